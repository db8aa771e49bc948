"""ggufkit diff: what differs between two GGUF files, and how far their tensors are from one another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import screen

if TYPE_CHECKING:
    from ggufkit_formats.tensor import Tensor

    from ..compare import Difference


@click.command(name="diff", short_help="Compare two GGUF files.")
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@screen.json_option
def command(a: Path, b: Path, as_json: bool) -> int:
    """Compare the GGUF files A and B: metadata, tensors, and the error of each tensor of A against B.

    Exit status 1 where anything differs.
    """
    from ggufkit_formats import gguf

    from .. import compare

    with gguf.open(a) as first, gguf.open(b) as second:
        only_a, only_b, changed = compare.keys(first, second)
        total = sum(t.n_elements for name, t in first.tensors.items() if name in second.tensors)
        with screen.Progress("comparing", max(total, 1), unit=lambda n: f"{n / 1e6:.1f} million weights") as bar:
            done = 0

            def progress(n: int) -> None:
                nonlocal done
                done += n
                bar(done)

            both = list(compare.tensors(first, second, progress))
        metadata = {
            "only_a": only_a,
            "only_b": only_b,
            "differ": [
                {"key": key, "a": _value(first.metadata.typed(key)), "b": _value(second.metadata.typed(key))}
                for key in changed
            ],
        }
        missing = {
            "only_a": [name for name in first.tensors if name not in second.tensors],
            "only_b": [name for name in second.tensors if name not in first.tensors],
        }
        equal = not any((only_a, only_b, changed, *missing.values())) and all(each.is_equal for each in both)
        document = {
            "a": str(a),
            "b": str(b),
            "equal": equal,
            "metadata": metadata,
            "tensors": missing | {"both": [_described(each) for each in both]},
        }
    if as_json:
        screen.print_json(document)
    else:
        sys.stdout.write(_text(document))
    return 0 if equal else 1


def _value(value: Any) -> Any:
    """A metadata value as JSON has it; of an array, its length alone."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value
    return {"length": len(value)} if hasattr(value, "__len__") else value.item()


def _described(each: Difference) -> dict[str, Any]:
    distance = each.distance
    return {
        "name": each.name,
        "a": _tensor(each.a),
        "b": _tensor(each.b),
        "equal": each.is_equal,
        "relative_rmse": distance.relative_rmse if distance is not None else None,
        "max_difference": distance.max_difference if distance is not None else None,
    }


def _tensor(t: Tensor) -> dict[str, Any]:
    return {"type": t.type.name, "shape": t.shape[::-1]}


def _text(document: dict[str, Any]) -> str:
    lines: list[str] = []
    files = {"only_a": document["a"], "only_b": document["b"]}
    for what in ("metadata", "tensors"):
        for side, file in files.items():
            names = document[what][side]
            if names:
                lines += [f"{what} only in {file}:", *(f"  {name}" for name in names), ""]
    changed = document["metadata"]["differ"]
    if changed:
        rows = [(each["key"], _short(each["a"]), _short(each["b"])) for each in changed]
        lines += [screen.table(rows, ("metadata", "A", "B")), ""]
    both = document["tensors"]["both"]
    rows = [
        (each["name"], _kind(each, "a", "b"), _kind(each, "b", "a"), _number(each["relative_rmse"]),
         _number(each["max_difference"]))
        for each in both
        if not each["equal"]
    ]  # fmt: skip
    if rows:
        lines += [screen.table(rows, ("tensor", "A", "B", "relative RMSE", "largest difference"), (3, 4)), ""]
    equal = len(both) - len(rows)
    if document["equal"]:
        lines.append(f"no difference: {equal} tensors, and all metadata")
    else:
        lines.append(f"{equal} of {len(both)} tensors that both files have are equal")
    return screen.printable("\n".join(lines)) + "\n"


def _kind(each: dict[str, Any], side: str, other: str) -> str:
    """A tensor's type, with its shape where the other's differs."""
    shape = each[side]["shape"]
    return each[side]["type"] + (f" {' × '.join(map(str, shape))}" if shape != each[other]["shape"] else "")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['length']} items"
    text = screen.one_line(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
