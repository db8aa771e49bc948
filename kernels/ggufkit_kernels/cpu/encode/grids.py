"""Encoders of IQ2 and IQ3: groups of 16 or 32 magnitudes that become points of a grid, run by run of 8 or 4.

In the order of operations of `ggufkit_formats.blocks.iq_search`, one group after the other. The trials of a group, 13
to 31 scales, do not depend on each other, so a trial is a lane: codes, places and both sums of all trials are found at
once, each sum in its order. Between them stands a loop over runs and trials that looks up each place's point, or
searches its neighbours, where a neighbour is a lane (near.py). Which trial wins is decided in order, as in ggml.
"""

from __future__ import annotations

import numpy as np
from ggufkit_formats.blocks.iq_search import KINDS

from ..jit import kernel
from ..simd import (
    LANES,
    as_bytes,
    as_float,
    bits_of,
    choose,
    get_f32,
    get_i32,
    get_i64,
    highest_word,
    load_bytes,
    load_floats,
    lowest,
    lowest_bit,
    magnitude,
    mask_bits,
    put_f16,
    put_f32,
    repeat,
    root,
    scatter,
    store_vector,
)
from .layout import ONE, ZERO, between, nearest
from .near import FACTORS, PLACE, POINTS, TABLES_NBYTES, nearest_of_eight, nearest_of_four

F32, I32 = np.float32, np.int32
HALF, NAN, QUARTER = F32(0.5), F32(np.nan), F32(0.25)
ABORTS = int(F32(1e15).view(np.int32))  # bits of a magnitude from here on make ggml abort, sooner or later
TOO_LARGE = F32(65520)  # rounds to an infinite float16
MAGIC = F32(12582912)

# Scratch of one thread, offsets in bytes: of a block's 256 weights their magnitudes, weights of errors w, w times
# magnitude, sqrt(w); signs of each eight; a group's trials, WIDEST side by side: scales, sums, places, points, levels;
# the block's scales and points.
WIDEST = 32
VALUES, W, WX, ROOT_W = (TABLES_NBYTES + 1024 * i for i in range(4))
SIGNS = ROOT_W + 1024
SCALE, SUM_X, SUM_2 = (SIGNS + 128 + 4 * WIDEST * i for i in range(3))
PLACES = SUM_2 + 4 * WIDEST
FOUND = PLACES + 8 * 4 * WIDEST
LEVELS = FOUND + 8 * 4 * WIDEST
SCALES = LEVELS + 32 * 4 * WIDEST
NUMBERS = SCALES + 64
LIVE = NUMBERS + 256
CODES = LIVE + 64
SCRATCH = CODES + 128


@kernel
def put_byte(at, x):
    store_vector(at, as_bytes(repeat(x, 1)))


@kernel
def put_word(at, x):
    store_vector(at, repeat(x, 1))


@kernel
def whole_number(x):
    """The nearest integer, as `nearest` gives it."""
    return I32((F32(x + MAGIC).view(I32) & 0x7FFFFF) - 0x400000)


@kernel
def weigh(x, importance, s, factor, plain):
    """w and sqrt(w) of 256 weights whose mean square counts `factor` times; `plain` 1: x², 2: mean / 4 + x²."""
    total = ZERO
    for i in range(0, 1024, 4):
        total += get_f32(x + i) * get_f32(x + i)
    mean = F32(factor) * total / F32(256)
    worst = repeat(0, LANES)
    for i in range(0, 1024, 4 * LANES):
        xi = load_floats(x + i, LANES)
        size = bits_of(magnitude(xi))
        worst = choose(size > worst, size, worst)
        w = xi * xi
        if importance:
            w = load_floats(importance + i, LANES) * root(mean + w)
        elif plain == 2:
            w = QUARTER * mean + w
        store_vector(s + W + i, w)
        store_vector(s + ROOT_W + i, root(w))
    return highest_word(worst)


@kernel
def fold(x, s, even):
    """Magnitudes and signs. For an even number of minus signs the weight that matters least changes its sign."""
    for k in range(32):
        xs, values = load_floats(x + 32 * k, 8), s + VALUES + 32 * k
        minus = xs < ZERO
        signs = mask_bits(minus)
        store_vector(values, magnitude(xs))
        if even:
            odd = signs ^ (signs >> 4)
            odd = odd ^ (odd >> 2)
            if (odd ^ (odd >> 1)) & 1:
                matters = load_floats(s + W + 32 * k, 8) * xs * xs
                least = lowest_bit(mask_bits(matters == lowest(matters))) & 7
                signs = signs ^ (1 << least)
                put_f32(values + 4 * least, -get_f32(values + 4 * least))
            signs = signs & 127
        put_word(s + SIGNS + 4 * k, signs)
    for i in range(0, 1024, 4 * LANES):
        store_vector(s + WX + i, load_floats(s + W + i, LANES) * load_floats(s + VALUES + i, LANES))


