"""Matrix times inputs, on packed codes: out (n, rows) = x (n, cols) @ weight.T.

Quantized weights meet inputs that are quantized to int8 per 32, with a float32 scale (`quantize_inputs`, once a
matmul), and are multiplied as integers; plain numbers meet float32 inputs and are multiplied as float32. An item
is a few strips of rows times a few tokens; inside it a strip is unpacked once for a tile of TOKENS tokens.
The same operations in the same order serve one token and many, so prefill and decode round alike.

A factory is asked with a layout's integers and compiles one kernel for them. Kernels read int64 words (`WORDS`)
by address; `ops.py` checks every size before.
"""

from __future__ import annotations

import struct
from functools import cache

from .jit import kernel
from .pack import Layout, Packed
from .simd import (
    LANES,
    abs_f32,
    add_f32,
    float_i32,
    get_f32,
    get_i64,
    largest_f32,
    load_bytes,
    load_codes,
    load_f32,
    load_number,
    load_u8,
    max_f32,
    mul_f32,
    neg_f32,
    put_f32,
    round_f32,
    splat_f32,
    splat_i32,
    store_i8,
    sum_f32,
)
from .team import address_of, lazy
from .tiles import (
    add_columns,
    add_floats,
    add_products,
    dot_codes,
    store_starts,
    store_sums,
    store_tile,
    sum_tile,
    zeros_f32,
    zeros_i32,
)

# The words of a matmul's args, as byte offsets. The first are the weight's, the others the call's.
WEIGHT_WORDS = [
    "codes",
    "d",
    "scale",
    "dmin",
    "minimum",
    "table",
    "strip_nbytes",
    "blocks",
    "rows",
    "strips",
    "cols",
    "offset",
    "factor",
]
CALL_WORDS = [
    "x",
    "n",
    "out",
    "bias",
    "q",
    "a",
    "starts",
    "sums",
    "strips_per_item",
    "tokens_per_item",
    "strip_items",
    "prep_tokens",
]
AT = {name: 8 * k for k, name in enumerate(WEIGHT_WORDS + CALL_WORDS)}
(CODES, D, SCALE, DMIN, MINIMUM, TABLE, STRIP_NBYTES, BLOCKS, ROWS, STRIPS, COLS, OFFSET, FACTOR) = (
    AT[name] for name in WEIGHT_WORDS
)
(X, N, OUT, BIAS, Q, A, STARTS, SUMS, STRIPS_PER_ITEM, TOKENS_PER_ITEM, STRIP_ITEMS, PREP_TOKENS) = (
    AT[name] for name in CALL_WORDS
)
TOKENS = 4  # a tile of quantized inputs: more spill registers
PLAIN_TOKENS = 8  # a tile of float32 inputs
VALUES = {"codes": 0, "bytes": 1, "table": 2, "table16": 3}
NUMBERS = {"f32": 0, "f16": 1, "bf16": 2}
SCALES = {"": 0, "i1": 1, "u1": 2}


def weight_words(weight: Packed) -> list[int]:
    """The int64 words that describe a packed matrix, in the order of WEIGHT_WORDS."""
    arrays = (weight.codes, weight.d, weight.scale, weight.dmin, weight.minimum, weight.table)
    factor = struct.unpack("<i", struct.pack("<f", weight.table_step))[0]
    return [
        *(a.ctypes.data for a in arrays),
        weight.codes[0].nbytes,
        weight.d.shape[1] if weight.d.ndim == 3 else 0,
        weight.shape[0],
        weight.strips,
        weight.padded_cols,
        weight.layout.offset,
        factor,
    ]


