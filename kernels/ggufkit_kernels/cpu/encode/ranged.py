"""Encoders of Q2_K, Q4_K and Q5_K: codes 0…n_max with a scale and a minimum a group.

The same float32 operations in the same order as `ggufkit_formats.blocks.k_search.ranged`, one group a lane (layout.py).
No sum is reordered, nothing is fused, so the bytes are the same. Each group is tried with 17 or 22 scales; what a
trial takes per weight, in instructions on a vector:

    regress   x - minimum, * inverse, round, [two bounds,] w l, w l l, w l x, three sums     9 (11) and 3 of memory
    judge     scale l, + minimum, - x, squared, * w, sum                                      6, and 3 of memory

Two pipes add and round, two multiply, integer bounds go to any: 4 cycles a vector and trial on a Zen 3, so 11 cycles a
weight for Q4_K with 8 lanes, 9 for Q2_K and Q5_K; 20, 18 and 16 are reached on a busy machine. In a profile of Q4_K
the first loop takes 41 % (3 cycles a vector for 2.5), the second 22 % (1.6 for 1.5), what is between them, four
divisions that wait for the loop before, 12 %, the first trial 6 %, turning the weights 6 %, the rest 13 %.

Quotients beyond 2**22 get ggml's odd values (with importance its trials hold them to the bounds first, `held`), which
costs three instructions more and next to never happens. So the
quotients of a group's ends (rounding keeps order, all others lie between) decide which loop runs: the one without
bounds (most trials of the first two thirds), the one with bounds, or the exact one.

Tried, one thread of a Zen 3, million weights a second, Q4_K if nothing else is said:

- arrays of 64 groups left to LLVM's own vectors: 80; these vectors: 161
- tiles of 1, 2, 4 registers, one in flight, always with bounds: 114, 140, 124; where needed: 121, 148, 114 (4 spill)
- 1, 2, 4 tiles in flight (of 2 registers): 139, 144, 143, all within the noise of a shared machine
- always with bounds in Q2_K, where the choice is hard to predict: 159 for 164
- bounds by float maximum and minimum, which share two pipes with the additions: 153; on the bits: 161
- state kept in place: LLVM makes `store(choose(better, new, load))` a masked store, 20 cycles on AMD: 119

Not done: one addition of nine as a fused product with 1, which rounds alike and would even out the pipes (2.5 -> 2.25
cycles); leaving out `judge` where a bound says that no lane can win, which is rare before the last five trials.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    all_of,
    any_of,
    as_float,
    at_least_zero,
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
    root,
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
    clipped,
    column,
    load_columns,
    nearest,
    pack_fifth_bits,
    pack_nibbles,
    pack_pairs,
)

F32 = np.float32
HALF, STEP, INFINITY = F32(0.5), F32(0.1), F32(np.inf)
FITS = F32(2**21)  # quotients below are rounded alike by all routes
TILE = 2  # groups side by side
FLIGHT = 2  # tiles searched by turns
WIDE, TILE_ROW = TILE * LANES, TILE * ROW

# Scratch of one thread, offsets in bytes: the blocks' weights and codes; w and the tried codes of the tiles in flight.
COLUMNS = 0
CODES = COLUMNS + 256 * ROW
W = CODES + 256 * ROW
TRIED = W + FLIGHT * 32 * TILE_ROW
# A tile's state, a tile row each: what stays, and twice what changes. (Written in place, choices become masked stores.)
STATE = TRIED + FLIGHT * 32 * TILE_ROW
LOW, HIGH, SUM_W, SUM_X, DET, NEW_SCALE, NEW_MIN = (TILE_ROW * i for i in range(7))
FIRST, CHANGING = 7 * TILE_ROW, 6 * TILE_ROW
INVERSE, MIN, BEST, BEST_INVERSE, BEST_MIN, SCALE = (TILE_ROW * i for i in range(6))
STATE_SIZE = 19 * TILE_ROW
# What is found, a row a group. The minimum is to be added here (at most 0), subtracted on disk.
FOUND = STATE + FLIGHT * STATE_SIZE
SCALES, MINIMA, FLAT, INVERSES, STARTS, SUMS, GROUP_D, GROUP_M = (FOUND + 16 * ROW * i for i in range(8))
WORDS = GROUP_M + 16 * ROW
SCRATCH = WORDS + 8 * ROW


def regression(bounded, exact, held):
    """The kernel that finds codes, with or without bounds, or exactly for any quotient, or held to the bounds first."""

    @kernel
    def regress(x, w, k, inverse, minimum, top, tried):
        """Codes by the inverse scale and minimum to try, and the sums of w l, w l l, w l x."""
        sum_l = sum_l2 = sum_xl = repeat(ZERO, WIDE)
        for i in range(0, k * TILE_ROW, TILE_ROW):
            xi = load_floats(x + i, WIDE)
            quotient = inverse * (xi - minimum)
            if held:
                code = whole(at_most(choose(quotient > ZERO, quotient, ZERO), top))
            elif exact:
                code = clipped(quotient, 0, np.int64(top))
            elif bounded:
                code = at_most(at_least_zero(whole(quotient)), top)
            else:
                code = whole(quotient)
            store_vector(tried + i, code)
            wl = load_floats(w + i, WIDE) * code
            sum_l = sum_l + wl
            sum_l2 = sum_l2 + wl * code
            sum_xl = sum_xl + wl * xi
        return sum_l, sum_l2, sum_xl

    return regress


regress_inside, regress_bounded = regression(False, False, False), regression(True, False, False)
regress_exactly, regress_held = regression(True, True, False), regression(True, True, True)


@kernel
def regress(x, w, k, top, held, tried, s, now):
    """`regress` by INVERSE and MIN, in the cheapest way that gives ggml's codes."""
    inverse, minimum = load_floats(now + INVERSE, WIDE), load_floats(now + MIN, WIDE)
    a, b = inverse * (load_floats(s + LOW, WIDE) - minimum), inverse * (load_floats(s + HIGH, WIDE) - minimum)
    above = top + HALF
    if all_of((a >= -HALF) & (b >= -HALF) & (a < above) & (b < above)):
        return regress_inside(x, w, k, inverse, minimum, top, tried)
    if all_of((magnitude(a) < FITS) & (magnitude(b) < FITS)):
        return regress_bounded(x, w, k, inverse, minimum, top, tried)
    if held:
        return regress_held(x, w, k, inverse, minimum, top, tried)
    return regress_exactly(x, w, k, inverse, minimum, top, tried)


