"""Part of a network on a GPU, the rest on the CPU: a backend made of two, that follows where the weights are.

`HybridOps(cpu, gpu, n_layers, n_gpu_layers)` puts the last layers' tensors on the GPU. Embedding and output stay on the
CPU, as in llama.cpp (where all is on the GPU its n_gpu_layers is larger than n_layers; here that is no hybrid then).

A forward is cut where the weights that it asks for change sides, into at most three segments (CPU, GPU, CPU); numbers
cross over there, and nowhere else: the residual stream, 16 KB a token for an 8B network. A segment is the network, run
by a backend (`Segment`) that does nothing until its weights come, and stops when they have been; so each side records
and replays a token in its own way (cpu/tape.py, cuda/trace.py), and no network knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.errors import UnsupportedError, UsageError
from ggufkit_formats.tensor import Tensor


@dataclass(frozen=True)
class Homed:
    """A weight or a vector, and the backend that holds it."""

    ops: Any
    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def nbytes(self) -> int:
        return self.value.nbytes


class HybridCache:
    """Keys and values: of the first layers on the CPU, of the others on the GPU."""

    def __init__(self, cpu: Any, gpu: Any, n_ctx: int):
        self.cpu, self.gpu, self.n_ctx = cpu, gpu, n_ctx
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, value: int) -> None:
        self._length = self.cpu.length = self.gpu.length = value

    @property
    def nbytes(self) -> int:
        return self.cpu.nbytes + self.gpu.nbytes

    def truncate(self, length: int) -> None:
        """Forget positions from `length` on."""
        if not 0 <= length <= self._length:
            raise UsageError(f"a cache of {self._length} positions cannot be cut to {length}")
        self.length = length


class Elsewhere:
    """A result of another segment. `x[first:]` of it is another one, as it is an array's."""

    def reshape(self, *shape: Any) -> Elsewhere:
        return self

    def __getitem__(self, index: Any) -> Elsewhere:
        return Elsewhere()


class Crossed(Exception):
    """The network asks for weights of the other side, with this result."""

    def __init__(self, value: Any):
        self.value = value


class Segment:
    """An `Ops` for one run of a network, that computes what lies between two changes of sides: even ones on the CPU."""

    def __init__(self, which: int, ops: Any, cpu: Any, cpu_layers: int, given: Callable[[Any], Any]):
        self.which, self.ops, self.given, self.cpu_layers = which, ops, given, cpu_layers
        self.name, self.threads = ops.name, ops.threads
        self.side, self.at = cpu, 0  # whose weights were asked for last, and how often that changed
        self.crossing: tuple[Any, Any] | None = None  # what stands for the result that crossed over, and that itself

    def _enter(self, home: Any, x: Any) -> bool:
        """Notes whose weights a call with x asks for; whether it is this segment's call."""
        if home is not self.side:
            if self.at == self.which:
                raise Crossed(x)
            self.side, self.at = home, self.at + 1
            if self.at == self.which:
                self.crossing = x, self.given(self.ops)
        return self.at == self.which

    @property
    def computes(self) -> bool:
        """Whether the last call was this segment's."""
        return self.at == self.which

    def to_numpy(self, x: Any) -> np.ndarray:
        """The values on the host, of a result that this segment reads or made."""
        return self.ops.to_numpy(self._here(x))

    def _here(self, x: Any) -> Any:
        if not isinstance(x, Elsewhere):
            return x
        if self.crossing is None or self.crossing[0] is not x:
            raise UnsupportedError("this network reads results from both sides: it cannot be split between GPU and CPU")
        return self.crossing[1]

    def _call(self, name: str, arrays: tuple[Any, ...], *rest: Any) -> Any:
        """A call without weights: of the segment in which its arrays came to be."""
        if self.at != self.which:
            return Elsewhere()
        return getattr(self.ops, name)(*map(self._here, arrays), *rest)

    def embed(self, weight: Homed, ids: np.ndarray) -> Any:
        """As in `Ops`."""
        if self.at != self.which:
            return Elsewhere()
        return self.ops.embed(weight.value, ids)

    def matmul(self, weight: Homed, x: Any, bias: Homed | None = None) -> Any:
        """As in `Ops`."""
        if not self._enter(weight.ops, x):
            return Elsewhere()
        return self.ops.matmul(weight.value, self._here(x), None if bias is None else bias.value)

    def rmsnorm(self, x: Any, weight: Homed, eps: float) -> Any:
        """As in `Ops`."""
        if not self._enter(weight.ops, x):
            return Elsewhere()
        return self.ops.rmsnorm(self._here(x), weight.value, eps)

    def rope(self, x: Any, *rest: Any) -> Any:
        """As in `Ops`."""
        return self._call("rope", (x,), *rest)

    def attend(self, q: Any, k: Any, v: Any, cache: Any, layer: int, start: int, scale: float) -> Any:
        """As in `Ops`; the layers of each side are counted from 0."""
        layer -= self.cpu_layers if self.which % 2 else 0
        return self._call("attend", (q, k, v), cache, layer, start, scale)

    def swiglu(self, gate: Any, up: Any) -> Any:
        """As in `Ops`."""
        return self._call("swiglu", (gate, up))

    def relu2(self, gate: Any, up: Any) -> Any:
        """As in `Ops`."""
        return self._call("relu2", (gate, up))

    def add(self, x: Any, y: Any) -> Any:
        """As in `Ops`."""
        return self._call("add", (x, y))


