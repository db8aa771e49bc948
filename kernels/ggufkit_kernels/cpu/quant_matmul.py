"""Packed codes times int8 inputs: out (n, rows) = x (n, cols) @ weight.T for quantized weights.

An item is a few strips of rows times a few tokens; inside it a strip is unpacked once for a tile of tokens. The same
operations in the same order serve one token and many, so prefill and decode round alike.

Two ways, by what the processor has (`FAMILY.dot`):
- `by_fours` (AVX-512 VNNI, AVX-VNNI, NEON dot products): one instruction adds four products of bytes to an int32.
  A unit of 32 or 16 inputs is summed, then goes into float32 with one conversion, one multiplication by the input's
  scale and one fma: 3 operations beside 8 (or 4).
- `by_pairs` (AVX2, AVX-512 without VNNI, anything): `vpmaddubsw` adds two products into an int16. They are summed as
  far as they fit, then `vpmaddwd` with the integer scale brings them into int32 for free.

One token reads each weight once, as fast as memory gives it. The processor's own prefetching does that if it sees
addresses rise; LLVM, left to itself, reads the last vector of a chunk second. So the vectors of codes are read in
order, and nothing else prefetches them. Matvec of 5632 x 2048 from memory over the kernel before, which prefetched 3 KB
ahead (without, it took up to twice the time), Zen 4, 2 threads, 50 to 100 rounds in one process: Q8_0 1.09-1.31, Q6_K
1.24-1.33, Q5_0 and Q5_1 1.26, Q5_K 1.03-1.12; with AVX2's 8 lanes Q8_0 1.17, Q6_K 1.04. Chunks of less than FOLLOWED
bytes are prefetched: without it Q2_K 0.9-0.96, with 8 lanes Q4_0 0.85-0.95.

Scales and minima lie in streams of their own, whose pages last for many pages of codes: the processor waits for the
first line of each. They are prefetched as well, those of SCALES_EVERY chunks at a time, SCALES_AHEAD bytes of codes
ahead. Tokens of a 1B shape with it over without, two kernels in one process on the same weights, 150 rounds: Q4_K_M
1.09, Q8_0 and Q6_K 1.01-1.02; 4096 bytes: 1.07, 1.0, 0.96. Matvec of Q4_0 from memory: 1.06 a chunk at a time, 1.14 by
two, 1.19-1.24 by eight (61 GB/s on two threads), MXFP4 1.04, NVFP4 and NF4 1.09. Codes of 4 bits, one line in each 256
bytes or more: 0.8-0.9.
"""

from __future__ import annotations

from collections.abc import Callable

from .jit import family, kernel
from .simd import (
    LANES,
    QUAD,
    add_dots,
    add_floats,
    add_products,
    dot_pairs,
    float_i32,
    get_i64,
    load_codes,
    load_minimum,
    load_number,
    load_scale,
    load_u8,
    mul_f32,
    neg_f32,
    prefetch,
    prefetch_ahead,
    splat_f32,
    splat_i32,
    store_tile,
    zeros_f32,
    zeros_i32,
)
from .words import (
    BLOCKS,
    CODES,
    COLS,
    DMIN,
    MINIMUM,
    OUT,
    ROWS,
    SCALE,
    STARTS,
    STRIP_NBYTES,
    SUMS,
    TABLE,
    A,
    D,
    N,
    Q,
    bias_of,
    part_of,
)

AHEAD = 3072  # bytes
FOLLOWED = 192  # bytes a chunk, from which on the processor's prefetching keeps up
SCALES_AHEAD = 1536  # bytes of codes whose scales are prefetched
SCALES_EVERY = 8  # chunks
NUMBER_NBYTES = (4, 2, 2, 1, 1)  # of each kind of number (see `load_number`)