@kernel
def judge(x, w, k, scale, minimum, absolute, tried):
    """The error of the trial: sum of w |scale l + minimum - x|, or of its square."""
    error = repeat(ZERO, WIDE)
    for i in range(0, k * TILE_ROW, TILE_ROW):
        diff = scale * load_floats(tried + i, WIDE) + minimum - load_floats(x + i, WIDE)
        error = error + load_floats(w + i, WIDE) * (magnitude(diff) if absolute else diff * diff)
    return error


@kernel
def begin(x, w, k, top, absolute, tried, s, factor):
    """The range over `top` as the first scale, and the inverse of the next. Returns the bits of the largest |x|."""
    now = s + FIRST
    low = high = load_floats(x, WIDE)
    wi = load_floats(w, WIDE)
    sum_w, sum_x = wi, wi * low
    worst = bits_of(magnitude(low))
    for i in range(TILE_ROW, k * TILE_ROW, TILE_ROW):
        xi, wi = load_floats(x + i, WIDE), load_floats(w + i, WIDE)
        low, high = least(xi, low), greatest(xi, high)
        worst = greatest(worst, bits_of(magnitude(xi)))
        sum_w, sum_x = sum_w + wi, sum_x + wi * xi
    low = choose(low > ZERO, ZERO, low)  # -0 stays, whose sign some types store
    flat = low == high  # the search finds nothing then, but must not divide by 0: that would take the exact route
    inverse = choose(flat, ZERO, top / (high - low))
    scale = ONE / inverse
    store_vector(s + LOW, low)
    store_vector(s + HIGH, high)
    store_vector(s + SUM_W, sum_w)
    store_vector(s + SUM_X, sum_x)
    store_vector(now + INVERSE, inverse)
    # an infinite quotient has code 0 here, whatever the trials do
    store_vector(now + BEST_INVERSE, choose(inverse < INFINITY, inverse, ZERO))
    store_vector(now + MIN, low)
    store_vector(now + BEST_MIN, low)
    store_vector(now + SCALE, scale)
    regress(x, w, k, top, False, tried, s, now)
    store_vector(now + BEST, judge(x, w, k, scale, low, absolute, tried))
    store_vector(now + INVERSE, choose(flat, ZERO, factor / (high - low)))
    return worst


