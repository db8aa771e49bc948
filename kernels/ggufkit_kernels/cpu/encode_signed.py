"""Encoders of Q6_K and Q3_K: codes -n_max…n_max - 1 with a scale a group of 16.

As in encode_ranged.py, LANES groups are searched side by side, in the order of operations of
`ggufkit_formats.blocks.k_search.signed` (Q6_K) and `coordinate` (Q3_K).
"""

from __future__ import annotations

import numpy as np

from .encode_number import LANES, ZERO, clipped, load_columns, nearest, store_half
from .jit import kernel

F32, I32, U8, U64 = np.float32, np.int32, np.uint8, np.uint64
STRIP = 4
ONE, SMALLEST, NAN = F32(1), F32(1e-15), F32(np.nan)

# Where the rows of the state begin: LANES float32 each, one a group.
LARGEST, INVERSE, BEST_INVERSE, SUM_LX, SUM_L2, SCALE, BEST, GROUP_D = (LANES * i for i in range(8))
CHANGED, IS_ZERO = LANES * 8, LANES * 9
STATE = 10 * LANES


def scratch() -> tuple[np.ndarray, ...]:
    """Arrays of one thread: columns, their squares, their cubes, tried codes, state, final codes."""
    floats = [np.zeros(n, F32) for n in (16 * LANES, 16 * LANES, 16 * LANES, 16 * LANES, STATE)]
    return (*floats, np.zeros(16 * LANES, U8))


@kernel
def first_largest(x, w, wx, s):
    """The weight of largest magnitude of each group, and the powers x² and x³."""
    for g in range(LANES):
        s[LARGEST + g] = ZERO
    for i in range(0, x.size, LANES):
        for g in range(LANES):
            at = U64(i + g)
            xi, old = x[at], s[LARGEST + g]
            s[LARGEST + g] = xi if abs(xi) > abs(old) else old
            w[at] = xi * xi
            wx[at] = xi * xi * xi
    for g in range(LANES):
        s[IS_ZERO + g] = ONE if abs(s[LARGEST + g]) < SMALLEST else ZERO


@kernel
def sums(x, w, wx, n_max, s, codes):
    """Codes by the inverse scale to try, and the sums of w l x and w l l."""
    low, high = I32(-n_max), I32(n_max - ONE)
    for g in range(LANES):
        s[SUM_LX + g] = ZERO
        s[SUM_L2 + g] = ZERO
    for i in range(0, x.size, STRIP * LANES):
        for g in range(LANES):
            inverse, lx, l2 = s[INVERSE + g], s[SUM_LX + g], s[SUM_L2 + g]
            for j in range(STRIP):
                at = U64(i + j * LANES + g)
                code = clipped(inverse * x[at], low, high)
                codes[at] = code
                lx += wx[at] * code
                l2 += w[at] * code * code
            s[SUM_LX + g] = lx
            s[SUM_L2 + g] = l2


@kernel
def quotients(s):
    """SCALE = lx / l2; 0 where l2 is 0, NaN where it overflowed (ggml would write zeros for huge weights)."""
    for g in range(LANES):
        lx, l2 = s[SUM_LX + g], s[SUM_L2 + g]
        quotient = lx / l2 if l2 > ZERO else ZERO
        s[SCALE + g] = quotient if abs(l2) < F32(np.inf) else NAN


