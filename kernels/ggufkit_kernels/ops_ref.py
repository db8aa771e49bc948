"""The backend's contract in plain NumPy: the definition that the fast backends are tested against.

Weights are dequantized to float32, sums are NumPy's, the cache is float32 (or float16, to study its rounding).
Nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ggufkit_formats.tensor import Tensor

from .ops import Positions


class RefWeight:
    """A matrix in float32: `values` (rows, cols)."""

    def __init__(self, values: np.ndarray):
        self.values = values
        self.shape: tuple[int, int] = values.shape
        self.nbytes = values.nbytes


class RefCache(Positions):
    """Keys and values, (n_layers, length, n_kv_heads, head_dim), doubled when full, up to n_ctx positions."""

    def __init__(self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int, dtype: np.dtype):
        super().__init__(n_ctx)
        self.k = np.zeros((n_layers, 0, n_kv_heads, head_dim), dtype)
        self.v = np.zeros_like(self.k)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def reserve(self, stop: int) -> None:
        """Make room for positions below `stop`. Raises UsageError beyond n_ctx."""
        self.check(stop)
        room = self.k.shape[1]
        if stop > room:
            wider = ((0, 0), (0, min(self.n_ctx, max(stop, 2 * room)) - room), (0, 0), (0, 0))
            self.k, self.v = np.pad(self.k, wider), np.pad(self.v, wider)


class RefOps:
    """The definition of `Ops`. `cache_dtype` is float32, or float16 to round keys and values as others do."""

    name = "reference"
    threads = 1

    def __init__(self, cache_dtype: type = np.float32):
        self.cache_dtype = np.dtype(cache_dtype)

    def prepare(self, types: Any, ends: Any, progress: Any = None) -> None:
        """Nothing: NumPy is ready."""

    def weight(self, tensor: Tensor, scale: float = 1.0) -> RefWeight:
        """The matrix (rows, cols) dequantized to float32, times `scale`."""
        values = np.ascontiguousarray(tensor.dequantize().reshape(tensor.rows, tensor.cols))
        return RefWeight(values if scale == 1.0 else values * np.float32(scale))

    def vector(self, tensor: Tensor) -> np.ndarray:
        """A small tensor as float32, flattened."""
        return tensor.dequantize().astype(np.float32).reshape(-1)

    def cache(self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int) -> RefCache:
        """An empty cache."""
        return RefCache(n_layers, n_kv_heads, head_dim, n_ctx, self.cache_dtype)

    def embed(self, weight: RefWeight, ids: np.ndarray) -> np.ndarray:
        """Rows `ids` (n,) of the weight: (n, cols)."""
        return weight.values[np.asarray(ids)]

    def matmul(self, weight: RefWeight, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x (n, cols) @ weight.T (+ bias (rows,)): (n, rows)."""
        out = x @ weight.values.T
        return out if bias is None else out + bias

    def rmsnorm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension."""
        mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
        return (x / np.sqrt(mean + eps)).astype(np.float32) * weight

    def rope(self, x: np.ndarray, start: int, freqs: np.ndarray, interleaved: bool, scale: float = 1.0) -> np.ndarray:
        """Rotate pairs of x (n, heads, head_dim) by position * freqs (pairs,); see `Ops.rope`."""
        pairs = len(freqs)
        angle = np.arange(start, start + len(x))[:, None] * np.asarray(freqs, dtype=np.float64)
        cos = (scale * np.cos(angle)).astype(np.float32)[:, None, :]
        sin = (scale * np.sin(angle)).astype(np.float32)[:, None, :]
        if interleaved:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        else:
            first, second = slice(0, pairs), slice(pairs, 2 * pairs)
        a, b = x[..., first], x[..., second]
        out = x.copy()
        out[..., first] = a * cos - b * sin
        out[..., second] = a * sin + b * cos
        return out

    def attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: RefCache, layer: int, start: int, scale: float
    ) -> np.ndarray:
        """Store k and v, then causal attention of q over positions 0 … own; see `Ops.attend`."""
        n, n_heads, head_dim = q.shape
        group = n_heads // k.shape[1]
        stop = start + n
        cache.reserve(stop)
        cache.k[layer, start:stop], cache.v[layer, start:stop] = k, v
        keys = np.repeat(cache.k[layer, :stop].astype(np.float32), group, axis=1)  # (stop, n_heads, head_dim)
        values = np.repeat(cache.v[layer, :stop].astype(np.float32), group, axis=1)
        scores = np.einsum("nhd,phd->hnp", q, keys) * np.float32(scale)
        future = np.arange(stop) > np.arange(start, stop)[:, None]
        scores = np.where(future, np.float32(-np.inf), scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hnp,phd->nhd", weights, values).reshape(n, n_heads * head_dim)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """silu(gate) * up."""
        with np.errstate(over="ignore"):
            return gate / (1 + np.exp(-gate)) * up

    def relu2(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """max(gate, 0)² * up."""
        return np.square(np.maximum(gate, np.float32(0))) * up

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """x + y."""
        return x + y

    def forward(
        self, network: Callable, config: Any, weights: Any, ids: np.ndarray, cache: RefCache, first: int = 0
    ) -> np.ndarray:
        """network(config, weights, self, ids, cache, first)."""
        return network(config, weights, self, ids, cache, first)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return np.asarray(x, dtype=np.float32)