@kernel
def propose(x, w, k, top, held, tried, s, now):
    """Codes by INVERSE and MIN, and the scale and minimum of least squares for them; a minimum above 0 becomes 0."""
    sum_l, sum_l2, sum_xl = regress(x, w, k, top, held, tried, s, now)
    sum_w, sum_x = load_floats(s + SUM_W, WIDE), load_floats(s + SUM_X, WIDE)
    det = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / det
    minimum = (sum_l2 * sum_x - sum_l * sum_xl) / det
    above = minimum > ZERO
    if any_of(above):
        scale, minimum = choose(above, sum_xl / sum_l2, scale), choose(above, ZERO, minimum)
    store_vector(s + DET, det)
    store_vector(s + NEW_SCALE, scale)
    store_vector(s + NEW_MIN, minimum)


@kernel
def decide(x, w, k, absolute, tried, s, old, now, factor):
    """Keep the trial where it is better, and set the inverse of the next one."""
    new_scale, new_minimum = load_floats(s + NEW_SCALE, WIDE), load_floats(s + NEW_MIN, WIDE)
    new, best = judge(x, w, k, new_scale, new_minimum, absolute, tried), load_floats(old + BEST, WIDE)
    better = (load_floats(s + DET, WIDE) > ZERO) & (new < best)
    minimum, inverse = load_floats(old + MIN, WIDE), load_floats(old + INVERSE, WIDE)
    low, high = load_floats(s + LOW, WIDE), load_floats(s + HIGH, WIDE)
    store_vector(now + BEST_INVERSE, choose(better, inverse, load_floats(old + BEST_INVERSE, WIDE)))
    store_vector(now + BEST_MIN, choose(better, minimum, load_floats(old + BEST_MIN, WIDE)))
    store_vector(now + BEST, choose(better, new, best))
    store_vector(now + SCALE, choose(better, new_scale, load_floats(old + SCALE, WIDE)))
    minimum = choose(better, new_minimum, minimum)
    store_vector(now + MIN, minimum)
    store_vector(now + INVERSE, choose(low == high, ZERO, factor / (high - minimum)))


@kernel
def search(x, w, k, top, r_min, r_step, steps, absolute, held, s, group):
    """Scales and minima of FLIGHT tiles from `group` on, and the sums of their w.

    While one tile waits for its divisions the other one's loops run. Of a code that was tried nothing is kept but
    the inverse scale and minimum that gave the best ones: the final codes follow from the stored scales anyway,
    except in groups whose scale became 0.
    """
    worst = repeat(0, WIDE)
    size = k * TILE_ROW
    for t in range(FLIGHT):
        state, at = s + STATE + t * STATE_SIZE, t * size
        found = begin(x + at, w + at, k, top, absolute, s + TRIED + at, state, F32(r_min + top))
        worst = greatest(worst, found)
    old, new = FIRST, FIRST + CHANGING
    for step in range(1, steps + 2):
        factor = F32(F32(r_min + r_step * F32(step)) + top)  # of the next trial
        for t in range(FLIGHT):
            state, at = s + STATE + t * STATE_SIZE, t * size
            propose(x + at, w + at, k, top, held, s + TRIED + at, state, state + old)
        for t in range(FLIGHT):
            state, at = s + STATE + t * STATE_SIZE, t * size
            decide(x + at, w + at, k, absolute, s + TRIED + at, state, state + old, state + new, factor)
        old, new = new, old
    for t in range(FLIGHT):
        state, to = s + STATE + t * STATE_SIZE, s + group * ROW + t * TILE_ROW
        low, best = load_floats(state + LOW, WIDE), state + old
        flat = low == load_floats(state + HIGH, WIDE)
        store_vector(to + SCALES, choose(flat, ZERO, load_floats(best + SCALE, WIDE)))
        store_vector(to + MINIMA, choose(flat, low, load_floats(best + MIN, WIDE)))
        store_vector(to + FLAT, choose(flat, ONE, repeat(ZERO, WIDE)))
        store_vector(to + INVERSES, load_floats(best + BEST_INVERSE, WIDE))
        store_vector(to + STARTS, load_floats(best + BEST_MIN, WIDE))
        store_vector(to + SUMS, load_floats(state + SUM_W, WIDE))
    return worst


