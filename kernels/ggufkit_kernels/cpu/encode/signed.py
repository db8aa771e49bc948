"""Encoder of Q6_K, and what it shares with Q3_K's (coordinate.py): codes -n_max…n_max - 1 with a scale a group of 16.

As in ranged.py, a group a lane, in the order of operations of `ggufkit_formats.blocks.k_search.signed`. 19 scales are
tried; a trial takes per weight a product, a rounding, up to two bounds, w l x, w l, w l l and two sums: 7 to 9
instructions on a vector, 2 to 2.3 cycles on a Zen 3, so 5 cycles a weight with 8 lanes; 10 are reached. In a
profile the loops take 56 %, choosing between trials 18 %, the rest is turning, packing and recoding. Trials do not
depend on each other, so nothing waits.

Tried, one thread of a Zen 3, million weights a second: arrays of 64 groups left to LLVM's own vectors: 108; tiles of 1,
2, 4 registers: 236, 302, 317 (4 would be too many where registers have 16 lanes); skipping the choice where no
lane is better: 296, always choosing: 314. x² and x³ are kept, not computed.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    any_of,
    as_float,
    at_least,
    at_most,
    bits_of,
    choose,
    extended,
    greatest,
    half_floats,
    halves,
    least,
    load_floats,
    load_words,
    magnitude,
    repeat,
    scatter,
    store_vector,
    whole,
)
from .layout import (
    NOT_FINITE,
    NOT_FINITE_HALF,
    ONE,
    ROW,
    ZERO,
    between,
    column,
    load_columns,
    nearest,
    pack_far_nibbles,
    pack_high_pairs,
)

F32 = np.float32
SMALLEST, NAN, INFINITY = F32(1e-15), F32(np.nan), F32(np.inf)

TILE = 2  # groups side by side
WIDE, TILE_ROW = TILE * LANES, TILE * ROW

# Scratch of one thread, offsets in bytes: the blocks' weights and codes; what is found, a row a group; a tile's x², x³.
COLUMNS = 0
CODES = COLUMNS + 256 * ROW
SCALES, INVERSES, IS_ZERO, GROUP_D = (CODES + 256 * ROW + 16 * ROW * i for i in range(4))
NO_BLOCK = GROUP_D + 16 * ROW
WORDS = NO_BLOCK + ROW
X2 = WORDS + 8 * ROW
X3 = X2 + 16 * TILE_ROW
SCRATCH = X3 + 16 * TILE_ROW


def summing(low, high):
    """The kernel that sums w l x and w l l over the codes of an inverse scale, clipped to the bounds that are given."""

    @kernel
    def sums(x, w, wx, inverse):
        lx = l2 = repeat(ZERO, WIDE)
        for i in range(0, 16 * TILE_ROW, TILE_ROW):
            code = whole(inverse * load_floats(x + i, WIDE))
            if low is not None:
                code = at_least(code, F32(low))
            if high is not None:
                code = at_most(code, F32(high))
            lx = lx + load_floats(wx + i, WIDE) * code
            l2 = l2 + load_floats(w + i, WIDE) * code * code
        return lx, l2

    return sums


# |inverse x| is at most 32 + step / 10, but for two roundings: what that cannot reach needs no clipping.
sums_inside, sums_below, sums_between = summing(None, None), summing(None, 31), summing(-32, 31)


def preparation(tile):
    """The kernel that looks at a tile of that many groups first."""
    wide, row = tile * LANES, tile * ROW

    @kernel
    def prepare(x, w, wx):
        """w = x² and wx = x³; each group's weight of largest magnitude, the first of equals; the magnitude's bits."""
        largest, worst = repeat(ZERO, wide), repeat(0, wide)
        for i in range(0, 16 * row, row):
            xi = load_floats(x + i, wide)
            largest = choose(magnitude(xi) > magnitude(largest), xi, largest)
            worst = greatest(worst, bits_of(magnitude(xi)))
            square = xi * xi
            store_vector(w + i, square)
            store_vector(wx + i, square * xi)
        return largest, worst

    return prepare


prepare = preparation(TILE)


@kernel
def quotient(lx, l2):
    """lx / l2; 0 where l2 is 0, NaN where it overflowed (ggml would write zeros for huge weights)."""
    return choose(magnitude(l2) < INFINITY, choose(l2 > ZERO, lx / l2, ZERO), NAN)


@kernel
def search(x, s, group):
    """Q6_K: 19 scales around -32 over the largest weight."""
    w, wx = s + X2, s + X3
    largest, worst = prepare(x, w, wx)
    zero = magnitude(largest) < SMALLEST
    divisor = choose(zero, INFINITY, largest)
    inverse = F32(-32) / divisor
    lx, l2 = sums_below(x, w, wx, inverse)
    scale = quotient(lx, l2)
    best, best_inverse = scale * lx, inverse
    for step in range(-9, 10):
        if step == 0:
            continue
        inverse = -F32(F32(32) + F32(0.1) * F32(step)) / divisor
        if step <= -6:
            lx, l2 = sums_inside(x, w, wx, inverse)
        elif step <= 4:
            lx, l2 = sums_below(x, w, wx, inverse)
        else:
            lx, l2 = sums_between(x, w, wx, inverse)
        better = (l2 > ZERO) & (lx * lx > best * l2)
        new = lx / l2
        scale, best = choose(better, new, scale), choose(better, new * lx, best)
        best_inverse = choose(better, inverse, best_inverse)
    to = s + group * ROW
    store_vector(to + SCALES, choose(zero, ZERO, scale))
    store_vector(to + INVERSES, best_inverse)
    store_vector(to + IS_ZERO, choose(zero, ONE, repeat(ZERO, WIDE)))
    return worst


@kernel
def largest_scale(scales):
    """The scale of largest magnitude of a block's sixteen; NaN if one is NaN."""
    out = total = repeat(ZERO, LANES)
    for g in range(16):
        scale = load_floats(scales + g * ROW, LANES)
        out = choose(magnitude(scale) > magnitude(out), scale, out)
        total = choose(scale != scale, NAN, total)
    return choose(total != total, NAN, out)


