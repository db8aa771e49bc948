"""Plain weights times float32 inputs: out (n, rows) = x (n, cols) @ weight.T for F32, F16 and BF16.

Weights are widened to float32 in registers, inputs are never rounded. One token sums four columns side by side,
since one sum alone would wait for itself; many tokens take interleaved inputs (see inputs.py) in tiles of 8.

Many tokens go over the columns by blocks of COLUMNS, sums so far waiting in `out`: a strip's block and a tile's block
are 32 KB each, and the inputs of an item's tokens stay in the second-level cache while all its strips pass. The sums'
order stays. Zen 4, two threads, 512 tokens x 5632 columns: 168-196 GOP/s where 8 whole inputs were all that fitted,
200-205 by blocks; 512-bit FMA does 230 at most.
"""

from __future__ import annotations

from collections.abc import Callable

from .jit import family
from .simd import (
    LANES,
    add_columns,
    add_products,
    get_i64,
    load_number,
    load_tile,
    splat_f32,
    store_tile,
    sum_tile,
    zeros_f32,
)
from .words import CODES, COLS, OUT, ROWS, N, Q, X, bias_of, part_of

COLUMNS = 1024  # a multiple of 4


@family
def plain_matmul(number: int, tokens: int) -> Callable:
    """Kernel: float32 (0), float16 (1) or bfloat16 (2) weights x float32 inputs, summed in float32."""
    step = LANES * (4 if number == 0 else 2)

    def one(args, item, worker):
        strip0, strip1, token0, token1 = part_of(args, item)
        rows, cols = get_i64(args + ROWS), get_i64(args + COLS)
        for strip in range(strip0, strip1):
            bias = bias_of(args, strip)
            for t in range(token0, token1):
                w, x = get_i64(args + CODES) + strip * cols * step, get_i64(args + X) + 4 * t * cols
                acc = zeros_f32(4)  # four columns are the tile: one sum alone would wait for itself
                for _ in range(cols // 4):
                    acc = add_columns(acc, w, x, number)
                    w, x = w + 4 * step, x + 16
                out = get_i64(args + OUT) + 4 * (t * rows + strip * LANES)
                store_tile(sum_tile(acc), bias, out, 4 * rows, rows - strip * LANES, 0)

    def many(args, item, worker):
        strip0, strip1, token0, token1 = part_of(args, item)
        n, rows, cols = get_i64(args + N), get_i64(args + ROWS), get_i64(args + COLS)
        for first_col in range(0, cols, COLUMNS):
            last_col = min(first_col + COLUMNS, cols)
            for strip in range(strip0, strip1):
                bias = splat_f32(0.0)
                if last_col == cols:
                    bias = bias_of(args, strip)
                for first in range(token0, token1, tokens):
                    t = min(
                        first, n - tokens
                    )  # the last tile may repeat tokens of the one before, whose sums are under way
                    out = get_i64(args + OUT) + 4 * (t * rows + strip * LANES)
                    acc = zeros_f32(tokens)
                    if first_col:
                        acc = load_tile(acc, out, 4 * rows, rows - strip * LANES)
                    w = get_i64(args + CODES) + (strip * cols + first_col) * step
                    x = get_i64(args + Q) + 4 * (first * cols + first_col * tokens)
                    for _ in range(last_col - first_col):
                        acc = add_products(acc, load_number(w, number), x, 4)
                        w, x = w + step, x + 4 * tokens
                    store_tile(acc, bias, out, 4 * rows, rows - strip * LANES, first - t)

    return one if tokens == 1 else many
