"""Encoders with importance of Q2_K, Q4_K, Q5_K, Q4_1 and Q5_1: codes 0…n_max with a scale and a minimum a group.

The search is that of ranged.py with other weights and 38 finer steps. In K types the square of a weight's error counts
importance * sqrt(mean square of the block + x²), and the scales and minima of the groups are rounded by a search of
their own (`positive`), as in `ggufkit_formats.blocks.k_search_weighted`: nine scales, then up to five rounds over the
codes, a block a lane. That is one number for 16 or 32 weights, so it takes little beside the first search.

Q4_1 and Q5_1 are the groups of 32 of that layout, eight blocks for one of 256, with the codes that the search found.
Their weights of errors look at whole rows and come ready from `TensorType.error_weights`.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    any_of,
    as_float,
    choose,
    extended,
    greatest,
    half_floats,
    halves,
    least,
    load_floats,
    load_words,
    repeat,
    root,
    scatter,
    store_vector,
)
from . import ranged
from .layout import (
    NOT_FINITE,
    NOT_FINITE_HALF,
    ONE,
    ROW,
    ZERO,
    column,
    load_columns,
    nearest,
    pack_block,
    pack_fifth_bits,
    pack_nibbles,
    pack_pairs,
    pack_word,
)
from .ranged import (
    CODES,
    COLUMNS,
    FLAT,
    FLIGHT,
    GROUP_D,
    GROUP_M,
    INVERSES,
    MINIMA,
    SCALES,
    STARTS,
    SUMS,
    TILE,
    TILE_ROW,
    WIDE,
    WORDS,
    W,
    found_code,
    recode,
    search,
)
from .signed import NAN, SMALLEST, quotient

F32 = np.float32
R_MIN, R_STEP, STEPS = F32(-0.9), F32(0.05), 36

# Scratch of one thread behind that of ranged.py: importance, laid out as the weights are; a tile row of mean squares;
# the codes of the groups' scales and minima.
IMPORTANCE = ranged.SCRATCH
MEAN = IMPORTANCE + 256 * ROW
STORED = MEAN + TILE_ROW
STORED_MIN = STORED + 16 * ROW
SCRATCH = STORED_MIN + 16 * ROW


@kernel
def mean_square(columns, k, tile, factor, out):
    """Store factor * mean square of each block, as often as a tile has groups. Squares are added one by one."""
    total = repeat(ZERO, LANES)
    for j in range(256):
        x = load_floats(columns + column(j // k, j % k, k, tile), LANES)
        total = total + x * x
    total = factor * total / F32(256)
    for t in range(tile):
        store_vector(out + t * ROW, total)


@kernel
def weigh(x, importance, w, k, s):
    """w = importance * sqrt(mean square + x²), of a tile."""
    mean = load_floats(s + MEAN, WIDE)
    for i in range(0, k * TILE_ROW, TILE_ROW):
        xi = load_floats(x + i, WIDE)
        store_vector(w + i, load_floats(importance + i, WIDE) * root(mean + xi * xi))


@kernel
def improve(rows, sign, weights, count, top, stored, lx, l2):
    """One round over the codes: each takes the value that is best beside the others. Also: whether one changed."""
    changed = lx != lx
    for g in range(0, count * ROW, ROW):
        x, w, code = sign * load_floats(rows + g, LANES), load_floats(weights + g, LANES), load_words(stored + g, LANES)
        old, wx = as_float(code), w * x
        rest_lx, rest_l2 = lx - wx * old, l2 - w * old * old
        other = least(nearest(x * rest_l2 / rest_lx), top)
        new = as_float(other)
        wanted = (rest_lx > ZERO) & (rest_l2 > ZERO) & (new != old)
        if any_of(wanted):
            new_lx, new_l2 = rest_lx + wx * new, rest_l2 + w * new * new
            better = wanted & (new_lx * new_lx * l2 > lx * lx * new_l2)
            store_vector(stored + g, choose(better, other & 255, code))
            lx, l2 = choose(better, new_lx, lx), choose(better, new_l2, l2)
            changed = changed | better
    return lx, l2, any_of(changed)


@kernel
def positive(rows, sign, weights, count, top, stored):
    """The scale for codes 0…top of `count` rows times sign; its codes go to `stored`, as bytes wrap them around."""
    largest = missing = repeat(ZERO, LANES)
    for g in range(0, count * ROW, ROW):
        x = sign * load_floats(rows + g, LANES)
        largest, missing = greatest(x, largest), choose(x != x, NAN, missing)
    largest = largest + missing
    zero = largest < SMALLEST
    inverse, best = F32(top) / largest, repeat(ZERO, LANES)
    scale = ONE / inverse
    for g in range(0, count * ROW, ROW):
        x = sign * load_floats(rows + g, LANES)
        diff = x - scale * as_float(nearest(inverse * x) & 255)
        best = best + load_floats(weights + g, LANES) * diff * diff
    for step in range(-4, 5):
        if step == 0:
            continue
        other = F32(F32(0.1) * F32(step) + F32(top)) / largest
        scale, error = ONE / other, repeat(ZERO, LANES)
        for g in range(0, count * ROW, ROW):
            x = sign * load_floats(rows + g, LANES)
            diff = x - scale * as_float(least(nearest(other * x), top))
            error = error + load_floats(weights + g, LANES) * diff * diff
        better = error < best
        inverse, best = choose(better, other, inverse), choose(better, error, best)
    lx = l2 = repeat(ZERO, LANES)
    for g in range(0, count * ROW, ROW):
        x, w = sign * load_floats(rows + g, LANES), load_floats(weights + g, LANES)
        code = least(nearest(inverse * x), top)
        value = as_float(code)
        lx, l2 = lx + w * x * value, l2 + w * value * value
        store_vector(stored + g, code & 255)
    for _ in range(5):
        lx, l2, changed = improve(rows, sign, weights, count, top, stored, lx, l2)
        if not changed:
            break
    if any_of(zero):
        for g in range(0, count * ROW, ROW):
            store_vector(stored + g, choose(zero, 0, load_words(stored + g, LANES)))
    return choose(zero, ZERO, quotient(lx, l2))


@kernel
def scale_and_minimum(s, count, top, out, stride):
    """Round the groups' scales and minima to codes, store d and dmin. Returns their bits."""
    d = halves(positive(s + SCALES, ONE, s + SUMS, count, top, s + STORED))
    dmin = halves(positive(s + MINIMA, -ONE, s + SUMS, count, top, s + STORED_MIN))
    scatter(out, stride, d)
    scatter(out + 2, stride, dmin)
    return d, dmin


