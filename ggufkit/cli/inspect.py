"""ggufkit inspect: what a GGUF file holds, without computing anything from it."""

from __future__ import annotations

import difflib
import itertools
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ggufkit_formats.errors import GgufkitError, UsageError

from . import screen

if TYPE_CHECKING:
    from ggufkit_formats.gguf import GgufFile, Metadata
    from ggufkit_formats.tensor import Tensor

HEAD = 16  # longer arrays show so many items


@click.command(name="inspect", short_help="Show the metadata and tensors of a GGUF file.")
@click.argument("file", type=click.Path(path_type=Path))
@screen.json_option
@click.option("--key", metavar="NAME", help="Show the value of this metadata key alone (without --json: in full).")
@click.option("--no-tensors", is_flag=True, help="Leave out the table of tensors.")
@click.option("--full", is_flag=True, help="Show long strings and arrays in full.")
@click.option(
    "--fit", is_flag=True, help="Show what the model needs of a GPU's memory instead, and how much of it fits."
)
@click.option(
    "-c", "--ctx-size", type=click.IntRange(1), metavar="N", help="With --fit: positions. Default: the model's."
)
@click.option("--memory", metavar="SIZE", help="With --fit: in so much memory (24G), not on the GPU at hand.")
def command(file: Path, as_json: bool, key: str | None, no_tensors: bool, full: bool, fit: bool, ctx_size: int | None,
            memory: str | None) -> None:  # fmt: skip
    """Show the metadata and the tensors of a GGUF FILE. Any shard of a split file means the whole.

    Shapes are in the file's own order, the contiguous dimension first. Offsets count from the start of the file (of
    the tensor's shard, where the file is split).
    """
    from ggufkit_formats import gguf

    if not fit and (ctx_size or memory):
        raise UsageError("--ctx-size and --memory go with --fit")
    with gguf.open(file) as opened:
        if fit:
            from . import fit as fitting

            found = fitting.document(file, opened, ctx_size, memory)
            return screen.print_json({"file": str(file), **found}) if as_json else print(fitting.text(found))
        if key is not None and key not in opened.metadata:
            raise GgufkitError(f"{file}: no metadata key {key!r}{_hint(key, list(opened.metadata))}")
        if as_json:
            screen.print_json(_document(file, opened, key, no_tensors, full))
        elif key is not None:
            _print_value(opened.metadata, key)
        else:
            _print_all(opened, no_tensors, full)
    return None


def _hint(key: str, keys: list[str]) -> str:
    """The keys that may be meant: spelt alike, or with the same last word."""
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.6)
    near += [k for k in keys if k.split(".")[-1] == key.split(".")[-1] and k not in near]
    return f"; did you mean {' or '.join(map(_line, near[:3]))}?" if near else ""


# -- JSON ------------------------------------------------------------------------------------------


def _document(file: Path, opened: GgufFile, key: str | None, no_tensors: bool, full: bool) -> dict[str, Any]:
    keys = [key] if key is not None else list(opened.metadata)
    document: dict[str, Any] = {"file": str(file), "version": opened.version, "byte_order": opened.byte_order}
    document["alignment"] = opened.alignment
    split = len(opened.paths) > 1
    if split:
        document["shards"] = [str(path) for path in opened.paths]
    document["metadata"] = {k: _json_value(opened.metadata.typed(k), full) for k in keys}
    if not no_tensors:
        number = {id(source): i for i, source in enumerate(opened.sources)}
        document["tensors"] = [
            _listed(t)
            | ({"shard": number[id(t.source)]} if split else {})
            | ({"parts": [_listed(part) for part in getattr(t, "parts", [])]} if not t.in_one_piece else {})
            for t in opened.tensors.values()
        ]
    document["summary"] = _summary(opened)
    return document


def _listed(t: Tensor) -> dict[str, Any]:
    return {"name": t.name, "type": t.type.name, "shape": t.shape[::-1], "offset": t.offset, "nbytes": t.nbytes}


def _summary(opened: GgufFile) -> dict[str, Any]:
    n_parameters = sum(t.n_elements for t in opened.tensors.values())
    n_bytes = sum(t.nbytes for t in opened.tensors.values())
    types: dict[str, int] = {}
    for tensor in opened.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    return {
        "n_tensors": len(opened.tensors),
        "n_parameters": n_parameters,
        "n_bytes": n_bytes,  # of the tensors, as llama.cpp counts a model's size
        "bits_per_weight": round(8 * n_bytes / n_parameters, 4) if n_parameters else 0.0,
        "types": dict(sorted(types.items(), key=lambda item: -item[1])),
    }


def _json_value(value: Any, full: bool) -> Any:
    """A typed value as JSON has it; arrays of more than HEAD items are cut, unless `full`."""
    if isinstance(value, str | bytes):
        return value if isinstance(value, str) else value.decode("utf-8", "replace")
    if not hasattr(value, "__len__"):
        return value.item()
    n = len(value) if full else min(len(value), HEAD)
    items = [_json_value(item, full) for item in _items(value, n)]
    return items if n == len(value) else {"type": _item_type(value), "length": len(value), "head": items}


