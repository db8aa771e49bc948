"""Encoders of IQ1_S and IQ1_M: -1, 0 or 1 with a shift, in points of a grid of eight.

In the order of operations of `ggufkit_formats.blocks.iq1_search`. Sorting a group and trying all its splits (561 of a
group of 32, with two shifts each; 153 of 16, with four) are done a group a lane (layout.py): a weight's place in the
order is how many others come before it, which takes comparisons only. The points of the codes found, and the search of
neighbours where codes are no point, are done one group after the other (near.py).
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    LANES,
    any_of,
    bits_of,
    choose,
    get_f32,
    get_i32,
    get_i64,
    get_u8,
    greatest,
    highest_word,
    load_floats,
    magnitude,
    put_f16,
    put_f32,
    repeat,
    root,
    store_vector,
)
from .grids import ABORTS, HALF, NAN, TOO_LARGE, put_byte, put_word, whole_number
from .layout import ONE, ROW, ZERO, load_columns
from .near import LARGEST, PLACE, POINTS, TABLES_NBYTES, nearest_of_eight

F32, I32 = np.float32, np.int32
P0, P1, P2 = F32(-0.875), F32(0.125), F32(1.125)  # what codes stand for, an eighth higher
M0, M1, M2 = F32(-1.125), F32(-0.125), F32(0.875)  # and an eighth lower

# Scratch of one thread, offsets in bytes: LANES blocks' weights and errors' weights in columns, the latter by rows too;
# of a group the places in the order, sorted products and weights (of each half in IQ1_M), their running sums, the sums
# behind a place times what code 2 stands for; the split found. Then by block: scales, shifts, points, a float16.
COLUMNS, WEIGHTS, ROWS = (TABLES_NBYTES + 256 * ROW * i for i in range(3))
RANKS = ROWS + 256 * ROW
SORTED_X, SORTED_W = (RANKS + 32 * ROW + 64 * ROW * i for i in range(2))
SUMS_X, SUMS_W = (SORTED_W + 64 * ROW + 66 * ROW * i for i in range(2))
TAIL_XP, TAIL_XM, TAIL_WP, TAIL_WM = (SUMS_W + 66 * ROW + 33 * ROW * i for i in range(4))
SCALE, FIRST, SECOND, SHIFT, LARGE = (TAIL_WM + 33 * ROW + ROW * i for i in range(5))
SCALES, SHIFTS = (LARGE + ROW + 64 * LANES * i for i in range(2))
NUMBERS = SHIFTS + 64 * LANES
BAD = NUMBERS + 128 * LANES
STORED = BAD + ROW
SCRATCH = STORED + 64


@kernel
def weigh(x, importance, w):
    """The weights of errors of a block, and the bits of its largest magnitude."""
    total = ZERO
    for i in range(0, 1024, 4):
        total += get_f32(x + i) * get_f32(x + i)
    mean = F32(2) * total / F32(256)
    worst = repeat(0, LANES)
    for i in range(0, 1024, 4 * LANES):
        xi = load_floats(x + i, LANES)
        worst = greatest(worst, bits_of(magnitude(xi)))
        square = xi * xi
        if importance:
            square = load_floats(importance + i, LANES) * root(mean + square)
        store_vector(w + i, square)
    return highest_word(worst)


@kernel
def sort(s, x, w, k, halves):
    """Places in the order; w x and w in that order, in IQ1_M of each half with zeros for the other; running sums."""
    largest = repeat(ZERO, LANES)
    for i in range(k):
        xi, rank = load_floats(x + i * ROW, LANES), repeat(0, LANES)
        largest = greatest(magnitude(xi), largest)
        for j in range(i):
            rank = choose(load_floats(x + j * ROW, LANES) <= xi, rank + 1, rank)
        for j in range(i + 1, k):
            rank = choose(load_floats(x + j * ROW, LANES) < xi, rank + 1, rank)
        store_vector(s + RANKS + i * ROW, rank)
        for lane in range(LANES):
            to, at = get_i32(s + RANKS + i * ROW + 4 * lane) * ROW + 4 * lane, i * ROW + 4 * lane
            wi = get_f32(w + at)
            wx = wi * get_f32(x + at)
            second = halves and i >= k // 2
            put_f32(s + SORTED_X + to, ZERO if second else wx)
            put_f32(s + SORTED_W + to, ZERO if second else wi)
            if halves:
                put_f32(s + SORTED_X + 32 * ROW + to, wx if second else ZERO)
                put_f32(s + SORTED_W + 32 * ROW + to, wi if second else ZERO)
    for half in range(2 if halves else 1):
        sum_x = sum_w = repeat(ZERO, LANES)
        store_vector(s + SUMS_X + half * 33 * ROW, sum_x)
        store_vector(s + SUMS_W + half * 33 * ROW, sum_w)
        for i in range(k):
            sum_x = sum_x + load_floats(s + SORTED_X + (32 * half + i) * ROW, LANES)
            sum_w = sum_w + load_floats(s + SORTED_W + (32 * half + i) * ROW, LANES)
            store_vector(s + SUMS_X + (33 * half + i + 1) * ROW, sum_x)
            store_vector(s + SUMS_W + (33 * half + i + 1) * ROW, sum_w)
    store_vector(s + LARGE, largest)


@kernel
def keep(s, scale, first, second, shift):
    store_vector(s + SCALE, scale)
    store_vector(s + FIRST, first)
    store_vector(s + SECOND, second)
    store_vector(s + SHIFT, shift)


@kernel
def split_one(s):
    """The best split of IQ1_S: shift 0 for an eighth higher, 1 for an eighth lower, -1 for none."""
    last_x, last_w = load_floats(s + SUMS_X + 32 * ROW, LANES), load_floats(s + SUMS_W + 32 * ROW, LANES)
    for i in range(33):
        behind_x = last_x - load_floats(s + SUMS_X + i * ROW, LANES)
        behind_w = last_w - load_floats(s + SUMS_W + i * ROW, LANES)
        store_vector(s + TAIL_XP + i * ROW, behind_x * P2)
        store_vector(s + TAIL_XM + i * ROW, behind_x * M2)
        store_vector(s + TAIL_WP + i * ROW, behind_w * P2 * P2)
        store_vector(s + TAIL_WM + i * ROW, behind_w * M2 * M2)
    scale, score = load_floats(s + LARGE, LANES), repeat(-LARGEST, LANES)
    first = second = shift = repeat(-1, LANES)
    for a in range(33):
        xa, wa = load_floats(s + SUMS_X + a * ROW, LANES), load_floats(s + SUMS_W + a * ROW, LANES)
        xp, xm, wp, wm = xa * P0, xa * M0, wa * P0 * P0, wa * M0 * M0
        for b in range(a, 33):
            at = b * ROW
            x = load_floats(s + SUMS_X + at, LANES) - xa
            w = load_floats(s + SUMS_W + at, LANES) - wa
            qx = xp + x * P1 + load_floats(s + TAIL_XP + at, LANES)
            q2 = wp + w * P1 * P1 + load_floats(s + TAIL_WP + at, LANES)
            better = (q2 > ZERO) & (qx * qx > score * q2)
            if any_of(better):
                new = qx / q2
                scale, score = choose(better, new, scale), choose(better, new * qx, score)
                first, second, shift = choose(better, a, first), choose(better, b, second), choose(better, 0, shift)
            qx = xm + x * M1 + load_floats(s + TAIL_XM + at, LANES)
            q2 = wm + w * M1 * M1 + load_floats(s + TAIL_WM + at, LANES)
            better = (q2 > ZERO) & (qx * qx > score * q2)
            if any_of(better):
                new = qx / q2
                scale, score = choose(better, new, scale), choose(better, new * qx, score)
                first, second, shift = choose(better, a, first), choose(better, b, second), choose(better, 1, shift)
    keep(s, scale, first, second, shift)


@kernel
def split_two(s):
    """The best split of IQ1_M: bit 1 of the shift is that of the first half, bit 0 that of the second; -1 for none."""
    # p0² - p1² and p1² - p2², for an eighth higher; for an eighth lower they are -n2 and -n1
    n1, n2, half = F32(0.75), F32(-1.25), 33 * ROW
    x0, x1 = load_floats(s + SUMS_X + 16 * ROW, LANES), load_floats(s + SUMS_X + half + 16 * ROW, LANES)
    w0, w1 = load_floats(s + SUMS_W + 16 * ROW, LANES), load_floats(s + SUMS_W + half + 16 * ROW, LANES)
    xp0, xm0, xp1, xm1 = x0 * P2, x0 * M2, x1 * P2, x1 * M2
    wp0, wm0, wp1, wm1 = w0 * P2 * P2, w0 * M2 * M2, w1 * P2 * P2, w1 * M2 * M2
    scale, score = load_floats(s + LARGE, LANES), repeat(-LARGEST, LANES)
    first = second = shift = repeat(-1, LANES)
    for a in range(17):
        xa0, xa1 = load_floats(s + SUMS_X + a * ROW, LANES), load_floats(s + SUMS_X + half + a * ROW, LANES)
        wa0, wa1 = load_floats(s + SUMS_W + a * ROW, LANES), load_floats(s + SUMS_W + half + a * ROW, LANES)
        ap0, am0, ap1, am1 = wp0 + wa0 * n1, wm0 + wa0 * -n2, wp1 + wa1 * n1, wm1 + wa1 * -n2
        for b in range(a, 17):
            at = b * ROW
            both0 = xa0 + load_floats(s + SUMS_X + at, LANES)
            both1 = xa1 + load_floats(s + SUMS_X + half + at, LANES)
            wb0, wb1 = load_floats(s + SUMS_W + at, LANES), load_floats(s + SUMS_W + half + at, LANES)
            qp0, qm0, qp1, qm1 = xp0 - both0, xm0 - both0, xp1 - both1, xm1 - both1
            vp0, vm0, vp1, vm1 = ap0 + wb0 * n2, am0 + wb0 * -n1, ap1 + wb1 * n2, am1 + wb1 * -n1
            for k in range(4):
                qx, q2 = qp0 + qp1, vp0 + vp1
                if k == 1:
                    qx, q2 = qp0 + qm1, vp0 + vm1
                elif k == 2:
                    qx, q2 = qm0 + qp1, vm0 + vp1
                elif k == 3:
                    qx, q2 = qm0 + qm1, vm0 + vm1
                better = (q2 > ZERO) & (qx * qx > score * q2)
                if any_of(better):
                    new = qx / q2
                    scale, score = choose(better, new, scale), choose(better, new * qx, score)
                    first, second = choose(better, a, first), choose(better, b, second)
                    shift = choose(better, k, shift)
    keep(s, scale, first, second, shift)


@kernel
def points_of(s, x, lane, g, k, halves):
    """A group's points, scale and shift from its split. Returns whether ggml would abort."""
    w, runs = s + ROWS + 1024 * lane + 4 * k * g, k // 8
    x += 4 * k * g
    scale, shift = get_f32(s + SCALE + 4 * lane), get_i32(s + SHIFT + 4 * lane)
    first, second = get_i32(s + FIRST + 4 * lane), get_i32(s + SECOND + 4 * lane)
    numbers = s + NUMBERS + 128 * lane + 4 * runs * g
    turned = scale < ZERO
    if turned:
        scale, shift = -scale, (3 if halves else 1) - shift
    bad, off = not scale < F32(np.inf), False
    places, points = get_i64(s + PLACE), get_i64(s + POINTS)
    for r in range(runs):
        lower = (shift >> (1 - r)) & 1 if halves else shift
        place = 0
        for i in range(7, -1, -1):
            rank = get_i32(s + RANKS + (8 * r + i) * ROW + 4 * lane)
            code = (1 if rank >= first else 0) + (1 if rank >= second else 0)
            place = 3 * place + (2 - code if turned else code)
        point = get_i32(places + 4 * place)
        if point < 0:
            off = True
            point = nearest_of_eight(s, point, x + 32 * r, w + 32 * r, scale, M0 if lower else P0)
            if point < 0:
                point, bad = 0, True
        put_word(numbers + 4 * r, point)
    if off:
        qx = q2 = ZERO
        for r in range(runs):
            lower = (shift >> (1 - r)) & 1 if halves else shift
            point = points + 8 * get_i32(numbers + 4 * r)
            for i in range(8):
                q = F32(get_u8(point + i)) + (M0 if lower else P0)
                wq = get_f32(w + 32 * r + 4 * i) * q
                qx += wq * get_f32(x + 32 * r + 4 * i)
                q2 += wq * q
        if qx > ZERO and q2 > ZERO:
            scale = F32(qx / q2)
    put_f32(s + SCALES + 64 * lane + 4 * g, scale)
    put_word(s + SHIFTS + 64 * lane + 4 * g, shift)
    return bad or not scale >= ZERO