@kernel
def low_byte(x):
    """int32 as a cast to int8 leaves it."""
    return (x << 24) >> 24


@kernel
def q6_scales(s, out):
    """Store d and sixteen scales. A block whose scales are all tiny is one of zeros."""
    largest = largest_scale(s + SCALES)
    zero = magnitude(largest) < SMALLEST
    inverse = F32(-128) / choose(zero, INFINITY, largest)
    h = halves(choose(zero, ZERO, ONE / inverse))
    scatter(out + 208, 210, h)
    d = half_floats(h)
    store_vector(s + NO_BLOCK, choose(zero, ONE, repeat(ZERO, LANES)))
    for q in range(4):
        word = repeat(0, LANES)
        for j in range(4):
            g = (4 * q + j) * ROW
            scale = low_byte(least(nearest(inverse * load_floats(s + SCALES + g, LANES)), 127))
            scale = choose(zero, 0, scale)
            store_vector(s + GROUP_D + g, d * as_float(scale))
            word = word | ((scale & 255) << (8 * j))
        scatter(out + 192 + 4 * q, 210, word)
    return extended(h) & 0x7FFF


@kernel
def recode(s):
    """The final codes + 32: nearest to x / group_d; where that is 0, those of the search."""
    for g in range(16):
        row = s + g * ROW
        d = load_floats(row + GROUP_D, LANES)
        x, codes = s + COLUMNS + column(g, 0, 16, TILE), s + CODES + 16 * g * ROW
        for i in range(16):
            code = nearest(load_floats(x + i * TILE_ROW, LANES) / d)
            store_vector(codes + i * ROW, between(code, -32, 31) + 32)
        zero = d == ZERO
        if any_of(zero):
            empty = (load_floats(row + IS_ZERO, LANES) + load_floats(s + NO_BLOCK, LANES)) != ZERO
            inverse = load_floats(row + INVERSES, LANES)
            for i in range(16):
                code = nearest(inverse * load_floats(x + i * TILE_ROW, LANES))
                code = choose(empty, 0, between(code, -32, 31) + 32)
                store_vector(codes + i * ROW, choose(zero, code, load_words(codes + i * ROW, LANES)))


@kernel
def q6_k(x, out, n, s):
    """n blocks -> 210 bytes each. Returns whether a weight or a scale may not be finite."""
    worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
    for b in range(0, n, LANES):
        to = out + 210 * b
        load_columns(x + 1024 * b, s + COLUMNS, 16, TILE)
        for g in range(0, 16, TILE):
            worst = greatest(worst, search(s + COLUMNS + column(g, 0, 16, TILE), s, g))
        worst_half = greatest(worst_half, q6_scales(s, to))
        recode(s)
        for h in range(2):
            codes = s + CODES + 128 * h * ROW
            pack_far_nibbles(codes, s + WORDS, to + 64 * h, 210)
            pack_far_nibbles(codes + 32 * ROW, s + WORDS, to + 64 * h + 32, 210)
            pack_high_pairs(codes, s + WORDS, to + 128 + 32 * h, 210)
    return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)
