"""The int64 words that a matmul's kernels read by address, and how an item is found in them."""

from __future__ import annotations

import struct

from .jit import kernel
from .pack import Packed
from .simd import LANES, get_i64, load_f32, splat_f32

# The words of a matmul's args, as byte offsets. The first are the weight's, the others the call's.
WEIGHT_WORDS = [
    "codes",
    "d",
    "scale",
    "dmin",
    "minimum",
    "table",
    "strip_nbytes",
    "blocks",
    "rows",
    "strips",
    "cols",
    "offset",
    "factor",
]
CALL_WORDS = [
    "x",
    "n",
    "out",
    "bias",
    "q",
    "a",
    "starts",
    "sums",
    "bounds",
    "tokens_per_item",
    "strip_items",
    "prep_tiles",
]
AT = {name: 8 * k for k, name in enumerate(WEIGHT_WORDS + CALL_WORDS)}
(CODES, D, SCALE, DMIN, MINIMUM, TABLE, STRIP_NBYTES, BLOCKS, ROWS, STRIPS, COLS, OFFSET, FACTOR) = (
    AT[name] for name in WEIGHT_WORDS
)
(X, N, OUT, BIAS, Q, A, STARTS, SUMS, BOUNDS, TOKENS_PER_ITEM, STRIP_ITEMS, PREP_TILES) = (
    AT[name] for name in CALL_WORDS
)


def float_bits(x: float) -> int:
    """The bits of a float32 as an integer."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


def weight_words(weight: Packed) -> list[int]:
    """The int64 words that describe a packed matrix, in the order of WEIGHT_WORDS."""
    arrays = (weight.codes, weight.d, weight.scale, weight.dmin, weight.minimum, weight.table)
    return [
        *(a.ctypes.data for a in arrays),
        weight.codes[0].nbytes,
        weight.d.shape[1] if weight.d.ndim == 3 else 0,
        weight.shape[0],
        weight.strips,
        weight.padded_cols,
        weight.layout.too_much,
        float_bits(weight.table_step),
    ]


@kernel
def part_of(args, item):
    """An item's range of strips and of tokens. BOUNDS are the strips at which items begin, and their end."""
    strip_items, tokens = get_i64(args + STRIP_ITEMS), get_i64(args + TOKENS_PER_ITEM)
    bound = get_i64(args + BOUNDS) + 8 * (item % strip_items)
    token = item // strip_items * tokens
    return get_i64(bound), get_i64(bound + 8), token, min(token + tokens, get_i64(args + N))


@kernel
def bias_of(args, strip):
    """The bias of a strip's rows; it is padded to whole strips."""
    bias = get_i64(args + BIAS)
    added = splat_f32(0.0)
    if bias:
        added = load_f32(bias + 4 * LANES * strip)
    return added
