"""How the kernels of elementwise.cu and sample.cu are launched: grids, blocks, arguments. Nothing is checked here."""

from __future__ import annotations

import numpy as np

from . import loader
from .device import Array, Device

ELEMENTWISE, SAMPLE = loader.module("elementwise.cu"), loader.module("sample.cu")
SHORT_ROW = 512  # a norm of so few numbers is a warp's
MOST_TOP = 64  # logits that `top` finds
PART, PARTS = 2048, 16384  # logits a block takes; keys that the last block takes


def _threads(n: int) -> int:
    """Threads for a row of n numbers: about four numbers each, 64 to 1024."""
    return min(1024, max(64, -(-n // 128) * 32))


def rmsnorm(device: Device, x: Array, weight: Array, out: Array, eps: float) -> None:
    """x (…, dim) / sqrt(mean(x²) + eps) * weight; out may be x."""
    dim = x.shape[-1]
    rows = x.size // dim
    if dim <= SHORT_ROW:
        device.launch(ELEMENTWISE.kernel("rmsnorm_short"), (-(-rows // 4),), 128, x, weight, out, rows, dim, float(eps))
    else:
        device.launch(ELEMENTWISE.kernel("rmsnorm"), (rows,), _threads(dim), x, weight, out, dim, float(eps))


def rope(device: Device, x: Array, table: Array, start: Array, pairs: int, interleaved: bool) -> None:
    """Rotate x (n, heads, head_dim) in place; table (positions, 2 * pairs): cos, sin; start int32 (1,)."""
    n, heads, head_dim = x.shape
    args = (x, table, start, heads, head_dim, pairs, int(interleaved))
    device.launch(ELEMENTWISE.kernel("rope"), (n,), _threads(heads * pairs), *args)


def map2(device: Device, name: str, a: Array, b: Array, out: Array) -> None:
    """out = swiglu, relu2 or add of a and b, number by number."""
    blocks = min(-(-a.size // 1024), 16 * device.n_sm)
    device.launch(ELEMENTWISE.kernel(name), (blocks,), 256, a, b, out, a.size)


def halves(device: Device, x: Array, out: Array, factors: Array) -> None:
    """x float32 (n, cols) as float16 (n, wide), each row over factors (n,): a power of two, mostly 1."""
    n, cols = x.shape
    device.launch(ELEMENTWISE.kernel("halves"), (n,), _threads(cols), x, out, factors, cols, out.shape[1])


def undo_halves(device: Device, x: Array, factors: Array, bias: Array | None) -> None:
    """x (n, rows) times factors (n,) (+ bias (rows,)), in place."""
    n, rows = x.shape
    device.launch(ELEMENTWISE.kernel("undo_halves"), (-(-rows // 1024), n), 256, x, factors, bias, rows)


def add_rows(device: Device, x: Array, bias: Array | None, residual: Array | None) -> None:
    """x (n, rows) + bias (rows,) + residual (n, rows), in place; either may be None."""
    n, rows = x.shape
    device.launch(ELEMENTWISE.kernel("add_rows"), (-(-rows // 1024), n), 256, x, bias, residual, rows)


def top_scratch(n: int) -> int:
    """Keys (uint64) that `top` needs room for, for n logits and any k."""
    return -(-n // PART) * MOST_TOP


def top(device: Device, logits: Array, k: int, scratch: Array, out: Array) -> None:
    """The k (1 to 64) largest of logits (n,), best first, of equal ones the first; NaN is larger than all.

    `scratch` uint64 (top_scratch(n),); out int32 (2, k): indices, then the bits of the logits. n at most 524288.
    """
    n = logits.size
    blocks = -(-n // PART)
    device.launch(SAMPLE.kernel("top_parts"), (blocks,), 256, logits, scratch, n, k)
    device.launch(SAMPLE.kernel("top_join"), (1,), 1024, scratch, out, blocks * k, k)


def top_of(out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices and logits from what `top` wrote, downloaded."""
    return out[0], out[1].view(np.float32)
