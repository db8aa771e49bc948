"""Causal attention over a cache of float16 keys and values.

An item is one key head and a tile of 4 or 8 of the queries that read it (the heads of its group, then the next
rows). Keys lie transposed in blocks of LANES positions, so that a vector holds one dimension of LANES keys and a
score needs no sum across lanes; a key is loaded and converted once for the whole tile. Two passes: all scores of
the tile into the worker's scratch, their softmax, then the weighted sum of the values, held in registers over
all positions.

    keys    (n_kv_heads, positions / LANES, head_dim, LANES) float16
    values  (n_kv_heads, positions, padded head_dim) float16
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .jit import kernel
from .simd import (
    LANES,
    add_f32,
    add_products,
    exp_f32,
    get_f32,
    get_i64,
    largest_f32,
    load_f32,
    load_number,
    load_tile,
    max_f32,
    put_f16,
    put_f32,
    splat_f32,
    store_f32,
    store_tile,
    sum_f32,
    zeros_f32,
)
from .team import address_of, lazy

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
    "score_nbytes",
    "query_items",
    "queries_per_item",
    "tokens_per_item",
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
    SCORE_NBYTES,
    QUERY_ITEMS,
    QUERIES_PER_ITEM,
    TOKENS_PER_ITEM,
) = (8 * k for k in range(len(ATTEND_WORDS)))
POSITION_BLOCK = 128


@lazy
def append(args, item, worker):
    """Write the keys and values of an item's tokens into the cache, as float16."""
    heads, dim, padded = get_i64(args + N_KV_HEADS), get_i64(args + HEAD_DIM), get_i64(args + PADDED_DIM)
    positions, per_item = get_i64(args + POSITIONS), get_i64(args + TOKENS_PER_ITEM)
    for t in range(item * per_item, min((item + 1) * per_item, get_i64(args + N))):
        position = get_i64(args + START) + t
        for head in range(heads):
            k = get_i64(args + K) + 4 * (t * heads + head) * dim
            v = get_i64(args + V) + 4 * (t * heads + head) * dim
            block = head * positions + position // LANES * LANES
            keys = get_i64(args + KEYS) + 2 * (block * dim + position % LANES)
            values = get_i64(args + VALUES) + 2 * (head * positions + position) * padded
            for i in range(dim):
                put_f16(keys + 2 * LANES * i, get_f32(k + 4 * i))
                put_f16(values + 2 * i, get_f32(v + 4 * i))


@kernel
def softmax(scores, own, limit):
    """exp(score - largest) over the first `own` floats, 0 from there to `limit`; returns 1 / their sum."""
    whole = (own + LANES - 1) // LANES * LANES
    for i in range(own, whole):
        put_f32(scores + 4 * i, np.float32(-np.inf))
    top = splat_f32(-np.inf)
    for i in range(0, whole, LANES):
        top = max_f32(load_f32(scores + 4 * i), top)
    top = splat_f32(-largest_f32(top))
    total = splat_f32(0.0)
    for i in range(0, whole, LANES):
        e = exp_f32(add_f32(load_f32(scores + 4 * i), top))
        store_f32(scores + 4 * i, e)
        total = add_f32(total, e)
    for i in range(whole, limit):
        put_f32(scores + 4 * i, np.float32(0.0))
    return np.float32(1.0) / sum_f32(total)


@cache
def attend(queries: int) -> int:
    """Kernel: attention with tiles of `queries` queries (4 or 8)."""

    @kernel
    def attend(args, item, worker):
        """Scores, softmax and weighted sum for one key head and some tiles of its queries."""
        n, n_heads, kv_heads = get_i64(args + N), get_i64(args + N_HEADS), get_i64(args + N_KV_HEADS)
        dim, padded, start = get_i64(args + HEAD_DIM), get_i64(args + PADDED_DIM), get_i64(args + START)
        group = n_heads // kv_heads
        head, part = item // get_i64(args + QUERY_ITEMS), item % get_i64(args + QUERY_ITEMS)
        per_item, stride = get_i64(args + QUERIES_PER_ITEM), get_i64(args + SCORE_NBYTES)
        keys = get_i64(args + KEYS) + 2 * head * get_i64(args + POSITIONS) * dim
        values = get_i64(args + VALUES) + 2 * head * get_i64(args + POSITIONS) * padded
        scores = get_i64(args + SCRATCH) + worker * get_i64(args + SCRATCH_NBYTES)
        query = scores + queries * stride
        result = query + 4 * queries * dim
        scale = get_f32(args + SCALE)
        for first in range(part * per_item, min((part + 1) * per_item, n * group), queries):
            count = min(queries, n * group - first)
            limit = start + (first + count - 1) // group + 1
            for j in range(queries):  # the tile's queries side by side, times the scale
                which = first + min(j, count - 1)
                x = get_i64(args + QUERY) + 4 * (which // group * n_heads + head * group + which % group) * dim
                for i in range(dim):
                    put_f32(query + 4 * (j * dim + i), get_f32(x + 4 * i) * scale)
            for block in range(0, limit, LANES):
                acc = zeros_f32(queries)
                k = keys + 2 * block * dim
                for i in range(dim):
                    acc = add_products(acc, load_number(k + 2 * LANES * i, 1), query + 4 * i, 4 * dim)
                store_tile(acc, splat_f32(0.0), scores + 4 * block, stride, LANES)
            for j in range(queries):
                own = start + (first + min(j, count - 1)) // group + 1
                factor = softmax(scores + j * stride, own, limit)
                put_f32(result + 4 * (queries * padded + j), factor)
            for p0 in range(0, limit, POSITION_BLOCK):  # a block of values stays in the L1 cache
                p1 = min(p0 + POSITION_BLOCK, limit)
                for i in range(0, padded, LANES):
                    acc = zeros_f32(queries)
                    if p0:
                        acc = load_tile(acc, result + 4 * i, 4 * padded)
                    v = values + 2 * (p0 * padded + i)
                    for p in range(p0, p1):
                        acc = add_products(acc, load_number(v, 1), scores + 4 * p, stride)
                        v += 2 * padded
                    store_tile(acc, splat_f32(0.0), result + 4 * i, 4 * padded, LANES)
            for j in range(count):
                which = first + j
                out = get_i64(args + OUT) + 4 * (which // group * n_heads + head * group + which % group) * dim
                factor = get_f32(result + 4 * (queries * padded + j))
                for i in range(dim):
                    put_f32(out + 4 * i, get_f32(result + 4 * (j * padded + i)) * factor)

    return address_of(attend)


def scratch_nbytes(queries: int, limit: int, head_dim: int, padded_dim: int) -> tuple[int, int]:
    """Bytes of a worker's scratch, and of one query's scores, for positions below `limit`."""
    score = -(-limit // 16) * 64 + 64  # rows a power of two apart would fight for cache lines
    score += 64 * (score % 4096 == 0)
    nbytes = queries * (score + 4 * head_dim + 4 * padded_dim + 4)
    return -(-nbytes // 64) * 64, score