@cache
def quantize_inputs(span: int, unit: int) -> int:
    """Kernel: x float32 (n, cols) -> int8 q (n, cols), scales a (n, cols / 32), and the sums that a layout needs:
    starts per `span` inputs for layouts with an offset, sums per `unit` inputs for those with a minimum (0: none).

    a = largest magnitude of 32 inputs / 127; where an input is not finite, a is NaN.
    """

    @kernel
    def quantize_inputs(args, item, worker):
        cols = get_i64(args + COLS)
        offset, factor = get_i64(args + OFFSET), get_f32(args + FACTOR)
        per_item = get_i64(args + PREP_TOKENS)
        first = item * per_item
        chunks = cols // 32 * (min(first + per_item, get_i64(args + N)) - first)
        x = get_i64(args + X) + first * cols * 4
        q = get_i64(args + Q) + first * cols
        a = get_i64(args + A) + first * cols // 8
        starts = get_i64(args + STARTS)
        if span:
            starts += first * cols // span * 4
        sums = get_i64(args + SUMS)
        if unit:
            sums += first * cols // unit * 4
        for chunk in range(chunks):
            v0, v1, v2, v3 = load_f32(x), load_f32(x + 32), load_f32(x + 64), load_f32(x + 96)
            both = max_f32(max_f32(abs_f32(v0), abs_f32(v1)), max_f32(abs_f32(v2), abs_f32(v3)))
            largest = largest_f32(both)
            scale = largest / 127.0
            inverse = splat_f32(127.0 / largest if largest > 1e-30 else 0.0)
            store_i8(q, round_f32(mul_f32(v0, inverse)))
            store_i8(q + 8, round_f32(mul_f32(v1, inverse)))
            store_i8(q + 16, round_f32(mul_f32(v2, inverse)))
            store_i8(q + 24, round_f32(mul_f32(v3, inverse)))
            # 0 * x is NaN where x is infinite or NaN, which the maximum may have passed over
            spoiled = sum_f32(mul_f32(add_f32(add_f32(v0, v1), add_f32(v2, v3)), splat_f32(0.0)))
            scale = scale * factor + spoiled
            put_f32(a + 4 * chunk, scale)
            if span:
                store_starts(q, -offset, starts, span)
                starts += 4 * (32 // span)
            if unit:
                store_sums(q, scale, sums, unit)
                sums += 4 * (32 // unit)
            x += 128
            q += 32

    return address_of(quantize_inputs)


def prep_kernel(layout: Layout) -> tuple[int, int, int]:
    """The kernel that quantizes the inputs for a layout, and its span and unit (0: no starts, no sums)."""
    span = layout.span if layout.values == "codes" and layout.offset else 0
    unit = layout.unit if layout.minimum else 0
    return quantize_inputs(span, unit), span, unit


def matmul_kernel(layout: Layout, tokens: int) -> int:
    """The kernel of a layout for tiles of `tokens` tokens: 1, or TOKENS (PLAIN_TOKENS for plain numbers)."""
    if layout.is_plain:
        return plain_matmul(NUMBERS[layout.values], tokens)
    return quant_matmul(
        VALUES[layout.values],
        layout.bits,
        layout.block,
        layout.group,
        SCALES[layout.scale],
        layout.minimum,
        int(layout.wide),
        layout.span // 4,
        int(layout.values == "codes" and layout.offset != 0),
        tokens,
    )


@kernel
def part_of(args, item):
    """An item's range of strips and of tokens."""
    strip_items, per_item = get_i64(args + STRIP_ITEMS), get_i64(args + STRIPS_PER_ITEM)
    strip = item % strip_items * per_item
    tokens = get_i64(args + TOKENS_PER_ITEM)
    token = item // strip_items * tokens
    last = min(strip + per_item, get_i64(args + STRIPS))
    return strip, last, token, min(token + tokens, get_i64(args + N))


@kernel
def bias_of(args, strip):
    """The bias of a strip's rows; it is padded to whole strips."""
    bias = get_i64(args + BIAS)
    added = splat_f32(0.0)
    if bias:
        added = load_f32(bias + 4 * LANES * strip)
    return added


@cache
def quant_matmul(
    values: int,
    bits: int,
    block: int,
    group: int,
    scaled: int,
    minimum: int,
    wide: int,
    span: int,
    started: int,
    tokens: int,
) -> int:
    """Kernel: packed codes x int8 inputs, for one layout (see `Layout`; `span` in quads) and tile."""
    small = 1 if block == 16 else 0  # a chunk has two d
    halves = 1 if group == 16 else 0  # a chunk has two scales and two sums
    chunks, group_chunks = max(1, block // 32), max(1, group // 32)
    number, quads = (0 if wide else 1), (4 if halves else 8)
    code_step, scale_step, d_step = bits * 4 * LANES, LANES * (block // group), LANES * (4 if wide else 2)
    block_step = 2 * d_step if small else d_step
    sum_step, start_step = (8 if halves else 4), (4 * (8 // span) if started else 0)

    @kernel
    def packed(args, item, worker):
        strip0, strip1, token0, token1 = part_of(args, item)
        n, rows, cols, blocks = get_i64(args + N), get_i64(args + ROWS), get_i64(args + COLS), get_i64(args + BLOCKS)
        a_stride, start_stride, sum_stride = cols // 8, cols // 32 * start_step, cols // 32 * sum_step
        table, low_table = load_u8(get_i64(args + TABLE)), load_u8(get_i64(args + TABLE) + 32)
        scale, low = splat_i32(1), splat_f32(0.0)
        for strip in range(strip0, strip1):
            bias = bias_of(args, strip)
            for first in range(token0, token1, tokens):
                t = min(first, n - tokens)  # the last tile may repeat tokens of the one before
                code = get_i64(args + CODES) + strip * get_i64(args + STRIP_NBYTES)
                at_d = get_i64(args + D) + strip * blocks * d_step
                at_dmin = get_i64(args + DMIN) + strip * blocks * d_step
                at_scale = get_i64(args + SCALE) + strip * blocks * scale_step
                at_min = get_i64(args + MINIMUM) + strip * blocks * scale_step
                q, a = get_i64(args + Q) + t * cols, get_i64(args + A) + t * a_stride
                start = get_i64(args + STARTS) + t * start_stride
                sums = get_i64(args + SUMS) + t * sum_stride
                acc = zeros_f32(tokens)
                for _ in range(cols // 32 // chunks):
                    d = load_number(at_d, number)
                    for c in range(chunks):
                        planes = load_codes(code, bits)
                        total = zeros_i32(tokens)
                        if scaled:
                            scale = load_bytes(at_scale + c // group_chunks * LANES * (1 + halves), scaled)
                        total = dot_codes(
                            total,
                            planes,
                            scale,
                            table,
                            low_table,
                            q,
                            cols,
                            start,
                            start_stride,
                            0,
                            quads,
                            values,
                            span,
                            started,
                        )
                        if small:
                            acc = add_floats(acc, total, d, a, a_stride)
                            d, total = load_number(at_d + d_step, number), zeros_i32(tokens)
                        if halves:
                            if scaled:
                                scale = load_bytes(at_scale + (2 * c + 1) * LANES, scaled)
                            total = dot_codes(
                                total,
                                planes,
                                scale,
                                table,
                                low_table,
                                q,
                                cols,
                                start,
                                start_stride,
                                4,
                                4,
                                values,
                                span,
                                started,
                            )
                        acc = add_floats(acc, total, d, a, a_stride)
                        if minimum:
                            for u in range(1 + halves):
                                low = neg_f32(load_number(at_dmin + u * small * d_step, number))
                                if minimum == 2:
                                    which = (c // group_chunks * (1 + halves) + u) * LANES
                                    low = mul_f32(low, float_i32(load_bytes(at_min + which, 2)))
                                acc = add_products(acc, low, sums + 4 * u, sum_stride)
                        code, q, a, start, sums = code + code_step, q + 32, a + 4, start + start_step, sums + sum_step
                    at_d, at_dmin = at_d + block_step, at_dmin + block_step
                    at_scale, at_min = at_scale + scale_step, at_min + scale_step
                store_tile(
                    acc, bias, get_i64(args + OUT) + 4 * (t * rows + strip * LANES), 4 * rows, rows - strip * LANES
                )

    return address_of(packed)


@lazy
def interleave_inputs(args, item, worker):
    """x float32 (n, cols) -> (tiles, cols, PLAIN_TOKENS): rows a power of two apart would fight for cache lines."""
    n, cols = get_i64(args + N), get_i64(args + COLS)
    first = item * PLAIN_TOKENS
    x = get_i64(args + X) + 4 * min(first, n - PLAIN_TOKENS) * cols
    tile = get_i64(args + Q) + 4 * first * cols
    for i in range(cols):
        for t in range(PLAIN_TOKENS):
            put_f32(tile + 4 * (i * PLAIN_TOKENS + t), get_f32(x + 4 * (t * cols + i)))


@cache
def plain_matmul(number: int, tokens: int) -> int:
    """Kernel: float32 (0), float16 (1) or bfloat16 (2) weights x float32 inputs, summed in float32."""
    step = LANES * (4 if number == 0 else 2)
    single = 4 if tokens == 1 else tokens

    @kernel
    def plain(args, item, worker):
        strip0, strip1, token0, token1 = part_of(args, item)
        n, rows, cols = get_i64(args + N), get_i64(args + ROWS), get_i64(args + COLS)
        for strip in range(strip0, strip1):
            bias = bias_of(args, strip)
            for first in range(token0, token1, tokens):
                t = min(first, n - tokens)
                w = get_i64(args + CODES) + strip * cols * step
                x = get_i64(args + X) + 4 * t * cols
                out = get_i64(args + OUT) + 4 * (t * rows + strip * LANES)
                acc = zeros_f32(single)
                if tokens == 1:  # four columns are the tile: one sum alone would wait for itself
                    for _ in range(cols // 4):
                        acc = add_columns(acc, w, x, number)
                        w, x = w + 4 * step, x + 16
                    store_tile(sum_tile(acc), bias, out, 4 * rows, rows - strip * LANES)
                else:
                    x = get_i64(args + Q) + 4 * first * cols
                    for _ in range(cols):
                        acc = add_products(acc, load_number(w, number), x, 4)
                        w, x = w + step, x + 4 * tokens
                    store_tile(acc, bias, out, 4 * rows, rows - strip * LANES)

    return address_of(plain)
