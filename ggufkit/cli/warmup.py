"""ggufkit warmup: compile the kernels that models of some types will need, and keep them."""

from __future__ import annotations

import sys
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import click
from ggufkit_formats.errors import UnsupportedError, UsageError

from . import screen

TYPES = "q4_0,q8_0,q4_k,q5_k,q6_k,f16,bf16,f32"  # what the usual file types are made of


@click.command(name="warmup", short_help="Compile kernels before they are needed.")
@click.argument("models", nargs=-1, metavar="[MODEL.gguf]...")
@click.option("--type", "--types", "types", multiple=True, metavar="TYPE",
              help=f"A tensor type, or several with commas between; repeatable. Default: {TYPES}.")  # fmt: skip
@click.option("--encoders/--no-encoders", default=True, show_default=True, help="Those that convert uses, too.")
@screen.json_option
def command(models: tuple[str, ...], types: tuple[str, ...], encoders: bool, as_json: bool) -> None:
    """Compile the kernels for MODELs, or for tensor types, into the cache; later runs only load them."""
    from ggufkit_formats.blocks import ScaledType

    began = time.perf_counter()
    wanted = _types(models, types)
    with screen.Progress("loading the compiler", 1, patience=1.0):
        from ggufkit_kernels.cpu import encode, jit, prepare, store
    jit.set_notice(None)
    entries = [*prepare.common(), *prepare.of_types(wanted)]
    with screen.compiling() as progress:
        compiled = prepare.compile(entries, progress)
    wanted = [type for type in wanted if not isinstance(type, ScaledType)]
    more = [type for type in wanted if encoders and type.name in encode.ENCODERS]
    before = jit.compiled()
    with screen.Progress("compiling encoders", max(len(more), 1), patience=0.5) as bar:
        for k, type in enumerate(more):
            bar(k)
            for importance in _importances(type, encode.WEIGHTED):
                encode.encode(type, _zeros(type), importance, threads=1)
    result: dict[str, Any] = {
        "types": [type.name for type in wanted],
        "kernels": len({entry.name for entry in entries}),
        "compiled": compiled,
        "encoders": len(more),
        "encoder_functions_compiled": jit.compiled() - before,
        "seconds": round(time.perf_counter() - began, 3),
        "cache": None if store.CACHE_DIR is None else str(store.CACHE_DIR),
        "cache_nbytes": 0 if store.CACHE_DIR is None else _nbytes(store.CACHE_DIR),
    }
    if as_json:
        return screen.print_json(result)
    sys.stdout.write(f"{result['kernels']} kernels, {compiled} of them compiled now; {len(more)} encoders\n")
    where = result["cache"] or "nowhere: no folder can be written to"
    sys.stdout.write(f"kept in {where} ({screen.size(result['cache_nbytes'])}), {result['seconds']:.1f} s\n")
    return None


def _types(models: tuple[str, ...], types: tuple[str, ...]) -> list[Any]:
    """The tensor types of the models' matrices, or those that are named; a ScaledType where there are scales."""
    from ggufkit_formats import gguf
    from ggufkit_formats.blocks import ScaledType, find
    from ggufkit_formats.blocks.base import UnknownType
    from ggufkit_runtime.generate import matrix_types

    from .. import sources
    from ..quantize import ternary

    found: dict[str, Any] = {}
    for name in models:
        with gguf.open(sources.model(name)) as file:
            kinds = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
            kinds |= {kind for each in matrix_types(file.tensors) for kind in each if isinstance(kind, ScaledType)}
            found |= {kind.name: kind for kind in kinds if not isinstance(kind, UnknownType)}
    if types or not models:
        names = [name.strip() for name in ",".join(types or (TYPES,)).split(",") if name.strip()]
        if not names:
            raise UsageError("--type names no type")
        try:
            found |= {kind.name: kind for kind in map(find, names)}
        except UnsupportedError as error:
            raise UsageError(f"--type: {error}") from None
        scaled = [ScaledType(kind, 1.0) for name, kind in found.items() if name in ternary.TYPES]
        found |= {kind.name: kind for kind in scaled}  # files of BitNet have a scale beside each matrix
    return sorted(found.values(), key=lambda kind: kind.name)


def _zeros(type: Any) -> Any:
    import numpy as np

    return np.zeros((1, 64 * type.block), np.float32)


def _importances(type: Any, weighted: Container[str]) -> list[Any]:
    """What an encoder is to be called with: no importance, and some where that takes another kernel."""
    import numpy as np

    some = np.ones(64 * type.block, np.float32)
    if type.needs_importance:
        return [some]
    return [None, some] if type.name in weighted else [None]


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