class Part:
    """A network's segment as a network: what a backend's `forward` runs, records and replays."""

    def __init__(self, network: Callable, which: int, cpu: Any, cpu_layers: int):
        self.network, self.which, self.cpu, self.cpu_layers = network, which, cpu, cpu_layers
        self.numbers: Any = None  # what a segment on the CPU begins with
        self.last = False  # known when it has run once, or has been recorded

    def __call__(self, config: Any, weights: Any, ops: Any, ids: np.ndarray, cache: Any, first: int = 0) -> Any:
        """The logits, or what crosses over to the next segment."""
        segment = Segment(self.which, ops, self.cpu, self.cpu_layers, self._given)
        try:
            out = self.network(config, weights, segment, ids, cache, first)
        except Crossed as crossed:
            return crossed.value
        self.last = True
        return out

    def _given(self, ops: Any) -> Any:
        return ops.receive() if self.which % 2 else self.numbers


class Both:
    """Two preparations at once; see prepare.py of either side."""

    def __init__(self, parts: Iterable[Any]):
        self.parts = [part for part in parts if part is not None]

    @property
    def missing(self) -> list[Any]:
        return [each for part in self.parts for each in part.missing]

    def start(self) -> None:
        for part in self.parts:
            part.start()

    def wait(self) -> None:
        for part in self.parts:
            part.wait()


class HybridOps:
    """Layers from n_layers - n_gpu_layers on by `gpu`, those before, and embedding, by `cpu`; see above."""

    name = "cuda+cpu"
    n_batch = 512  # as the CPU likes it

    def __init__(self, cpu: Any, gpu: Any, n_layers: int, n_gpu_layers: int):
        if not 0 < n_gpu_layers <= n_layers:
            raise UsageError(f"{n_gpu_layers} of {n_layers} layers on the GPU is not a part of them")
        self.cpu, self.gpu = cpu, gpu
        self.n_layers, self.n_gpu_layers, self.cpu_layers = n_layers, n_gpu_layers, n_layers - n_gpu_layers
        self.threads = cpu.threads
        self.most_top = getattr(cpu, "most_top", 0)  # the output is the CPU's
        self._parts: dict[Callable, list[Part]] = {}

    def home(self, name: str) -> Any:
        """The backend that a tensor of that name lies in."""
        words = name.split(".")
        on_gpu = words[0] == "blk" and int(words[1]) >= self.cpu_layers
        return self.gpu if on_gpu else self.cpu

    def prepare(
        self,
        types: Iterable[TensorType],
        ends: Iterable[TensorType],
        progress: Callable[[int, int], None] | None = None,
    ) -> Both:
        """Begin to compile what both sides need; see `Ops.prepare`."""
        types, ends = list(types), list(ends)
        return Both([self.cpu.prepare(types, ends, progress), self.gpu.prepare(types, [], None)])

    def weight(self, tensor: Tensor, scale: float = 1.0) -> Homed:
        """Pack a matrix where it belongs."""
        home = self.home(tensor.name)
        return Homed(home, home.weight(tensor, scale))

    def vector(self, tensor: Tensor) -> Homed:
        """A small tensor where it belongs."""
        home = self.home(tensor.name)
        return Homed(home, home.vector(tensor))

    def cache(self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int) -> HybridCache:
        """An empty cache."""
        on_cpu = self.cpu.cache(max(1, self.cpu_layers), n_kv_heads, head_dim, n_ctx)
        return HybridCache(on_cpu, self.gpu.cache(self.n_gpu_layers, n_kv_heads, head_dim, n_ctx), n_ctx)

    def forward(
        self, network: Callable, config: Any, weights: Any, ids: np.ndarray, cache: HybridCache, first: int = 0
    ) -> Any:
        """network(config, weights, …): segment after segment, each by its own side's `forward`."""
        start, parts = cache.length, self._parts.setdefault(network, [])
        x: Any = None
        for which in range(2 * self.n_layers):
            if which == len(parts):
                parts.append(Part(network, which, self.cpu, self.cpu_layers))
            part, own = parts[which], (cache.gpu if which % 2 else cache.cpu)
            own.length = start
            if which % 2:
                x = self.gpu.forward(part, config, weights, ids, own, first, given=x)
                if not part.last:
                    x = self.gpu.to_numpy(x)
            elif which:
                part.numbers = x  # a few calls, and the tape knows of no numbers from elsewhere
                x = part(config, weights, self.cpu, ids, own, first)
            else:
                x = self.cpu.forward(part, config, weights, ids, own, first)
            if part.last:
                break
        cache.length = start + len(ids)
        return x

    def to_numpy(self, x: Any) -> np.ndarray:
        """The values on the host."""
        return x if isinstance(x, np.ndarray) else self.gpu.to_numpy(x)

    def top(self, logits: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest of logits (1, n_vocab), by the CPU; see `CpuOps.top`."""
        return self.cpu.top(self.to_numpy(logits), k)
