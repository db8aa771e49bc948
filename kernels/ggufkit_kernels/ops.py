"""The backend's contract: what a network may ask of the machine.

A model's `forward` is written once against these functions and is handed one of the implementations:
`ops_ref` (plain NumPy, the definition), `cpu` (Numba), later `cuda` (CuPy). Arrays belong to the backend
(NumPy arrays on the CPU, device arrays on a GPU), activations are float32, and n is the number of tokens in the
batch, which stand at consecutive positions `start … start + n - 1` of one sequence.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from ggufkit_formats.errors import UsageError
from ggufkit_formats.tensor import Tensor

Array = Any  # the backend's float32 array
Weight = Any  # the backend's packed matrix: has .shape (rows, cols) and .nbytes


class Cache(Protocol):
    """Keys and values of one sequence, all layers. Grows on demand up to n_ctx positions."""

    n_ctx: int  # most positions it may hold
    length: int  # positions filled; a forward advances it after its last layer
    nbytes: int

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on, so that a chat can go on from a common prefix."""
        ...


class Positions:
    """What the caches of all backends count: positions filled, of at most `n_ctx`."""

    def __init__(self, n_ctx: int):
        self.n_ctx = n_ctx
        self.length = 0

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on. Raises UsageError for more than there are."""
        if not 0 <= length <= self.length:
            raise UsageError(f"a cache of {self.length} positions cannot be cut to {length}")
        self.length = length

    def check(self, stop: int) -> None:
        """Raise UsageError where positions below `stop` are more than `n_ctx`."""
        if stop > self.n_ctx:
            raise UsageError(f"position {stop - 1} does not fit a context of {self.n_ctx}")


class Ops(Protocol):
    name: str
    threads: int

    def prepare(self, types: Any, ends: Any, progress: Any = None) -> Any:
        """Begin to compile what a network with matrices of these tensor types in its layers, and of the types `ends`
        for embedding and output, needs; `wait()` on the result waits.

        `progress` is told (kernels compiled, kernels to compile) from another thread. None: nothing to compile.
        """
        ...

    def weight(self, tensor: Tensor, scale: float = 1.0) -> Weight:
        """Pack a matrix (rows, cols) of any tensor type, times `scale`, into the backend's layout; with pread."""
        ...

    def vector(self, tensor: Tensor) -> Array:
        """A small tensor (norm, bias, rope factors) as float32, flattened."""
        ...

    def cache(self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int) -> Cache:
        """An empty cache."""
        ...

    def embed(self, weight: Weight, ids: np.ndarray) -> Array:
        """Rows `ids` (n,) of the weight, decoded exactly: (n, cols)."""
        ...

    def matmul(self, weight: Weight, x: Array, bias: Array | None = None) -> Array:
        """x (n, cols) @ weight.T (+ bias (rows,)): (n, rows)."""
        ...

    def rmsnorm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension; x (…, dim), weight (dim,)."""
        ...

    def rope(self, x: Array, start: int, freqs: np.ndarray, interleaved: bool, scale: float = 1.0) -> Array:
        """Rotate pairs of x (n, heads, head_dim) by position * freqs (pairs,), cos and sin times `scale`; may
        work in place, returns the result. Pairs are (2i, 2i + 1) if interleaved (ggml's NORM), else
        (i, i + pairs) (ggml's NEOX); dimensions from 2 * pairs on pass unchanged."""
        ...

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, layer: int, start: int, scale: float) -> Array:
        """Store k, v (n, n_kv_heads, head_dim) at `start` in the cache's layer, then causal attention of q (n,
        n_heads, head_dim) over positions 0 … own: softmax(scale * q·k) v, query head h reading key head
        h // (n_heads // n_kv_heads). Returns (n, n_heads * head_dim)."""
        ...

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) * up, elementwise; may reuse `gate`."""
        ...

    def relu2(self, gate: Array, up: Array) -> Array:
        """max(gate, 0)² * up, elementwise; may reuse `gate`."""
        ...

    def add(self, x: Array, y: Array) -> Array:
        """x + y, elementwise; may reuse `x`."""
        ...

    def forward(self, network: Any, config: Any, weights: Any, ids: np.ndarray, cache: Cache, first: int = 0) -> Array:
        """network(config, weights, self, ids, cache, first): the logits of ids[first:]. A backend may record the
        calls that a single token makes and replay them for the next ones: a network may branch on `config`,
        `weights` and len(ids), but not on values, the ids or the position."""
        ...

    def to_numpy(self, x: Array) -> np.ndarray:
        """The values on the host, float32."""
        ...