@kernel
def groups_of(s, x, k, halves, smallest):
    """All groups of LANES blocks."""
    for g in range(256 // k):
        sort(s, s + COLUMNS + g * k * ROW, s + WEIGHTS + g * k * ROW, k, halves)
        if halves:
            split_two(s)
        else:
            split_one(s)
        for lane in range(LANES):
            if get_f32(s + LARGE + 4 * lane) < smallest or get_i32(s + SHIFT + 4 * lane) < 0:
                put_f32(s + SCALES + 64 * lane + 4 * g, ZERO)
                put_word(s + SHIFTS + 64 * lane + 4 * g, 0)
                for r in range(k // 8):
                    put_word(s + NUMBERS + 128 * lane + 4 * (k // 8 * g + r), 0)
            elif points_of(s, x + 1024 * lane, lane, g, k, halves):
                put_word(s + BAD + 4 * lane, 1)


@kernel
def prepare(s, x, importance, cols, column, k):
    """Weights of errors and columns of LANES blocks; which have weights that make ggml abort."""
    for lane in range(LANES):
        weights = importance + 4 * ((column + 256 * lane) % cols) if importance else 0
        worst = weigh(x + 1024 * lane, weights, s + ROWS + 1024 * lane)
        put_word(s + BAD + 4 * lane, 1 if worst >= ABORTS else 0)
    load_columns(x, s + COLUMNS, k, 1)
    load_columns(s + ROWS, s + WEIGHTS, k, 1)


@kernel
def stored_scales(scales, count):
    """The largest scale over 15; scales become what is stored, as int32."""
    most = ZERO
    for g in range(count):
        most = max(most, get_f32(scales + 4 * g))
    d = F32(most / F32(15))
    inverse = F32(ONE / d)
    for g in range(count):
        code = min(max(whole_number(HALF * (inverse * get_f32(scales + 4 * g) - ONE)), I32(0)), I32(7))
        put_word(scales + 4 * g, code if most != ZERO else 0)
    return d, most


@kernel
def put_s(s, lane, out):
    scales, shifts, numbers = s + SCALES + 64 * lane, s + SHIFTS + 64 * lane, s + NUMBERS + 128 * lane
    d, most = stored_scales(scales, 8)
    for g in range(8):
        word = get_i32(scales + 4 * g) << 12
        if most != ZERO:
            word |= get_i32(shifts + 4 * g) << 15
        for r in range(4):
            number = get_i32(numbers + 4 * (4 * g + r))
            put_byte(out + 2 + 4 * g + r, number & 255)
            word |= (number >> 8) << (3 * r)
        put_byte(out + 34 + 2 * g, word & 255)
        put_byte(out + 35 + 2 * g, word >> 8)
    stored = NAN if get_i32(s + BAD + 4 * lane) else F32(d * F32(1.125))
    put_f16(out, stored)
    return not stored < TOO_LARGE


@kernel
def put_m(s, lane, x, out):
    scales, shifts, numbers = s + SCALES + 64 * lane, s + SHIFTS + 64 * lane, s + NUMBERS + 128 * lane
    w, points = s + ROWS + 1024 * lane, get_i64(s + POINTS)
    d, most = stored_scales(scales, 16)
    qx = q2 = ZERO
    for p in range(32):
        shift, number = get_i32(shifts + 4 * (p // 2)), get_i32(numbers + 4 * p)
        lower = (shift >> (1 - p % 2)) & 1
        factor = F32(2 * get_i32(scales + 4 * (p // 2)) + 1)
        for i in range(8):
            q = (F32(get_u8(points + 8 * number + i)) + (M0 if lower else P0)) * factor
            wq = get_f32(w + 32 * p + 4 * i) * q
            qx += wq * get_f32(x + 32 * p + 4 * i)
            q2 += wq * q
        put_byte(out + p, number & 255)
    if q2 > ZERO:
        d = F32(qx / q2)
    stored = NAN if get_i32(s + BAD + 4 * lane) else F32(d * F32(1.1125))
    put_f16(s + STORED, stored if most != ZERO or get_i32(s + BAD + 4 * lane) else ZERO)
    half = get_i32(s + STORED) & 0xFFFF
    for g in range(16):
        shift = get_i32(shifts + 4 * g) if most != ZERO else 0
        a, b = get_i32(numbers + 8 * g), get_i32(numbers + 8 * g + 4)
        put_byte(out + 32 + g, (a >> 8) | (b >> 8) << 4 | (shift >> 1) << 3 | (shift & 1) << 7)
    for q in range(4):
        word = ((half >> (4 * q)) & 15) << 12
        for j in range(4):
            word |= get_i32(scales + 4 * (4 * q + j)) << (3 * j)
        put_byte(out + 48 + 2 * q, word & 255)
        put_byte(out + 49 + 2 * q, word >> 8)
    return not abs(stored) < TOO_LARGE


# n blocks each. They return whether a weight or a scale may not be finite.


@kernel
def iq1_s(x, out, n, s, importance, cols, first):
    due = False
    for b in range(0, n, LANES):
        prepare(s, x + 1024 * b, importance, cols, first + 256 * b, 32)
        groups_of(s, x + 1024 * b, 32, False, F32(1e-12))
        for lane in range(LANES):
            due |= put_s(s, lane, out + 50 * (b + lane))
    return due


@kernel
def iq1_m(x, out, n, s, importance, cols, first):
    due = False
    for b in range(0, n, LANES):
        prepare(s, x + 1024 * b, importance, cols, first + 256 * b, 16)
        groups_of(s, x + 1024 * b, 16, True, F32(1e-7))
        for lane in range(LANES):
            due |= put_m(s, lane, x + 1024 * (b + lane), out + 56 * (b + lane))
    return due
