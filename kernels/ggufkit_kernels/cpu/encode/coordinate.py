"""Encoder of Q3_K: codes -4…3 with a scale a group of 16, improved one after the other.

In the order of operations of `ggufkit_formats.blocks.k_search.coordinate`, a group a lane: from the codes of the first
scale on, each code takes the value that is best beside the others, up to five rounds, until a round changes nothing.

Each step needs the sums that the one before left: 45 cycles of latency with a division in it, and a round has 16. But
hardly any code changes: of normal weights 2 % in the first round, 0.6 % in the second. So a step asks first whether a
lane wants another code. Where none does (85 % of the first round's steps with 8 lanes, 95 % and 98 % later) the sums
stay, the processor has guessed so, and the steps overlap. A group's rounds end when its vector's do.

Tried, one thread of a Zen 3, million weights a second: arrays of 64 groups left to LLVM's own vectors, without the
question: 132; with it and 1, 2, 4 registers a step: 450, 392, 376; the first round without it, on 2, 4, 8 registers
side by side: 363, 391, 386. A profile gives the rounds 34, 18, 7 and 2 % of all time: a step of the first one costs 20
cycles, mostly guesses that were wrong, where its division allows 3.5. Gathering the groups that still change (19 %,
5 %) into full vectors was not tried.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    any_of,
    as_float,
    at_most,
    choose,
    extended,
    greatest,
    half_floats,
    halves,
    load_floats,
    load_words,
    magnitude,
    repeat,
    scatter,
    store_vector,
    truncated,
    whole,
)
from .layout import (
    NOT_FINITE,
    NOT_FINITE_HALF,
    ONE,
    ROW,
    ZERO,
    between,
    clipped,
    column,
    load_columns,
    nearest,
    pack_pairs,
    pack_six_bits,
    pack_third_bits,
)
from .signed import INFINITY, SMALLEST, largest_scale, low_byte, preparation, quotient

F32 = np.float32

# Scratch of one thread, offsets in bytes: the blocks' weights, codes, and the search's codes; a row a group; x² and x³.
COLUMNS, CODES, TRIED = (256 * ROW * i for i in range(3))
SCALES, IS_ZERO, GROUP_D = (TRIED + 256 * ROW + 16 * ROW * i for i in range(3))
X2 = GROUP_D + 16 * ROW
X3 = X2 + 16 * ROW
WORDS = X3 + 16 * ROW
SCRATCH = WORDS + 8 * ROW

prepare = preparation(1)


@kernel
def improve(x, w, wx, tried, lx, l2):
    """One round over the group: each code takes the value that is best beside the others. Also: which lanes changed."""
    changed = lx != lx
    for i in range(0, 16 * ROW, ROW):
        xi, old = load_floats(x + i, LANES), load_floats(tried + i, LANES)
        wi, wxi = load_floats(w + i, LANES), load_floats(wx + i, LANES)
        rest_lx, rest_l2 = lx - wxi * old, l2 - wi * old * old
        new = clipped(xi * rest_l2 / rest_lx, -4, 3)
        wanted = (rest_lx > ZERO) & (new != old)
        if any_of(wanted):
            new_lx, new_l2 = rest_lx + wxi * new, rest_l2 + wi * new * new
            better = wanted & (new_l2 > ZERO) & (new_lx * new_lx * l2 > lx * lx * new_l2)
            store_vector(tried + i, choose(better, new, old))
            lx, l2 = choose(better, new_lx, lx), choose(better, new_l2, l2)
            changed = changed | better
    return lx, l2, any_of(changed)


@kernel
def coordinate(x, tried, s, group):
    """Q3_K: the first scale's codes, improved one after the other."""
    w, wx = s + X2, s + X3
    largest, worst = prepare(x, w, wx)
    zero = magnitude(largest) < SMALLEST
    inverse = F32(-4) / choose(zero, INFINITY, largest)
    lx = l2 = repeat(ZERO, LANES)
    for i in range(0, 16 * ROW, ROW):
        code = at_most(whole(inverse * load_floats(x + i, LANES)), F32(3))
        store_vector(tried + i, code)
        lx = lx + load_floats(wx + i, LANES) * code
        l2 = l2 + load_floats(w + i, LANES) * code * code
    for _ in range(5):
        lx, l2, changed = improve(x, w, wx, tried, lx, l2)
        if not changed:
            break
    to = s + group * ROW
    store_vector(to + SCALES, choose(zero, ZERO, quotient(lx, l2)))
    store_vector(to + IS_ZERO, choose(zero, ONE, repeat(ZERO, LANES)))
    return worst


@kernel
def q3_scales(s, out):
    """Store d and sixteen scales in twelve bytes."""
    largest = largest_scale(s + SCALES)
    some = largest != ZERO
    inverse = choose(some, F32(-32) / largest, ZERO)
    h = halves(choose(some, ONE / inverse, ZERO))
    scatter(out + 108, 110, h)
    d = half_floats(h)
    for g in range(16):
        scale = low_byte(nearest(inverse * load_floats(s + SCALES + g * ROW, LANES)))
        scale = choose(some, between(scale, -32, 31) + 32, 0)
        store_vector(s + GROUP_D + g * ROW, d * as_float(scale - 32))
        store_vector(s + SCALES + g * ROW, scale)
    pack_six_bits(s + SCALES, out + 96, 110)
    return extended(h) & 0x7FFF


@kernel
def recode(s):
    """The final codes + 4: nearest to x / group_d; where that is 0, those of the search."""
    for g in range(16):
        row = s + g * ROW
        d = load_floats(row + GROUP_D, LANES)
        group = s + 16 * g * ROW
        x, codes, tried = group + COLUMNS, group + CODES, group + TRIED
        for i in range(0, 16 * ROW, ROW):
            store_vector(codes + i, between(nearest(load_floats(x + i, LANES) / d), -4, 3) + 4)
        zero = d == ZERO
        if any_of(zero):
            empty = load_floats(row + IS_ZERO, LANES) != ZERO
            for i in range(0, 16 * ROW, ROW):
                code = choose(empty, 0, truncated(load_floats(tried + i, LANES)) + 4)
                store_vector(codes + i, choose(zero, code, load_words(codes + i, LANES)))


@kernel
def q3_k(x, out, n, s):
    """n blocks -> 110 bytes each. Returns whether a weight or a scale may not be finite."""
    worst, worst_half = repeat(0, LANES), repeat(0, LANES)
    for b in range(0, n, LANES):
        to = out + 110 * b
        load_columns(x + 1024 * b, s + COLUMNS, 16, 1)
        for g in range(16):
            start = column(g, 0, 16, 1)
            worst = greatest(worst, coordinate(s + COLUMNS + start, s + TRIED + start, s, g))
        worst_half = greatest(worst_half, q3_scales(s, to))
        recode(s)
        pack_third_bits(s + CODES, s + WORDS, to, 110)
        for h in range(2):
            pack_pairs(s + CODES + 128 * h * ROW, s + WORDS, to + 32 + 32 * h, 110)
    return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)
