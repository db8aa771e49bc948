"""Quantize rows of weights fast: the bytes of `TensorType.encode`, many threads, compiled loops.

The kernels stand in ranged.py (Q2_K, Q4_K, Q5_K), signed.py (Q6_K), coordinate.py (Q3_K), levels.py (IQ4), grids.py
(IQ2, IQ3), ones.py (IQ1), legacy.py, ternary.py and fp4.py; those with importance in weighted_ranged.py (also Q4_1,
Q5_1) and weighted_signed.py (also Q3_K, Q4_0, Q5_0), and the IQ types' own. Threads take pieces of a megabyte of
float32 from a common list, so the extra memory does not grow with the input (but for the error weights of the older
types, as large as the input), and nothing is shared between calls: any number of Python threads may encode at once.

Speeds of all types, beside ggml's and the definition's, stand in docs/formats/blocks.md.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.blocks import TensorType, find
from ggufkit_formats.blocks.base import as_float32, as_importance

from ..simd import LANES
from . import (
    coordinate,
    four_bit,
    fp4,
    grids,
    legacy,
    levels,
    near,
    ones,
    ranged,
    signed,
    ternary,
    weighted_ranged,
    weighted_signed,
)

PIECE = 1 << 18  # weights that a thread takes at a time


@dataclass(frozen=True)
class Encoder:
    """A kernel (addresses of x and of out, number of blocks, address of scratch) -> whether a check is due.

    The number of blocks is a multiple of `lanes`. A check is due where a weight or a scale may not be finite. What a
    kernel knows of importance is said by `weights`:

    - "blocks": error weights of each block, whose address stands after that of x.
    - "row": three numbers at the end: the address of a row's importance (0 for none), which begins again behind its
      end, as far as `lanes` blocks reach; the columns of a row; and the column of the first weight.
    """

    kernel: Callable[..., bool]
    scratch: int = 0  # bytes
    lanes: int = 1
    weights: str = ""
    tables: Callable[[], np.ndarray] | None = None  # what the scratch begins with, int64


ENCODERS: dict[str, Encoder] = {
    "Q4_0": Encoder(legacy.q4_0),
    "Q4_1": Encoder(legacy.q4_1),
    "Q5_0": Encoder(legacy.q5_0),
    "Q5_1": Encoder(legacy.q5_1),
    "Q8_0": Encoder(legacy.q8_0),
    "Q2_K": Encoder(ranged.q2_k, ranged.SCRATCH, LANES),
    "Q3_K": Encoder(coordinate.q3_k, coordinate.SCRATCH, LANES),
    "Q4_K": Encoder(ranged.q4_k, ranged.SCRATCH, LANES),
    "Q5_K": Encoder(ranged.q5_k, ranged.SCRATCH, LANES),
    "Q6_K": Encoder(signed.q6_k, signed.SCRATCH, LANES),
    "TQ1_0": Encoder(ternary.tq1_0),
    "TQ2_0": Encoder(ternary.tq2_0),
    "Q2_0": Encoder(ternary.q2_0, 64),
    "Q1_0": Encoder(ternary.q1_0, ternary.SCRATCH, LANES),
    "MXFP4": Encoder(fp4.mxfp4),
    "NVFP4": Encoder(fp4.nvfp4),
    "NF4": Encoder(four_bit.nf4, 64, tables=four_bit.tables),
    "IQ4_NL": Encoder(levels.iq4_nl, levels.SCRATCH, 8 * LANES, "row"),
    "IQ4_XS": Encoder(levels.iq4_xs, levels.SCRATCH, LANES, "row"),
    "IQ3_S": Encoder(grids.iq3_s, grids.SCRATCH, 1, "row", near.tables("IQ3_S")),
    "IQ3_XXS": Encoder(grids.iq3_xxs, grids.SCRATCH, 1, "row", near.tables("IQ3_XXS")),
    "IQ2_S": Encoder(grids.iq2_s, grids.SCRATCH, 1, "row", near.tables("IQ2_S")),
    "IQ2_XS": Encoder(grids.iq2_xs, grids.SCRATCH, 1, "row", near.tables("IQ2_XS")),
    "IQ2_XXS": Encoder(grids.iq2_xxs, grids.SCRATCH, 1, "row", near.tables("IQ2_XXS")),
    "IQ1_S": Encoder(ones.iq1_s, ones.SCRATCH, LANES, "row", near.tables("IQ1_S")),
    "IQ1_M": Encoder(ones.iq1_m, ones.SCRATCH, LANES, "row", near.tables("IQ1_S")),
}

# With importance. The older types take eight blocks of 32 as one of 256.
WEIGHTED: dict[str, Encoder] = {
    "Q4_0": Encoder(weighted_signed.q4_0, weighted_signed.SCRATCH, 8 * LANES, "blocks"),
    "Q4_1": Encoder(weighted_ranged.q4_1, weighted_ranged.SCRATCH, 8 * LANES, "blocks"),
    "Q5_0": Encoder(weighted_signed.q5_0, weighted_signed.SCRATCH, 8 * LANES, "blocks"),
    "Q5_1": Encoder(weighted_ranged.q5_1, weighted_ranged.SCRATCH, 8 * LANES, "blocks"),
    "Q2_K": Encoder(weighted_ranged.q2_k, weighted_ranged.SCRATCH, LANES, "blocks"),
    "Q3_K": Encoder(weighted_signed.q3_k, weighted_signed.SCRATCH, LANES, "blocks"),
    "Q4_K": Encoder(weighted_ranged.q4_k, weighted_ranged.SCRATCH, LANES, "blocks"),
    "Q5_K": Encoder(weighted_ranged.q5_k, weighted_ranged.SCRATCH, LANES, "blocks"),
    "Q6_K": Encoder(weighted_signed.q6_k, weighted_signed.SCRATCH, LANES, "blocks"),
}


def encode(
    type: TensorType | str,
    x: np.ndarray,
    importance: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """float (…, cols) -> uint8 (…, bytes per row), the bytes that `TensorType.encode` gives.

    `importance` is one weight per column, (cols,), or None; `threads` defaults to the processors this process may
    use. Types without a kernel go to the NumPy definition. Raises FormatError for rows that are not divisible by the
    block, not finite, or too large for the type's scales, UsageError where a type needs importance and there is none.
    """
    type = find(type)
    weighted = importance is not None and type.uses_importance
    encoder = ENCODERS.get(type.name)
    if weighted and (encoder is None or encoder.weights != "row"):
        encoder = WEIGHTED.get(type.name)
    if encoder is None or (importance is None and type.needs_importance):
        return type.encode(x, importance)
    x = as_float32(x)
    row_nbytes = type.row_nbytes(x.shape[-1])
    weights = None
    if importance is not None:
        weights = importance = as_importance(importance, x.shape[-1])
        if weighted and x.size and encoder.weights == "blocks":
            weights = type.error_weights(x.reshape(-1, x.shape[-1]), importance)
            weights = (importance if weights.strides[0] == 0 else weights).reshape(-1, type.block)
    blocks = x.reshape(-1, type.block)
    out = np.empty((len(blocks), type.block_nbytes), np.uint8)
    run(type, encoder, blocks, out, threads or available_threads(), weights if weighted and x.size else None)
    return out.reshape(*x.shape[:-1], row_nbytes)


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    type: TensorType,
    encoder: Encoder,
    blocks: np.ndarray,
    out: np.ndarray,
    threads: int,
    weights: np.ndarray | None = None,
) -> None:
    """Encode all blocks (n, block) into out (n, nbytes), in pieces that the threads take one after the other.

    `weights` by "blocks" are those of errors, (n, block), or of one row, (m, block), which every row repeats; by "row"
    the importance of one row, (cols,).
    """
    cols = 0 if weights is None or encoder.weights != "row" else len(weights)
    if cols:  # as far again as the last lane reads
        weights = np.resize(weights, cols + encoder.lanes * type.block)  # type: ignore[arg-type]
    step = PIECE // type.block
    pieces = -(-len(blocks) // step)
    counter = itertools.count()  # its next() is atomic
    stop = threading.Event()

    def work() -> None:
        scratch = np.empty(encoder.scratch + 64, np.uint8)
        scratch = scratch[-scratch.ctypes.data % 64 :]  # no vector then lies in two cache lines
        if encoder.tables is not None:
            addresses = encoder.tables()
            scratch[: addresses.nbytes] = addresses.view(np.uint8)
        try:
            while not stop.is_set() and (piece := next(counter)) < pieces:
                part = slice(piece * step, (piece + 1) * step)
                w, first = weights, 0
                if cols:
                    first = piece * step * type.block % cols
                elif weights is not None:
                    w = weights[np.arange(len(blocks))[part] % len(weights)]
                if encode_piece(encoder, blocks[part], out[part], scratch, w, cols, first):
                    type.check_finite(blocks[part])
                    type.check_scales(out[part].reshape(-1).view(type.fields))
        except BaseException:
            stop.set()
            raise

    threads = min(threads, pieces)
    if threads <= 1:
        work()
        return
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="encode") as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


def encode_piece(
    encoder: Encoder,
    x: np.ndarray,
    out: np.ndarray,
    scratch: np.ndarray,
    weights: np.ndarray | None = None,
    cols: int = 0,
    first: int = 0,
) -> bool:
    """Encode blocks x (n, block) into out (n, nbytes), all contiguous; the last ones beside blocks of zeros.

    `weights` are those of the blocks, or of a row of `cols` columns, of which the blocks begin with column `first`.
    """
    of_blocks = encoder.weights == "blocks"

    def kernel(x: np.ndarray, w: np.ndarray | None, out: np.ndarray, n: int, start: int) -> bool:
        words: list[Any] = [x.ctypes.data, out.ctypes.data, n, scratch.ctypes.data]
        if of_blocks and w is not None:
            words.insert(1, w.ctypes.data)
        elif encoder.weights == "row":
            words += (0, 1, 0) if w is None else (w.ctypes.data, cols, (first + start * x.shape[1]) % cols)
        return bool(encoder.kernel(*words))

    whole = len(x) - len(x) % encoder.lanes
    due = whole > 0 and kernel(x, weights, out, whole, 0)
    if rest := len(x) - whole:
        padding = ((0, encoder.lanes - rest), (0, 0))
        last_w = np.pad(weights[whole:], padding) if of_blocks and weights is not None else weights
        last_out = np.empty((encoder.lanes, out.shape[1]), np.uint8)
        due |= kernel(np.pad(x[whole:], padding), last_w, last_out, encoder.lanes, whole)
        out[whole:] = last_out[:rest]
    return due
