"""Encoders of IQ4_NL and IQ4_XS: the nearest of 16 uneven levels, with a scale a group of 32.

In the order of operations of `ggufkit_formats.blocks.iq4.search`, a group a lane (layout.py). Both types see runs of
256 weights side by side: one block of IQ4_XS, eight of IQ4_NL. 16 scales are tried; a trial takes per weight a product,
the nearest level, w l, w l x, w l l and two sums. The level is found by 15 comparisons, each with a choice between two
registers, beside which the rest hardly counts: no table is looked up, so any processor does it.

With importance, errors count importance * sqrt(2 mean x² + x²) times, the mean taken over a block. The importance of a
row is laid out over and over, so that the LANES runs find theirs one after the other wherever in a row they begin.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    any_of,
    as_float,
    bits_of,
    choose,
    extended,
    greatest,
    halves,
    load_floats,
    magnitude,
    repeat,
    root,
    scatter,
    store_vector,
)
from .layout import NOT_FINITE, NOT_FINITE_HALF, ONE, ROW, ZERO, between, load_columns, nearest
from .signed import INFINITY, NAN, SMALLEST, quotient

F32 = np.float32
STEPS = 7

# Scratch of one thread, offsets in bytes: the runs' weights, how much their errors count, their importance; the groups'
# scales.
COLUMNS, WEIGHTS, IMPORTANCE = (256 * ROW * i for i in range(3))
SCALES = IMPORTANCE + 256 * ROW
SCRATCH = SCALES + 8 * ROW


@kernel
def nearest_level(x):
    """The level nearest to x, the upper one of two that are as near; the last one for NaN."""
    level = choose(x < F32(101), F32(89), repeat(F32(113), LANES))
    level = choose(x < F32(79), F32(69), level)
    level = choose(x < F32(61), F32(53), level)
    level = choose(x < F32(45.5), F32(38), level)
    level = choose(x < F32(31.5), F32(25), level)
    level = choose(x < F32(19), F32(13), level)
    level = choose(x < F32(7), F32(1), level)
    level = choose(x < F32(-4.5), F32(-10), level)
    level = choose(x < F32(-16), F32(-22), level)
    level = choose(x < F32(-28.5), F32(-35), level)
    level = choose(x < F32(-42), F32(-49), level)
    level = choose(x < F32(-57), F32(-65), level)
    level = choose(x < F32(-74), F32(-83), level)
    level = choose(x < F32(-93.5), F32(-104), level)
    return choose(x < F32(-115.5), F32(-127), level)


@kernel
def code_of(x):
    """The code of the nearest level, int32."""
    code = choose(x < F32(101), 14, repeat(15, LANES))
    code = choose(x < F32(79), 13, code)
    code = choose(x < F32(61), 12, code)
    code = choose(x < F32(45.5), 11, code)
    code = choose(x < F32(31.5), 10, code)
    code = choose(x < F32(19), 9, code)
    code = choose(x < F32(7), 8, code)
    code = choose(x < F32(-4.5), 7, code)
    code = choose(x < F32(-16), 6, code)
    code = choose(x < F32(-28.5), 5, code)
    code = choose(x < F32(-42), 4, code)
    code = choose(x < F32(-57), 3, code)
    code = choose(x < F32(-74), 2, code)
    code = choose(x < F32(-93.5), 1, code)
    return choose(x < F32(-115.5), 0, code)


@kernel
def sums(x, w, inverse):
    """The sums of w l x and w l l over the levels that an inverse scale gives."""
    lx = l2 = repeat(ZERO, LANES)
    for i in range(0, 32 * ROW, ROW):
        xi = load_floats(x + i, LANES)
        level = nearest_level(inverse * xi)
        wl = load_floats(w + i, LANES) * level
        lx = lx + wl * xi
        l2 = l2 + wl * level
    return lx, l2


@kernel
def search(x, w, to):
    """Store the best scale of a group, of 16 around the one that puts its largest weight on -127."""
    largest, worst = repeat(ZERO, LANES), repeat(0, LANES)
    for i in range(0, 32 * ROW, ROW):
        xi = load_floats(x + i, LANES)
        largest = choose(magnitude(xi) > magnitude(largest), xi, largest)
        worst = greatest(worst, bits_of(magnitude(xi)))
    zero = magnitude(largest) < SMALLEST
    divisor = choose(zero, INFINITY, largest)
    lx, l2 = sums(x, w, ONE / (divisor / F32(127)))
    scale = quotient(lx, l2)
    best = scale * lx
    for step in range(-STEPS, STEPS + 1):
        lx, l2 = sums(x, w, F32(step - 127) / divisor)
        better = (l2 > ZERO) & (lx * lx > best * l2)
        new = lx / l2
        scale, best = choose(better, new, scale), choose(better, new * lx, best)
    store_vector(to, choose(zero, ZERO, scale))
    return worst


@kernel
def squares(x, w, count):
    """w = x² of `count` rows."""
    for i in range(0, count * ROW, ROW):
        xi = load_floats(x + i, LANES)
        store_vector(w + i, xi * xi)


@kernel
def weigh(x, importance, w, count):
    """w = importance * sqrt(2 mean x² + x²), the mean over `count` rows."""
    total = repeat(ZERO, LANES)
    for i in range(0, count * ROW, ROW):
        xi = load_floats(x + i, LANES)
        total = total + xi * xi
    mean = total * F32(2 / count)
    for i in range(0, count * ROW, ROW):
        xi = load_floats(x + i, LANES)
        store_vector(w + i, load_floats(importance + i, LANES) * root(mean + xi * xi))


@kernel
def inverse_of(d):
    """1 / d, 0 where d is 0."""
    return choose(d != ZERO, ONE / d, ZERO)


@kernel
def put_codes(x, inverse, out, stride):
    """The nearest levels' codes of a group: 16 bytes to each of LANES places, `stride` bytes apart."""
    for q in range(4):
        word = repeat(0, LANES)
        for j in range(4):
            at = x + (4 * q + j) * ROW
            low, high = code_of(inverse * load_floats(at, LANES)), code_of(inverse * load_floats(at + 16 * ROW, LANES))
            word = word | (low << (8 * j)) | (high << (8 * j + 4))
        scatter(out + 4 * q, stride, word)


