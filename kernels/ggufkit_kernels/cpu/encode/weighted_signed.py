"""Encoders with importance of Q3_K, Q6_K, Q4_0 and Q5_0: codes -n_max…n_max - 1 with a scale a group.

All four search as signed.py does, over 19 scales, by other weights: Q6_K by the importance, Q3_K by importance *
sqrt(2 * mean square of the block + x²), whose groups' scales are then rounded by the same search; Q4_0 and Q5_0 are
groups of 32, eight blocks for one of 256, and get their weights of errors ready from `TensorType.error_weights`.
In the order of operations of `ggufkit_formats.blocks.k_search.signed`; codes are always held to both bounds.
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
    load_floats,
    load_words,
    magnitude,
    repeat,
    root,
    scatter,
    store_vector,
    whole,
)
from . import signed
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
    pack_block,
    pack_far_nibbles,
    pack_high_pairs,
    pack_pairs,
    pack_six_bits,
    pack_third_bits,
    pack_word,
)
from .signed import (
    CODES,
    COLUMNS,
    GROUP_D,
    INFINITY,
    INVERSES,
    IS_ZERO,
    SCALES,
    SMALLEST,
    TILE,
    TILE_ROW,
    WIDE,
    WORDS,
    largest_scale,
    q6_scales,
    quotient,
    recode,
)
from .weighted_ranged import mean_square

F32 = np.float32

# Scratch of one thread behind that of signed.py: importance, laid out as the weights are; a tile row of mean squares; w
# and w x of a tile; the groups' sums of w, and times their scale; what is found for the scales: a scale, an inverse, a
# zero, 16 rows apart, as SCALES, INVERSES and IS_ZERO are.
IMPORTANCE = signed.SCRATCH
MEAN = IMPORTANCE + 256 * ROW
W = MEAN + TILE_ROW
WX = W + 32 * TILE_ROW
SUMS = WX + 32 * TILE_ROW
SUMS_X = SUMS + 16 * ROW
TOP = SUMS_X + 16 * ROW
SCRATCH = TOP + 48 * ROW


def weighing(tile):
    """The kernel that looks at a tile of that many groups first."""
    wide, row = tile * LANES, tile * ROW

    @kernel
    def weigh(x, importance, w, wx, k, mean, by_size):
        """w = importance, times sqrt(mean + x²) where `by_size`, and w x.

        Returns each group's weight of largest magnitude, the first of equals; the magnitude's bits; the sum of w.
        """
        largest = total = repeat(ZERO, wide)
        worst = repeat(0, wide)
        for i in range(0, k * row, row):
            xi, wi = load_floats(x + i, wide), load_floats(importance + i, wide)
            if by_size:
                wi = wi * root(load_floats(mean, wide) + xi * xi)
            largest = choose(magnitude(xi) > magnitude(largest), xi, largest)
            worst = greatest(worst, bits_of(magnitude(xi)))
            total = total + wi
            store_vector(w + i, wi)
            store_vector(wx + i, wi * xi)
        return largest, worst, total

    return weigh


def searching(tile):
    """The kernel that tries scales for a tile of that many groups."""
    wide, row = tile * LANES, tile * ROW

    @kernel
    def search(x, w, wx, k, top, largest, to):
        """19 scales around -top over the largest weight. The best one, its inverse, and whether a group is zero."""
        zero = magnitude(largest) < SMALLEST
        divisor = choose(zero, INFINITY, largest)
        scale = best = best_inverse = repeat(ZERO, wide)
        for trial in range(19):
            step = trial - 10 if trial < 10 else trial - 9
            if trial == 0:
                step = 0
            inverse = -F32(top + F32(0.1) * F32(step)) / divisor
            lx = l2 = repeat(ZERO, wide)
            for i in range(0, k * row, row):
                code = at_most(at_least(whole(inverse * load_floats(x + i, wide)), -top), top - ONE)
                lx = lx + load_floats(wx + i, wide) * code
                l2 = l2 + load_floats(w + i, wide) * code * code
            if trial == 0:
                scale = quotient(lx, l2)
                best, best_inverse = scale * lx, inverse
            else:
                better = (l2 > ZERO) & (lx * lx > best * l2)
                new = lx / l2
                scale, best = choose(better, new, scale), choose(better, new * lx, best)
                best_inverse = choose(better, inverse, best_inverse)
        store_vector(to, choose(zero, ZERO, scale))
        store_vector(to + 16 * ROW, best_inverse)
        store_vector(to + 32 * ROW, choose(zero, ONE, repeat(ZERO, wide)))

    return search


weigh, search = weighing(TILE), searching(TILE)
weigh_scales, search_scales = weighing(1), searching(1)


@kernel
def find(x, importance, k, top, by_size, s):
    """Scales of all groups of LANES times 256 weights, and the sums of their w. Returns the bits of the largest |x|."""
    worst = repeat(0, WIDE)
    load_columns(x, s + COLUMNS, k, TILE)
    load_columns(importance, s + IMPORTANCE, k, TILE)
    if by_size:
        mean_square(s + COLUMNS, k, TILE, F32(2), s + MEAN)
    for g in range(0, 256 // k, TILE):
        at = s + column(g, 0, k, TILE)
        largest, found, total = weigh(at + COLUMNS, at + IMPORTANCE, s + W, s + WX, k, s + MEAN, by_size)
        worst = greatest(worst, found)
        store_vector(s + SUMS + g * ROW, total)
        search(at + COLUMNS, s + W, s + WX, k, top, largest, s + SCALES + g * ROW)
    return worst


@kernel
def q6_k(x, importance, out, n, s):
    """n blocks -> 210 bytes each. Returns whether a weight or a scale may not be finite."""
    worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
    for b in range(0, n, LANES):
        to = out + 210 * b
        worst = greatest(worst, find(x + 1024 * b, importance + 1024 * b, 16, F32(32), False, s))
        worst_half = greatest(worst_half, q6_scales(s, to))
        recode(s)
        for h in range(2):
            codes = s + CODES + 128 * h * ROW
            pack_far_nibbles(codes, s + WORDS, to + 64 * h, 210)
            pack_far_nibbles(codes + 32 * ROW, s + WORDS, to + 64 * h + 32, 210)
            pack_high_pairs(codes, s + WORDS, to + 128 + 32 * h, 210)
    return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)


@kernel
def q3_scales(s, out):
    """Search a scale for the sixteen scales; store it and their codes in twelve bytes."""
    weigh_scales(s + SCALES, s + SUMS, s + SUMS, s + SUMS_X, 16, s + MEAN, False)
    largest = largest_scale(s + SCALES)  # NaN if one is: that must show
    search_scales(s + SCALES, s + SUMS, s + SUMS_X, 16, F32(32), largest, s + TOP)
    h = halves(load_floats(s + TOP, LANES))
    inverse, zero = load_floats(s + TOP + 16 * ROW, LANES), load_floats(s + TOP + 32 * ROW, LANES) != ZERO
    scatter(out + 108, 110, h)
    d = half_floats(h)
    for g in range(16):
        scale = between(nearest(inverse * load_floats(s + SCALES + g * ROW, LANES)), -32, 31) + 32
        scale = choose(zero, 0, scale)
        store_vector(s + GROUP_D + g * ROW, d * as_float(scale - 32))
        store_vector(s + SCALES + g * ROW, scale)
    pack_six_bits(s + SCALES, out + 96, 110)
    return extended(h) & 0x7FFF


@kernel
def found_codes(s, g, k, top):
    """The codes + top of group g that the search found, by the inverse scale that was best; 0 for a group of zeros."""
    row = s + g * ROW
    zero, inverse = load_floats(row + IS_ZERO, LANES) != ZERO, load_floats(row + INVERSES, LANES)
    x, codes = s + COLUMNS + column(g, 0, k, TILE), s + CODES + k * g * ROW
    for i in range(k):
        code = between(nearest(inverse * load_floats(x + i * TILE_ROW, LANES)), -top, top - 1) + top
        store_vector(codes + i * ROW, choose(zero, 0, code))


@kernel
def recode_q3(s):
    """The final codes + 4: nearest to x / group_d; where that is 0, those of the search."""
    for g in range(16):
        found_codes(s, g, 16, 4)
        d = load_floats(s + GROUP_D + g * ROW, LANES)
        zero = d == ZERO
        x, codes = s + COLUMNS + column(g, 0, 16, TILE), s + CODES + 16 * g * ROW
        for i in range(16):
            code = between(nearest(load_floats(x + i * TILE_ROW, LANES) / d), -4, 3) + 4
            store_vector(codes + i * ROW, choose(zero, load_words(codes + i * ROW, LANES), code))


@kernel
def q3_k(x, importance, out, n, s):
    """n blocks -> 110 bytes each. Returns whether a weight or a scale may not be finite."""
    worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
    for b in range(0, n, LANES):
        to = out + 110 * b
        worst = greatest(worst, find(x + 1024 * b, importance + 1024 * b, 16, F32(4), True, s))
        worst_half = greatest(worst_half, q3_scales(s, to))
        recode_q3(s)
        pack_third_bits(s + CODES, s + WORDS, to, 110)
        for h in range(2):
            pack_pairs(s + CODES + 128 * h * ROW, s + WORDS, to + 32 + 32 * h, 110)
    return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)


def older_encoder(bits):
    """The kernel of Q4_0 or Q5_0; n is a multiple of eight times the lanes, w the weights of errors."""
    top, qs = 1 << (bits - 1), 2 if bits == 4 else 6
    nbytes = qs + 16

    @kernel
    def encode(x, w, out, n, s):
        worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
        for b in range(0, n, 8 * LANES):
            worst = greatest(worst, find(x + 128 * b, w + 128 * b, 32, F32(top), False, s))
            for g in range(8):
                found_codes(s, g, 32, top)
                to, codes = out + nbytes * (b + g), s + CODES + 32 * g * ROW
                d = halves(load_floats(s + SCALES + g * ROW, LANES))
                scatter(to, 8 * nbytes, d)
                worst_half = greatest(worst_half, extended(d) & 0x7FFF)
                if bits == 5:
                    pack_word(codes, to + 2, 8 * nbytes)
                pack_block(codes, to + qs, 8 * nbytes)
        return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)

    return encode


q4_0, q5_0 = older_encoder(4), older_encoder(5)