@kernel
def found_code(x, inverse, minimum, flat, top, held):
    """The code that the search found for x (from the inverse scale and minimum that were best); 0 in a flat group."""
    quotient = inverse * (x - minimum)
    if held:
        quotient = at_most(choose(quotient > ZERO, quotient, ZERO), F32(top))
    return choose(flat, 0, between(nearest(quotient), 0, top))


@kernel
def recode(s, k, top, held):
    """The final codes: nearest to (x + group_m) / group_d; those of the search where group_d is 0."""
    for g in range(256 // k):
        row = s + g * ROW
        d, m = load_floats(row + GROUP_D, LANES), load_floats(row + GROUP_M, LANES)
        x, codes = s + COLUMNS + column(g, 0, k, TILE), s + CODES + g * k * ROW
        for i in range(k):
            quotient = (load_floats(x + i * TILE_ROW, LANES) + m) / d
            store_vector(codes + i * ROW, between(nearest(quotient), 0, top))
        zero = d == ZERO
        if any_of(zero):
            flat = load_floats(row + FLAT, LANES) != ZERO
            inverse, minimum = load_floats(row + INVERSES, LANES), load_floats(row + STARTS, LANES)
            for i in range(k):
                code = found_code(load_floats(x + i * TILE_ROW, LANES), inverse, minimum, flat, top, held)
                store_vector(codes + i * ROW, choose(zero, code, load_words(codes + i * ROW, LANES)))


@kernel
def most(rows, count, sign):
    """The largest of `count` rows times sign, 0 if none is positive."""
    out = repeat(ZERO, LANES)
    for g in range(count):
        out = greatest(sign * load_floats(rows + g * ROW, LANES), out)
    return out


@kernel
def step_of(largest, top, out, stride):
    """Store the scale whose `top`-fold is the largest, 0 if that is 0. Returns its bits, and the factor to codes."""
    half = halves(largest / top)
    scatter(out, stride, half)
    return half, choose(largest > ZERO, top / largest, ZERO)


@kernel
def q45_scales(s, out, stride):
    """Store d, dmin and the twelve bytes of eight scales and minima. Returns the largest bits of d and dmin."""
    d_bits, inv_d = step_of(most(s + SCALES, 8, ONE), F32(63), out, stride)
    m_bits, inv_m = step_of(most(s + MINIMA, 8, -ONE), F32(63), out + 2, stride)
    d, dmin = half_floats(d_bits), half_floats(m_bits)
    first = second = third = repeat(0, LANES)
    for g in range(8):
        row = s + g * ROW
        scale = least(nearest(inv_d * load_floats(row + SCALES, LANES)) & 255, 63)
        minimum = least(nearest(inv_m * (-ONE * load_floats(row + MINIMA, LANES))) & 255, 63)
        store_vector(row + GROUP_D, d * as_float(scale))
        store_vector(row + GROUP_M, dmin * as_float(minimum))
        if g < 4:
            first, second = first | (scale << 8 * g), second | (minimum << 8 * g)
        else:
            by = 8 * (g - 4)
            first, second = first | ((scale >> 4) << (by + 6)), second | ((minimum >> 4) << (by + 6))
            third = third | (((scale & 15) | ((minimum & 15) << 4)) << by)
    scatter(out + 4, stride, first)
    scatter(out + 8, stride, second)
    scatter(out + 12, stride, third)
    return greatest(extended(d_bits) & 0x7FFF, extended(m_bits) & 0x7FFF)


@kernel
def q45_weights(x, w):
    """w = sqrt(mean x²) + |x|, of a tile."""
    total = repeat(ZERO, WIDE)
    for i in range(0, 32 * TILE_ROW, TILE_ROW):
        xi = load_floats(x + i, WIDE)
        total = total + xi * xi
    mean = root(total / F32(32))
    for i in range(0, 32 * TILE_ROW, TILE_ROW):
        store_vector(w + i, mean + magnitude(load_floats(x + i, WIDE)))


def q45_encoder(bits, nbytes, r_min, steps):
    """The kernel of Q4_K or Q5_K: n blocks -> nbytes each. Returns whether a weight or a scale may not be finite."""
    top, low, size = (1 << bits) - 1, F32(r_min), 32 * TILE_ROW

    @kernel
    def encode(x, out, n, s):
        worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
        for b in range(0, n, LANES):
            to = out + nbytes * b
            load_columns(x + 1024 * b, s + COLUMNS, 32, TILE)
            for g in range(0, 8, TILE * FLIGHT):
                columns = s + COLUMNS + column(g, 0, 32, TILE)
                for t in range(FLIGHT):
                    q45_weights(columns + t * size, s + W + t * size)
                worst = greatest(worst, search(columns, s + W, 32, F32(top), low, STEP, steps, False, False, s, g))
            worst_half = greatest(worst_half, q45_scales(s, to, nbytes))
            recode(s, 32, top, False)
            for p in range(4):
                pack_nibbles(s + CODES + 64 * p * ROW, s + WORDS, to + nbytes - 128 + 32 * p, nbytes)
            if bits == 5:
                pack_fifth_bits(s + CODES, s + WORDS, to + 16, nbytes)
        return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)

    return encode


