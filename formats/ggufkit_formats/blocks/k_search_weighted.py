"""The searches of the K types where each column has an importance: other weights, other steps, scales searched twice.

Arrays as in `k_search`, whose searches these are built from; Q6_K's only difference is its weights, so it stands there.
The squared error of weight x counts importance * sqrt(mean square of the block + x²), and the scales of the groups are
rounded by a search of their own, in which a group counts the sum of its weights. Bytes equal `quantize_row_*_impl`'s.
"""

from __future__ import annotations

import numpy as np

from .k_search import F32, SMALLEST, by_block, by_group, half_rounded, nearest, quotient, ranged, recode, signed, total


def error_weights(x: np.ndarray, importance: np.ndarray, factor: int) -> np.ndarray:
    """importance * sqrt(factor * mean square of the block + x²), (n, 256); the square summed from first to last."""
    squares = x * x
    mean = F32(factor) * total(np.ascontiguousarray(squares.T)) / F32(256)
    return importance * np.sqrt(mean[:, None] + squares)


def positive(x: np.ndarray, w: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale for codes 0…n_max that minimises sum w (s q - x)²: nine scales near n_max / largest, then codes by turns.

    x, w (k, blocks): the scales or minima of a block's groups. Returns s (blocks,) and codes (k, blocks) uint8. A
    negative x has a code below zero that wraps around, as it does in ggml.
    """
    largest = np.maximum(x.max(axis=0), F32(0))
    zero = largest < SMALLEST
    inverse = F32(n_max) / largest
    # only here codes are not held to n_max
    diff = x - F32(1) / inverse * nearest(inverse * x).astype(np.uint8).astype(F32)
    best = total(w * diff * diff)
    for step in range(-4, 5):
        if step == 0:
            continue
        other = (F32(0.1) * F32(step) + F32(n_max)) / largest
        diff = x - F32(1) / other * np.minimum(nearest(other * x), n_max).astype(F32)
        error = total(w * diff * diff)
        inverse = np.where(error < best, other, inverse)
        best = np.where(error < best, error, best)
    found = np.minimum(nearest(inverse * x), n_max)
    lx, l2 = total(w * x * found.astype(F32)), total(w * found.astype(F32) * found.astype(F32))
    codes, lx, l2 = improved(x, w, found.astype(np.uint8), lx, l2, n_max)
    return np.where(zero, F32(0), quotient(lx, l2)), np.where(zero, np.uint8(0), codes)


def improved(
    x: np.ndarray, w: np.ndarray, codes: np.ndarray, lx: np.ndarray, l2: np.ndarray, n_max: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One code after the other is replaced where lx² / l2 grows, five times over the block at most.

    codes (k, blocks) uint8, lx = sum w x q, l2 = sum w q² (blocks,). Returns all three.
    """
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            old, wi, xi = codes[i].astype(F32), w[i], x[i]
            rest_lx, rest_l2 = lx - wi * xi * old, l2 - wi * old * old
            new = np.minimum(nearest(xi * rest_l2 / rest_lx), n_max).astype(F32)
            new_lx, new_l2 = rest_lx + wi * xi * new, rest_l2 + wi * new * new
            better = (rest_lx > 0) & (rest_l2 > 0) & (new != old) & (new_lx * new_lx * l2 > lx * lx * new_l2)
            codes[i] = np.where(better, new, old).astype(np.int32).astype(np.uint8)
            lx, l2 = np.where(better, new_lx, lx), np.where(better, new_l2, l2)
            changed = changed or bool(better.any())
        if not changed:
            break
    return codes, lx, l2


def by_rows(scales: np.ndarray, groups: int) -> np.ndarray:
    """(n * groups,) of a search -> (groups, n)."""
    return np.ascontiguousarray(scales.reshape(-1, groups).T)


# -- one function a type; x, importance (n, 256) -------------------------------------------------------------


def q2_k(x: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales (n, 16) with both nibbles, d, dmin (n,), codes (n, 256)."""
    columns, w = by_group(x, 16), by_group(error_weights(x, importance, 1), 16)
    scale, minimum, codes = ranged(columns, w, 3, -0.9, 36, absolute=False, r_step=0.05, held=True)
    sums = by_rows(total(w), 16)
    d, stored = positive(by_rows(scale, 16), sums, 15)
    dmin, stored_min = positive(by_rows(minimum, 16), sums, 15)
    packed = (stored | stored_min << 4).T
    group_d = (half_rounded(d)[:, None] * (packed & 15).astype(F32)).reshape(-1)
    group_m = (half_rounded(dmin)[:, None] * (packed >> 4).astype(F32)).reshape(-1)
    return packed, d, dmin, by_block(recode(columns, codes, group_d, group_m, 0, 3))


def q3_k(x: np.ndarray, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales + 32 (n, 16) uint8, d (n,), codes (n, 256)."""
    columns, w = by_group(x, 16), by_group(error_weights(x, importance, 2), 16)
    scale, codes = signed(columns, 4, w)
    d, stored = signed(by_rows(scale, 16), 32, by_rows(total(w), 16))
    stored = stored.T
    group_d = (half_rounded(d)[:, None] * (stored - 32).astype(F32)).reshape(-1)
    return stored.astype(np.uint8), d, by_block(recode(columns, codes, group_d, None, -4, 3))


def q45_k(
    x: np.ndarray, importance: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns scales, minima (n, 8) uint8 below 64, d, dmin (n,), codes (n, 256)."""
    columns, w = by_group(x, 32), by_group(error_weights(x, importance, 2), 32)
    n_max = (1 << bits) - 1
    scale, minimum, codes = ranged(columns, w, n_max, -0.9, 36, absolute=False, r_step=0.05, held=True)
    sums = by_rows(total(w), 8)
    d, stored = positive(by_rows(scale, 8), sums, 63)
    dmin, stored_min = positive(by_rows(minimum, 8), sums, 63)
    stored, stored_min = (spilled(s.T) if bits == 4 else np.minimum(s.T, np.uint8(63)) for s in (stored, stored_min))
    group_d = (half_rounded(d)[:, None] * stored.astype(F32)).reshape(-1)
    group_m = (half_rounded(dmin)[:, None] * stored_min.astype(F32)).reshape(-1)
    return stored, stored_min, d, dmin, by_block(recode(columns, codes, group_d, group_m, 0, n_max))


def spilled(stored: np.ndarray) -> np.ndarray:
    """(n, 8) uint8 as six bits hold them in Q4_K: of the first four, bits 6 and 7 get among those of the last four."""
    low, high = stored[:, :4], stored[:, 4:]
    return np.concatenate([low & 63, high & 63 | low >> 6 << 4], axis=1)
