"""The backend for NVIDIA GPUs: checks shapes in Python, computes in the kernels beside this file and in cuBLAS.

`CudaOps(device)` is an `Ops`, written against `Device`, so that the same code runs on a GPU and, in the tests, without
one. Arrays are the device's, float32. Everything is queued in one stream; Python waits only where numbers are asked
for (`to_numpy`, `top`). One CudaOps is for one thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.errors import UsageError
from ggufkit_formats.tensor import Tensor

from ..cpu import pack_fast
from ..cpu.memory import Arena
from ..cpu.simd import LANES
from ..cpu.tape import rotations
from ..cpu.team import default_threads, team
from . import attention, launches, weights
from .attention import CudaCache, Parts, Rotation
from .device import Array, Device
from .loader import Module
from .weights import MOST_TOKENS, CudaWeight, Inputs

__all__ = ["CudaCache", "CudaOps", "CudaWeight"]

FEW = MOST_TOKENS  # up to so many tokens go through the matvec kernels, more through cuBLAS
SLAB_NBYTES = 64 << 20  # of weights unpacked to halves at a time


class Preparation:
    """Modules to be compiled, or loaded where they have been; by the thread that waits, which the driver knows."""

    def __init__(self, device: Device, modules: Iterable[Module], progress: Callable[[int, int], None] | None):
        self.missing = list(dict.fromkeys(modules))
        self._device, self._progress = device, progress

    def start(self) -> None:
        """It begins when somebody waits."""

    def wait(self) -> None:
        """Compile all. Raises DeviceError where one does not compile."""
        self._device.compile(self.missing, self._progress)


class CudaOps:
    """The backend on a device; `threads` of the processor pack the weights."""

    name = "cuda"
    n_batch = 2048  # tokens of a prompt at a time: what unpacking the weights costs is spread over them
    prefetched = 0  # bytes of the matrix behind one token's attention, asked for beside it. For measurements
    fewest_blocks = 0.75  # of a product that makes the next norm, per multiprocessor
    fused_prompt = True  # a prompt's attention in one launch (flash.cu), where its heads have a kernel
    most_top = launches.MOST_TOP  # logits that `top` finds at most

    def __init__(self, device: Device, threads: int | None = None, fused: bool = True):
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads: at least 1 is needed")
        self.device = device
        self.fused = fused  # products of one token with what follows them in one launch (fused.cu)
        self.threads = threads or default_threads()
        self.team = team(self.threads)
        self._rooms: dict[tuple[str, Any], Array] = {}
        self._tables: dict[tuple[int, float], tuple[np.ndarray, Array]] = {}
        self._position: tuple[Array, int] | None = None
        self._given: np.ndarray | None = None
        self.given_shape: tuple[int, ...] = ()  # of what a recorded forward is given

    # -- memory --------------------------------------------------------------------------------------

    def array(self, *shape: int) -> Array:
        """A new float32 array, contents anything."""
        return self.device.empty(shape, np.float32)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Memory for what a call leaves behind, by name; it serves the next call again."""
        key, count = (name, np.dtype(dtype)), math.prod(shape)
        room = self._rooms.get(key)
        if room is None or room.shape[0] < count:
            self._rooms.pop(key, None)
            room = None  # before more is asked for
            room = self._rooms[key] = self.device.empty((count,), dtype)
        return room[:count].reshape(shape)

    def position(self, start: int) -> Array:
        """`start` in device memory, int32 (1,)."""
        if self._position is None:
            self._position = self.device.empty((1,), np.int32), -1
        if self._position[1] != start:
            self.device.write(self._position[0], np.array([start], np.int32))
            self._position = self._position[0], start
        return self._position[0]

    def rotation(self, freqs: np.ndarray, interleaved: bool, scale: float, stop: int) -> Rotation:
        """Rotary angles of all positions below `stop`; kept, and made anew for twice as many where they run out."""
        key = (id(freqs), scale)
        kept, table = self._tables.get(key, (freqs, None))
        if table is None or table.shape[0] < stop:
            room = max(stop, attention.FIRST_POSITIONS, 0 if table is None else 2 * table.shape[0])
            table = self.device.upload(rotations(np.arange(room), freqs, scale))
            self._tables[key] = kept, table
        return Rotation(table, len(freqs), interleaved)

    # -- weights -------------------------------------------------------------------------------------

    def prepare(
        self,
        types: Iterable[TensorType],
        ends: Iterable[TensorType],
        progress: Callable[[int, int], None] | None = None,
    ) -> Preparation:
        """Begin to compile what a network with matrices of these types needs; see `Ops.prepare`."""
        found = [*weights.modules([*types, *ends]), launches.ELEMENTWISE, launches.SAMPLE, attention.PROMPT]
        return Preparation(self.device, found, progress)

    def weight(self, tensor: Tensor, scale: float = 1.0) -> CudaWeight:
        """Pack a matrix (rows, cols) of any tensor type, times `scale`, on the host, and copy it to the device."""
        return CudaWeight(self.device, pack_fast.pack(tensor, self.team, Arena(), scale))

    def vector(self, tensor: Tensor) -> Array:
        """A small tensor as float32, flattened."""
        rows = tensor.read_rows(0, tensor.rows)
        return self.device.upload(tensor.type.decode(rows).astype(np.float32, copy=False).reshape(-1))

    def cache(self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int) -> CudaCache:
        """An empty cache."""
        return CudaCache(self.device, n_layers, n_kv_heads, head_dim, n_ctx)

    def forward(
        self, network: Callable, config: Any, weights: Any, ids: np.ndarray, cache: CudaCache, first: int = 0,
        given: np.ndarray | None = None,
    ) -> Array:  # fmt: skip
        """network(config, weights, self, ids, cache, first); one token's calls are recorded once, then replayed.

        What a single token's forward returns is overwritten by the next one with the same cache. `given` float32
        (n, cols) is what `receive` returns to a network that begins with numbers from elsewhere.
        """
        if len(ids) == 1:
            from .trace import replay

            return replay(self, network, config, weights, ids, cache, given)
        self._given = given
        return network(config, weights, self, ids, cache, first)

    def receive(self) -> Array:
        """The numbers that `forward` was given."""
        if self._given is None:
            raise UsageError("this forward was given nothing")
        return self.device.upload(np.ascontiguousarray(self._given, np.float32))

    # -- matrices ------------------------------------------------------------------------------------

    def embed(self, weight: CudaWeight, ids: np.ndarray) -> Array:
        """Rows `ids` (n,) of the weight, decoded exactly: (n, cols). Raises UsageError for an id out of range."""
        ids = np.ascontiguousarray(ids, dtype=np.int64).reshape(-1)
        rows, cols = weight.shape
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise UsageError(f"token ids {int(ids.min())}…{int(ids.max())} are outside 0…{rows - 1}")
        out = self.array(len(ids), cols)
        if len(ids):
            self.device.launch(*weight.embed(self.device.upload(ids.astype(np.int32)), out, len(ids)))
        return out

    def matmul(self, weight: CudaWeight, x: Array, bias: Array | None = None) -> Array:
        """x (n, cols) @ weight.T (+ bias (rows,)): (n, rows)."""
        rows, cols = weight.shape
        if len(x.shape) != 2 or x.shape[1] != cols:
            raise UsageError(f"inputs {x.shape} do not fit a weight of {weight.shape}")
        if bias is not None and bias.shape != (rows,):
            raise UsageError(f"a bias {bias.shape} does not fit a weight of {weight.shape}")
        n = x.shape[0]
        out = self.array(n, rows)
        if n == 0:
            return out
        if n <= FEW:
            self._matvec(weight, x, bias, out)
        elif weight.unpacked_dtype is np.float32:
            self._gemm_f32(weight, x, bias, out)
        else:
            self._gemm(weight, x, bias, out)
        return out

    def _matvec(self, weight: CudaWeight, x: Array, bias: Array | None, out: Array) -> None:
        n = x.shape[0]
        inputs: Any = x
        if weight.takes_bytes:
            inputs = Inputs(self.device, n, x.shape[1])
            self.device.launch(*weights.quantize(x, inputs, n))
        self.device.launch(*weight.matvec(inputs, out, n, bias))

    def _gemm(self, weight: CudaWeight, x: Array, bias: Array | None, out: Array) -> None:
        """By cuBLAS on weights unpacked to halves, some rows at a time. Inputs of weights that are plain numbers go as
        two halves, whose sum has 22 bits: nothing else rounds these weights' inputs."""
        n, cols = x.shape
        high, factors = self.scratch("halves", (n, cols), np.float16), self.scratch("factors", (n,), np.float32)
        launches.halves(self.device, x, high, factors)
        low = None if weight.takes_bytes else self.scratch("low", (n, cols), np.float16)
        if low is not None:
            grid = (-(-cols // 1024), n)
            self.device.launch(attention.PROMPT.kernel("low_halves"), grid, 256, x, high, factors, low, cols)
        for first, last, part in self._unpacked(weight, np.float16):
            self.device.gemm(high, part, out[:, first:last])
            if low is not None:
                self.device.gemm(low, part, out[:, first:last], beta=1.0)
        launches.undo_halves(self.device, out, factors, bias)

    def _gemm_f32(self, weight: CudaWeight, x: Array, bias: Array | None, out: Array) -> None:
        """By cuBLAS in float32, some rows at a time, which are only brought into order."""
        for first, last, part in self._unpacked(weight, np.float32):
            self.device.gemm(x, part, out[:, first:last])
        if bias is not None:
            launches.add_rows(self.device, out, bias, None)

    def _unpacked(self, weight: CudaWeight, dtype: Any) -> Iterator[tuple[int, int, Array]]:
        """A weight's rows, unpacked some at a time into the same memory: the first, the end, and their values."""
        rows, cols = weight.shape
        step = max(1, SLAB_NBYTES // (np.dtype(dtype).itemsize * cols * LANES)) * LANES
        slab = self.scratch("slab", (min(step, rows), cols), dtype)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            part = slab[: last - first]
            self.device.launch(*weight.unpack(first, last, part))
            yield first, last, part

    # -- the rest ------------------------------------------------------------------------------------

    def rmsnorm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension."""
        if weight.shape != (x.shape[-1],):
            raise UsageError(f"a norm of {weight.shape} does not fit {x.shape}")
        out = self.array(*x.shape)
        if x.nbytes:
            launches.rmsnorm(self.device, x, weight, out, eps)
        return out

    def rope(self, x: Array, start: int, freqs: np.ndarray, interleaved: bool, scale: float = 1.0) -> Array:
        """Rotate pairs of x (n, heads, head_dim) in place; angles are computed in float64, once a position."""
        check_rope(x.shape, freqs)
        rotation = self.rotation(freqs, interleaved, scale, start + x.shape[0])
        if x.nbytes:
            launches.rope(self.device, x, rotation.table, self.position(start), rotation.pairs, interleaved)
        return x

    def attend(self, q: Array, k: Array, v: Array, cache: CudaCache, layer: int, start: int, scale: float) -> Array:
        """Store k and v at `start`, then causal attention of q over positions 0 … own; see `Ops.attend`."""
        group = check_attend(q.shape, k.shape, v.shape, cache)
        if start < 0:
            raise UsageError(f"position {start} is below 0")
        n, n_heads, head_dim = q.shape
        cache.reserve(start + n)
        out, position = self.array(n, n_heads * head_dim), self.position(start)
        if n == 1:
            parts = Parts(self.device, cache, group)
            self.device.launch(*attention.attend(q, k, v, cache, layer, position, parts, out, scale, Rotation()))
        elif n:
            self.device.launch(*attention.rope_append(None, k, v, cache, layer, position, n_heads, Rotation()))
            attention.prompt(self.device, self.scratch, q, cache, layer, position, start, scale, out, self.fused_prompt)
        return out

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) * up, elementwise, into `gate`."""
        return self._elementwise("swiglu", gate, up)

    def relu2(self, gate: Array, up: Array) -> Array:
        """max(gate, 0)² * up, elementwise, into `gate`."""
        return self._elementwise("relu2", gate, up)

    def add(self, x: Array, y: Array) -> Array:
        """x + y, elementwise, into `x`."""
        return self._elementwise("add", x, y)

    def _elementwise(self, name: str, x: Array, y: Array) -> Array:
        if x.shape != y.shape:
            raise UsageError(f"shapes {x.shape} and {y.shape} differ")
        if x.nbytes:
            launches.map2(self.device, name, x, y, x)
        return x

    def to_numpy(self, x: Array) -> np.ndarray:
        """The values on the host, float32, when everything queued is done."""
        return self.device.download(x)

    def top(self, logits: Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest of logits (1, n_vocab): ids int64 (k,) and values float32 (k,), best first, of equal ones the
        lower id first. NaN counts as largest. Raises UsageError for a k out of 1 … `most_top`."""
        n_vocab = logits.shape[-1]
        if not 1 <= k <= min(self.most_top, n_vocab) or logits.shape[0] != 1:
            raise UsageError(f"the {k} largest of {logits.shape} logits cannot be had")
        room = self.scratch("top", (launches.top_scratch(n_vocab),), np.uint64)
        out = self.scratch(f"top {k}", (2, k), np.int32)
        launches.top(self.device, logits, k, room, out)
        ids, values = launches.top_of(self.device.download(out))
        return ids.astype(np.int64), values


def check_rope(shape: tuple[int, ...], freqs: np.ndarray) -> None:
    """Raises UsageError for more pairs than a head has."""
    if len(shape) != 3 or 2 * len(freqs) > shape[2]:
        raise UsageError(f"{len(freqs)} pairs do not fit a head of {shape[-1]}")


def check_attend(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], cache: CudaCache) -> int:
    """The number of queries that share a key head. Raises UsageError for shapes that do not fit together."""
    heads, fits = cache.n_kv_heads, len(q) == 3 and k == v
    if not fits or k != (q[0], heads, cache.head_dim) or q[2] != cache.head_dim or q[1] % heads:
        raise UsageError(f"queries {q}, keys {k}, values {v} and the cache do not fit")
    return q[1] // heads
