"""Encoders of Q2_K, Q4_K and Q5_K: codes 0…n_max with a scale and a minimum a group.

The same float32 operations in the same order as `ggufkit_formats.blocks.k_search.ranged`, but LANES groups at a time:
weight i of every group stands in row i of a small matrix, the innermost loop runs over groups, and LLVM makes
vectors of it. No sum is reordered, nothing is fused, so the bytes are the same. STRIP weights of a group
are taken together, which keeps the running sums in registers for that long. The matrices are flat and LANES
is a constant, so that LLVM sees which rows cannot overlap (it gives up at 8 checks at run time), and sums that
are an index are cast to unsigned, which spares Numba's test for negative ones (with it nothing is vectorised).

Tried on Q4_K, one thread of a Zen 3 (million weights a second): LANES 32, 64, 128: 49, 63, 52; STRIP 2, 4, 8: 62, 63,
56; the same loops with signed indices, not vectorised: 17. With explicit vectors more is possible.

Nothing is kept of a code that was tried, only the scale and minimum that gave the best ones: the final codes follow
from the stored scales anyway, except in groups whose scale became 0.
"""

from __future__ import annotations

import numpy as np

from .encode_number import LANES, ZERO, clipped, load_columns, nearest, store_half
from .jit import kernel

F32, I32, U8, U64 = np.float32, np.int32, np.uint8, np.uint64
STRIP = 4
ONE = F32(1)

# Where the rows of the state begin: LANES float32 each, one a group.
HIGH, LOW, SUM_W, SUM_X, SUM_L, SUM_L2, SUM_XL = (LANES * i for i in range(7))
SCALE, MINIMUM, ERROR, INVERSE, TRIAL_SCALE, TRIAL_MINIMUM, TRIAL_ERROR = (LANES * i for i in range(7, 14))
BEST_INVERSE, BEST_MINIMUM, FLAT, GROUP_D, GROUP_M = (LANES * i for i in range(14, 19))
STATE = 19 * LANES


def scratch(k: int) -> tuple[np.ndarray, ...]:
    """Arrays of one thread for groups of k weights: columns, weights, tried codes, state, final codes."""
    floats = [np.zeros(n, F32) for n in (k * LANES, k * LANES, k * LANES, STATE)]
    return (*floats, np.zeros(k * LANES, U8))


@kernel
def first_range(x, w, s):
    """Smallest and largest weight of each group, and the sums of w and w x."""
    for g in range(LANES):
        s[LOW + g] = x[g]
        s[HIGH + g] = x[g]
        s[SUM_W + g] = w[g]
        s[SUM_X + g] = w[g] * x[g]
    for i in range(LANES, x.size, LANES):
        for g in range(LANES):
            xi, wi, low, high = x[U64(i + g)], w[U64(i + g)], s[LOW + g], s[HIGH + g]
            s[LOW + g] = xi if xi < low else low
            s[HIGH + g] = xi if xi > high else high
            s[SUM_W + g] += wi
            s[SUM_X + g] += wi * xi
    for g in range(LANES):
        low = s[LOW + g]
        low = ZERO if low > ZERO else low
        s[LOW + g] = low
        s[FLAT + g] = ONE if s[HIGH + g] == low else ZERO


@kernel
def regress(x, w, n_max, s, codes):
    """Codes by the inverse scale and minimum to try, and the sums of w l, w l l, w l x."""
    top = I32(n_max)
    for g in range(LANES):
        s[SUM_L + g] = ZERO
        s[SUM_L2 + g] = ZERO
        s[SUM_XL + g] = ZERO
    for i in range(0, x.size, STRIP * LANES):
        for g in range(LANES):
            inverse, minimum = s[INVERSE + g], s[MINIMUM + g]
            sum_l, sum_l2, sum_xl = s[SUM_L + g], s[SUM_L2 + g], s[SUM_XL + g]
            for j in range(STRIP):
                at = U64(i + j * LANES + g)
                xi = x[at]
                code = clipped(inverse * (xi - minimum), I32(0), top)
                codes[at] = code
                wl = w[at] * code
                sum_l += wl
                sum_l2 += wl * code
                sum_xl += wl * xi
            s[SUM_L + g] = sum_l
            s[SUM_L2 + g] = sum_l2
            s[SUM_XL + g] = sum_xl