@kernel
def whole_scale(x, w, codes):
    """The scale for integers up to 4 of 32 magnitudes, as iq_search.whole_scale finds it."""
    largest = ZERO
    for i in range(0, 128, 4):
        largest = max(largest, get_f32(x + i))
    inverse, best = F32(F32(4) / largest), ZERO
    for step in range(-5, 5):
        tried, first = inverse, step == -5
        if not first:
            if step == 0:
                continue
            tried = F32(F32(F32(0.1) * F32(step) + F32(4)) / largest)
        scale = F32(ONE / tried)
        error = ZERO
        for i in range(0, 128, 4):
            code = whole_number(tried * get_f32(x + i))
            code = code & 255 if first else min(code, I32(4))
            diff = F32(get_f32(x + i) - scale * F32(code))
            error += get_f32(w + i) * diff * diff
        if first:
            best = error
        elif error < best:
            best, inverse = error, tried
    lx = l2 = ZERO
    for i in range(0, 128, 4):
        code = min(whole_number(inverse * get_f32(x + i)), I32(4))
        put_word(codes + i, code & 255)
        wi = get_f32(w + i)
        lx += wi * get_f32(x + i) * F32(code)
        l2 += wi * F32(code) * F32(code)
    for _ in range(5):
        changed = False
        for i in range(0, 128, 4):
            wi, xi, old = get_f32(w + i), get_f32(x + i), get_i32(codes + i)
            rest_lx, rest_l2 = F32(lx - wi * xi * F32(old)), F32(l2 - wi * F32(old) * F32(old))
            if rest_lx > ZERO and rest_l2 > ZERO:
                code = min(whole_number(xi * rest_l2 / rest_lx), I32(4))
                if code != old:
                    rest_lx += wi * xi * F32(code)
                    rest_l2 += wi * F32(code) * F32(code)
                    if rest_lx * rest_lx * l2 > lx * lx * rest_l2:
                        put_word(codes + i, code & 255)
                        lx, l2, changed = rest_lx, rest_l2, True
        if not changed:
            break
    return F32(lx / l2) if l2 > ZERO else ZERO


