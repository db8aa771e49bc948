"""Encoders of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0, one block of 32 after the other.

The same bytes as `ggufkit_formats.blocks.legacy`. Largest and smallest weights are found on integers that are ordered
as the floats are: LLVM makes vectors of an integer maximum, but not of a float one without fast-math.
"""

from __future__ import annotations

import numpy as np

from .encode_number import ZERO, store_half
from .jit import kernel

F32, I32, U8 = np.float32, np.int32, np.uint8
ONE, HALF, INFINITY = F32(1), F32(0.5), F32(np.inf)
MAGNITUDE = I32(0x7FFFFFFF)


@kernel
def magnitude(x):
    """The largest |x[j]|, x (32,)."""
    most = I32(0)
    for j in range(32):
        a = I32(F32(x[j]).view(I32) & MAGNITUDE)
        most = a if a > most else most
    return I32(most).view(F32)


@kernel
def first_of_magnitude(x, most):
    """The first weight of that magnitude, with its sign; +0 for zeros."""
    if most != ZERO:
        for j in range(32):
            if abs(x[j]) == most:
                return F32(x[j])
    return ZERO


@kernel
def ordered(bits):
    """The bits of a float as an integer of the same order, and back."""
    return I32(bits ^ I32(I32(bits >> I32(31)) & MAGNITUDE))


@kernel
def extremes(x):
    """The smallest and the largest weight, x (32,). Of zeros of both signs the first counts: its sign is stored."""
    low, high = MAGNITUDE, I32(-0x80000000)
    for j in range(32):
        a = ordered(F32(x[j]).view(I32))
        low = a if a < low else low
        high = a if a > high else high
    least, most = I32(ordered(I32(low))).view(F32), I32(ordered(I32(high))).view(F32)
    if least == ZERO or most == ZERO:
        first = ZERO
        for j in range(31, -1, -1):
            first = F32(x[j]) if x[j] == ZERO else first
        least = first if least == ZERO else least
        most = first if most == ZERO else most
    return least, most


@kernel
def inverse_of(d):
    """1 / d, 0 where d is 0; and whether it is finite. Where not, ggml's casts of infinity make all codes 0."""
    inverse = ONE / d if d != ZERO else ZERO
    return inverse, abs(inverse) < INFINITY


@kernel
def q45(x, out, bits, ranged):
    """x (n, 32) float32 -> out (n, nbytes) uint8: Q4_0, Q5_0, or Q4_1, Q5_1 with `ranged`."""
    half, top = 1 << (bits - 1), I32((1 << bits) - 1)
    qs = 4 if ranged else 2
    codes = np.empty(32, U8)
    for b in range(x.shape[0]):
        row = x[b]
        low, bias = ZERO, F32(half) + HALF
        if ranged:
            low, high = extremes(row)
            bias = HALF
            d = F32((high - low) / F32(top))
            store_half(out[b], 2, low)
        else:
            d = F32(first_of_magnitude(row, magnitude(row)) / F32(-half))
        store_half(out[b], 0, d)
        inverse, finite = inverse_of(d)
        if not finite:
            inverse, bias = ZERO, ZERO
        for j in range(32):
            q = I32(F32(F32(F32(row[j] - low) * inverse) + bias))
            codes[j] = U8(top if q > top else q)
        at = qs
        if bits == 5:
            at += 4
            for k in range(4):
                high_bits = 0
                for j in range(8):
                    high_bits |= (codes[8 * k + j] >> 4) << j
                out[b, qs + k] = U8(high_bits)
        for j in range(16):
            out[b, at + j] = U8((codes[j] & 15) | (codes[j + 16] & 15) << 4)


@kernel
def q8_0(x, out):
    """x (n, 32) float32 -> out (n, 34) uint8."""
    for b in range(x.shape[0]):
        row = x[b]
        d = F32(magnitude(row) / F32(127))
        store_half(out[b], 0, d)
        inverse, finite = inverse_of(d)
        if not finite:
            inverse = ZERO
        for j in range(32):
            v = F32(row[j] * inverse)
            whole = I32(v)
            rest = F32(v - F32(whole))  # exact; C's roundf takes halves away from zero
            up = I32(1) if rest >= HALF else I32(0)
            down = I32(1) if rest <= -HALF else I32(0)
            out[b, 2 + j] = U8(I32(whole + up - down))
