"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: a block of 32 weights is one vector.

The same bytes as `ggufkit_formats.blocks.legacy`. A block is loaded into 2 or 4 registers, its largest or smallest
weight found by a tree, and codes are packed straight from registers: 1 to 2 cycles a weight. Blocks do not depend on
each other, so the latency of the tree and of two scalar divisions is hidden. Where a weight must be the first of
equals (a magnitude of both signs, zeros of both signs), the lowest bit of a mask says which.

Tried, one thread of a Zen 3, million weights a second (with the allocation of the bytes; kernels alone up to 3000):

|                                                        | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 |
|--------------------------------------------------------|------|------|------|------|------|
| loops over 32 numbers, left to LLVM's own vectors      | 415  | 454  | 360  | 370  | 631  |
| vectors of 32, the first of equals by a loop over bits | 1016 |      | 988  |      |      |
| vectors of 32                                          | 1823 | 2179 | 1503 | 1885 | 2293 |

Of the last line, a third or more is the system's work for fresh pages of output.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    any_of,
    as_bytes,
    bits_of,
    choose,
    first_half,
    get_f32,
    greatest,
    highest,
    highest_word,
    least,
    load_floats,
    lowest,
    lowest_bit,
    magnitude,
    mask_bits,
    put_f16,
    repeat,
    second_half,
    store_vector,
    truncated,
)
from .layout import NOT_FINITE, ONE, ZERO

F32, I32 = np.float32, np.int32
BLOCK = 32
HALF, BELOW_HALF, INFINITY = F32(0.5), np.nextafter(F32(0.5), F32(0)), F32(np.inf)
TOO_LARGE = F32(65520)  # rounds to an infinite float16


@kernel
def inverse_of(d):
    """1 / d, 0 where d is 0; and whether it is finite. Where not, ggml's casts of infinity make all codes 0."""
    inverse = ONE / d if d != ZERO else ZERO
    return inverse, abs(inverse) < INFINITY


@kernel
def largest(x, v):
    """The weight of largest magnitude, the first of equals, +0 for zeros; and the bits of the magnitude."""
    size = bits_of(magnitude(v))
    most = highest_word(size)
    if most == 0:
        return ZERO, most
    return get_f32(x + 4 * lowest_bit(mask_bits(size == most))), most


@kernel
def extremes(x, v):
    """The smallest and the largest weight. Of zeros of both signs the first counts: its sign is stored."""
    low, high = lowest(v), highest(v)
    if low == ZERO:
        low = get_f32(x + 4 * lowest_bit(mask_bits(v == ZERO)))
        high = low if high == ZERO else high
    return low, high


def encoder(bits, ranged):
    """The kernel of Q4_0, Q5_0, or Q4_1, Q5_1 with `ranged`."""
    half, top = 1 << (bits - 1), (1 << bits) - 1
    head = 4 if ranged else 2
    qs = head + (4 if bits == 5 else 0)
    nbytes = qs + 16

    @kernel
    def encode(x, out, n, s):
        worst = repeat(0, BLOCK)
        most, suspect = I32(0), False
        for _ in range(n):
            v = load_floats(x, BLOCK)
            low, bias = ZERO, F32(half) + HALF
            if ranged:
                low, high = extremes(x, v)
                worst = greatest(worst, bits_of(magnitude(v)))
                bias = HALF
                d = F32((high - low) / F32(top))
                put_f16(out + 2, low)
                suspect |= abs(low) >= TOO_LARGE
            else:
                first, size = largest(x, v)
                most = max(most, size)
                d = F32(first / F32(-half))
            put_f16(out, d)
            suspect |= abs(d) >= TOO_LARGE
            inverse, finite = inverse_of(d)
            if not finite:
                inverse, bias = ZERO, ZERO
            if ranged:
                v = v - low
            codes = least(truncated(v * inverse + bias), top)
            if bits == 5:
                store_vector(out + head, repeat(mask_bits(codes > 15), 1))
                codes = codes & 15
            store_vector(out + qs, as_bytes(first_half(codes) | (second_half(codes) << 4)))
            x += 4 * BLOCK
            out += nbytes
        return suspect | (most >= NOT_FINITE) | any_of(worst >= NOT_FINITE)

    return encode


q4_0, q4_1, q5_0, q5_1 = encoder(4, False), encoder(4, True), encoder(5, False), encoder(5, True)


@kernel
def q8_0(x, out, n, s):
    """n blocks -> 34 bytes each."""
    most, suspect = I32(0), False
    for _ in range(n):
        v = load_floats(x, BLOCK)
        size = highest_word(bits_of(magnitude(v)))
        most = max(most, size)
        d = F32(I32(size).view(F32) / F32(127))
        put_f16(out, d)
        suspect |= d >= TOO_LARGE
        inverse, finite = inverse_of(d)
        if not finite:
            inverse = ZERO
        v = v * inverse
        # C's roundf takes halves away from zero.
        v = v + choose(v < ZERO, -BELOW_HALF, repeat(BELOW_HALF, BLOCK))
        store_vector(out + 2, as_bytes(truncated(v)))
        x += 4 * BLOCK
        out += 34
    return suspect | (most >= NOT_FINITE)