def searching(name):
    """The kernel that searches a group: its points go to NUMBERS. Gives its scale, and whether a point missed."""
    kind = KINDS[name]
    k, length, top, all_again = kind.group, kind.length, kind.top, kind.all_again
    runs, trials = kind.group // kind.length, 2 * kind.steps + 1
    wide = -(-trials // LANES) * LANES
    by_integers, starts_off = name == "IQ2_XXS", name == "IQ3_S"
    near = nearest_of_four if length == 4 else nearest_of_eight
    n_max, row = F32(2 * top - 1), 4 * wide

    @kernel
    def try_all(s, x, g, largest):
        """Levels of all trials, and their sums. Returns whether a point was missing."""
        inverse = load_floats(get_i64(s + FACTORS), wide) / largest
        store_vector(s + SCALE, ONE / inverse)
        for r in range(runs):
            place = repeat(0, wide)
            for i in range(length):
                at = x + 4 * (length * (r + 1) - 1 - i)
                code = between(nearest(HALF * (inverse * get_f32(at) - ONE)), 0, top - 1)
                place = (place << 3) + code if length == 4 else place + place + place + code
            store_vector(s + PLACES + r * row, place)
        places, points, missing = get_i64(s + PLACE), get_i64(s + POINTS), False
        for r in range(runs):
            at = 4 * (g * k + length * r)
            for t in range(trials):
                point = get_i32(places + 4 * get_i32(s + PLACES + r * row + 4 * t))
                if point < 0:
                    point = near(s, point, s + VALUES + at, s + ROOT_W + at, get_f32(s + SCALE + 4 * t), ZERO)
                    if point < 0:
                        point, missing = 0, True
                put_word(s + FOUND + r * row + 4 * t, point)
                levels = as_float(load_bytes(points + length * point, length))
                scatter(s + LEVELS + r * length * row + 4 * t, row, levels)
        sum_x = sum_2 = repeat(ZERO, wide)
        for i in range(k):
            q = load_floats(s + LEVELS + i * row, wide)
            at = 4 * (g * k + i)
            sum_x = sum_x + get_f32(s + WX + at) * q
            sum_2 = sum_2 + get_f32(s + W + at) * q * q
        store_vector(s + SUM_X, sum_x)
        store_vector(s + SUM_2, sum_2)
        return missing

    @kernel
    def search(s, g):
        x, numbers = s + VALUES + 4 * k * g, s + NUMBERS + 4 * runs * g
        if by_integers:
            scale = whole_scale(x, s + W + 4 * k * g, s + CODES)
            largest = F32(scale * F32(top))
            if largest <= ZERO:
                for r in range(runs):
                    put_word(numbers + 4 * r, 0)
                return ZERO, False
        else:
            largest = get_f32(x)
            for i in range(4, 4 * k, 4):
                largest = max(largest, get_f32(x + i))
            scale = F32(largest / n_max)
        missing = try_all(s, x, g, largest)
        best, won = ZERO, -1
        for t in range(trials):
            sum_x, sum_2 = get_f32(s + SUM_X + 4 * t), get_f32(s + SUM_2 + 4 * t)
            if sum_2 > ZERO and sum_x * sum_x > best * sum_2:
                scale = F32(sum_x / sum_2)
                best, won = F32(scale * sum_x), t
        places, points = get_i64(s + PLACE), get_i64(s + POINTS)
        off = won < 0 and starts_off
        for r in range(runs):
            put_word(numbers + 4 * r, get_i32(s + FOUND + r * row + 4 * won) if won >= 0 else 0)
            if won >= 0:
                off |= get_i32(places + 4 * get_i32(s + PLACES + r * row + 4 * won)) < 0
        if not (scale > ZERO and (off or by_integers)):
            return scale, missing
        inverse = F32(ONE / scale)
        for r in range(runs):
            if not all_again and get_i32(places + 4 * get_i32(s + PLACES + r * row + 4 * won)) >= 0:
                continue
            place, at = 0, 4 * (g * k + length * r)
            for i in range(length - 1, -1, -1):
                code = whole_number(HALF * (inverse * get_f32(s + VALUES + at + 4 * i) - ONE))
                code = min(max(code, I32(0)), I32(top - 1))
                place = place * top + code
            point = get_i32(places + 4 * place)
            if point < 0:
                point = near(s, point, s + VALUES + at, s + ROOT_W + at, scale, ZERO)
                if point < 0:
                    point, missing = 0, True
            put_word(numbers + 4 * r, point)
        sum_x = sum_2 = ZERO
        for r in range(runs):
            point = get_i32(numbers + 4 * r)
            store_vector(s + CODES, as_float(load_bytes(points + length * point, length)))
            for i in range(length):
                q, at = get_f32(s + CODES + 4 * i), 4 * (g * k + length * r + i)
                sum_x += get_f32(s + WX + at) * q
                sum_2 += get_f32(s + W + at) * q * q
        if sum_2 > ZERO:
            scale = F32(sum_x / sum_2)
        return scale, missing

    return search


# -- blocks: a word of NUMBERS a run, of SIGNS eight weights, of CODES (stored scales) and LIVE a group ---------------


@kernel
def put_pairs(s, out, count):
    """Stored scales of four bits, two a byte."""
    for g in range(count):
        put_byte(out + g, get_i32(s + CODES + 8 * g) | (get_i32(s + CODES + 8 * g + 4) << 4))


@kernel
def seven_signs(s, g):
    """Signs of seven bits of 32 weights and the stored scale of a group."""
    word = get_i32(s + CODES + 4 * g) << 28
    for j in range(4):
        word |= get_i32(s + SIGNS + 4 * (4 * g + j)) << (7 * j)
    return word


@kernel
def put_iq2_xxs(s, out):
    for g in range(8):
        for j in range(4):
            put_byte(out + 2 + 8 * g + j, get_i32(s + NUMBERS + 4 * (4 * g + j)))
        put_word(out + 6 + 8 * g, seven_signs(s, g))


@kernel
def put_iq2_xs(s, out):
    for p in range(32):
        number = get_i32(s + NUMBERS + 4 * p) | (get_i32(s + SIGNS + 4 * p) << 9)
        put_byte(out + 2 + 2 * p, number & 255)
        put_byte(out + 3 + 2 * p, number >> 8)
    put_pairs(s, out + 66, 8)


@kernel
def put_iq2_s(s, out):
    for q in range(8):
        high = 0
        for j in range(4):
            p = 4 * q + j
            number = get_i32(s + NUMBERS + 4 * p)
            put_byte(out + 2 + p, number & 255)
            put_byte(out + 34 + p, get_i32(s + SIGNS + 4 * p))
            high |= (number >> 8) << (2 * j)
        put_byte(out + 66 + q, high)
    put_pairs(s, out + 74, 8)


@kernel
def put_iq3_xxs(s, out):
    for p in range(64):
        put_byte(out + 2 + p, get_i32(s + NUMBERS + 4 * p))
    for g in range(8):
        put_word(out + 66 + 4 * g, seven_signs(s, g))


@kernel
def put_iq3_s(s, out):
    """As in ggml, low bits and signs of groups behind one of zeros move up."""
    for i in range(2, 110):
        put_byte(out + i, 0)
    to = 0
    for g in range(8):
        if not get_i32(s + LIVE + 4 * g):
            continue
        high = 0
        for j in range(8):
            number = get_i32(s + NUMBERS + 4 * (8 * g + j))
            put_byte(out + 2 + 8 * to + j, number & 255)
            high |= (number >> 8) << j
        put_byte(out + 66 + g, high)
        for j in range(4):
            put_byte(out + 74 + 4 * to + j, get_i32(s + SIGNS + 4 * (4 * g + j)))
        to += 1
    put_pairs(s, out + 106, 4)


@kernel
def clear(s, numbers, n_numbers, signs, n_signs):
    for i in range(n_numbers):
        put_word(s + NUMBERS + 4 * (numbers + i), 0)
    for i in range(n_signs):
        put_word(s + SIGNS + 4 * (signs + i), 0)


def encoder(name, put, nbytes):
    """The kernel of a type: n blocks of `nbytes`, which `put` writes but for d."""
    kind = KINDS[name]
    k, groups, runs, even = kind.group, 256 // kind.group, kind.group // kind.length, kind.even
    factor, smallest, d_factor = kind.mean_factor, F32(kind.smallest), F32(kind.d_factor)
    plain, by_integers, all_signs = 2 if name == "IQ2_S" else 1, name == "IQ2_XXS", 127 if kind.even else 255
    search = searching(name)

    @kernel
    def group(s, g):
        """A group's scale, not negative, its points and signs; whether ggml would abort."""
        largest = get_f32(s + VALUES + 4 * k * g)
        for i in range(1, k):
            largest = max(largest, get_f32(s + VALUES + 4 * (k * g + i)))
        live = not (largest < smallest or largest == ZERO)
        put_word(s + LIVE + 4 * g, 1 if live else 0)
        scale, missing = ZERO, False
        if live:
            scale, missing = search(s, g)
        if not live or (by_integers and scale == ZERO):
            clear(s, runs * g, runs, k // 8 * g, k // 8)
        if scale < ZERO:
            scale = -scale
            for i in range(k // 8 * g, k // 8 * (g + 1)):
                put_word(s + SIGNS + 4 * i, get_i32(s + SIGNS + 4 * i) ^ all_signs)
        return scale, missing or not scale >= ZERO

    @kernel
    def block(x, importance, out, s):
        bad = weigh(x, importance, s, factor, plain) >= ABORTS
        fold(x, s, even)
        most = ZERO
        for g in range(groups):
            scale, aborts = group(s, g)
            bad |= aborts
            most = max(most, scale)
            put_f32(s + SCALES + 4 * g, scale)
        if most == ZERO and even:
            clear(s, 0, groups * runs, 0, 32)
        d = F32(most / F32(31))
        inverse = F32(ONE / d)
        for g in range(groups):
            code = whole_number(HALF * (inverse * get_f32(s + SCALES + 4 * g) - ONE))
            put_word(s + CODES + 4 * g, min(max(code, I32(0)), I32(15)) if most != ZERO else 0)
        put(s, out)
        stored = NAN if bad else F32(d * d_factor)
        put_f16(out, stored)
        return not stored < TOO_LARGE

    @kernel
    def encode(x, out, n, s, importance, cols, first):
        due = False
        for b in range(n):
            weights = importance + 4 * ((first + 256 * b) % cols) if importance else 0
            due |= block(x + 1024 * b, weights, out + nbytes * b, s)
        return due

    return encode


encode_iq3_s, encode_iq3_xxs = encoder("IQ3_S", put_iq3_s, 110), encoder("IQ3_XXS", put_iq3_xxs, 98)
encode_iq2_s, encode_iq2_xs = encoder("IQ2_S", put_iq2_s, 82), encoder("IQ2_XS", put_iq2_xs, 74)
encode_iq2_xxs = encoder("IQ2_XXS", put_iq2_xxs, 66)

# n blocks each. They return whether a weight or a scale may not be finite.


@kernel
def iq3_s(x, out, n, s, importance, cols, first):
    return encode_iq3_s(x, out, n, s, importance, cols, first)


@kernel
def iq3_xxs(x, out, n, s, importance, cols, first):
    return encode_iq3_xxs(x, out, n, s, importance, cols, first)


@kernel
def iq2_s(x, out, n, s, importance, cols, first):
    return encode_iq2_s(x, out, n, s, importance, cols, first)


@kernel
def iq2_xs(x, out, n, s, importance, cols, first):
    return encode_iq2_xs(x, out, n, s, importance, cols, first)


@kernel
def iq2_xxs(x, out, n, s, importance, cols, first):
    return encode_iq2_xxs(x, out, n, s, importance, cols, first)
