"""ggufkit types: all tensor types and file types, and what can be done with each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from . import screen

if TYPE_CHECKING:
    from ggufkit_formats.blocks import TensorType

    from ..quantize.file_types import FileType

SAMPLE = (4, 1024)  # normal random weights that errors are measured on


@click.command(name="types", short_help="List all tensor types and file types.")
@screen.json_option
def command(as_json: bool) -> None:
    """List tensor types and file types: bits a weight, what can be done with each, and its error.

    The error is the relative RMSE of normal random weights, quantized and back.
    """
    from ggufkit_formats.blocks import TYPES

    from ..quantize.file_types import FILE_TYPES

    by_id = sorted(TYPES.values(), key=lambda t: (t.id < 0, t.id))
    tensor_types = [_tensor_type(t) for t in by_id]
    known = {each["name"]: each for each in tensor_types}
    file_types = [_file_type(t, known) for t in FILE_TYPES.values()]
    if as_json:
        screen.print_json({"tensor_types": tensor_types, "file_types": file_types})
        return
    rows = [
        (t["name"], _id(t["id"]), t["block"], f"{t['bits_per_weight']:.4g}", *map(_yes, _can(t)), _percent(t["error"]))
        for t in tensor_types
    ]
    header = ("tensor type", "id", "block", "bits/weight", "read", "write", "CPU", "CUDA", "error")
    sys.stdout.write(screen.table(rows, header, (1, 2, 3, 8)) + "\n\n")
    rows = [(t["name"], _id(t["id"]), t["type"], _yes(t["write"])) for t in file_types]
    sys.stdout.write(screen.table(rows, ("file type", "id", "mostly", "write"), (1,)) + "\n\n")
    sys.stdout.write("error: relative RMSE of normal random weights, quantized and back\n")


def _tensor_type(t: TensorType) -> dict[str, Any]:
    error, write = _error(t)
    return {
        "name": t.name,
        "id": t.id if t.id >= 0 else None,
        "block": t.block,
        "block_nbytes": t.block_nbytes,
        "bits_per_weight": t.bits_per_weight,
        "read": True,
        "write": write,
        "cpu": True,  # what has no layout of its own is held as float32
        "cuda": True,  # the same layouts
        "error": error,
    }


def _error(t: TensorType) -> tuple[float | None, bool]:
    """The relative RMSE (None where it says nothing: integers), and whether the type can be written."""
    import numpy as np
    from ggufkit_formats.errors import GgufkitError

    from ..compare import Summed

    x = np.random.default_rng(0).standard_normal(SAMPLE).astype(np.float32)
    for importance in (None, np.ones(SAMPLE[1], np.float32)):  # some types cannot do without
        try:
            raw = t.encode(x, importance)
        except GgufkitError:
            continue
        if t.fields.kind == "i":
            return None, True
        summed = Summed()
        summed.add(t.decode(raw), x)
        return summed.distance.relative_rmse, True
    return None, False


def _file_type(t: FileType, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    of = known.get(t.type)
    bits = of["bits_per_weight"] if of is not None else None
    if t.nested:  # NF4 with double quantization: the maxima take a byte each, and 4 for each 256
        from ggufkit_formats.blocks.nf4 import BLOCK, NESTED_BLOCK

        bits = 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK)
    return {
        "name": t.name,
        "id": t.id if t.id >= 0 else None,
        "type": t.type,
        "write": of is not None and of["write"],
        "bits_per_weight": bits,
    }


def _can(t: dict[str, Any]) -> tuple[bool, ...]:
    return t["read"], t["write"], t["cpu"], t["cuda"]


def _id(number: int | None) -> str:
    return "-" if number is None else str(number)


def _yes(value: bool) -> str:
    return "yes" if value else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
