"""Causal attention over a cache of float16 keys and values.

A tile is QUERIES of the queries that read one key head (the heads of its group, then the next rows); a key is loaded
and converted once for all of them. Keys lie transposed in blocks of LANES positions, so that a vector holds one
dimension of LANES keys and a score needs no sum across lanes. Two blocks of keys, or two vectors of values, go
side by side, so that a query's number is loaded once for both.

Positions go by splits of SPLIT: a tile's scores stay in the L1 cache, as do the values that they weigh. Each split
gives a maximum, a sum and weighted values; `merge` joins them in the order of positions (online softmax, Milakov and
Gimelshein, arXiv 1805.02867). A batch of tokens walks all splits in one item; a single token makes every split an
item of its own (Flash-Decoding), so that long contexts keep all threads busy, and joins them afterwards by the same
operations in the same order: bit for bit the same.

    keys    (n_kv_heads, positions / LANES, head_dim, LANES) float16
    values  (n_kv_heads, padded head_dim / (2 LANES), positions, 2 LANES) float16
    part    maximum (queries,), sum (queries,), weighted values (queries, padded head_dim), float32
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .elementwise import rotate
from .jit import family, kernel, lazy
from .simd import (
    LANES,
    add_f32,
    add_outer,
    exp_f32,
    first_f32,
    fma_f32,
    get_f32,
    get_i64,
    largest_f32,
    load_f32,
    max_f32,
    mul_f32,
    prefetch,
    put_f16,
    put_f32,
    splat_f32,
    store_f32,
    store_outer,
    sum_f32,
    zeros_f32,
)

ATTEND_WORDS = [
    "q",
    "k",
    "v",
    "keys",
    "values",
    "out",
    "n",
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "padded_dim",
    "positions",
    "start",
    "scale",
    "scratch",
    "scratch_nbytes",
    "parts",
    "splits",
    "query_items",
    "queries_per_item",
    "tokens_per_item",
    "cos",
    "sin",
    "pairs",
    "interleaved",
]
(
    QUERY,
    K,
    V,
    KEYS,
    VALUES,
    OUT,
    N,
    N_HEADS,
    N_KV_HEADS,
    HEAD_DIM,
    PADDED_DIM,
    POSITIONS,
    START,
    SCALE,
    SCRATCH,
    SCRATCH_NBYTES,
    PARTS,
    SPLITS,
    QUERY_ITEMS,
    QUERIES_PER_ITEM,
    TOKENS_PER_ITEM,
    COS,
    SIN,
    PAIRS,
    INTERLEAVED,
) = (8 * k for k in range(len(ATTEND_WORDS)))
START_WORD, SCRATCH_WORD, PARTS_WORD, COS_WORD = START // 8, SCRATCH // 8, PARTS // 8, COS // 8
SPLIT = 256  # positions
QUERIES = LANES // 2  # of a tile: with two columns, as many sums as registers bear
SCORE_NBYTES = 4 * SPLIT + 64  # of a query's scores: rows a power of two apart would fight for cache lines


@kernel
def put_position(args, head, position, k, v):
    """Write a head's key and value (addresses of float32) at a position of the cache, as float16."""
    dim, padded, positions = get_i64(args + HEAD_DIM), get_i64(args + PADDED_DIM), get_i64(args + POSITIONS)
    block = head * positions + position // LANES * LANES
    keys = get_i64(args + KEYS) + 2 * (block * dim + position % LANES)
    values = get_i64(args + VALUES) + 2 * (head * positions * padded + position * 2 * LANES)
    for i in range(dim):
        put_f16(keys + 2 * LANES * i, get_f32(k + 4 * i))
        column = i // (2 * LANES) * positions * 2 * LANES + i % (2 * LANES)
        put_f16(values + 2 * column, get_f32(v + 4 * i))