@kernel
def q45_scales(s, out, stride, spills):
    """Store d, dmin and the twelve bytes of eight scales and minima. Returns the largest bits of d and dmin.

    A scale below zero wraps around to a code over 63: Q5_K cuts it off, in Q4_K (`spills`) its upper bits mix with
    those of another one.
    """
    d_bits, m_bits = scale_and_minimum(s, 8, 63, out, stride)
    d, dmin = half_floats(d_bits), half_floats(m_bits)
    first = second = third = low = low_min = repeat(0, LANES)
    for g in range(8):
        row = s + g * ROW
        scale, minimum = load_words(row + STORED, LANES), load_words(row + STORED_MIN, LANES)
        if not spills:
            scale, minimum = least(scale, 63), least(minimum, 63)
        if g < 4:
            first, second = first | (scale << 8 * g), second | (minimum << 8 * g)
        else:
            by = 8 * (g - 4)
            first, second = first | (((scale >> 4) & 3) << (by + 6)), second | (((minimum >> 4) & 3) << (by + 6))
            third = third | (((scale & 15) | ((minimum & 15) << 4)) << by)
            low, low_min = load_words(row - 4 * ROW + STORED, LANES), load_words(row - 4 * ROW + STORED_MIN, LANES)
            if not spills:
                low, low_min = repeat(0, LANES), repeat(0, LANES)
        store_vector(row + GROUP_D, d * as_float((scale & 63) | ((low >> 6) << 4)))
        store_vector(row + GROUP_M, dmin * as_float((minimum & 63) | ((low_min >> 6) << 4)))
    scatter(out + 4, stride, first)
    scatter(out + 8, stride, second)
    scatter(out + 12, stride, third)
    return greatest(extended(d_bits) & 0x7FFF, extended(m_bits) & 0x7FFF)


@kernel
def find(x, importance, k, top, factor, s):
    """Scales and minima of all groups of LANES blocks of a K type. Returns the bits of the largest |x|."""
    worst, size = repeat(0, WIDE), k * TILE_ROW
    load_columns(x, s + COLUMNS, k, TILE)
    load_columns(importance, s + IMPORTANCE, k, TILE)
    mean_square(s + COLUMNS, k, TILE, factor, s + MEAN)
    for g in range(0, 256 // k, TILE * FLIGHT):
        at = column(g, 0, k, TILE)
        for t in range(FLIGHT):
            here = s + at + t * size
            weigh(here + COLUMNS, here + IMPORTANCE, s + W + t * size, k, s)
        worst = greatest(worst, search(s + COLUMNS + at, s + W, k, top, R_MIN, R_STEP, STEPS, False, True, s, g))
    return worst


def q45_encoder(bits, nbytes):
    """The kernel of Q4_K or Q5_K: n blocks -> nbytes each. Returns whether a weight or a scale may not be finite."""
    top = (1 << bits) - 1

    @kernel
    def encode(x, importance, out, n, s):
        worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
        for b in range(0, n, LANES):
            to = out + nbytes * b
            worst = greatest(worst, find(x + 1024 * b, importance + 1024 * b, 32, F32(top), F32(2), s))
            worst_half = greatest(worst_half, q45_scales(s, to, nbytes, bits == 4))
            recode(s, 32, top, True)
            for p in range(4):
                pack_nibbles(s + CODES + 64 * p * ROW, s + WORDS, to + nbytes - 128 + 32 * p, nbytes)
            if bits == 5:
                pack_fifth_bits(s + CODES, s + WORDS, to + 16, nbytes)
        return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)

    return encode