@kernel
def put_nl(s, out):
    """Eight blocks of 18 bytes of each run. Returns the largest bits of a d."""
    worst = repeat(0, LANES)
    for g in range(8):
        scale = load_floats(s + SCALES + g * ROW, LANES)
        half = halves(scale)
        worst = greatest(worst, extended(half) & 0x7FFF)
        scatter(out + 18 * g, 144, half)
        put_codes(s + COLUMNS + g * 32 * ROW, inverse_of(scale), out + 18 * g + 2, 144)
    return worst


@kernel
def put_xs(s, out):
    """A block of 136 bytes of each run. Returns the largest bits of a d."""
    largest = total = repeat(ZERO, LANES)
    for g in range(8):
        scale = load_floats(s + SCALES + g * ROW, LANES)
        largest = choose(magnitude(scale) > magnitude(largest), scale, largest)
        total = choose(scale != scale, NAN, total)
    d = choose(total != total, NAN, F32(-1) * largest) / F32(32)
    inverse = inverse_of(d)
    low = high = repeat(0, LANES)
    for g in range(8):
        factor = between(nearest(inverse * load_floats(s + SCALES + g * ROW, LANES)), -32, 31)
        low = low | (((factor + 32) & 15) << (4 * g))
        high = high | (((factor + 32) >> 4) << (2 * g))
        put_codes(s + COLUMNS + g * 32 * ROW, inverse_of(d * as_float(factor)), out + 8 + 16 * g, 136)
    half = halves(d)
    scatter(out, 136, (extended(half) & 0xFFFF) | (high << 16))
    scatter(out + 4, 136, low)
    return extended(half) & 0x7FFF


def encoder(is_xs):
    """The kernel of IQ4_NL or IQ4_XS."""
    per_run, nbytes, rows = (1, 136, 256) if is_xs else (8, 144, 32)

    @kernel
    def encode(x, out, n, s, importance, cols, first):
        due = False
        for b in range(0, n // per_run, LANES):
            load_columns(x + 1024 * b, s + COLUMNS, 32, 1)
            if importance:
                load_columns(importance + 4 * ((first + 256 * b) % cols), s + IMPORTANCE, 32, 1)
                for i in range(0, 256 * ROW, rows * ROW):
                    weigh(s + COLUMNS + i, s + IMPORTANCE + i, s + WEIGHTS + i, rows)
            else:
                squares(s + COLUMNS, s + WEIGHTS, 256)
            worst = repeat(0, LANES)
            for g in range(8):
                group = s + g * 32 * ROW
                worst = greatest(worst, search(group + COLUMNS, group + WEIGHTS, s + SCALES + g * ROW))
            half = put_xs(s, out + nbytes * b) if is_xs else put_nl(s, out + nbytes * b)
            due |= any_of(worst >= NOT_FINITE) | any_of(half >= NOT_FINITE_HALF)
        return due

    return encode


encode_nl, encode_xs = encoder(False), encoder(True)


@kernel
def iq4_nl(x, out, n, s, importance, cols, first):
    """n blocks -> 18 bytes each. Returns whether a weight or a scale may not be finite."""
    return encode_nl(x, out, n, s, importance, cols, first)


@kernel
def iq4_xs(x, out, n, s, importance, cols, first):
    """n blocks -> 136 bytes each. Returns whether a weight or a scale may not be finite."""
    return encode_xs(x, out, n, s, importance, cols, first)