@lazy
def append(args, item, worker):
    """Write the keys and values of an item's tokens into the cache, as float16."""
    heads, dim = get_i64(args + N_KV_HEADS), get_i64(args + HEAD_DIM)
    per_item = get_i64(args + TOKENS_PER_ITEM)
    for t in range(item * per_item, min((item + 1) * per_item, get_i64(args + N))):
        for head in range(heads):
            at = 4 * (t * heads + head) * dim
            put_position(args, head, get_i64(args + START) + t, get_i64(args + K) + at, get_i64(args + V) + at)


@kernel
def weigh(scores, own, limit, part, j, queries):
    """The scores' maximum and sum into a part; exp(score - maximum) over the first `own` floats, 0 up to `limit`."""
    whole = (own + LANES - 1) // LANES * LANES
    for i in range(own, whole):
        put_f32(scores + 4 * i, np.float32(-np.inf))
    top = splat_f32(-np.inf)
    for i in range(0, whole, LANES):
        top = max_f32(load_f32(scores + 4 * i), top)
    largest = largest_f32(top)
    top = splat_f32(-largest)
    total = splat_f32(0.0)
    for i in range(0, whole, LANES):
        e = exp_f32(add_f32(load_f32(scores + 4 * i), top))
        store_f32(scores + 4 * i, e)
        total = add_f32(total, e)
    for i in range(whole, limit):
        put_f32(scores + 4 * i, np.float32(0.0))
    put_f32(part + 4 * j, largest)
    put_f32(part + 4 * (queries + j), sum_f32(total))


@kernel
def merge(into, part, queries, padded):
    """Join the part of the next positions into that of the earlier ones."""
    for j in range(queries):
        before, after = get_f32(into + 4 * j), get_f32(part + 4 * j)
        largest = max(before, after)
        old, new = exp_f32(splat_f32(before - largest)), exp_f32(splat_f32(after - largest))
        put_f32(into + 4 * j, largest)
        total, more = splat_f32(get_f32(into + 4 * (queries + j))), splat_f32(get_f32(part + 4 * (queries + j)))
        put_f32(into + 4 * (queries + j), first_f32(fma_f32(more, new, mul_f32(total, old))))
        x, y = into + 4 * (2 * queries + j * padded), part + 4 * (2 * queries + j * padded)
        for i in range(0, 4 * padded, 4 * LANES):
            store_f32(x + i, fma_f32(load_f32(y + i), new, mul_f32(load_f32(x + i), old)))


@kernel
def scaled(x, factor, out, n):
    """out = x * factor, n floats each."""
    all_lanes, whole = splat_f32(factor), n // LANES * LANES
    for i in range(0, whole, LANES):
        store_f32(out + 4 * i, mul_f32(load_f32(x + 4 * i), all_lanes))
    for i in range(whole, n):
        put_f32(out + 4 * i, get_f32(x + 4 * i) * factor)


