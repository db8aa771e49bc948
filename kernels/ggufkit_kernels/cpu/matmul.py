"""Matrix times inputs, on packed weights: which kernels a layout takes, for how many tokens.

`quant_matmul.py` and `plain_matmul.py` hold the kernels, `inputs.py` what is made of the inputs before, `words.py`
how kernels are told. A family is asked with a layout's integers for the kernel that is compiled for them.
`ops.py` checks every size before.
"""

from __future__ import annotations

from .inputs import PLAIN_TOKENS, interleave_inputs, quantize_inputs
from .jit import Entry
from .pack import Layout
from .plain_matmul import plain_matmul
from .quant_matmul import by_fours, by_pairs
from .simd import FAMILY

__all__ = ["NUMBERS", "PLAIN_TOKENS", "SCALES", "TOKENS", "interleave_inputs", "matmul_kernel", "prep_kernel"]

TOKENS = FAMILY.tokens  # a tile of quantized inputs: more spill registers
VALUES = {"codes": 0, "bytes": 1, "table": 2, "table16": 3}
NUMBERS = {"f32": 0, "f16": 1, "bf16": 2, "e8m0": 3, "e4m3": 4}
SCALES = {"": 0, "i1": 1, "u1": 2}


def prep_kernel(layout: Layout, tokens: int) -> tuple[Entry, int, int]:
    """The kernel that quantizes inputs for a layout and a tile, and its span and unit (0: no starts, no sums)."""
    span = layout.start_span if layout.too_much else 0
    unit = layout.unit if layout.minimum else 0
    return quantize_inputs.entry(span, unit, tokens), span, unit


def matmul_kernel(layout: Layout, tokens: int) -> Entry:
    """The kernel of a layout for tiles of `tokens` tokens: 1, or TOKENS (PLAIN_TOKENS for plain numbers)."""
    if layout.is_plain:
        return plain_matmul.entry(NUMBERS[layout.values], tokens)
    form = (VALUES[layout.values], layout.bits, layout.block, layout.group, SCALES[layout.scale], layout.minimum)
    form += (layout.joined,)
    number, started = NUMBERS[layout.number], int(layout.too_much != 0)
    if FAMILY.dot == "pairs":
        return by_pairs.entry(*form, number, layout.span // 4, started, tokens)
    return by_fours.entry(*form, number, started, tokens)
