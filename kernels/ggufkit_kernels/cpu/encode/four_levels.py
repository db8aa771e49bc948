"""The search of Q2_0's scales: the d for which d * {-1, 0, 1, 2} is nearest to a block, from several starts.

What `ggufkit.quantize.ternary` defines in NumPy, operation for operation: sums of a block are folded in halves, so they
are the same bits whatever the width of vectors. A block is looked at alone, 64 weights side by side; most of the time
goes into 288 divisions of vectors of 16. One thread of a Zen 4: 3.5 million weights a second in NumPy, 49 here.
"""

from __future__ import annotations

import numpy as np

from ..jit import kernel
from ..simd import (
    choose,
    first_half,
    get_f32,
    greatest,
    highest,
    least,
    load_floats,
    put_f32,
    repeat,
    second_half,
    whole,
)

F32 = np.float32
BLOCK = 64
ZERO, ONE = F32(0), F32(1)


@kernel(inline="always")
def folded(v):
    """The sum of 64 lanes, the second half added to the first again and again."""
    a = first_half(v) + second_half(v)
    b = first_half(a) + second_half(a)
    c = first_half(b) + second_half(b)
    d = first_half(c) + second_half(c)
    e = first_half(d) + second_half(d)
    return highest(first_half(e) + second_half(e))


@kernel(inline="always")
def levels(x, d, high):
    """The nearest of -1 … `high` to x / d, as floats; 0 where d is 0."""
    if d == ZERO:
        return repeat(ZERO, BLOCK)
    return whole(least(greatest(x / repeat(d, BLOCK), -ONE), high))


@kernel(inline="always")
def error_of(x, d, high):
    """The sum of the squared errors of d."""
    off = x - levels(x, d, high) * d
    return folded(off * off)


@kernel
def search(x, n, starts, count, rounds, high, d):
    """n blocks of float32 at `x`, and at `d` the scales to begin with, which become the best ones."""
    for _ in range(n):
        v = load_floats(x, BLOCK)
        best = get_f32(d)
        least_error = error_of(v, best, high)
        size = highest(choose(v < ZERO, repeat(ZERO, BLOCK) - v, v))
        for side in range(2):
            for k in range(count):
                start = get_f32(starts + 4 * k)
                one = F32((start if side == 0 else -start) * size)
                for _ in range(rounds):
                    q = levels(v, one, high)
                    norm = folded(q * q)
                    if norm > ZERO:
                        one = F32(folded(v * q) / norm)
                found = error_of(v, one, high)
                if found < least_error:
                    best, least_error = one, found
        put_f32(d, best)
        x += 4 * BLOCK
        d += 4


def best_scales(x: np.ndarray, d: np.ndarray, starts: np.ndarray, rounds: int, high: int) -> np.ndarray:
    """Float32 blocks x (n, 64), scales d (n,) to begin with, `starts` (of the largest magnitude) -> scales (n,)."""
    x, starts = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(starts, np.float32)
    out = np.array(d, np.float32)
    if len(x):
        search(x.ctypes.data, len(x), starts.ctypes.data, len(starts), rounds, F32(high), out.ctypes.data)
    return out
