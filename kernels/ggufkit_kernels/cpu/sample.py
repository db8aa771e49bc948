"""The largest logits: what choosing a token needs of them, in one pass.

`end` is a recorded token's last kernel (tape.py): it copies the logits out and finds the largest meanwhile, while they
are still in the caches. `top` finds the k largest: the maxima of groups of logits first, each lane of a vector being a
group's; the k-th largest of the maxima is reached by k logits at least, so that only groups that reach it are gone
through. NaN counts as largest, of equal logits the one with the lower index.

NumPy does the same in several passes over logits that the weights have driven out of the caches, and in code that they
have driven out as well: 0.15 to 0.3 ms a token.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel, lazy
from .simd import (
    LANES,
    bits_f32,
    get_f32,
    get_i64,
    largest_f32,
    largest_magnitude,
    load_f32,
    max_f32,
    max_i32,
    put_f32,
    put_i64,
    splat_f32,
    splat_i32,
    store_f32,
)

MOST_TOP = 64  # logits that `top` finds at most: they are kept sorted by insertion
DEPTH = 32  # logits of a group
BLOCK = DEPTH * LANES


def groups(n: int) -> int:
    """The groups of n logits."""
    return n // BLOCK * LANES


@kernel
def before(x, i, y, j):
    """Whether logit x at i comes before logit y at j."""
    if x == y or (x != x and y != y):
        return i < j
    return x > y or x != x


@lazy
def end(args, item, worker):
    """Copy a token's logits, and find the largest. Words: (token, position), out, (where the id goes), logits, how
    many, …; at 72 the index and at 80 the value of the largest are left."""
    out, x, n = get_i64(args + 16), get_i64(args + 32), get_i64(args + 40)
    magnitude, best, place = splat_i32(0), np.float32(-np.inf), 0
    whole = n // LANES * LANES
    for first in range(0, whole, BLOCK):
        top = splat_f32(-np.inf)
        for i in range(first, min(first + BLOCK, whole), LANES):
            v = load_f32(x + 4 * i)
            store_f32(out + 4 * i, v)
            top, magnitude = max_f32(v, top), max_i32(magnitude, bits_f32(v))
        largest = largest_f32(top)
        if largest > best:
            best, place = largest, first
    for i in range(whole, n):
        v = get_f32(x + 4 * i)
        put_f32(out + 4 * i, v)
        magnitude = max_i32(magnitude, bits_f32(splat_f32(v)))
        if v > best:
            best, place = v, i
    if largest_magnitude(magnitude) != largest_magnitude(magnitude):  # there is a NaN
        place = 0
        while get_f32(x + 4 * place) == get_f32(x + 4 * place):
            place += 1
    else:
        while get_f32(x + 4 * place) != best and place < n - 1:
            place += 1
    put_i64(args + 72, place)
    put_f32(args + 80, get_f32(x + 4 * place))


@kernel
def insert(values, ids, count, k, x, i):
    """Put logit x at i in its place among the `count` best, of which k at most stay; how many there are then."""
    at = count
    if count == k:
        if not before(x, i, get_f32(values + 4 * (k - 1)), get_i64(ids + 8 * (k - 1))):
            return count
        at = k - 1
    while at > 0 and before(x, i, get_f32(values + 4 * (at - 1)), get_i64(ids + 8 * (at - 1))):
        put_f32(values + 4 * at, get_f32(values + 4 * (at - 1)))
        put_i64(ids + 8 * at, get_i64(ids + 8 * (at - 1)))
        at -= 1
    put_f32(values + 4 * at, x)
    put_i64(ids + 8 * at, i)
    return min(count + 1, k)


@lazy
def top(args, item, worker):
    """The k largest of n logits, best first. Words: logits, n, k, where int64 indices go, where float32 values go,
    scratch for `groups(n)` floats."""
    x, n, k = get_i64(args), get_i64(args + 8), get_i64(args + 16)
    ids, values, maxima = get_i64(args + 24), get_i64(args + 32), get_i64(args + 40)
    whole, magnitude = n // BLOCK * BLOCK, splat_i32(0)
    count = 0
    for first in range(0, whole, BLOCK):
        most = splat_f32(-np.inf)
        for i in range(first, first + BLOCK, LANES):
            v = load_f32(x + 4 * i)
            most, magnitude = max_f32(v, most), max_i32(magnitude, bits_f32(v))
        store_f32(maxima + 4 * (first // DEPTH), most)
    for g in range(whole // DEPTH):
        count = insert(values, ids, count, k, get_f32(maxima + 4 * g), g)
    least = get_f32(values + 4 * (k - 1)) if count == k else np.float32(-np.inf)
    if largest_magnitude(magnitude) != largest_magnitude(magnitude):  # a group's maximum may have passed over NaN
        least = np.float32(-np.inf)
        whole = 0
    count = 0
    for g in range(whole // DEPTH):
        if get_f32(maxima + 4 * g) >= least:
            at = g // LANES * BLOCK + g % LANES
            for i in range(at, at + BLOCK, LANES):
                if get_f32(x + 4 * i) >= least:
                    count = insert(values, ids, count, k, get_f32(x + 4 * i), i)
    for i in range(whole, n):
        count = insert(values, ids, count, k, get_f32(x + 4 * i), i)
