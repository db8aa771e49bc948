"""Encoders of TQ1_0, TQ2_0, Q2_0 and Q1_0: d is found by a pass over the block, codes are made by another.

The same bytes as `ggufkit_formats.blocks.ternary`. |x * (1 / d)| is at most 1, up to rounding, so a trit is two
comparisons with a half. Q1_0 sums magnitudes one after the other, as ggml does, which is one addition's latency a
weight: so LANES blocks are turned and summed side by side.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    as_bytes,
    bits_of,
    choose,
    get_f32,
    greatest,
    highest_word,
    load_floats,
    load_words,
    magnitude,
    mask_bits,
    put_f16,
    repeat,
    rows_to_lanes,
    store_vector,
)
from .layout import NOT_FINITE, ROW, ZERO
from .legacy import TOO_LARGE, inverse_of

F32, I32 = np.float32, np.int32
HALF = F32(0.5)
Q1_BLOCK = 128
SCRATCH = Q1_BLOCK * ROW


@kernel(inline="always")
def trits(x, inverse, count):
    """0, 1 or 2 for each of `count` (a constant) weights, int32."""
    v = load_floats(x, count) * inverse
    return choose(v >= HALF, repeat(2, count), choose(v <= -HALF, repeat(0, count), repeat(1, count)))


@kernel(inline="always")
def five_trits(x, inverse, count, step):
    """Bytes of five trits of weights `step` apart: their number in base 3 as 256 / 243, rounded up (see TQ1_0)."""
    number = trits(x, inverse, count)
    for k in range(1, 5):
        number = number + number + number + trits(x + 4 * step * k, inverse, count)
    # 256 n / 243 = n + 13 n / 243; the division by multiplication is exact up to 13 * 242 + 242
    return as_bytes(number + (((number * 13 + 242) * 270) >> 16))


@kernel
def scale_of(x, n):
    """The largest magnitude of n weights, a multiple of 64, and its bits."""
    worst = bits_of(magnitude(load_floats(x, 64)))
    for j in range(64, n, 64):
        worst = greatest(worst, bits_of(magnitude(load_floats(x + 4 * j, 64))))
    most = highest_word(worst)
    return I32(most).view(F32), most


@kernel
def tq2_0(x, out, n, s):
    """n blocks -> 66 bytes each."""
    most, suspect = I32(0), False
    for _ in range(n):
        d, size = scale_of(x, 256)
        most = max(most, size)
        put_f16(out + 64, d)
        suspect |= d >= TOO_LARGE
        inverse, finite = inverse_of(d)
        if not finite:
            inverse = ZERO
        for h in range(2):
            at = x + 512 * h
            codes = trits(at, inverse, 32) | (trits(at + 128, inverse, 32) << 2)
            codes = codes | (trits(at + 256, inverse, 32) << 4) | (trits(at + 384, inverse, 32) << 6)
            store_vector(out + 32 * h, as_bytes(codes))
        x += 1024
        out += 66
    return suspect | (most >= NOT_FINITE)


@kernel
def tq1_0(x, out, n, s):
    """n blocks -> 54 bytes each."""
    most, suspect = I32(0), False
    for _ in range(n):
        d, size = scale_of(x, 256)
        most = max(most, size)
        put_f16(out + 52, d)
        suspect |= d >= TOO_LARGE
        inverse, finite = inverse_of(d)
        if not finite:
            inverse = ZERO
        store_vector(out, five_trits(x, inverse, 32, 32))
        store_vector(out + 32, five_trits(x + 640, inverse, 16, 16))
        last = trits(x + 960, inverse, 4)
        for k in range(1, 4):
            last = last + last + last + trits(x + 960 + 16 * k, inverse, 4)
        last = last + last + last
        store_vector(out + 48, as_bytes(last + (((last * 13 + 242) * 270) >> 16)))
        x += 1024
        out += 54
    return suspect | (most >= NOT_FINITE)


@kernel
def q2_0(x, out, n, s):
    """n blocks -> 18 bytes each. Scratch: 64 bytes."""
    most, suspect = I32(0), False
    for _ in range(n):
        d, size = scale_of(x, 64)
        most = max(most, size)
        put_f16(out, d)
        suspect |= d >= TOO_LARGE
        inverse, finite = inverse_of(d)
        if finite:
            store_vector(s, as_bytes(trits(x, inverse, 64)))
            four = load_words(s, 16)
            store_vector(out + 2, as_bytes(four | (four >> 6) | (four >> 12) | (four >> 18)))
        else:
            store_vector(out + 2, as_bytes(repeat(0, 16)))
        x += 256
        out += 18
    return suspect | (most >= NOT_FINITE)


@kernel
def q1_0(x, out, n, s):
    """n blocks, a multiple of LANES -> 18 bytes each. Scratch: SCRATCH."""
    suspect = False
    for _ in range(0, n, LANES):
        for j in range(0, Q1_BLOCK, LANES):
            rows_to_lanes(x + 4 * j, 4 * Q1_BLOCK, s + j * ROW, ROW)
        total = magnitude(load_floats(s, LANES))
        for j in range(1, Q1_BLOCK):
            total = total + magnitude(load_floats(s + j * ROW, LANES))
        store_vector(s, total * F32(1 / Q1_BLOCK))
        for k in range(LANES):
            d = get_f32(s + 4 * k)
            put_f16(out, d)
            suspect |= not d < TOO_LARGE  # as the sum of what is not finite is not
            for j in range(0, Q1_BLOCK, 32):
                bits = mask_bits(load_floats(x + 4 * j, 32) >= ZERO)
                store_vector(out + 2 + j // 8, repeat(bits, 1))
            x += 4 * Q1_BLOCK
            out += 18
    return suspect