@kernel
def fetch_inputs(args, cols, start_step, sum_step):
    """Prefetch one token's inputs: another thread's cache has them, if another thread made them.

    1B shape, Q4_K_M, on two threads: 1.005 of the tokens a second.
    """
    for i in range(0, cols, 64):
        prefetch(get_i64(args + Q) + i)
    for i in range(0, cols // 8, 64):
        prefetch(get_i64(args + A) + i)
    for i in range(0, cols // 32 * start_step, 64):
        prefetch(get_i64(args + STARTS) + i)
    for i in range(0, cols // 32 * sum_step, 64):
        prefetch(get_i64(args + SUMS) + i)


@family
def by_pairs(
    values: int,
    bits: int,
    block: int,
    group: int,
    scaled: int,
    minimum: int,
    joined: int,
    number: int,
    span: int,
    started: int,
    tokens: int,
) -> Callable:
    """Kernel: packed codes x int8 inputs, for one layout (see `Layout`; `span` in quads) and tile, in int16 pairs."""
    small = 1 if block == 16 else 0  # a chunk has two d
    halves = 1 if group == 16 else 0  # a chunk has two scales and two sums
    chunks, group_chunks = max(1, block // 32), max(1, group // 32)
    quads, d_step = (4 if halves else 8), LANES * NUMBER_NBYTES[number]
    code_step, scale_step = bits * 4 * LANES, LANES * (block // group)
    block_step = 2 * d_step if small else d_step
    ahead = tokens == 1 and code_step < FOLLOWED
    streamed = 1 if tokens == 1 and not ahead else 0
    min_step = {0: scale_step, 4: 0, 6: scale_step // 2}[joined]
    far, every = -(-SCALES_AHEAD // (code_step * chunks)), max(1, SCALES_EVERY // chunks)  # in blocks
    far_d, far_scale, far_min = far * block_step, far * scale_step, far * min_step
    every_d, every_scale, every_min = every * block_step, every * scale_step, every * min_step
    sum_step, start_step = (8 if halves else 4), (4 * (8 // span) if started else 0)

    def packed(args, item, worker):
        strip0, strip1, token0, token1 = part_of(args, item)
        n, rows, cols, blocks = get_i64(args + N), get_i64(args + ROWS), get_i64(args + COLS), get_i64(args + BLOCKS)
        table, low_table = load_u8(get_i64(args + TABLE)), load_u8(get_i64(args + TABLE) + QUAD)
        scale, low = splat_i32(1), splat_f32(0.0)
        if tokens == 1:
            fetch_inputs(args, cols, start_step, sum_step if minimum else 0)
        for strip in range(strip0, strip1):
            bias = bias_of(args, strip)
            for first in range(token0, token1, tokens):
                t = min(first, n - tokens)  # the last tile may repeat tokens of the one before
                code = get_i64(args + CODES) + strip * get_i64(args + STRIP_NBYTES)
                at_d = get_i64(args + D) + strip * blocks * d_step
                at_dmin = get_i64(args + DMIN) + strip * blocks * d_step
                at_scale = get_i64(args + SCALE) + strip * blocks * scale_step
                at_min = get_i64(args + MINIMUM) + strip * blocks * min_step
                q, a = get_i64(args + Q) + first * cols, get_i64(args + A) + first * cols // 8
                start = get_i64(args + STARTS) + first * cols // 32 * start_step
                sums = get_i64(args + SUMS) + first * cols // 32 * sum_step
                acc = zeros_f32(tokens)
                for b in range(cols // 32 // chunks):
                    if tokens == 1 and b % every == 0:
                        prefetch_ahead(at_d, far_d, every_d)
                        if scaled:
                            prefetch_ahead(at_scale, far_scale, every_scale)
                        if minimum:
                            prefetch_ahead(at_dmin, far_d, every_d)
                        if minimum == 2 and min_step:
                            prefetch_ahead(at_min, far_min, every_min)
                    d = load_number(at_d, number)
                    for c in range(chunks):
                        if ahead:
                            prefetch_ahead(code, AHEAD, code_step)
                        planes = load_codes(code, bits, streamed)
                        total = zeros_i32(tokens)
                        if scaled:
                            scale = load_scale(at_scale, at_min, c // group_chunks * (1 + halves), scaled, joined)
                        total = dot_pairs(
                            total,
                            planes,
                            scale,
                            table,
                            low_table,
                            q,
                            32,
                            start,
                            start_step,
                            0,
                            quads,
                            values,
                            span,
                            started,
                        )
                        if small:
                            acc = add_floats(acc, total, d, a, 4)
                            d, total = load_number(at_d + d_step, number), zeros_i32(tokens)
                        if halves:
                            if scaled:
                                scale = load_scale(at_scale, at_min, 2 * c + 1, scaled, joined)
                            total = dot_pairs(
                                total,
                                planes,
                                scale,
                                table,
                                low_table,
                                q,
                                32,
                                start,
                                start_step,
                                4,
                                4,
                                values,
                                span,
                                started,
                            )
                        acc = add_floats(acc, total, d, a, 4)
                        if minimum:
                            for u in range(1 + halves):
                                low = neg_f32(load_number(at_dmin + u * small * d_step, number))
                                if minimum == 2:
                                    which = c // group_chunks * (1 + halves) + u
                                    low = mul_f32(low, float_i32(load_minimum(at_scale, at_min, which, joined)))
                                acc = add_products(acc, low, sums + 4 * u, sum_step)
                        code, q, a = code + code_step, q + 32 * tokens, a + 4 * tokens
                        start, sums = start + start_step * tokens, sums + sum_step * tokens
                    at_d, at_dmin = at_d + block_step, at_dmin + block_step
                    at_scale, at_min = at_scale + scale_step, at_min + min_step
                out = get_i64(args + OUT) + 4 * (t * rows + strip * LANES)
                store_tile(acc, bias, out, 4 * rows, rows - strip * LANES, 0)

    return packed


@family
def by_fours(
    values: int,
    bits: int,
    block: int,
    group: int,
    scaled: int,
    minimum: int,
    joined: int,
    number: int,
    started: int,
    tokens: int,
) -> Callable:
    """Kernel: packed codes x int8 inputs, for one layout and tile, summed four products at a time."""
    small = 1 if block == 16 else 0  # a chunk has two d
    units = 2 if group == 16 else 1  # a chunk has two scales, two starts and two sums
    chunks, group_chunks = max(1, block // 32), max(1, group // 32)
    quads, d_step = 8 // units, LANES * NUMBER_NBYTES[number]
    code_step, scale_step = bits * QUAD, LANES * (block // group)
    block_step = 2 * d_step if small else d_step
    ahead = tokens == 1 and code_step < FOLLOWED
    streamed = 1 if tokens == 1 and not ahead else 0
    min_step = {0: scale_step, 4: 0, 6: scale_step // 2}[joined]
    far, every = -(-SCALES_AHEAD // (code_step * chunks)), max(1, SCALES_EVERY // chunks)  # in blocks
    far_d, far_scale, far_min = far * block_step, far * scale_step, far * min_step
    every_d, every_scale, every_min = every * block_step, every * scale_step, every * min_step
    sum_step, start_step = 4 * units, (4 * units if started else 0)

    def packed(args, item, worker):
        strip0, strip1, token0, token1 = part_of(args, item)
        n, rows, cols, blocks = get_i64(args + N), get_i64(args + ROWS), get_i64(args + COLS), get_i64(args + BLOCKS)
        table, low_table = load_u8(get_i64(args + TABLE)), load_u8(get_i64(args + TABLE) + QUAD)
        if tokens == 1:
            fetch_inputs(args, cols, start_step, sum_step if minimum else 0)
        for strip in range(strip0, strip1):
            bias = bias_of(args, strip)
            for first in range(token0, token1, tokens):
                t = min(first, n - tokens)  # the last tile may repeat tokens of the one before
                code = get_i64(args + CODES) + strip * get_i64(args + STRIP_NBYTES)
                at_d = get_i64(args + D) + strip * blocks * d_step
                at_dmin = get_i64(args + DMIN) + strip * blocks * d_step
                at_scale = get_i64(args + SCALE) + strip * blocks * scale_step
                at_min = get_i64(args + MINIMUM) + strip * blocks * min_step
                q, a = get_i64(args + Q) + first * cols, get_i64(args + A) + first * cols // 8
                start = get_i64(args + STARTS) + first * cols // 32 * start_step
                sums = get_i64(args + SUMS) + first * cols // 32 * sum_step
                acc = zeros_f32(tokens)
                for b in range(cols // 32 // chunks):
                    if tokens == 1 and b % every == 0:
                        prefetch_ahead(at_d, far_d, every_d)
                        if scaled:
                            prefetch_ahead(at_scale, far_scale, every_scale)
                        if minimum:
                            prefetch_ahead(at_dmin, far_d, every_d)
                        if minimum == 2 and min_step:
                            prefetch_ahead(at_min, far_min, every_min)
                    d = load_number(at_d, number)
                    for c in range(chunks):
                        if ahead:
                            prefetch_ahead(code, AHEAD, code_step)
                        planes, group0 = load_codes(code, bits, streamed), c // group_chunks * units
                        scale = d
                        if scaled:
                            scale = mul_f32(d, float_i32(load_scale(at_scale, at_min, group0, scaled, joined)))
                        acc = add_dots(
                            acc, planes, scale, table, low_table, q, 32, start, start_step, a, 4,
                            0, quads, values, started,
                        )  # fmt: skip
                        if units == 2:
                            if small:
                                scale = load_number(at_d + d_step, number)
                            elif scaled:
                                scale = mul_f32(d, float_i32(load_scale(at_scale, at_min, group0 + 1, scaled, joined)))
                            acc = add_dots(
                                acc, planes, scale, table, low_table, q, 32, start, start_step, a, 4,
                                4, 4, values, started,
                            )  # fmt: skip
                        if minimum:
                            for u in range(units):
                                low = neg_f32(load_number(at_dmin + u * small * d_step, number))
                                if minimum == 2:
                                    low = mul_f32(low, float_i32(load_minimum(at_scale, at_min, group0 + u, joined)))
                                acc = add_products(acc, low, sums + 4 * u, sum_step)
                        code, q, a = code + code_step, q + 32 * tokens, a + 4 * tokens
                        start, sums = start + start_step * tokens, sums + sum_step * tokens
                    at_d, at_dmin = at_d + block_step, at_dmin + block_step
                    at_scale, at_min = at_scale + scale_step, at_min + min_step
                out = get_i64(args + OUT) + 4 * (t * rows + strip * LANES)
                store_tile(acc, bias, out, 4 * rows, rows - strip * LANES, 0)

    return packed