@kernel
def search(x, w, wx, n_max, s, codes):
    """Q6_K: 19 scales around -n_max over the largest weight. Fills SCALE and BEST_INVERSE."""
    first_largest(x, w, wx, s)
    for g in range(LANES):
        s[INVERSE + g] = -n_max / s[LARGEST + g]
        s[BEST_INVERSE + g] = s[INVERSE + g]
    sums(x, w, wx, n_max, s, codes)
    quotients(s)
    for g in range(LANES):
        s[BEST + g] = s[SCALE + g] * s[SUM_LX + g]
    for step in range(-9, 10):
        if step == 0:
            continue
        factor = -F32(n_max + F32(0.1) * F32(step))
        for g in range(LANES):
            s[INVERSE + g] = factor / s[LARGEST + g]
        sums(x, w, wx, n_max, s, codes)
        for g in range(LANES):
            lx, l2 = s[SUM_LX + g], s[SUM_L2 + g]
            old_scale, old_best = s[SCALE + g], s[BEST + g]
            inverse, old_inverse = s[INVERSE + g], s[BEST_INVERSE + g]
            better = (l2 > ZERO) & (lx * lx > old_best * l2)
            scale = lx / l2
            s[SCALE + g] = scale if better else old_scale
            s[BEST + g] = scale * lx if better else old_best
            s[BEST_INVERSE + g] = inverse if better else old_inverse
    for g in range(LANES):
        s[SCALE + g] = ZERO if s[IS_ZERO + g] != ZERO else s[SCALE + g]


@kernel
def improve(x, w, wx, n_max, s, codes):
    """One round over the group: each code takes the value that is best beside the others. CHANGED counts."""
    low, high = I32(-n_max), I32(n_max - ONE)
    for i in range(0, x.size, LANES):
        for g in range(LANES):
            at = U64(i + g)
            lx, l2, old, wi, wxi = s[SUM_LX + g], s[SUM_L2 + g], codes[at], w[at], wx[at]
            rest_lx, rest_l2 = lx - wxi * old, l2 - wi * old * old
            new = clipped(x[at] * rest_l2 / rest_lx, low, high)
            new_lx, new_l2 = rest_lx + wxi * new, rest_l2 + wi * new * new
            better = (rest_lx > ZERO) & (new != old) & (new_l2 > ZERO)
            better &= new_lx * new_lx * l2 > lx * lx * new_l2
            codes[at] = new if better else old
            s[SUM_LX + g] = new_lx if better else lx
            s[SUM_L2 + g] = new_l2 if better else l2
            s[CHANGED + g] += ONE if better else ZERO


@kernel
def coordinate(x, w, wx, n_max, s, codes):
    """Q3_K: the first scale's codes, improved one after the other. Fills SCALE and the codes."""
    first_largest(x, w, wx, s)
    for g in range(LANES):
        s[INVERSE + g] = -n_max / s[LARGEST + g]
    sums(x, w, wx, n_max, s, codes)
    for _ in range(5):
        for g in range(LANES):
            s[CHANGED + g] = ZERO
        improve(x, w, wx, n_max, s, codes)
        changed = ZERO
        for g in range(LANES):
            changed += s[CHANGED + g]
        if changed == ZERO:
            break
    quotients(s)
    for g in range(LANES):
        s[SCALE + g] = ZERO if s[IS_ZERO + g] != ZERO else s[SCALE + g]


@kernel
def recode(x, n_max, s, codes):
    """The final codes + n_max: nearest to x / group_d. Groups whose group_d is 0 are the caller's."""
    low, high = I32(-n_max), I32(n_max - ONE)
    for i in range(0, x.size, LANES):
        for g in range(LANES):
            at = U64(i + g)
            codes[at] = U8(I32(clipped(x[at] / s[GROUP_D + g], low, high) + n_max))


@kernel
def largest_scale(s, start):
    """The scale of largest magnitude of 16; NaN if one is NaN."""
    out = ZERO
    for g in range(start, start + 16):
        scale = s[SCALE + g]
        if scale != scale:
            return scale
        out = scale if abs(scale) > abs(out) else out
    return out


@kernel
def q6_scales(s, start, out):
    """Store d and sixteen scales; False for a block of zeros, of which nothing else is stored."""
    most = largest_scale(s, start)
    if abs(most) < SMALLEST:
        return False
    inverse = F32(-128) / most
    d = store_half(out, 208, ONE / inverse)
    for g in range(16):
        scale = np.int8(min(nearest(inverse * s[SCALE + start + g]), 127))
        out[192 + g] = U8(scale)
        s[GROUP_D + start + g] = d * F32(scale)
    return True


