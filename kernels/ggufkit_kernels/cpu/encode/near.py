"""Points of the IQ types' grids: as tables in memory, and the search of the nearest neighbour of a place.

Codes of a run that are no point of the grid are replaced by one of the place's neighbours (ggufkit_formats.blocks.
iq_search), of which there are 5 to 30, at most 292. Their numbers stand side by side in memory, LANES neighbours a
*chunk*, so one neighbour is a lane: nothing is gathered, and the smallest error is found by one reduction. Lists are
filled up with their first neighbour, which cannot win a second time.

    place     int32, one a place: the number of its point; or, for chunks from `first` on, -1 - (first << 6 | chunks)
    points    uint8, (points, length)
    chunks    uint8, (chunks, length, LANES): numbers of the neighbours' points, one after the other
    numbers   int32, (chunks, LANES): which points they are
    factors   float32: what the scales to try are over the largest weight

The kernels find the addresses of these at the beginning of their scratch (PLACE, POINTS …).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
from ggufkit_formats.blocks import iq1_search, iq_search

from ..jit import kernel
from ..simd import (
    LANES,
    as_float,
    choose,
    get_f32,
    get_i32,
    get_i64,
    load_bytes,
    lowest,
    lowest_bit,
    mask_bits,
    repeat,
)
from .layout import ZERO

F32 = np.float32
LARGEST = np.finfo(np.float32).max
PLACE, POINTS, CHUNKS, NUMBERS, FACTORS = range(0, 40, 8)
TABLES_NBYTES = 64


_lock = threading.Lock()


@cache
def _arrays(name: str) -> tuple[np.ndarray, ...]:
    kind = iq_search.KINDS.get(name)
    if kind is None:  # IQ1_S and IQ1_M
        at, multiple = iq_search.places("IQ1_S", iq1_search.DISTANCES), 1
        factors = np.zeros(64, np.float32)
    else:
        at, multiple = iq_search.places(kind.grid, kind.distances), 2
        steps = np.arange(-kind.steps, kind.steps + 1, dtype=np.float32)
        factors = np.float32(2 * kind.top - 1) + steps * np.float32(kind.step)
        factors = np.concatenate([factors, np.repeat(factors[-1:], 64)])
    # Levels 2p + 1 of IQ2 and IQ3, codes p of IQ1.
    levels = (multiple * at.points + (multiple - 1)).astype(np.uint8)
    counts = np.diff(at.start)
    chunks = -(-counts // LANES)
    first = np.concatenate([[0], np.cumsum(chunks)[:-1]])
    assert chunks.max() < 64
    place = np.where(at.point >= 0, at.point, -1 - (first << 6 | chunks)).astype(np.int32)
    owner = np.repeat(np.arange(len(counts)), chunks)  # of each chunk, its place
    within = (np.arange(len(owner)) - first[owner])[:, None] * LANES + np.arange(LANES)
    within[within >= counts[owner][:, None]] = 0
    numbers = at.neighbours[at.start[owner][:, None] + within].astype(np.int32)
    lanes = np.ascontiguousarray(levels[numbers].transpose(0, 2, 1))
    return place, levels, lanes, numbers, factors


def tables(name: str) -> Callable[[], np.ndarray]:
    """What gives the addresses of a type's tables, int64: made when it is first asked, and kept."""

    def addresses() -> np.ndarray:
        with _lock:  # two threads that both found nothing would make two sets, and one of them would go
            return np.array([array.ctypes.data for array in _arrays(name)], np.int64)

    return addresses


def nearest_point(length):
    """The kernel that finds the best neighbour for runs of that length."""

    @kernel
    def find(s, entry, x, w, scale, shift):
        """The point that minimises sum w (scale (level + shift) - x)² among those of a place's entry; -1 if none."""
        which = -1 - entry
        chunk, count = which >> 6, which & 63
        levels = get_i64(s + CHUNKS) + chunk * length * LANES
        best, at = LARGEST, -1
        for k in range(chunk * LANES, (chunk + count) * LANES, LANES):
            error = repeat(ZERO, LANES)
            for i in range(length):
                diff = scale * (as_float(load_bytes(levels + i * LANES, LANES)) + shift) - get_f32(x + 4 * i)
                error = error + get_f32(w + 4 * i) * diff * diff
            error = choose(error < LARGEST, error, repeat(LARGEST, LANES))
            low = lowest(error)
            if low < best:
                best, at = low, k + lowest_bit(mask_bits(error == low))
            levels += length * LANES
        if at < 0:
            return at
        return get_i32(get_i64(s + NUMBERS) + 4 * at)

    return find


nearest_of_four, nearest_of_eight = nearest_point(4), nearest_point(8)
