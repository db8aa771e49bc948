"""Plain weights times float32 inputs: out (n, rows) = x (n, cols) @ weight.T for F32, F16 and BF16.

Weights are widened to float32 in registers, inputs are never rounded. One token sums four columns side by side,
since one sum alone would wait for itself; many tokens take interleaved inputs (see inputs.py) in tiles of 8.
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
    store_tile,
    sum_tile,
    zeros_f32,
)
from .words import CODES, COLS, OUT, ROWS, N, Q, X, bias_of, part_of


@family
def plain_matmul(number: int, tokens: int) -> Callable:
    """Kernel: float32 (0), float16 (1) or bfloat16 (2) weights x float32 inputs, summed in float32."""
    step = LANES * (4 if number == 0 else 2)
    single = 4 if tokens == 1 else tokens

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

    return plain
