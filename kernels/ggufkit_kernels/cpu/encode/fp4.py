"""Encoders of MXFP4 and NVFP4: a scale from the largest magnitude, then the nearest of eight levels, and the sign.

The same bytes as `ggufkit_formats.blocks.fp4`, which tries all sixteen levels as ggml does and takes the first of
equals. The levels' midpoints times d are exact, and so is the difference to the two levels around a weight, so a
magnitude above the midpoint takes the upper level, all others the lower one. That fails only where the difference of
two levels is lost in rounding, for NVFP4's weights from 2**20 d on: those groups try all levels here, too.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    as_bytes,
    bits_of,
    choose,
    first_half,
    get_f32,
    highest_word,
    load_floats,
    magnitude,
    put_i64,
    repeat,
    second_half,
    store_vector,
)
from .layout import NOT_FINITE

F32, I32 = np.float32, np.int32
FAR = F32(2.0**20)
HALF = F32(0.5)
E8M0_NAN = 255


def steps() -> np.ndarray:
    """int32 (278,): for magnitudes from 2**k to 2**(k + 1), at k + 149, the mantissa from which log2f gives k + 1.

    log2(2**n - j * 2**(n - 24)) is about n - j / ln 2 * 2**-24, which is n where the second part is less than half a
    step of a float32 below n: 2**(m - 24), m the exponent of numbers just below n (just beyond, where n is negative).
    """
    out = []
    for n in range(-148, 130):
        size = n - 1 if n > 0 else -n
        up = int(2.0 ** (size.bit_length() - 1) * np.log(2)) if size else 0
        out.append((1 << 23) - up)
    return np.array(out, np.int32)


STEPS = steps()
SMALL, NORMAL = F32(2.0**24), 1 << 23


@kernel
def exponent_of(size):
    """floor(log2f) + 125 of a magnitude's bits, not 0."""
    less = 0
    if size < NORMAL:
        size, less = I32(F32(I32(size).view(F32) * SMALL).view(I32)), 24
    k = (size >> 23) - 127 - less
    return k + 125 + (1 if (size & (NORMAL - 1)) >= STEPS[k + 149] else 0)


@kernel
def e4m3_of(x):
    """`fp4.to_e4m3` of a float32 that is not negative."""
    x = min(x, F32(448))
    word = I32(F32(x).view(I32))
    if word >> 23 <= 120:
        return min(I32(x * F32(512) + HALF), 7)
    rounded = ((word - (120 << 23)) >> 20) + ((word >> 19) & 1)
    return 126 if rounded >= 120 else rounded


@kernel
def from_e4m3(code):
    """`fp4.e4m3` of a code below 128."""
    if code < 8:
        return F32(F32(code) * F32(2.0**-10))
    return I32((code << 20) + (119 << 23)).view(F32)


@kernel(inline="always")
def nearest(v, d, count):
    """Codes of `count` (a constant) weights, int32: the nearest of the levels times d."""
    size, one, none = magnitude(v), repeat(1, count), repeat(0, count)
    code = choose(size > d * HALF, one, none) + choose(size > d * F32(1.5), one, none)
    code = code + choose(size > d * F32(2.5), one, none) + choose(size > d * F32(3.5), one, none)
    code = code + choose(size > d * F32(5), one, none) + choose(size > d * F32(7), one, none)
    code = code + choose(size > d * F32(10), one, none)
    return choose(code > 0, code | ((bits_of(v) >> 28) & 8), code)


@kernel
def nearest_of_all(x, d):
    """The code of the weight at an address, as ggml's loop finds it."""
    value = get_f32(x)
    best, least = 0, abs(value)
    for code in range(1, 16):
        low = code & 7
        level = F32(low) if low < 5 else F32(6) if low == 5 else F32(8) if low == 6 else F32(12)
        if code >= 8:
            level = -level
        error = abs(F32(F32(level * d) - value))
        if error < least:
            best, least = code, error
    return best


@kernel
def mxfp4(x, out, n, s):
    """n blocks -> 17 bytes each."""
    most, suspect = I32(0), False
    for _ in range(n):
        v = load_floats(x, 32)
        size = highest_word(bits_of(magnitude(v)))
        most = max(most, size)
        e = 0
        if size != 0:
            e = exponent_of(size) & 255
        suspect |= e == E8M0_NAN
        d = I32(max((e - 1) << 23, (e + 1) << 21)).view(F32)
        codes = nearest(v, d, 32)
        store_vector(out, as_bytes(repeat(e, 1)))
        store_vector(out + 1, as_bytes(first_half(codes) | (second_half(codes) << 4)))
        x += 128
        out += 17
    return suspect | (most >= NOT_FINITE)


@kernel
def nvfp4(x, out, n, s):
    """n blocks -> 36 bytes each."""
    most = I32(0)
    for _ in range(n):
        for g in range(4):
            v = load_floats(x, 16)
            size = highest_word(bits_of(magnitude(v)))
            most = max(most, size)
            largest = I32(size).view(F32)
            code = e4m3_of(F32(largest / F32(6)))
            d = from_e4m3(code)
            store_vector(out + g, as_bytes(repeat(code, 1)))
            if code == 0:
                put_i64(out + 4 + 8 * g, 0)
            elif largest >= d * FAR:
                word = 0
                for j in range(8):
                    both = nearest_of_all(x + 4 * j, d) | (nearest_of_all(x + 32 + 4 * j, d) << 4)
                    word |= both << (8 * j)
                put_i64(out + 4 + 8 * g, word)
            else:
                codes = nearest(v, d, 16)
                store_vector(out + 4 + 8 * g, as_bytes(first_half(codes) | (second_half(codes) << 4)))
            x += 64
        out += 36
    return most >= NOT_FINITE