def _items(value: Any, n: int) -> list[Any]:
    """The first n items of an array in typed form; strings stay bytes, so that none is refused."""
    raw_items = getattr(value, "raw_items", None)
    return list(itertools.islice(raw_items() if raw_items else value, n))


def _item_type(value: Any) -> str:
    """GGUF's name for the type of an array's items."""
    if hasattr(value, "raw_items"):
        return "STRING"
    return "ARRAY" if isinstance(value, list) else value.dtype.name.upper()


# -- text ------------------------------------------------------------------------------------------


def _print_value(metadata: Metadata, key: str) -> None:
    """One value, as it is; an array with one item a line. Only a terminal needs protection from it."""
    value = metadata.typed(key)
    if isinstance(value, str | bytes):
        text = value if isinstance(value, str) else value.decode("utf-8", "replace")
        sys.stdout.write((screen.printable(text) if sys.stdout.isatty() else text) + "\n")
    elif hasattr(value, "__len__"):
        for item in _items(value, len(value)):
            sys.stdout.write(_text(item, math.inf) + "\n")
    else:
        sys.stdout.write(_text(value, math.inf) + "\n")


def _print_all(opened: GgufFile, no_tensors: bool, full: bool) -> None:
    tty = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if tty else math.inf
    summary = _summary(opened)
    shards = f", {len(opened.paths)} shards" if len(opened.paths) > 1 else ""
    write = sys.stdout.write
    write(f"{_line(str(opened.path))}\nGGUF version {opened.version}, {opened.byte_order} endian, ")
    write(f"alignment {opened.alignment}{shards}, {screen.size(opened.nbytes)}\n\nMetadata\n")
    limit = math.inf if full else width if tty else 200
    keys = {key: _line(key) for key in opened.metadata}
    pad = min(max(map(len, keys.values()), default=0), 44)
    for key, shown in keys.items():
        room = limit if full else max(limit - max(pad, len(shown)) - 4, 12)
        write(f"  {shown:<{pad}}  {_text(opened.metadata.typed(key), room, whole=full)}\n")
    if not no_tensors and opened.tensors:
        write("\nTensors\n" + _tensor_table(list(opened.tensors.values()), width) + "\n")
    if len(opened.stored) > len(opened.tensors):
        write(f"\nNF4 tensors are stored in parts: the file lists {len(opened.stored)} tensors.\n")
    types = ", ".join(f"{name} × {n}" for name, n in summary["types"].items())
    write(
        f"\n{summary['n_tensors']} tensors, {summary['n_parameters']:,} parameters, "
        f"{screen.size(summary['n_bytes'])}, {summary['bits_per_weight']:.2f} bits per weight\n"
    )
    write(f"{types}\n" if types else "")


def _tensor_table(tensors: list[Tensor], width: float) -> str:
    shapes = (" × ".join(map(str, t.shape[::-1])) or "scalar" for t in tensors)
    rows = [[_line(t.name), t.type.name, next(shapes), screen.size(t.nbytes), t.offset] for t in tensors]
    header = ["name", "type", "shape", "size", "offset"]
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(5)]
    room = width - 2 - sum(widths[1:]) - 8
    if widths[0] > room:  # a narrow terminal loses the offsets, then the ends of long names
        rows, header = [row[:4] for row in rows], header[:4]
        room = max(16, width - 2 - sum(widths[1:4]) - 6)
    for row in rows:
        row[0] = _cut(row[0], room)
    lines = screen.table(rows, header, right=(3, 4)).split("\n")
    return "\n".join("  " + line for line in lines)


def _text(value: Any, room: float, whole: bool = False) -> str:
    """A typed value on one line of at most `room` characters, control characters escaped."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        if len(value) <= room:
            return _cut(_line(value), room)
        note = f" ({len(value)} characters)" if room > 40 else ""
        return _cut(_line(value[: int(room) + 1]), room - len(note)) + note
    if not hasattr(value, "__len__"):
        return str(value).lower() if value.dtype == bool else str(value)
    n = len(value) if whole else min(len(value), HEAD)
    items = ", ".join(_item(item) for item in _items(value, n)) + (", …" if n < len(value) else "")
    return _cut(f"{_item_type(value)} × {len(value)}" + (f": {items}" if items else ""), room)


def _item(value: Any) -> str:
    text = _text(value, math.inf)
    return f'"{text}"' if isinstance(value, bytes | str) else text


def _line(text: str) -> str:
    """Text on one line: newlines and tabs escaped, too."""
    return screen.printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _cut(text: str, room: float) -> str:
    return text if len(text) <= room else text[: max(int(room) - 1, 1)] + "…"