@kernel
def judge(x, w, absolute, s, codes):
    """The error of the trial: sum of w |scale l + minimum - x|, or of its square."""
    for g in range(LANES):
        s[TRIAL_ERROR + g] = ZERO
    for i in range(0, x.size, STRIP * LANES):
        for g in range(LANES):
            scale, minimum, error = s[TRIAL_SCALE + g], s[TRIAL_MINIMUM + g], s[TRIAL_ERROR + g]
            for j in range(STRIP):
                at = U64(i + j * LANES + g)
                diff = scale * codes[at] + minimum - x[at]
                error += w[at] * (abs(diff) if absolute else diff * diff)
            s[TRIAL_ERROR + g] = error


@kernel
def solve(s):
    """The scale and minimum of least squares from the sums; a minimum above 0 becomes 0. SUM_L gets the determinant."""
    for g in range(LANES):
        sum_l, sum_l2, sum_xl = s[SUM_L + g], s[SUM_L2 + g], s[SUM_XL + g]
        sum_w, sum_x = s[SUM_W + g], s[SUM_X + g]
        det = sum_w * sum_l2 - sum_l * sum_l
        scale = (sum_w * sum_xl - sum_x * sum_l) / det
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / det
        s[TRIAL_SCALE + g] = sum_xl / sum_l2 if minimum > ZERO else scale
        s[TRIAL_MINIMUM + g] = ZERO if minimum > ZERO else minimum
        s[SUM_L + g] = det


@kernel
def keep(s):
    """Take over the trial where it is better."""
    for g in range(LANES):
        new, old = s[TRIAL_ERROR + g], s[ERROR + g]
        better = (s[SUM_L + g] > ZERO) & (new < old)
        scale, minimum = s[SCALE + g], s[MINIMUM + g]
        new_scale, new_minimum, inverse = s[TRIAL_SCALE + g], s[TRIAL_MINIMUM + g], s[INVERSE + g]
        best_inverse, best_minimum = s[BEST_INVERSE + g], s[BEST_MINIMUM + g]
        s[ERROR + g] = new if better else old
        s[SCALE + g] = new_scale if better else scale
        s[BEST_INVERSE + g] = inverse if better else best_inverse
        s[BEST_MINIMUM + g] = minimum if better else best_minimum
        s[MINIMUM + g] = new_minimum if better else minimum


@kernel
def search(x, w, n_max, r_min, steps, absolute, s, codes):
    """Fill the rows SCALE and MINIMUM; the minimum is to be added here (at most 0), subtracted on disk."""
    first_range(x, w, s)
    for g in range(LANES):
        low = s[LOW + g]
        inverse = n_max / (s[HIGH + g] - low)
        s[INVERSE + g] = inverse
        s[BEST_INVERSE + g] = inverse
        s[SCALE + g] = ONE / inverse
        s[TRIAL_SCALE + g] = ONE / inverse
        s[MINIMUM + g] = low
        s[BEST_MINIMUM + g] = low
        s[TRIAL_MINIMUM + g] = low
    regress(x, w, n_max, s, codes)
    judge(x, w, absolute, s, codes)
    for g in range(LANES):
        s[ERROR + g] = s[TRIAL_ERROR + g]
    for step in range(steps + 1):
        factor = F32(F32(r_min + F32(0.1) * F32(step)) + n_max)
        for g in range(LANES):
            s[INVERSE + g] = factor / (s[HIGH + g] - s[MINIMUM + g])
        regress(x, w, n_max, s, codes)
        solve(s)
        judge(x, w, absolute, s, codes)
        keep(s)
    for g in range(LANES):
        flat = s[FLAT + g] != ZERO
        s[SCALE + g] = ZERO if flat else s[SCALE + g]
        s[MINIMUM + g] = s[LOW + g] if flat else s[MINIMUM + g]


@kernel
def recode(x, n_max, s, codes):
    """The final codes: nearest to (x + group_m) / group_d; those of the search where group_d is 0."""
    top = I32(n_max)
    for i in range(0, x.size, LANES):
        for g in range(LANES):
            at = U64(i + g)
            codes[at] = U8(I32(clipped((x[at] + s[GROUP_M + g]) / s[GROUP_D + g], I32(0), top)))
    for g in range(LANES):
        if s[GROUP_D + g] == ZERO:
            for i in range(0, x.size, LANES):
                code = clipped(s[BEST_INVERSE + g] * (x[i + g] - s[BEST_MINIMUM + g]), I32(0), top)
                codes[i + g] = U8(0) if s[FLAT + g] != ZERO else U8(code)


@kernel
def most(s, start, count, sign):
    """The largest of count numbers times sign, 0 if none is positive."""
    out = ZERO
    for g in range(start, start + count):
        out = max(out, sign * s[g])
    return out


