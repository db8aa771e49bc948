"""The searches of IQ2 and IQ3: scales for groups of 16 or 32 weights whose magnitudes are points of a grid.

Arrays of weights stand as (k, groups), as in k_search: every operation is a float32 one in ggml's order, so the results
are equal bit for bit. A point's numbers p stand for the levels 2p + 1; a run is as many weights as a point has numbers.
Runs whose rounded levels are no point take the best of that place's *neighbours*, the points at its few smallest
distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .k_search import nearest, total
from .tables import grid

F32 = np.float32
LARGEST = np.finfo(np.float32).max
TOO_LARGE = F32(1e15)  # weights from here on make ggml abort, sooner or later


@dataclass(frozen=True)
class Kind:
    """How a type searches."""

    grid: str
    group: int
    distances: int  # a place's neighbours are at so many different distances
    mean_factor: int  # of the mean x² in the weights of errors
    steps: int  # scales tried on each side of the first one
    step: float
    smallest: float  # groups whose largest weight is below count as zero
    even: bool = True  # whether the number of minus signs of eight weights is even
    all_again: bool = False  # whether the last pass looks at all runs, not only those that were no points
    d_factor: float = 1.0  # what the stored d is multiplied with

    @property
    def top(self) -> int:
        """Numbers of a point are below."""
        return 8 if self.grid.startswith("IQ3") else 3

    @property
    def length(self) -> int:
        """Numbers of a point."""
        return 4 if self.top == 8 else 8


KINDS = {
    "IQ3_S": Kind("IQ3_S", 32, 3, 2, 9, 0.2, 0.0, even=False, all_again=True, d_factor=1.033),
    "IQ3_XXS": Kind("IQ3_XXS", 32, 2, 2, 15, 0.2, 1e-8, d_factor=1.0125),
    "IQ2_S": Kind("IQ2_S", 16, 1, 2, 9, 0.1, 1e-8, even=False, d_factor=0.9875),
    "IQ2_XS": Kind("IQ2_XS", 16, 2, 1, 9, 0.1, 1e-15),
    "IQ2_XXS": Kind("IQ2_XXS", 32, 2, 1, 6, 0.1, 1e-15, all_again=True),
}


@dataclass(frozen=True, eq=False)
class Places:
    """Every combination of numbers, by the sum p[0] + base * p[1] + …: the point it is, or its neighbours."""

    points: np.ndarray  # (n, length) uint8, the grid
    point: np.ndarray  # (places,) int16: its number, or -1
    start: np.ndarray  # (places + 1,) int32: where in `neighbours` its own begin; points have none
    neighbours: np.ndarray  # int16: numbers of points, those of a place by distance, then by number
    most: int  # neighbours of a place


@lru_cache(maxsize=8)
def places(name: str, distances: int) -> Places:
    """The places of a grid, with the neighbours at so many different distances."""
    points = grid(name)
    base, length = (8, 4) if name.startswith("IQ3") else (3, 8)
    n = base**length
    every = np.arange(n)[:, None] // base ** np.arange(length) % base
    point = np.full(n, -1, np.int16)
    point[points @ base ** np.arange(length)] = np.arange(len(points))
    off = np.flatnonzero(point < 0)
    a, b = every[off].astype(F32), points.astype(F32)  # small integers: exact
    apart = ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)).astype(np.int16)
    limit = apart.min(axis=1)
    for _ in range(distances - 1):
        limit = np.where(apart > limit[:, None], apart, np.int16(32767)).min(axis=1)
    row, near = np.nonzero(apart <= limit[:, None])
    order = np.lexsort((near, apart[row, near], row))
    counts = np.zeros(n, np.int32)
    counts[off] = np.bincount(row, minlength=len(off))
    start = np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
    return Places(points, point, start, near[order].astype(np.int16), int(counts.max()))


def best_points(
    at: Places, levels: np.ndarray, place: np.ndarray, x: np.ndarray, w: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The point of each place, or else the neighbour that minimises sum w (scale level - x)², the first one.

    levels (points, length) float32, place, scale (m,), x, w (length, m). Returns numbers of points, and whether there
    is one: overflow leaves none.
    """
    found = at.point[place].astype(np.intp)
    off = np.flatnonzero(found < 0)
    if not len(off):
        return found, np.ones(len(place), bool)
    start, count = at.start[place[off]], at.start[place[off] + 1] - at.start[place[off]]
    column = np.arange(at.most)
    lists = at.neighbours[np.minimum(start[:, None] + column, len(at.neighbours) - 1)].astype(np.intp)
    error = np.zeros(lists.shape, F32)
    for i in range(len(x)):
        diff = scale[off, None] * levels[lists, i] - x[i, off, None]
        error += w[i, off, None] * diff * diff
    error[(column >= count[:, None]) | np.isnan(error)] = np.inf
    best = np.argmin(error, axis=1)[:, None]
    found[off] = np.take_along_axis(lists, best, axis=1)[:, 0]
    fine = np.ones(len(place), bool)
    fine[off] = np.take_along_axis(error, best, axis=1)[:, 0] < LARGEST
    return found, fine


