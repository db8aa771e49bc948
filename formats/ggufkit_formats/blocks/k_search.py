"""The searches for scales of the K types, vectorised over groups of weights.

Arrays of weights stand as (k, groups): row i holds weight i of every group, so that sums over a group can be taken in
ggml's order, one weight after the other, for all groups at once. Everything is float32, every operation is
rounded by itself, and the order of operations is that of `quantize_row_*_ref`: the results are equal bit for bit.
What ggml does with numbers it cannot represent (an infinite 1 / d, for instance) is repeated too.
"""

from __future__ import annotations

import numpy as np

F32 = np.float32
SMALLEST = F32(1e-15)  # groups whose largest weight is below count as zero (types without minimum)


def nearest(x: np.ndarray) -> np.ndarray:
    """int32 nearest to float32, halves to even, for |x| < 2**22; beyond (and for NaN) what the bits give.

    Adding 1.5 * 2**23 leaves the integer in the low bits of the sum.
    """
    return ((x + F32(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def by_group(x: np.ndarray, k: int) -> np.ndarray:
    """(n, 256) weights -> (k, n * 256 // k), row i the weights i of all groups."""
    return np.ascontiguousarray(x.reshape(-1, k).T)


def by_block(codes: np.ndarray) -> np.ndarray:
    """(k, groups) codes -> (n, 256) uint8."""
    return np.ascontiguousarray(codes.T).astype(np.uint8).reshape(-1, 256)


def total(terms: np.ndarray) -> np.ndarray:
    """Sum of the rows, from the first to the last."""
    out = np.zeros_like(terms[0])
    for row in terms:
        out += row
    return out


def half_rounded(x: np.ndarray) -> np.ndarray:
    """float32 through float16 and back, as the decoder will see it."""
    return x.astype(np.float16).astype(F32)


def first_largest(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per column of x (k, groups): the largest magnitude, and the first weight that has it, with its sign."""
    at = np.argmax(np.abs(x), axis=0)
    value = np.take_along_axis(x, at[None], axis=0)[0]
    return np.abs(value), value


def ranged(
    x: np.ndarray,
    w: np.ndarray,
    n_max: int,
    r_min: float,
    steps: int,
    absolute: bool,
    r_step: float = 0.1,
    held: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale s and minimum m for codes 0…n_max that minimise sum w |s q - m - x| (or its square).

    x, w (k, groups). Tries steps + 1 scales around the range over n_max; for each, the best s and m follow from a
    weighted regression. Returns s, m (groups,), and the codes (k, groups) that go with them. `held`: quotients are
    brought between 0 and n_max before they are rounded, not after, which tells where they are beyond 2**22.
    """
    low, high = x[0].copy(), x[0].copy()
    sum_w, sum_x = w[0].copy(), w[0] * x[0]
    for xi, wi in zip(x[1:], w[1:], strict=True):
        low, high = np.where(xi < low, xi, low), np.where(xi > high, xi, high)
        sum_w += wi
        sum_x += wi * xi
    low = np.where(low > 0, F32(0), low)
    flat = high == low

    def error(codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        diff = scale * codes + minimum - x
        return total(w * (np.abs(diff) if absolute else diff * diff))

    def codes_of(inverse: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        return np.clip(nearest(inverse * (x - minimum)), 0, n_max).astype(F32)

    inverse = F32(n_max) / (high - low)
    scale, minimum = F32(1) / inverse, low
    best_codes = codes_of(inverse, low)
    best = error(best_codes, scale, minimum)
    for step in range(steps + 1):
        # The minimum is the best one so far: later steps search from there.
        inverse = (F32(r_min) + F32(r_step) * F32(step) + F32(n_max)) / (high - minimum)
        if held:
            quotients = inverse * (x - minimum)
            codes = nearest(np.where(quotients > 0, np.minimum(quotients, F32(n_max)), F32(0))).astype(F32)
        else:
            codes = codes_of(inverse, minimum)
        wl = w * codes
        sum_l, sum_l2, sum_xl = total(wl), total(wl * codes), total(wl * x)
        det = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / det
        above = new_minimum > 0
        new_minimum = np.where(above, F32(0), new_minimum)
        new_scale = np.where(above, sum_xl / sum_l2, new_scale)
        new = error(codes, new_scale, new_minimum)
        better = (det > 0) & (new < best) & ~flat
        best = np.where(better, new, best)
        scale, minimum = np.where(better, new_scale, scale), np.where(better, new_minimum, minimum)
        best_codes = np.where(better, codes, best_codes)
    return np.where(flat, F32(0), scale), -minimum, np.where(flat, F32(0), best_codes).astype(np.int32)


def quotient(lx: np.ndarray, l2: np.ndarray) -> np.ndarray:
    """lx / l2, 0 where l2 is 0, NaN where it overflowed: ggml would go on and write zeros in place of huge weights."""
    return np.where(np.isfinite(l2), np.where(l2 > 0, lx / l2, F32(0)), F32(np.nan))


def signed(x: np.ndarray, n_max: int, w: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scale for codes -n_max…n_max - 1 that minimises sum w (s q - x)², over 19 scales near -n_max / largest.

    x (k, groups), w likewise, or None for x². Returns s (groups,) and codes + n_max (k, groups), all 0 for groups
    that count as zero.
    """
    largest, at = first_largest(x)
    zero = largest < SMALLEST
    w = x * x if w is None else w

    def tried(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = np.clip(nearest(inverse * x), -n_max, n_max - 1)
        l = codes.astype(F32)  # noqa: E741
        return codes, total(w * x * l), total(w * l * l)

    best_codes, lx, l2 = tried(F32(-n_max) / at)
    scale = quotient(lx, l2)
    best = scale * lx
    for step in range(-9, 10):
        if step == 0:
            continue
        codes, lx, l2 = tried(-(F32(n_max) + F32(0.1) * F32(step)) / at)
        better = (l2 > 0) & (lx * lx > best * l2)
        scale = np.where(better, lx / l2, scale)
        best = np.where(better, scale * lx, best)
        best_codes = np.where(better, codes, best_codes)
    return np.where(zero, F32(0), scale), np.where(zero, 0, best_codes + n_max)


def coordinate(x: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """As `signed`, but improves one code after the other, five times over the group at most (Q3_K)."""
    largest, at = first_largest(x)
    zero = largest < SMALLEST
    w = x * x
    codes = np.clip(nearest(F32(-n_max) / at * x), -n_max, n_max - 1).astype(F32)
    lx, l2 = total(w * x * codes), total(w * codes * codes)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            l, wi, xi = codes[i], w[i], x[i]  # noqa: E741
            rest_lx, rest_l2 = lx - wi * xi * l, l2 - wi * l * l
            new = np.clip(nearest(xi * rest_l2 / rest_lx), -n_max, n_max - 1).astype(F32)
            new_lx, new_l2 = rest_lx + wi * xi * new, rest_l2 + wi * new * new
            better = (rest_lx > 0) & (new != l) & (new_l2 > 0)
            better &= new_lx * new_lx * l2 > lx * lx * new_l2
            codes[i] = np.where(better, new, l)
            lx, l2 = np.where(better, new_lx, lx), np.where(better, new_l2, l2)
            changed = changed or bool(better.any())
        if not changed:
            break
    scale = quotient(lx, l2)
    return np.where(zero, F32(0), scale), np.where(zero, 0, codes.astype(np.int32) + n_max)


def recode(x: np.ndarray, codes: np.ndarray, d: np.ndarray, dm: np.ndarray | None, low: int, high: int) -> np.ndarray:
    """The final codes: nearest to (x + dm) / d with the stored scales; those of the search where d is 0."""
    shifted = x if dm is None else x + dm
    return np.where(d != 0, np.clip(nearest(shifted / d), low, high) - low, codes)


def step_of(scales: np.ndarray, top: float) -> tuple[np.ndarray, np.ndarray]:
    """Scales (n, groups) of which the largest is to become `top`: (its scale, the factor), 0 if none is positive."""
    most = np.maximum(scales.max(axis=1, initial=0), F32(0))
    positive = most > 0
    return np.where(positive, most / F32(top), F32(0)), np.where(positive, F32(top) / most, F32(0))


# -- one function a type; x (n, 256) -------------------------------------------------------------------------


def q2_k(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales (n, 16) with both nibbles, d, dmin (n,), codes (n, 256)."""
    columns = by_group(x, 16)
    scale, minimum, codes = ranged(columns, np.abs(columns), 3, -0.5, 15, absolute=True)
    scale, minimum = scale.reshape(-1, 16), minimum.reshape(-1, 16)
    d, inv_d = step_of(scale, 15)
    dmin, inv_dmin = step_of(minimum, 15)
    packed = nearest(inv_d[:, None] * scale) & 0xFF
    packed |= nearest(inv_dmin[:, None] * minimum) << 4
    packed &= 0xFF
    group_d = (half_rounded(d)[:, None] * (packed & 15).astype(F32)).reshape(-1)
    group_m = (half_rounded(dmin)[:, None] * (packed >> 4).astype(F32)).reshape(-1)
    return packed.astype(np.uint8), d, dmin, by_block(recode(columns, codes, group_d, group_m, 0, 3))


def q3_k(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales + 32 (n, 16) uint8, d (n,), codes (n, 256)."""
    columns = by_group(x, 16)
    scale, codes = coordinate(columns, 4)
    scale = scale.reshape(-1, 16)
    _, most = first_largest(np.ascontiguousarray(scale.T))
    inverse = np.where(most != 0, F32(-32) / most, F32(0))
    stored = np.clip(nearest(inverse[:, None] * scale).astype(np.int8), -32, 31) + np.int8(32)
    d = np.where(most != 0, F32(1) / inverse, F32(0))
    stored[most == 0] = 0
    group_d = (half_rounded(d)[:, None] * (stored - np.int8(32)).astype(F32)).reshape(-1)
    return stored.view(np.uint8), d, by_block(recode(columns, codes, group_d, None, -4, 3))


def q45_k(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales, minima (n, 8) uint8 below 64, d, dmin (n,), codes (n, 256)."""
    columns = by_group(x, 32)
    w = np.sqrt(total(columns * columns) / F32(32)) + np.abs(columns)
    n_max, (r_min, steps) = (1 << bits) - 1, {4: (-1.0, 20), 5: (-0.5, 15)}[bits]
    scale, minimum, codes = ranged(columns, w, n_max, r_min, steps, absolute=False)
    scale, minimum = scale.reshape(-1, 8), minimum.reshape(-1, 8)
    d, inv_d = step_of(scale, 63)
    dmin, inv_dmin = step_of(minimum, 63)
    stored = np.minimum(nearest(inv_d[:, None] * scale) & 0xFF, 63).astype(np.uint8)
    stored_min = np.minimum(nearest(inv_dmin[:, None] * minimum) & 0xFF, 63).astype(np.uint8)
    group_d = (half_rounded(d)[:, None] * stored.astype(F32)).reshape(-1)
    group_m = (half_rounded(dmin)[:, None] * stored_min.astype(F32)).reshape(-1)
    return stored, stored_min, d, dmin, by_block(recode(columns, codes, group_d, group_m, 0, n_max))


def q6_k(x: np.ndarray, importance: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales (n, 16) int8, d (n,), codes (n, 256). `importance` (n, 256) weighs errors in place of x²."""
    columns = by_group(x, 16)
    scale, codes = signed(columns, 32, None if importance is None else by_group(importance, 16))
    scale = scale.reshape(-1, 16)
    magnitude, most = first_largest(np.ascontiguousarray(scale.T))
    zero = magnitude < SMALLEST
    inverse = F32(-128) / most
    d = np.where(zero, F32(0), F32(1) / inverse)
    stored = np.minimum(nearest(inverse[:, None] * scale), 127).astype(np.int8)
    stored[zero] = 0
    group_d = (half_rounded(d)[:, None] * stored.astype(F32)).reshape(-1)
    codes = by_block(recode(columns, codes, group_d, None, -32, 31))
    codes[zero] = 0
    return stored, d, codes


def q8_k(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns d (n,) and codes (n, 256) int8."""
    magnitude, most = first_largest(np.ascontiguousarray(x.T))
    zero = magnitude == 0
    inverse = F32(-127) / most
    codes = np.minimum(nearest(inverse[:, None] * x), 127).astype(np.int8)
    codes[zero] = 0
    return np.where(zero, F32(0), F32(1) / inverse), codes