@kernel
def q2_scales(s, start, out):
    """Store d, dmin and sixteen scale bytes of the block whose first group is `start`."""
    d, dmin = most(s, SCALE + start, 16, ONE), most(s, MINIMUM + start, 16, -ONE)
    top = F32(15)
    inv_d = top / d if d > ZERO else ZERO
    inv_dmin = top / dmin if dmin > ZERO else ZERO
    d = store_half(out, 80, d / top)
    dmin = store_half(out, 82, dmin / top)
    for g in range(16):
        both = nearest(inv_d * s[SCALE + start + g]) | (nearest(inv_dmin * -s[MINIMUM + start + g]) << 4)
        out[g] = U8(both & 255)
        s[GROUP_D + start + g] = d * F32(both & 15)
        s[GROUP_M + start + g] = dmin * F32((both >> 4) & 15)


@kernel
def q45_scales(s, start, out):
    """Store d, dmin and the twelve bytes of eight scales and minima."""
    d, dmin = most(s, SCALE + start, 8, ONE), most(s, MINIMUM + start, 8, -ONE)
    top = F32(63)
    inv_d = top / d if d > ZERO else ZERO
    inv_dmin = top / dmin if dmin > ZERO else ZERO
    d = store_half(out, 0, d / top)
    dmin = store_half(out, 2, dmin / top)
    for g in range(8):
        scale = min(nearest(inv_d * s[SCALE + start + g]) & 255, 63)
        minimum = min(nearest(inv_dmin * -s[MINIMUM + start + g]) & 255, 63)
        s[GROUP_D + start + g] = d * F32(scale)
        s[GROUP_M + start + g] = dmin * F32(minimum)
        if g < 4:
            out[4 + g] = U8(scale)
            out[8 + g] = U8(minimum)
        else:
            out[8 + g] = U8((scale & 15) | ((minimum & 15) << 4))
            out[g] |= U8((scale >> 4) << 6)
            out[4 + g] |= U8((minimum >> 4) << 6)


@kernel
def q2_k(x, out, columns, w, tried, s, codes):
    """x (n, 256) float32 -> out (n, 84) uint8."""
    blocks = LANES // 16
    for start in range(0, x.shape[0], blocks):
        count = min(blocks, x.shape[0] - start)
        load_columns(x[start : start + count], 16, columns)
        for i in range(columns.size):
            w[i] = abs(columns[i])
        search(columns, w, F32(3), F32(-0.5), 15, True, s, tried)
        for b in range(count):
            q2_scales(s, b * 16, out[start + b])
        recode(columns, F32(3), s, codes)
        for b in range(count):
            for i in range(64):
                # Byte 32h + j: weights 128h + 32p + j, p = 0…3, which stand in group 8h + 2p + j // 16.
                at = i % 16 * LANES + b * 16 + i // 32 * 8 + i % 32 // 16
                low, high = codes[at] | codes[at + 2] << 2, codes[at + 4] | codes[at + 6] << 2
                out[start + b, 16 + i] = U8(low | high << 4)


@kernel
def q45_weights(x, w, s):
    """w = sqrt(mean x²) + |x|."""
    for g in range(LANES):
        s[SUM_X + g] = ZERO
    for i in range(0, x.size, LANES):
        for g in range(LANES):
            s[SUM_X + g] += x[U64(i + g)] * x[U64(i + g)]
    for g in range(LANES):
        s[SUM_X + g] = np.sqrt(s[SUM_X + g] / F32(32))
    for i in range(0, x.size, LANES):
        for g in range(LANES):
            w[U64(i + g)] = s[SUM_X + g] + abs(x[U64(i + g)])


@kernel
def q45_k(x, out, bits, r_min, steps, columns, w, tried, s, codes):
    """x (n, 256) float32 -> out (n, 144 or 176) uint8: Q4_K, or with bits = 5 Q5_K."""
    n_max = F32((1 << bits) - 1)
    qs, blocks = (16 if bits == 4 else 48), LANES // 8
    for start in range(0, x.shape[0], blocks):
        count = min(blocks, x.shape[0] - start)
        load_columns(x[start : start + count], 32, columns)
        q45_weights(columns, w, s)
        search(columns, w, n_max, r_min, steps, False, s, tried)
        for b in range(count):
            q45_scales(s, b * 8, out[start + b])
        recode(columns, n_max, s, codes)
        for b in range(count):
            for j in range(32):
                at = j * LANES + b * 8
                for p in range(4):
                    low, high = codes[at + 2 * p], codes[at + 2 * p + 1]
                    out[start + b, qs + 32 * p + j] = U8((low & 15) | (high & 15) << 4)
                if bits == 5:
                    fifth = 0
                    for g in range(8):
                        fifth |= (codes[at + g] >> 4) << g
                    out[start + b, 16 + j] = U8(fifth)