q4_k, q5_k = q45_encoder(4, 144), q45_encoder(5, 176)


@kernel
def q2_scales(s, out):
    """Store d, dmin and sixteen bytes of a scale and a minimum. Returns the largest bits of d and dmin."""
    d_bits, m_bits = scale_and_minimum(s, 16, 15, out + 80, 84)
    d, dmin = half_floats(d_bits), half_floats(m_bits)
    for q in range(4):
        word = repeat(0, LANES)
        for j in range(4):
            row = s + (4 * q + j) * ROW
            both = (load_words(row + STORED, LANES) | (load_words(row + STORED_MIN, LANES) << 4)) & 255
            store_vector(row + GROUP_D, d * as_float(both & 15))
            store_vector(row + GROUP_M, dmin * as_float(both >> 4))
            word = word | (both << (8 * j))
        scatter(out + 4 * q, 84, word)
    return greatest(extended(d_bits) & 0x7FFF, extended(m_bits) & 0x7FFF)


@kernel
def q2_k(x, importance, out, n, s):
    """n blocks -> 84 bytes each. Returns whether a weight or a scale may not be finite."""
    worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
    for b in range(0, n, LANES):
        to = out + 84 * b
        worst = greatest(worst, find(x + 1024 * b, importance + 1024 * b, 16, F32(3), ONE, s))
        worst_half = greatest(worst_half, q2_scales(s, to))
        recode(s, 16, 3, True)
        for h in range(2):
            pack_pairs(s + CODES + 128 * h * ROW, s + WORDS, to + 16 + 32 * h, 84)
    return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)


# -- the older types ---------------------------------------------------------------------------------------


@kernel
def found_codes(s, top):
    """The codes of the search, by the inverse scale and minimum that were best."""
    for g in range(8):
        row = s + g * ROW
        flat = load_floats(row + FLAT, LANES) != ZERO
        inverse, minimum = load_floats(row + INVERSES, LANES), load_floats(row + STARTS, LANES)
        x, codes = s + COLUMNS + column(g, 0, 32, TILE), s + CODES + 32 * g * ROW
        for i in range(32):
            code = found_code(load_floats(x + i * TILE_ROW, LANES), inverse, minimum, flat, top, True)
            store_vector(codes + i * ROW, code)


def older_encoder(bits):
    """The kernel of Q4_1 or Q5_1; n is a multiple of eight times the lanes, w the weights of errors."""
    top, qs = (1 << bits) - 1, 4 if bits == 4 else 8
    nbytes, size = qs + 16, 32 * TILE_ROW

    @kernel
    def encode(x, w, out, n, s):
        worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
        for b in range(0, n, 8 * LANES):
            load_columns(x + 128 * b, s + COLUMNS, 32, TILE)
            load_columns(w + 128 * b, s + IMPORTANCE, 32, TILE)
            for g in range(0, 8, TILE * FLIGHT):
                at = s + g // TILE * size
                found = search(at + COLUMNS, at + IMPORTANCE, 32, F32(top), R_MIN, R_STEP, STEPS, False, True, s, g)
                worst = greatest(worst, found)
            found_codes(s, top)
            for g in range(8):
                row, to, codes = s + g * ROW, out + nbytes * (b + g), s + CODES + 32 * g * ROW
                d, m = halves(load_floats(row + SCALES, LANES)), halves(load_floats(row + MINIMA, LANES))
                scatter(to, 8 * nbytes, d)
                scatter(to + 2, 8 * nbytes, m)
                bits_now = greatest(extended(d) & 0x7FFF, extended(m) & 0x7FFF)
                worst_half = greatest(worst_half, bits_now)
                if bits == 5:
                    pack_word(codes, to + 4, 8 * nbytes)
                pack_block(codes, to + qs, 8 * nbytes)
        return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)

    return encode


q4_1, q5_1 = older_encoder(4), older_encoder(5)
