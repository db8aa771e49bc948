"""Quantizing on a GPU, the bytes of `TensorType.encode`: for the types of encode.cu, without importance."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.blocks.base import as_float32

from .device import Device
from .loader import Module

MODULE = Module("encode.cu", fmad=False)
PIECE = 1 << 24  # weights on the device at a time


class Encoder(NamedTuple):
    kernel: str
    lanes: int  # threads that share a block of weights
    threads: int


ENCODERS = {
    "Q4_0": Encoder("encode_q4_0", 1, 256),
    "Q8_0": Encoder("encode_q8_0", 1, 256),
    "Q4_K": Encoder("encode_q4_k", 8, 128),
    "Q5_K": Encoder("encode_q5_k", 8, 128),
    "Q6_K": Encoder("encode_q6_k", 16, 128),
}


def encodes(type: TensorType, importance: np.ndarray | None) -> bool:
    """Whether there is a kernel for it."""
    return type.name in ENCODERS and (importance is None or not type.uses_importance)


class CudaEncoder:
    """Encodes on a device. Any number of threads may call it; they take turns."""

    def __init__(self, device: Device):
        self.device, self._turn = device, threading.Lock()

    def encode(self, type: TensorType, x: np.ndarray) -> np.ndarray:
        """float (…, cols) -> uint8 (…, bytes per row), as `TensorType.encode` without importance gives them.

        Raises FormatError for rows that are not divisible by the block, not finite, or too large for the type's scales.
        """
        x = as_float32(x)
        row_nbytes = type.row_nbytes(x.shape[-1])
        blocks = x.reshape(-1, type.block)
        out = np.empty((len(blocks), type.block_nbytes), np.uint8)
        step = PIECE // type.block
        for start in range(0, len(blocks), step):
            part = slice(start, start + step)
            with self._turn:
                due = self._run(ENCODERS[type.name], np.ascontiguousarray(blocks[part]), out[part])
            if due:
                type.check_finite(blocks[part])
                type.check_scales(out[part].reshape(-1).view(type.fields))
        return out.reshape(*x.shape[:-1], row_nbytes)

    def _run(self, encoder: Encoder, x: np.ndarray, out: np.ndarray) -> bool:
        """Encode blocks x (n, block) into out (n, bytes). Whether a check is due."""
        device, n = self.device, len(x)
        made, due = device.empty(out.shape, np.uint8), device.zeros((1,), np.int32)
        grid = (-(-n * encoder.lanes // encoder.threads),)
        device.launch(MODULE.kernel(encoder.kernel), grid, encoder.threads, device.upload(x), made, due, n)
        out[...] = device.download(made)
        return bool(device.download(due)[0])
