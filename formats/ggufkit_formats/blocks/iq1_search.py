"""The searches of IQ1_S and IQ1_M: -1, 0 or 1, all an eighth higher or all an eighth lower, and a scale a group.

A group's weights are sorted; the best codes then are 0 up to some place, 1 up to another, 2 behind it, so all pairs of
places are tried, with both shifts. In IQ1_M each half of a group has a shift of its own. Codes that are no points of
the grid are replaced by the nearest neighbour. Arrays stand as (k, groups), and all is float32 in ggml's order, as in
k_search and iq_search. Equal weights keep their order, as in the C library's sort that ggml calls.
"""

from __future__ import annotations

import numpy as np

from .iq_search import LARGEST, TOO_LARGE, best_points, places
from .k_search import nearest, total

F32 = np.float32
PLUS = np.array([-0.875, 0.125, 1.125], F32)  # what codes 0, 1, 2 stand for
MINUS = np.array([-1.125, -0.125, 0.875], F32)
SQUARES = [(q, q[0] * q[0] - q[1] * q[1], q[1] * q[1] - q[2] * q[2]) for q in (PLUS, MINUS)]
DISTANCES = 3


class _Best:
    """The best split of each group so far."""

    def __init__(self, largest: np.ndarray):
        self.score = np.full(len(largest), -LARGEST)
        self.scale = largest.copy()
        self.first, self.second, self.shift = (np.full(len(largest), -1) for _ in range(3))

    def offer(self, qx: np.ndarray, q2: np.ndarray, first: int, second: int, shift: int) -> None:
        """The sums of w x q and w q q of a split."""
        better = np.flatnonzero((q2 > 0) & (qx * qx > self.score * q2))
        scale = qx[better] / q2[better]
        self.scale[better], self.score[better] = scale, scale * qx[better]
        self.first[better], self.second[better], self.shift[better] = first, second, shift


