"""Quantize rows of weights fast: the bytes of `TensorType.encode`, many threads, compiled loops.

The kernels stand in encode_ranged.py (Q2_K, Q4_K, Q5_K), encode_signed.py (Q3_K, Q6_K) and encode_legacy.py. Threads
take pieces of about a megabyte of float32 from a common list, so the extra memory does not grow with the
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
from ggufkit_formats.blocks.base import as_float32

from . import encode_legacy, encode_ranged, encode_signed

PIECE = 1 << 18  # weights that a thread takes at a time
F32 = np.float32


@dataclass(frozen=True)
class Encoder:
    """A kernel (x (n, block), out (n, nbytes) zeroed, *arguments, *scratch arrays of this thread)."""

    kernel: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    scratch: Callable[[], tuple[np.ndarray, ...]] = tuple


ENCODERS: dict[str, Encoder] = {
    "Q4_0": Encoder(encode_legacy.q45, (4, False)),
    "Q4_1": Encoder(encode_legacy.q45, (4, True)),
    "Q5_0": Encoder(encode_legacy.q45, (5, False)),
    "Q5_1": Encoder(encode_legacy.q45, (5, True)),
    "Q8_0": Encoder(encode_legacy.q8_0),
    "Q2_K": Encoder(encode_ranged.q2_k, (), lambda: encode_ranged.scratch(16)),
    "Q3_K": Encoder(encode_signed.q3_k, (), encode_signed.scratch),
    "Q4_K": Encoder(encode_ranged.q45_k, (4, F32(-1), 20), lambda: encode_ranged.scratch(32)),
    "Q5_K": Encoder(encode_ranged.q45_k, (5, F32(-0.5), 15), lambda: encode_ranged.scratch(32)),
    "Q6_K": Encoder(encode_signed.q6_k, (), encode_signed.scratch),
}


def encode(
    type: TensorType | str,
    x: np.ndarray,
    importance: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """float (…, cols) -> uint8 (…, bytes per row), the bytes that `TensorType.encode` gives.

    `importance` is one weight per column, (cols,), or None; `threads` defaults to the processors this process may
    use. Types without a kernel (and importance) go to the NumPy definition. Raises FormatError for rows that
    are not divisible by the block, not finite, or too large for the type's scales.
    """
    type = find(type)
    encoder = ENCODERS.get(type.name)
    if encoder is None or importance is not None:
        return type.encode(x, importance)
    x = as_float32(x)
    row_nbytes = type.row_nbytes(x.shape[-1])
    blocks = x.reshape(-1, type.block)
    out = np.zeros((len(blocks), type.block_nbytes), np.uint8)
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
        scratch = encoder.scratch()
        try:
            while not stop.is_set() and (piece := next(counter)) < pieces:
                part = slice(piece * step, (piece + 1) * step)
                type.check_finite(blocks[part])
                encoder.kernel(blocks[part], out[part], *encoder.arguments, *scratch)
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
