"""Quantize rows of weights fast: the bytes of `TensorType.encode`, many threads, compiled loops.

The kernels stand in ranged.py (Q2_K, Q4_K, Q5_K), signed.py (Q6_K), coordinate.py (Q3_K) and legacy.py; those with
importance in weighted_ranged.py (also Q4_1, Q5_1) and weighted_signed.py (also Q3_K, Q4_0, Q5_0). Threads take pieces
of a megabyte of float32 from a common list, so the extra memory does not grow with the input (but for the error weights
of the older types, as large as the input), and nothing is shared between calls: any number of Python threads may encode
at once.

Speeds of all types, beside ggml's and the definition's, stand in docs/formats/blocks.md.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from ggufkit_formats.blocks import TensorType, find
from ggufkit_formats.blocks.base import as_float32, as_importance

from ..simd import LANES
from . import coordinate, legacy, ranged, signed, weighted_ranged, weighted_signed

PIECE = 1 << 18  # weights that a thread takes at a time


@dataclass(frozen=True)
class Encoder:
    """A kernel (addresses of x and of out, number of blocks, address of scratch) -> whether a check is due.

    With importance the address of the blocks' error weights stands after that of x. The number of blocks is a multiple
    of `lanes`. A check is due where a weight or a scale may not be finite.
    """

    kernel: Callable[..., bool]
    scratch: int = 0  # bytes
    lanes: int = 1


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
}

# With importance. The older types take eight blocks of 32 as one of 256.
WEIGHTED: dict[str, Encoder] = {
    "Q4_0": Encoder(weighted_signed.q4_0, weighted_signed.SCRATCH, 8 * LANES),
    "Q4_1": Encoder(weighted_ranged.q4_1, weighted_ranged.SCRATCH, 8 * LANES),
    "Q5_0": Encoder(weighted_signed.q5_0, weighted_signed.SCRATCH, 8 * LANES),
    "Q5_1": Encoder(weighted_ranged.q5_1, weighted_ranged.SCRATCH, 8 * LANES),
    "Q2_K": Encoder(weighted_ranged.q2_k, weighted_ranged.SCRATCH, LANES),
    "Q3_K": Encoder(weighted_signed.q3_k, weighted_signed.SCRATCH, LANES),
    "Q4_K": Encoder(weighted_ranged.q4_k, weighted_ranged.SCRATCH, LANES),
    "Q5_K": Encoder(weighted_ranged.q5_k, weighted_ranged.SCRATCH, LANES),
    "Q6_K": Encoder(weighted_signed.q6_k, weighted_signed.SCRATCH, LANES),
}


def encode(
    type: TensorType | str,
    x: np.ndarray,
    importance: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """float (…, cols) -> uint8 (…, bytes per row), the bytes that `TensorType.encode` gives.

    `importance` is one weight per column, (cols,), or None; `threads` defaults to the processors this process may
    use. Types without a kernel go to the NumPy definition. Raises FormatError for rows that
    are not divisible by the block, not finite, or too large for the type's scales.
    """
    type = find(type)
    weighted = importance is not None and type.uses_importance
    encoder = (WEIGHTED if weighted else ENCODERS).get(type.name)
    if encoder is None:
        return type.encode(x, importance)
    x = as_float32(x)
    row_nbytes = type.row_nbytes(x.shape[-1])
    if importance is not None:
        importance = as_importance(importance, x.shape[-1])
    blocks = x.reshape(-1, type.block)
    weights = None
    if importance is not None and weighted and x.size:
        weights = type.error_weights(x.reshape(-1, x.shape[-1]), importance)
        weights = (importance if weights.strides[0] == 0 else weights).reshape(-1, type.block)
    out = np.empty((len(blocks), type.block_nbytes), np.uint8)
    run(type, encoder, blocks, out, threads or available_threads(), weights)
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

    `weights` of errors are (n, block), or those of one row, (m, block), which every row repeats.
    """
    step = PIECE // type.block
    pieces = -(-len(blocks) // step)
    counter = itertools.count()  # its next() is atomic
    stop = threading.Event()

    def work() -> None:
        scratch = np.empty(encoder.scratch + 64, np.uint8)
        scratch = scratch[-scratch.ctypes.data % 64 :]  # no vector then lies in two cache lines
        try:
            while not stop.is_set() and (piece := next(counter)) < pieces:
                part = slice(piece * step, (piece + 1) * step)
                w = None if weights is None else weights[np.arange(len(blocks))[part] % len(weights)]
                if encode_piece(encoder, blocks[part], out[part], scratch, w):
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
    encoder: Encoder, x: np.ndarray, out: np.ndarray, scratch: np.ndarray, weights: np.ndarray | None = None
) -> bool:
    """Encode blocks x (n, block) into out (n, nbytes), all contiguous; the last ones beside blocks of zeros."""

    def run(x: np.ndarray, weights: np.ndarray | None, out: np.ndarray, n: int) -> bool:
        inputs = [x.ctypes.data] if weights is None else [x.ctypes.data, weights.ctypes.data]
        return bool(encoder.kernel(*inputs, out.ctypes.data, n, scratch.ctypes.data))

    whole = len(x) - len(x) % encoder.lanes
    due = whole > 0 and run(x, weights, out, whole)
    if rest := len(x) - whole:
        last_out = np.empty((encoder.lanes, out.shape[1]), np.uint8)
        last_x, last_weights = (
            None if each is None else np.pad(each[whole:], ((0, encoder.lanes - rest), (0, 0))) for each in (x, weights)
        )
        assert last_x is not None
        due |= run(last_x, last_weights, last_out, encoder.lanes)
        out[whole:] = last_out[:rest]
    return due
