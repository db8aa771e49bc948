"""Ternary types by other rules than ggml's, which takes a block's largest magnitude as its scale.

- A tensor that is ternary already, all weights in {-s, 0, s}, keeps every weight: ggml's rule does that, where s is a
  float16 (any bfloat16 of ordinary size is one).
- `absmean`: one scale a tensor, the mean magnitude, as BitNet b1.58 is trained (arXiv 2402.17764).
- `search`: the scale of each block that makes the sum of its squared errors least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.blocks.ternary import TernaryType
from ggufkit_formats.errors import FormatError

METHODS = ("ggml", "absmean", "search")
TYPES = ("TQ1_0", "TQ2_0", "Q2_0")
EPSILON = 1e-6  # of absmean: keeps a tensor of zeros from dividing by 0

Chunks = Callable[[], Iterable[np.ndarray]]  # a tensor's weights, float32, in pieces of whole rows
Encode = Callable[[np.ndarray], np.ndarray]  # float32 (rows, cols) -> uint8 (rows, bytes per row)


def encoder(method: str, kind: TensorType, chunks: Chunks) -> Encode | None:
    """How a tensor's rows become blocks of `kind`, by one of METHODS; None where ggml's bytes are what is wanted.

    `chunks` may be read once to its end, and again in part: absmean looks at all weights, before any is encoded.
    """
    if method == "ggml" or kind.name not in TYPES or common_scale(chunks()) is not None:
        return None
    assert isinstance(kind, TernaryType)
    if method == "search":
        return lambda x: search(kind, x)
    gamma = mean_magnitude(chunks())
    return lambda x: absmean(kind, x, gamma)


def common_scale(chunks: Iterable[np.ndarray]) -> float | None:
    """The s of weights that all are -s, 0 or s; None where there is no such s, or all are 0. Stops at the first
    weight that says no."""
    scale = np.float32(0)
    for chunk in chunks:
        flat = chunk.reshape(-1)
        for start in range(0, len(flat), 1 << 16):
            magnitudes = np.abs(flat[start : start + (1 << 16)])
            scale = scale or magnitudes.max(initial=np.float32(0))
            if not ((magnitudes == scale) | (magnitudes == 0)).all():
                return None
    return float(scale) or None


def mean_magnitude(chunks: Iterable[np.ndarray]) -> float:
    """γ = mean |w|, in double precision."""
    total, count = 0.0, 0
    for chunk in chunks:
        total += float(np.abs(chunk).sum(dtype=np.float64))
        count += chunk.size
    return total / max(count, 1)


def absmean(kind: TernaryType, x: np.ndarray, gamma: float) -> np.ndarray:
    """float32 (rows, cols) -> uint8 (rows, bytes per row): clip(round(x / (γ + ε)), -1, 1) with the scale γ.

    `gamma` is the tensor's mean magnitude. Source: arXiv 2402.17764, equations 1 to 3; halves round to even.
    """
    _check_finite(x, gamma)
    by = np.float32(gamma + EPSILON)
    codes = (np.clip(np.rint(x / by), -1, 1) + 1).astype(np.uint8).reshape(-1, kind.block)
    return kind.assemble(np.full(len(codes), gamma), codes).reshape(len(x), -1)


def search(kind: TernaryType, x: np.ndarray) -> np.ndarray:
    """float32 (rows, cols) -> uint8 (rows, bytes per row) with the least squared error of each block.

    For {-1, 0, 1} the best scale for k weights that are not 0 is the mean magnitude of the k largest, and of all k the
    best is tried out exactly; d is rounded to float16 afterwards. Q2_0's {-1, 0, 1, 2} is searched from several scales
    of both signs.
    """
    _check_finite(x, np.abs(x).max(initial=0))
    blocks = x.reshape(-1, kind.block)
    out = np.empty((len(blocks), kind.block_nbytes), np.uint8)
    for start in range(0, len(blocks), 4096):
        part = blocks[start : start + 4096]
        d = _best_of_three(part)
        if kind.name == "Q2_0":
            from ggufkit_kernels.cpu.encode.four_levels import best_scales

            d = best_scales(part, d, STARTS, ROUNDS, 2)  # best_of_four
        d = d.astype(np.float16).astype(np.float32)
        out[start : start + 4096] = kind.assemble(d, _codes(part, d, 2 if kind.name == "Q2_0" else 1))
    return out.reshape(len(x), -1)


def _best_of_three(x: np.ndarray) -> np.ndarray:
    """The scales d (n,) for which d * {-1, 0, 1} is nearest to the rows of x (n, block).

    With k weights kept and their best scale, the error is Σ x² - (Σ of the k magnitudes)² / k: the k largest are kept,
    and the last term is to be large.
    """
    sums = np.cumsum(-np.sort(-np.abs(x), axis=1), axis=1, dtype=np.float64)
    kept = np.arange(1, x.shape[1] + 1)
    k = (sums * sums / kept).argmax(axis=1)
    return (np.take_along_axis(sums, k[:, None], axis=1)[:, 0] / kept[k]).astype(np.float32)


STARTS = np.linspace(0.25, 1.05, 9, dtype=np.float32)  # of the largest magnitude, over 1
ROUNDS = 3  # of codes for a scale and the scale for those codes


def best_of_four(x: np.ndarray, three: np.ndarray) -> np.ndarray:
    """The scales d (n,) of either sign for which d * {-1, 0, 1, 2} is nearest to the rows of x, as far as seen.

    The definition of `best_scales`, which is what `search` uses.
    """
    largest = np.abs(x).max(axis=1)
    best, error = three, _error(x, three)
    for sign in (1, -1):
        for start in STARTS:
            d = (sign * start) * largest
            for _ in range(ROUNDS):
                q = _codes(x, d, 2).astype(np.float32) - 1
                norm = _folded(q * q)
                d = np.where(norm > 0, _folded(x * q) / np.maximum(norm, 1), d)
            found = _error(x, d)
            best, error = np.where(found < error, d, best), np.minimum(found, error)
    return best


def _error(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    off = x - d[:, None] * (_codes(x, d, 2).astype(np.float32) - 1)
    return _folded(off * off)


def _folded(x: np.ndarray) -> np.ndarray:
    """Sums of rows (n, 2**k), the second half added to the first again and again: (n,)."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def _codes(x: np.ndarray, d: np.ndarray, high: int) -> np.ndarray:
    """The nearest of d * {-1 … high} to each x (n, block), plus 1, uint8; d = 0 gives the code of 0."""
    by = np.where(d == 0, np.float32(1), d)[:, None]
    with np.errstate(over="ignore"):
        q = np.clip(np.rint(x / by), -1, high)
    return (np.where(d[:, None] == 0, 0, q) + 1).astype(np.uint8)


def _check_finite(x: np.ndarray, scale: float) -> None:
    if not np.isfinite(x).all():
        raise FormatError("NaN or infinite weights")
    if scale > 65504:
        raise FormatError(f"weights up to {np.abs(x).max():.6g} are too large for the type's scales")
