"""Which kernels a network needs, known from its tensors' types before a weight is read, so that they can be compiled
(with a bar that counts them) while the model is on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ggufkit_formats.blocks import TensorType

from . import attention, elementwise, pack_fast, team
from .inputs import PLAIN_TOKENS, interleave_inputs
from .jit import Entry
from .matmul import TOKENS, matmul_kernel, prep_kernel
from .pack import PLAIN, Layout
from .pack_map import map_of

Progress = Callable[[int, int], None]


def common() -> list[Entry]:
    """What every network needs, whatever its types."""
    found = [team.serve, team.run_program, team.several, attention.append, elementwise.rmsnorm, elementwise.rope]
    found += [elementwise.swiglu, elementwise.add]
    for tile in {4, attention.QUERIES}:
        found += [attention.attend_split.entry(tile), attention.join.entry(tile), attention.attend.entry(tile)]
    return found


def of_types(types: Iterable[TensorType]) -> list[Entry]:
    """What matrices of these types need beside: packing, products with one token and with many, embedding."""
    found: dict[str, Entry] = {}
    for type in types:
        layout = Layout(PLAIN[type.name]) if type.name in PLAIN else None
        if layout is None:
            bitmap = map_of(type)
            layout = bitmap.layout if bitmap is not None else None
            entries = [pack_fast.pack_words] if bitmap is not None else []
        else:
            entries = [pack_fast.pack_floats if type.block_nbytes == 4 else pack_fast.pack_halves]
        if layout is None:  # packed by NumPy, into a layout that its first row will tell
            continue
        tiles = (1, PLAIN_TOKENS) if layout.is_plain else (1, TOKENS)
        entries += [matmul_kernel(layout, tile) for tile in tiles]
        if layout.is_plain:
            entries += [interleave_inputs, elementwise.embed_plain]
        else:
            entries += [prep_kernel(layout, tile)[0] for tile in tiles]
            entries.append(elementwise.embed_codes)
        found |= {entry.name: entry for entry in entries}
    return list(found.values())


def compile(entries: Iterable[Entry], progress: Progress | None = None) -> int:
    """Compile those that are neither in memory nor on disk, and how many these were; `progress` is told (done, all)."""
    missing = [entry for entry in entries if not entry.here]
    for k, entry in enumerate(missing):
        if progress is not None:
            progress(k, len(missing))
        _ = entry.address
    if progress is not None and missing:
        progress(len(missing), len(missing))
    return len(missing)