@kernel
def finish(args, head, first, count, part, queries):
    """Write a tile's outputs: weighted values over their sum."""
    n_heads, dim, padded = get_i64(args + N_HEADS), get_i64(args + HEAD_DIM), get_i64(args + PADDED_DIM)
    group = n_heads // get_i64(args + N_KV_HEADS)
    for j in range(count):
        which = first + j
        out = get_i64(args + OUT) + 4 * (which // group * n_heads + head * group + which % group) * dim
        scaled(part + 4 * (2 * queries + j * padded), np.float32(1.0) / get_f32(part + 4 * (queries + j)), out, dim)


@kernel
def one_split(zero, queries, args, head, first, count, p0, scores, query, part):
    """The part of a tile for the positions of one split. `zero` is a tile of 2 * `queries` vectors."""
    dim, padded, start = get_i64(args + HEAD_DIM), get_i64(args + PADDED_DIM), get_i64(args + START)
    group = get_i64(args + N_HEADS) // get_i64(args + N_KV_HEADS)
    p1 = min(start + (first + count - 1) // group + 1, p0 + SPLIT)
    keys = get_i64(args + KEYS) + 2 * head * get_i64(args + POSITIONS) * dim
    values = get_i64(args + VALUES) + 2 * head * get_i64(args + POSITIONS) * padded
    for block in range(p0, p1, 2 * LANES):
        acc = zero
        k = keys + 2 * block * dim
        for i in range(dim):
            acc = add_outer(acc, k + 2 * LANES * i, 2 * LANES * dim, query + 4 * i, 4 * dim, 2)
        store_outer(acc, scores + 4 * (block - p0), SCORE_NBYTES, 2)
    for j in range(queries):
        own = start + (first + min(j, count - 1)) // group + 1
        weigh(scores + j * SCORE_NBYTES, min(max(own - p0, 0), SPLIT), p1 - p0, part, j, queries)
    for i in range(0, padded, 2 * LANES):
        acc = zero
        v = values + 2 * (i * get_i64(args + POSITIONS) + p0 * 2 * LANES)
        for p in range(p1 - p0):
            acc = add_outer(acc, v + 4 * LANES * p, 2 * LANES, scores + 4 * p, SCORE_NBYTES, 2)
        store_outer(acc, part + 4 * (2 * queries + i), 4 * padded, 2)


@kernel
def gather(args, head, first, count, query, queries):
    """A tile's queries side by side, times the scale."""
    n_heads, dim, scale = get_i64(args + N_HEADS), get_i64(args + HEAD_DIM), get_f32(args + SCALE)
    group = n_heads // get_i64(args + N_KV_HEADS)
    for j in range(queries):
        which = first + min(j, count - 1)
        x = get_i64(args + QUERY) + 4 * (which // group * n_heads + head * group + which % group) * dim
        scaled(x, scale, query + 4 * j * dim, dim)


@family
def attend(queries: int) -> Callable:
    """Kernel: attention of a batch; an item is one key head and some tiles of `queries` of its queries."""
    vectors = 2 * queries

    def attend(args, item, worker):
        n, n_heads, kv_heads = get_i64(args + N), get_i64(args + N_HEADS), get_i64(args + N_KV_HEADS)
        dim, padded, start = get_i64(args + HEAD_DIM), get_i64(args + PADDED_DIM), get_i64(args + START)
        group = n_heads // kv_heads
        head, share = item // get_i64(args + QUERY_ITEMS), item % get_i64(args + QUERY_ITEMS)
        per_item, zero = get_i64(args + QUERIES_PER_ITEM), zeros_f32(vectors)
        scores = get_i64(args + SCRATCH) + worker * get_i64(args + SCRATCH_NBYTES)
        query = scores + queries * SCORE_NBYTES
        result = query + 4 * queries * dim
        more = result + 4 * queries * (padded + 2)
        for first in range(share * per_item, min((share + 1) * per_item, n * group), queries):
            count = min(queries, n * group - first)
            gather(args, head, first, count, query, queries)
            part = result
            for p0 in range(0, start + (first + count - 1) // group + 1, SPLIT):  # one call: compiled once
                one_split(zero, queries, args, head, first, count, p0, scores, query, part)
                if p0:
                    merge(result, part, queries, padded)
                part = more
            finish(args, head, first, count, result, queries)

    return attend


@kernel
def fetch_split(args, head, p0, padded):
    """Prefetch a split's keys and values: one token reads them once, after all weights passed through the caches."""
    count = min(get_i64(args + START) + 1 - p0, SPLIT)
    at = get_i64(args + KEYS) + 2 * (head * get_i64(args + POSITIONS) + p0) * get_i64(args + HEAD_DIM)
    for i in range(0, 2 * count * get_i64(args + HEAD_DIM), 64):
        prefetch(at + i)
    for column in range(padded // (2 * LANES)):
        place = (head * padded // (2 * LANES) + column) * get_i64(args + POSITIONS) + p0
        at = get_i64(args + VALUES) + 4 * LANES * place
        for i in range(0, 4 * LANES * count, 64):
            prefetch(at + i)


@kernel
def gather_rotated(args, head, first, count, query, queries):
    """As `gather`, for one token, whose queries are rotated first, if PAIRS says so."""
    n_heads, dim, scale = get_i64(args + N_HEADS), get_i64(args + HEAD_DIM), get_f32(args + SCALE)
    group, pairs = n_heads // get_i64(args + N_KV_HEADS), get_i64(args + PAIRS)
    for j in range(queries):
        x = get_i64(args + QUERY) + 4 * (head * group + first + min(j, count - 1)) * dim
        to = query + 4 * j * dim
        if pairs:
            rotate(x, to, dim, get_i64(args + COS), get_i64(args + SIN), pairs, get_i64(args + INTERLEAVED))
            x = to
        scaled(x, scale, to, dim)


@family
def attend_split(queries: int) -> Callable:
    """Kernel: attention of one token; an item is one key head and one split, for all tiles of its queries.

    The last split stores the key, rotated, and the value first. One split alone leaves nothing to `join`.
    """
    vectors = 2 * queries

    def attend_split(args, item, worker):
        kv_heads, padded, zero = get_i64(args + N_KV_HEADS), get_i64(args + PADDED_DIM), zeros_f32(vectors)
        dim, start, pairs = get_i64(args + HEAD_DIM), get_i64(args + START), get_i64(args + PAIRS)
        group, tiles = get_i64(args + N_HEADS) // kv_heads, get_i64(args + QUERY_ITEMS)
        head, split = item % kv_heads, item // kv_heads
        if split <= start // SPLIT:
            fetch_split(args, head, split * SPLIT, padded)
            scores = get_i64(args + SCRATCH) + worker * get_i64(args + SCRATCH_NBYTES)
            query = scores + queries * SCORE_NBYTES
            if split == start // SPLIT:
                k, v = get_i64(args + K) + 4 * head * dim, get_i64(args + V) + 4 * head * dim
                if pairs:
                    rotate(k, query, dim, get_i64(args + COS), get_i64(args + SIN), pairs, get_i64(args + INTERLEAVED))
                    k = query
                put_position(args, head, start, k, v)
            for tile in range(tiles):
                first = tile * queries
                count = min(queries, group - first)
                at = (head * tiles + tile) * get_i64(args + SPLITS) + split
                part = get_i64(args + PARTS) + 4 * queries * (padded + 2) * at
                if start < SPLIT:
                    part = query + 4 * queries * dim
                gather_rotated(args, head, first, count, query, queries)
                one_split(zero, queries, args, head, first, count, split * SPLIT, scores, query, part)
                if start < SPLIT:
                    finish(args, head, first, count, part, queries)

    return attend_split


@family
def join(queries: int) -> Callable:
    """Kernel: join the parts of one token's splits; an item is some key heads with all tiles."""

    def join(args, item, worker):
        kv_heads, padded, tiles = get_i64(args + N_KV_HEADS), get_i64(args + PADDED_DIM), get_i64(args + QUERY_ITEMS)
        group, per_item = get_i64(args + N_HEADS) // kv_heads, get_i64(args + TOKENS_PER_ITEM)
        nbytes = 4 * queries * (padded + 2)
        last = min((item + 1) * per_item, kv_heads)
        if get_i64(args + START) < SPLIT:
            last = 0
        for head in range(item * per_item, last):
            for tile in range(tiles):
                part = get_i64(args + PARTS) + nbytes * (head * tiles + tile) * get_i64(args + SPLITS)
                for k in range(1, get_i64(args + START) // SPLIT + 1):
                    merge(part, part + k * nbytes, queries, padded)
                first = tile * queries
                finish(args, head, first, min(queries, group - first), part, queries)

    return join


def part_nbytes(queries: int, padded_dim: int) -> int:
    """Bytes of a part."""
    return 4 * queries * (padded_dim + 2)


def scratch_nbytes(queries: int, head_dim: int, padded_dim: int) -> int:
    """Bytes of a worker's scratch: scores, queries, two parts."""
    nbytes = queries * (SCORE_NBYTES + 4 * head_dim) + 2 * part_nbytes(queries, padded_dim)
    return -(-nbytes // 64) * 64