def running(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, … rows, one after the other."""
    return np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0, dtype=F32)])


def split_one(best: _Best, order: np.ndarray, wx: np.ndarray, w: np.ndarray) -> None:
    """IQ1_S: shift 0 for an eighth higher, 1 for an eighth lower."""
    k = len(w)
    sx, sw = running(np.take_along_axis(wx, order, axis=0)), running(np.take_along_axis(w, order, axis=0))
    for first in range(k + 1):
        for second in range(first, k + 1):
            parts_x = (sx[first], sx[second] - sx[first], sx[k] - sx[second])
            parts_w = (sw[first], sw[second] - sw[first], sw[k] - sw[second])
            for shift, q in enumerate((PLUS, MINUS)):
                qx = parts_x[0] * q[0] + parts_x[1] * q[1] + parts_x[2] * q[2]
                q2 = parts_w[0] * q[0] * q[0] + parts_w[1] * q[1] * q[1] + parts_w[2] * q[2] * q[2]
                best.offer(qx, q2, first, second, shift)


def split_two(best: _Best, order: np.ndarray, wx: np.ndarray, w: np.ndarray) -> None:
    """IQ1_M: the shift's bit 1 is that of the first half, bit 0 that of the second."""
    k = len(w)
    mine = [order < k // 2, order >= k // 2]
    wx, w = np.take_along_axis(wx, order, axis=0), np.take_along_axis(w, order, axis=0)
    sx = [running(np.where(half, wx, F32(0))) for half in mine]
    sw = [running(np.where(half, w, F32(0))) for half in mine]
    for first in range(k + 1):
        for second in range(first, k + 1):
            qx, q2 = [], []
            for x, v in zip(sx, sw, strict=True):
                both = x[first] + x[second]
                qx.append([x[k] * q[2] - both for q in (PLUS, MINUS)])
                q2.append([v[k] * q[2] * q[2] + v[first] * a + v[second] * b for q, a, b in SQUARES])
            for shift in range(4):
                a, b = shift >> 1, shift & 1
                best.offer(qx[0][a] + qx[1][b], q2[0][a] + q2[1][b], first, second, shift)


def search(x: np.ndarray, w: np.ndarray, halves: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Groups (k, groups) that are not zero: scales, shifts (groups,), points (k / 8, groups), and which have a scale.

    A scale is NaN where a weight is too large.
    """
    k, n = x.shape
    order = np.argsort(x, axis=0, kind="stable")
    best = _Best(np.abs(x).max(axis=0))
    (split_two if halves else split_one)(best, order, w * x, w)
    found = best.shift >= 0
    row = np.arange(k)[:, None]
    codes = np.empty((k, n), np.intp)
    np.put_along_axis(codes, order, (row >= best.first).astype(np.intp) + (row >= best.second), axis=0)
    negative = best.scale < 0
    codes = np.where(negative, 2 - codes, codes)
    shift = np.where(negative, (3 if halves else 1) - best.shift, best.shift)
    scale = np.abs(best.scale)

    at = places("IQ1_S", DISTANCES)
    runs = k // 8
    lower = np.stack([shift >> 1, shift & 1] if halves else [shift] * runs).astype(bool)  # of each run (runs, groups)
    place = np.einsum("rlg,l->rg", codes.reshape(runs, 8, n), 3 ** np.arange(8))
    points = np.zeros((runs, n), np.intp)
    bad = ~np.isfinite(scale)
    for is_lower, levels in ((False, PLUS[at.points]), (True, MINUS[at.points])):
        run, group = np.nonzero((lower == is_lower) & found)
        xs, ws = (values.reshape(runs, 8, n)[run, :, group].T for values in (x, w))
        points[run, group], fine = best_points(at, levels, place[run, group], xs, ws, scale[group])
        bad[group[~fine]] = True
    q = np.where(
        lower[:, None], MINUS[at.points[points]].transpose(0, 2, 1), PLUS[at.points[points]].transpose(0, 2, 1)
    )
    wq = w * q.reshape(k, n)
    qx, q2 = total(wq * x), total(wq * q.reshape(k, n))
    moved = (at.point[place] < 0).any(axis=0) & (qx > 0) & (q2 > 0)
    scale = np.where(moved, qx / q2, scale)
    return np.where(bad & found, F32(np.nan), scale), shift, points, found


def encode(
    x: np.ndarray, importance: np.ndarray | None, group: int, smallest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks x (n, 256): the largest scale over 15 (n,), s, shifts (n, groups), points (n, 32), weights (n, 256).

    `group` of 32 is IQ1_S, of 16 IQ1_M. The scale is NaN where ggml would abort.
    """
    square = x * x
    w = square
    if importance is not None:
        w = importance * np.sqrt((F32(2) * total(np.ascontiguousarray(square.T)) / F32(256))[:, None] + square)
    columns, weights = (np.ascontiguousarray(values.reshape(-1, group).T) for values in (x, w))
    n = columns.shape[1]
    scale, shift, points = np.zeros(n, F32), np.zeros(n, np.intp), np.zeros((group // 8, n), np.intp)
    live = np.flatnonzero(~(np.abs(columns).max(axis=0) < F32(smallest)))
    if len(live):
        found_scale, found_shift, found_points, found = search(columns[:, live], weights[:, live], group == 16)
        scale[live] = np.where(found, found_scale, F32(0))
        shift[live], points[:, live] = np.where(found, found_shift, 0), np.where(found, found_points, 0)
    scale, shift = scale.reshape(len(x), -1), shift.reshape(len(x), -1)
    largest = scale.max(axis=1)
    d = largest / F32(15)
    s = np.clip(nearest(F32(0.5) * (F32(1) / d[:, None] * scale - F32(1))), 0, 7)
    # A block without scales keeps its points, and neither scales nor shifts.
    s[largest == 0], shift[largest == 0] = 0, 0
    d = np.where(np.abs(x).max(axis=1) < TOO_LARGE, d, F32(np.nan))
    return d, s, shift, points.T.reshape(len(x), -1), w


def common_scale(
    x: np.ndarray, w: np.ndarray, s: np.ndarray, shift: np.ndarray, points: np.ndarray, d: np.ndarray
) -> np.ndarray:
    """IQ1_M's d (n,): the best one for all codes and scales of blocks x (n, 256)."""
    p = places("IQ1_S", DISTANCES).points[points]  # (n, 32, 8)
    lower = np.stack([shift >> 1, shift & 1], axis=2).reshape(len(x), 32).astype(bool)
    q = np.where(lower[:, :, None], MINUS[p], PLUS[p]).reshape(x.shape)
    q = q * np.repeat((2 * s + 1).astype(F32), 16, axis=1)
    wq = w * q
    qx, q2 = total(np.ascontiguousarray((wq * x).T)), total(np.ascontiguousarray((wq * q).T))
    return np.where(q2 > 0, qx / q2, d)