@kernel
def q6_pack(codes, start, out):
    for h in range(2):
        for j in range(32):
            # Weights 128h + 32p + j, p = 0…3, stand in groups 8h + 2p + j // 16.
            at = j % 16 * LANES + start + 8 * h + j // 16
            a, b, c, d = codes[at], codes[at + 2], codes[at + 4], codes[at + 6]
            out[64 * h + j] = U8((a & 15) | (c & 15) << 4)
            out[64 * h + 32 + j] = U8((b & 15) | (d & 15) << 4)
            out[128 + 32 * h + j] = U8(a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6)


@kernel
def q6_k(x, out, columns, w, wx, tried, s, codes):
    """x (n, 256) float32 -> out (n, 210) uint8, zeroed."""
    blocks, n_max = LANES // 16, F32(32)
    for start in range(0, x.shape[0], blocks):
        count = min(blocks, x.shape[0] - start)
        load_columns(x[start : start + count], 16, columns)
        search(columns, w, wx, n_max, s, tried)
        stored = 0
        for b in range(count):
            stored |= 1 << b if q6_scales(s, b * 16, out[start + b]) else 0
        recode(columns, n_max, s, codes)
        for g in range(16 * count):
            if s[GROUP_D + g] == ZERO:
                for i in range(16):
                    code = clipped(s[BEST_INVERSE + g] * columns[i * LANES + g], I32(-32), I32(31))
                    codes[i * LANES + g] = U8(0) if s[IS_ZERO + g] != ZERO else U8(I32(code + n_max))
        for b in range(count):
            if stored >> b & 1:
                q6_pack(codes, b * 16, out[start + b])


@kernel
def q3_scales(s, start, out):
    """Store d and sixteen scales in twelve bytes."""
    most = largest_scale(s, start)
    inverse = F32(-32) / most if most != ZERO else ZERO
    d = store_half(out, 108, ONE / inverse if most != ZERO else ZERO)
    for g in range(16):
        low = np.int8(nearest(inverse * s[SCALE + start + g]))
        scale = min(max(low, -32), 31) + 32 if most != ZERO else 0
        s[GROUP_D + start + g] = d * F32(scale - 32)
        out[96 + g % 8] |= U8((scale & 15) << (g // 8 * 4))
        out[104 + g % 4] |= U8((scale >> 4) << (g // 4 * 2))


@kernel
def q3_pack(codes, start, out):
    for j in range(32):
        high = 0
        for h in range(2):
            # Weights 128h + 32p + j, p = 0…3, stand in groups 8h + 2p + j // 16.
            at = j % 16 * LANES + start + 8 * h + j // 16
            low = 0
            for p in range(4):
                code = codes[at + 2 * p]
                low |= (code & 3) << 2 * p
                high |= code >> 2 << (4 * h + p)
            out[32 + 32 * h + j] = U8(low)
        out[j] = U8(high)


@kernel
def q3_k(x, out, columns, w, wx, tried, s, codes):
    """x (n, 256) float32 -> out (n, 110) uint8, zeroed."""
    blocks, n_max = LANES // 16, F32(4)
    for start in range(0, x.shape[0], blocks):
        count = min(blocks, x.shape[0] - start)
        load_columns(x[start : start + count], 16, columns)
        coordinate(columns, w, wx, n_max, s, tried)
        for b in range(count):
            q3_scales(s, b * 16, out[start + b])
        recode(columns, n_max, s, codes)
        for g in range(16 * count):
            if s[GROUP_D + g] == ZERO:
                for i in range(g, 16 * LANES, LANES):
                    codes[i] = U8(0) if s[IS_ZERO + g] != ZERO else U8(I32(tried[i] + n_max))
        for b in range(count):
            q3_pack(codes, b * 16, out[start + b])
