"""What a matmul makes of its inputs once, before any weight is read.

Quantized weights meet int8 inputs: 32 inputs share a float32 scale a = largest magnitude / 127, finer than what
llama.cpp does for K types (one a 256 inputs) and the same as for the others. With them come the sums that an offset
or a minimum needs. Plain weights meet float32 inputs, interleaved by tiles of tokens: rows of inputs that lie a
power of two apart would fight for the same cache lines (F32, 8 KB apart: 35 GOP/s; interleaved: 52–60).
"""

from __future__ import annotations

from collections.abc import Callable

from .jit import family, lazy
from .simd import (
    LANES,
    bits_f32,
    get_f32,
    get_i64,
    largest_magnitude,
    load_f32,
    max_i32,
    mul_f32,
    put_f32,
    round_f32,
    splat_f32,
    store_i8,
    store_starts,
    store_sums,
)
from .words import COLS, FACTOR, OFFSET, PREP_TILES, STARTS, SUMS, A, N, Q, X

PLAIN_TOKENS = 8  # a tile of float32 inputs


@family
def quantize_inputs(span: int, unit: int, tile: int) -> Callable:
    """Kernel: x float32 (n, cols) -> int8 inputs, scales, and the sums that a layout needs: starts per `span` inputs
    for layouts with an offset, sums per `unit` inputs for those with a minimum (0: none).

    All lie as (tiles, chunks of 32 inputs, `tile` tokens, values), so that a matmul's tile reads forward and its
    addresses differ by constants. The last tile begins at token n - tile: it repeats some of the one before. Where an
    input is not finite, its scale is NaN.
    """
    n_starts, n_sums = (32 // span if span else 0), (32 // unit if unit else 0)

    def quantize_inputs(args, item, worker):
        cols, n = get_i64(args + COLS), get_i64(args + N)
        offset, factor = get_i64(args + OFFSET), get_f32(args + FACTOR)
        per_item = get_i64(args + PREP_TILES)
        for k in range(item * per_item, min((item + 1) * per_item, (n + tile - 1) // tile)):
            for j in range(tile):
                x = get_i64(args + X) + 4 * (min(k * tile, n - tile) + j) * cols
                at = k * tile * (cols // 32) + j  # in chunks
                for _ in range(cols // 32):
                    q = get_i64(args + Q) + 32 * at
                    bits = bits_f32(load_f32(x))
                    for i in range(LANES, 32, LANES):
                        bits = max_i32(bits, bits_f32(load_f32(x + 4 * i)))
                    largest = largest_magnitude(bits)
                    inverse = splat_f32(127.0 / largest if largest > 1e-30 else 0.0)
                    for i in range(0, 32, LANES):
                        store_i8(q + i, round_f32(mul_f32(load_f32(x + 4 * i), inverse)))
                    # 0 times the largest is NaN where an input is infinite or NaN
                    scale = largest / 127.0 * factor + largest * 0.0
                    put_f32(get_i64(args + A) + 4 * at, scale)
                    x += 128
                    at += tile
                # Sums in a loop of their own: reading the bytes that were just written, in other pieces, would wait
                at = k * tile * (cols // 32) + j
                for _ in range(cols // 32 if span or unit else 0):
                    q = get_i64(args + Q) + 32 * at
                    if span:
                        store_starts(q, -offset, get_i64(args + STARTS) + 4 * n_starts * at, span)
                    if unit:
                        scale = get_f32(get_i64(args + A) + 4 * at)
                        store_sums(q, scale, get_i64(args + SUMS) + 4 * n_sums * at, unit)
                    at += tile

    return quantize_inputs


@lazy
def interleave_inputs(args, item, worker):
    """x float32 (n, cols) -> (tiles, cols, PLAIN_TOKENS)."""
    n, cols = get_i64(args + N), get_i64(args + COLS)
    first = item * PLAIN_TOKENS
    x = get_i64(args + X) + 4 * min(first, n - PLAIN_TOKENS) * cols
    tile = get_i64(args + Q) + 4 * first * cols
    for i in range(cols):
        for t in range(PLAIN_TOKENS):
            put_f32(tile + 4 * (i * PLAIN_TOKENS + t), get_f32(x + 4 * (t * cols + i)))