q4_k, q5_k = q45_encoder(4, 144, -1.0, 20), q45_encoder(5, 176, -0.5, 15)


@kernel
def q2_scales(s, out):
    """Store d, dmin and sixteen bytes of a scale and a minimum. Returns the largest bits of d and dmin."""
    d_bits, inv_d = step_of(most(s + SCALES, 16, ONE), F32(15), out + 80, 84)
    m_bits, inv_m = step_of(most(s + MINIMA, 16, -ONE), F32(15), out + 82, 84)
    d, dmin = half_floats(d_bits), half_floats(m_bits)
    for q in range(4):
        word = repeat(0, LANES)
        for j in range(4):
            row = s + (4 * q + j) * ROW
            both = nearest(inv_d * load_floats(row + SCALES, LANES))
            both = both | (nearest(inv_m * (-ONE * load_floats(row + MINIMA, LANES))) << 4)
            store_vector(row + GROUP_D, d * as_float(both & 15))
            store_vector(row + GROUP_M, dmin * as_float((both >> 4) & 15))
            word = word | ((both & 255) << (8 * j))
        scatter(out + 4 * q, 84, word)
    return greatest(extended(d_bits) & 0x7FFF, extended(m_bits) & 0x7FFF)


@kernel
def q2_k(x, out, n, s):
    """n blocks -> 84 bytes each; w = |x|. Returns whether a weight or a scale may not be finite."""
    worst, worst_half = repeat(0, WIDE), repeat(0, LANES)
    for b in range(0, n, LANES):
        to = out + 84 * b
        load_columns(x + 1024 * b, s + COLUMNS, 16, TILE)
        for g in range(0, 16, TILE * FLIGHT):
            columns = s + COLUMNS + column(g, 0, 16, TILE)
            for i in range(0, FLIGHT * 16 * TILE_ROW, TILE_ROW):
                store_vector(s + W + i, magnitude(load_floats(columns + i, WIDE)))
            worst = greatest(worst, search(columns, s + W, 16, F32(3), F32(-0.5), STEP, 15, True, False, s, g))
        worst_half = greatest(worst_half, q2_scales(s, to))
        recode(s, 16, 3, False)
        for h in range(2):
            pack_pairs(s + CODES + 128 * h * ROW, s + WORDS, to + 16 + 32 * h, 84)
    return any_of(worst >= NOT_FINITE) | any_of(worst_half >= NOT_FINITE_HALF)
