"""Quantize rows of weights fast: the bytes of `TensorType.encode`, many threads, compiled loops.

The kernels stand in ranged.py (Q2_K, Q4_K, Q5_K), signed.py (Q6_K), coordinate.py (Q3_K), legacy.py, ternary.py and
fp4.py. Threads take pieces of a megabyte of float32 from a common list, so the extra memory does not grow with the
input, and nothing is shared between calls: any number of Python threads may encode at once.

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
from ggufkit_formats.blocks.base import as_float32, check_importance

from ..simd import LANES
from . import coordinate, fp4, legacy, ranged, signed, ternary

PIECE = 1 << 18  # weights that a thread takes at a time


@dataclass(frozen=True)
class Encoder:
    """A kernel (addresses of x and of out, number of blocks, address of scratch) -> whether a check is due.

    The number of blocks is a multiple of `lanes`. A check is due where a weight or a scale may not be finite.
    """

    kernel: Callable[[int, int, int, int], bool]
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
    "TQ1_0": Encoder(ternary.tq1_0),
    "TQ2_0": Encoder(ternary.tq2_0),
    "Q2_0": Encoder(ternary.q2_0, 64),
    "Q1_0": Encoder(ternary.q1_0, ternary.SCRATCH, LANES),
    "MXFP4": Encoder(fp4.mxfp4),
    "NVFP4": Encoder(fp4.nvfp4),
}


def encode(
    type: TensorType | str,
    x: np.ndarray,
    importance: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """float (…, cols) -> uint8 (…, bytes per row), the bytes that `TensorType.encode` gives.

    `importance` is one weight per column, (cols,), or None; `threads` defaults to the processors this process may
    use. Types without a kernel (and importance where it counts) go to the NumPy definition. Raises FormatError for rows
    that are not divisible by the block, not finite, or too large for the type's scales.
    """
    type = find(type)
    encoder = ENCODERS.get(type.name)
    if encoder is None or (importance is not None and not type.ignores_importance):
        return type.encode(x, importance)
    x = as_float32(x)
    check_importance(importance, x.shape[-1])
    row_nbytes = type.row_nbytes(x.shape[-1])
    blocks = x.reshape(-1, type.block)
    out = np.empty((len(blocks), type.block_nbytes), np.uint8)
    run(type, encoder, blocks, out, threads or available_threads())
    return out.reshape(*x.shape[:-1], row_nbytes)


def available_threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(type: TensorType, encoder: Encoder, blocks: np.ndarray, out: np.ndarray, threads: int) -> None:
    """Encode all blocks (n, block) into out (n, nbytes), in pieces that the threads take one after the other."""
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
                if encode_piece(encoder, blocks[part], out[part], scratch):
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


def encode_piece(encoder: Encoder, x: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> bool:
    """Encode blocks x (n, block) into out (n, nbytes), both contiguous; the last ones beside blocks of zeros."""
    whole = len(x) - len(x) % encoder.lanes
    address: Any = scratch.ctypes.data
    due = whole and encoder.kernel(x.ctypes.data, out.ctypes.data, whole, address)
    if rest := len(x) - whole:
        last_x = np.zeros((encoder.lanes, x.shape[1]), np.float32)
        last_out = np.empty((encoder.lanes, out.shape[1]), np.uint8)
        last_x[:rest] = x[whole:]
        due |= encoder.kernel(last_x.ctypes.data, last_out.ctypes.data, encoder.lanes, address)
        out[whole:] = last_out[:rest]
    return bool(due)