def folded(x: np.ndarray, w: np.ndarray, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of x (k, groups), and the signs of each eight (k / 8, groups) uint8.

    For an even number of minus signs the weight that matters least changes its sign: its magnitude becomes negative.
    """
    minus = ~(x >= 0)
    values = np.where(minus, -x, x)
    minus = minus.reshape(-1, 8, x.shape[1])
    if even:
        odd = minus.sum(axis=1) % 2 == 1
        least = np.argmin((w * x * x).reshape(minus.shape), axis=1)
        flipped = odd[:, None, :] & (np.arange(8)[:, None] == least[:, None, :])
        values = np.where(flipped.reshape(x.shape), -values, values)
        minus = minus ^ flipped
    signs = (minus << np.arange(8)[:, None]).sum(axis=1).astype(np.uint8)
    return values, signs & np.uint8(127 if even else 255)


def whole_scale(x: np.ndarray, w: np.ndarray, n_max: int) -> np.ndarray:
    """The scale s that minimises sum w (s q - x)² for integers q up to n_max, improved one code after the other.

    x, w (k, groups), the largest x positive. As ggml does it for IQ2_XXS: codes are kept in bytes, so a code of -1
    counts as 255 when it is looked at again.
    """
    largest = np.maximum(x.max(axis=0), F32(0))
    inverse = F32(n_max) / largest

    def error(inverse: np.ndarray, codes: np.ndarray) -> np.ndarray:
        diff = x - F32(1) / inverse * codes.astype(F32)
        return total(w * diff * diff)

    best = error(inverse, nearest(inverse * x) & 255)
    for step in range(-4, 5):
        if step:
            tried = (F32(0.1) * F32(step) + F32(n_max)) / largest
            new = error(tried, np.minimum(nearest(tried * x), n_max))
            better = new < best
            best, inverse = np.where(better, new, best), np.where(better, tried, inverse)
    codes = np.minimum(nearest(inverse * x), n_max)
    wx, l = w * x, codes.astype(F32)  # noqa: E741
    lx, l2 = total(wx * l), total(w * l * l)
    codes &= 255
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            old = codes[i].astype(F32)
            rest_lx, rest_l2 = lx - wx[i] * old, l2 - w[i] * old * old
            code = np.minimum(nearest(x[i] * rest_l2 / rest_lx), n_max)
            new = code.astype(F32)
            new_lx, new_l2 = rest_lx + wx[i] * new, rest_l2 + w[i] * new * new
            better = (rest_lx > 0) & (rest_l2 > 0) & (code != codes[i])
            better &= new_lx * new_lx * l2 > lx * lx * new_l2
            codes[i] = np.where(better, code & 255, codes[i])
            lx, l2 = np.where(better, new_lx, lx), np.where(better, new_l2, l2)
            changed = changed or bool(better.any())
        if not changed:
            break
    return np.where(l2 > 0, lx / l2, F32(0))


class _Groups:
    """Groups that do not count as zero: magnitudes x, weights of errors w (k, groups), and what is tried with them."""

    def __init__(self, kind: Kind, x: np.ndarray, w: np.ndarray):
        self.kind, self.x, self.w = kind, x, w
        self.at = places(kind.grid, kind.distances)
        self.levels = (2 * self.at.points + 1).astype(F32)
        self.wx, self.root_w = w * x, np.sqrt(w)
        self.bad = np.zeros(x.shape[1], bool)
        self._base = kind.top ** np.arange(kind.length)

    def runs(self, values: np.ndarray) -> np.ndarray:
        """(k, groups) -> (k / length, length, groups)."""
        return values.reshape(-1, self.kind.length, values.shape[1])

    def points(self, inverse: np.ndarray, scale: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points for the runs `which` (k / length, groups), and whether their levels were points already.

        Groups where no point could be found become bad.
        """
        codes = np.clip(nearest(F32(0.5) * (inverse * self.x - F32(1))), 0, self.kind.top - 1)
        place = np.einsum("rlg,l->rg", self.runs(codes), self._base)
        run, group = np.nonzero(which)
        x, root_w = (self.runs(values)[run, :, group].T for values in (self.x, self.root_w))
        found, fine = best_points(self.at, self.levels, place[run, group], x, root_w, scale[group])
        self.bad[group[~fine]] = True
        out = np.zeros(which.shape, np.intp)
        out[run, group] = found
        return out, self.at.point[place] >= 0

    def sums(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sums of w x q and w q q, q the levels of the points."""
        q = self.levels[points].transpose(0, 2, 1).reshape(self.x.shape)
        return total(self.wx * q), total(self.w * q * q)


def search(kind: Kind, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales (groups,) and points (k / length, groups) for magnitudes x (k, groups) of groups that are not zero.

    Scales may be negative (all signs change then); NaN where a weight is too large to be searched for.
    """
    groups = _Groups(kind, x, w)
    every = np.ones((len(x) // kind.length, x.shape[1]), bool)
    n_max = F32(2 * kind.top - 1)
    if kind.grid == "IQ2_XXS":
        scale = whole_scale(x, w, kind.top + 1)
        none = scale * F32(kind.top) <= 0
        largest = np.where(none, F32(1), scale * F32(kind.top))
    else:
        none = np.zeros(x.shape[1], bool)
        largest = x.max(axis=0)
        scale = largest / n_max
    best = np.zeros_like(scale)
    points = np.zeros(every.shape, np.intp)
    on_grid = every & (kind.grid != "IQ3_S")
    for step in range(-kind.steps, kind.steps + 1):
        inverse = (n_max + F32(step) * F32(kind.step)) / largest
        new_points, new_on = groups.points(inverse, F32(1) / inverse, every & ~none)
        lx, l2 = groups.sums(new_points)
        better = (l2 > 0) & (lx * lx > best * l2)
        scale = np.where(better, lx / l2, scale)
        best = np.where(better, scale * lx, best)
        points, on_grid = np.where(better, new_points, points), np.where(better, new_on, on_grid)
    again = (scale > 0) & ~none
    which = every & again
    if kind.grid != "IQ2_XXS":
        again &= ~on_grid.all(axis=0)
        which = (every if kind.all_again else ~on_grid) & again
    new_points, _ = groups.points(F32(1) / scale, scale, which)
    points = np.where(which, new_points, points)
    lx, l2 = groups.sums(points)
    scale = np.where(again & (l2 > 0), lx / l2, scale)
    return np.where(groups.bad, F32(np.nan), np.where(none, F32(0), scale)), np.where(none, 0, points)


def error_weights(kind: Kind, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """How much an error of each weight of blocks x (n, 256) counts."""
    square = x * x
    mean = F32(kind.mean_factor) * total(np.ascontiguousarray(square.T)) / F32(256)
    if importance is not None:
        return importance * np.sqrt(mean[:, None] + square)
    return F32(0.25) * mean[:, None] + square if kind.grid == "IQ2_S" else square


def encode(
    kind: Kind, x: np.ndarray, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks x (n, 256): d (n,), s (n, groups) 0…15, points (n, 256 / length), signs (n, 32).

    d is NaN where ggml would abort. Also: which groups do not count as zero (n, groups); points and signs of others
    are 0.
    """
    k = kind.group

    def by_group(values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values.reshape(-1, k).T)

    columns, w = by_group(x), by_group(error_weights(kind, x, importance))
    values, signs = folded(columns, w, kind.even)
    largest = values.max(axis=0)
    live = np.flatnonzero(~((largest < F32(kind.smallest)) | (largest == 0)))
    scale = np.zeros(columns.shape[1], F32)
    points = np.zeros((k // kind.length, columns.shape[1]), np.intp)
    if len(live):
        scale[live], points[:, live] = search(kind, values[:, live], w[:, live])
    signs = np.where(scale < 0, ~signs & np.uint8(127 if kind.even else 255), signs)
    written = np.zeros(columns.shape[1], bool)
    written[live] = True
    scales = np.abs(scale).reshape(len(x), -1)
    largest = scales.max(axis=1)
    kept = written & (scale != 0) if kind.grid == "IQ2_XXS" else written
    if kind.even:  # of a block without scales nothing is kept
        kept = kept & np.repeat(largest != 0, 256 // k)
    signs, points = np.where(kept, signs, np.uint8(0)), np.where(kept, points, 0)
    d = largest / F32(31)
    s = np.clip(nearest(F32(0.5) * (F32(1) / d[:, None] * scales - F32(1))), 0, 15)
    s[largest == 0] = 0
    d = np.where(np.abs(x).max(axis=1) < TOO_LARGE, d * F32(kind.d_factor), F32(np.nan))
    return d, s, points.T.reshape(len(x), -1), signs.T.reshape(len(x), -1), written.reshape(len(x), -1)
