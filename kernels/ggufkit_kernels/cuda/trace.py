"""A token's forward, recorded once, fused, and replayed as one CUDA graph.

A network makes some 700 calls a token (32 layers); launched one by one they cost 5 us of Python and driver each, more
than what most of them compute. So the calls are recorded against arrays that are not there yet (`Lazy`), and what a
single call cannot see is put together, by what depends on what, never by the architecture:

- a norm, or an activation of a gate, that is read by matrices of codes gives their int8 inputs at once; float32 numbers
  go through memory only where somebody else reads them. Inputs that several matrices read are quantized once;
- a sum that is the only reader of a product is added by the product's kernel (the residual), and a norm of that sum
  which only matrices of codes read leaves it as their int8 inputs, where its rows make blocks enough for the device;
- two products of one input, of matrices of one type, that only a gate's activation reads are one launch with it;
- rotations, and norms of the heads before them, that only attention reads are attention's own, as is storing k and v;
  matrices of codes that read attention's results get them as int8 inputs, where a block has whole chunks of them;
- products of one input by matrices of one type (q, k and v) are one launch;
- launches that do not depend on each other (q and k, v of another type) are one level of the graph, side by side.

Every result has memory of its own, for the whole graph: 200 KB a layer of an 8B network, all of which stays in the
L2 cache. The token's id and its position lie in device memory (two int32, written by one copy a token), rotary
angles come from a table; nothing else differs from token to token. Kernels and their order are those of separate calls
but for what is fused: equal bit for bit where the fused kernel computes in the same order (tests/cuda/test_trace.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ggufkit_formats.errors import UsageError

from . import attention, launches, weights
from .attention import CudaCache, Parts, Rotation
from .device import Array
from .ops import CudaOps, check_attend, check_rope
from .weights import CudaWeight, Inputs, Launch


@dataclass(eq=False)
class Node:
    """A call: what it is, the results it reads, the rest of its arguments, and who reads it."""

    kind: str
    reads: tuple[Node, ...]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    readers: list[Node] = field(default_factory=list)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


class Lazy:
    """A result that is not there yet, of one token."""

    def __init__(self, node: Node, shape: tuple[int, ...]):
        self.node, self.shape = node, shape

    def __len__(self) -> int:
        return self.shape[0]

    def reshape(self, *shape: Any) -> Lazy:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if int(np.prod(sizes)) != self.node.size or sizes[0] != 1:
            raise UsageError(f"{self.shape} of one token cannot become {sizes}")
        return Lazy(self.node, sizes)

    def __getitem__(self, index: Any) -> Lazy:
        if not isinstance(index, slice) or index.indices(1) != (0, 1, 1):
            raise UsageError("of a single token's forward only all of it can be taken")
        return self


class Recorder:
    """An `Ops` that keeps the calls of a single token."""

    def __init__(self, ops: CudaOps):
        self.ops, self.name, self.threads = ops, ops.name, ops.threads
        self.nodes: list[Node] = []

    def _node(self, kind: str, reads: tuple[Lazy, ...], args: tuple[Any, ...], shape: tuple[int, ...]) -> Lazy:
        node = Node(kind, tuple(x.node for x in reads), args, shape)
        for read in node.reads:
            read.readers.append(node)
        self.nodes.append(node)
        return Lazy(node, shape)

    def receive(self) -> Lazy:
        """The numbers that the forward is given; see CudaOps."""
        return self._node("given", (), (), self.ops.given_shape)

    def embed(self, weight: CudaWeight, ids: np.ndarray) -> Lazy:
        """As in CudaOps; the id is checked when the graph runs."""
        return self._node("embed", (), (weight,), (1, weight.shape[1]))

    def matmul(self, weight: CudaWeight, x: Lazy, bias: Array | None = None) -> Lazy:
        """As in CudaOps."""
        rows, cols = weight.shape
        if x.shape != (1, cols) or (bias is not None and bias.shape != (rows,)):
            raise UsageError(f"inputs {x.shape} or the bias do not fit a weight of {weight.shape}")
        return self._node("matmul", (x,), (weight, bias), (1, rows))

    def rmsnorm(self, x: Lazy, weight: Array, eps: float) -> Lazy:
        """As in CudaOps."""
        if weight.shape != (x.shape[-1],):
            raise UsageError(f"a norm of {weight.shape} does not fit {x.shape}")
        return self._node("rmsnorm", (x,), (weight, eps), x.shape)

    def rope(self, x: Lazy, start: int, freqs: np.ndarray, interleaved: bool, scale: float = 1.0) -> Lazy:
        """As in CudaOps."""
        check_rope(x.shape, freqs)
        return self._node("rope", (x,), (freqs, bool(interleaved), scale), x.shape)

    def attend(self, q: Lazy, k: Lazy, v: Lazy, cache: CudaCache, layer: int, start: int, scale: float) -> Lazy:
        """As in CudaOps."""
        group = check_attend(q.shape, k.shape, v.shape, cache)
        return self._node("attend", (q, k, v), (cache, layer, scale, group), (1, q.node.size))

    def swiglu(self, gate: Lazy, up: Lazy) -> Lazy:
        """As in CudaOps."""
        return self._elementwise("swiglu", gate, up)

    def relu2(self, gate: Lazy, up: Lazy) -> Lazy:
        """As in CudaOps."""
        return self._elementwise("relu2", gate, up)

    def add(self, x: Lazy, y: Lazy) -> Lazy:
        """As in CudaOps."""
        return self._elementwise("add", x, y)

    def _elementwise(self, kind: str, x: Lazy, y: Lazy) -> Lazy:
        if x.shape != y.shape:
            raise UsageError(f"shapes {x.shape} and {y.shape} differ")
        return self._node(kind, (x, y), (), x.shape)


class Kept:
    """Stands for a device where launches are only to be kept."""

    def __init__(self, n_sm: int):
        self.n_sm = n_sm
        self.launches: list[Launch] = []

    def launch(self, *launch: Any) -> None:
        self.launches.append(launch)


class Program:
    """The launches that recorded calls become, by levels."""

    def __init__(self, ops: CudaOps, nodes: list[Node], output: Node, cache: CudaCache):
        self.ops, self.cache, self.output = ops, cache, output
        self.call = ops.device.zeros((2,), np.int32)  # the token's id, its position
        self.ids, self.position = self.call[0:1], self.call[1:2]
        self.levels: list[list[Launch]] = []
        self.n_vocab = 0
        self.given: Array | None = None
        self._level: dict[int, int] = {}  # by id of an array or of inputs: the level that fills it
        self._values: dict[Node, Array] = {}
        self._inputs: dict[Node, Inputs] = {}
        self._parts: dict[tuple[int, int], list[Parts]] = {}
        self._taken: dict[tuple[int, int, int], int] = {}
        self._absorbed: set[Node] = set()
        self._residual: dict[Node, Node] = {}  # a sum -> the product whose kernel adds it
        self._norm_of: dict[Node, Node] = {}  # a sum with a residual -> the norm that its kernel does too
        self._gated: set[Node] = set()  # activations whose kernel does both products too
        self._beside: set[Node] = set()  # products that another one's launch has made
        self._before: dict[Node, tuple[Any, ...]] = {}  # attention -> q, k, rotation, norms
        for node in nodes:
            self._absorb(node)
        for node in nodes:
            if node not in self._absorbed:
                getattr(self, f"_emit_{node.kind}")(node)

    # -- what is done by whom ----------------------------------------------------------------------

    def _single(self, node: Node, kind: str) -> bool:
        """Whether that is a call of this kind with one reader."""
        return node.kind == kind and len(node.readers) == 1 and node is not self.output

    def _absorb(self, node: Node) -> None:
        if node.kind == "add":
            for product in reversed(node.reads):
                if self._single(product, "matmul"):
                    self._absorbed.add(product)
                    self._residual[node] = product
                    return self._absorb_norm(node, product)
        if node.kind == "attend":
            self._absorb_rotations(node)
        if node.kind in ("swiglu", "relu2") and self.ops.fused:
            gate, up = node.reads
            if (
                all(self._single(x, "matmul") and x.args[1] is None for x in (gate, up))
                and gate.reads == up.reads
                and gate.args[0].goes_with(up.args[0])
                and any(map(self._takes_bytes, node.readers))
            ):
                self._absorbed |= {gate, up}
                self._gated.add(node)
        return None

    def _absorb_norm(self, node: Node, product: Node) -> None:
        norms = [x for x in node.readers if x.kind == "rmsnorm" and x.size == x.shape[-1]]
        blocks = -(-node.size // 32)
        if (
            not self.ops.fused
            or len(norms) != 1
            or not product.args[0].takes_bytes
            or blocks < self.ops.device.n_sm * self.ops.fewest_blocks
        ):
            return
        (norm,) = norms
        if norm.readers and all(map(self._takes_bytes, norm.readers)) and norm is not self.output:
            self._absorbed.add(norm)
            self._norm_of[node] = norm

    def _absorb_rotations(self, node: Node) -> None:
        q, k, _ = node.reads
        rotation, norms = None, None
        if all(self._single(x, "rope") for x in (q, k)) and _same(q.args, k.args):
            self._absorbed |= {q, k}
            rotation, q, k = q.args, q.reads[0], k.reads[0]
            dim = self.cache.head_dim
            if all(self._single(x, "rmsnorm") and x.shape[-1] == dim for x in (q, k)) and q.args[1] == k.args[1]:
                self._absorbed |= {q, k}
                norms = q.args[0], k.args[0], q.args[1]
                q, k = q.reads[0], k.reads[0]
        self._before[node] = q, k, rotation, norms

    def _takes_bytes(self, node: Node) -> bool:
        return node.kind == "matmul" and node.args[0].takes_bytes

    # -- arrays ------------------------------------------------------------------------------------

    def _run(self, function: Callable, reads: tuple[Any, ...], writes: tuple[Any, ...], *args: Any) -> None:
        """Add the launch that a function of launches.py makes."""
        kept: Any = Kept(self.ops.device.n_sm)
        function(kept, *args)
        (launch,) = kept.launches
        self._add(launch, reads, writes)

    def _add(self, launch: Launch, reads: tuple[Any, ...], writes: tuple[Any, ...]) -> int:
        level = max((self._level.get(id(x), -1) for x in reads if x is not None), default=-1) + 1
        while len(self.levels) <= level:
            self.levels.append([])
        self.levels[level].append(launch)
        for x in writes:
            self._level[id(x)] = level
        return level

    def _new(self, node: Node) -> Array:
        self._values[node] = out = self.ops.device.empty(node.shape, np.float32)
        return out

    def _value(self, node: Node) -> Array:
        return self._values[node]

    def _int8(self, node: Node) -> Inputs:
        """The int8 inputs that a result makes, quantized where nobody did yet."""
        found = self._inputs.get(node)
        if found is None:
            found = self._inputs[node] = Inputs(self.ops.device, 1, node.size)
            x = self._value(node)
            self._add(weights.quantize(x, found, 1), (x,), (found,))
        return found

    # -- launches ----------------------------------------------------------------------------------

    def _emit_given(self, node: Node) -> None:
        self.given = self._new(node)

    def _emit_embed(self, node: Node) -> None:
        (weight,) = node.args
        self.n_vocab = weight.shape[0]
        out = self._new(node)
        self._add(weight.embed(self.ids, out, 1), (), (out,))

    def _products_beside(self, node: Node) -> list[Node]:
        """A product and up to two others of its input whose matrices are alike, that no other kernel takes."""
        weight = node.args[0]
        free = [x for x in node.reads[0].readers if x.kind == "matmul" and x not in self._absorbed | self._beside]
        return [node, *[x for x in free if x is not node and weight.alike(x.args[0])][:2]] if self.ops.fused else [node]

    def _emit_matmul(self, node: Node, into: Node | None = None, residual: Node | None = None) -> None:
        if node in self._beside:
            return
        if into is None and len(products := self._products_beside(node)) > 1:
            x = self._int8(node.reads[0])
            outs = [self._new(product) for product in products]
            matrices, biases = zip(*(product.args for product in products), strict=True)
            self._beside |= set(products)
            self._add(weights.matvecs(matrices, x, outs, biases), (x,), tuple(outs))
            return
        weight, bias = node.args
        x = self._int8(node.reads[0]) if weight.takes_bytes else self._value(node.reads[0])
        more = None if residual is None else self._value(residual)
        out = self._new(into or node)
        norm = None if into is None else self._norm_of.get(into)
        if norm is None:
            self._add(weight.matvec(x, out, 1, bias, more), (x, more), (out,))
        else:
            to = self._inputs[norm] = Inputs(self.ops.device, 1, norm.size, normed=True)
            self._add(weight.matvec_norm(x, out, *norm.args, to, bias, more), (x, more), (out, to))

    def _emit_add(self, node: Node) -> None:
        product = self._residual.get(node)
        if product is not None:
            other = node.reads[0] if node.reads[1] is product else node.reads[1]
            return self._emit_matmul(product, node, other)
        x, y = map(self._value, node.reads)
        out = self._new(node)
        return self._run(launches.map2, (x, y), (out,), "add", x, y, out)

    def _emit_rmsnorm(self, node: Node) -> None:
        weight, eps = node.args
        x = self._value(node.reads[0])

        def plain(out: Array) -> None:
            self._run(launches.rmsnorm, (x,), (out,), x.reshape(node.shape), weight, out, eps)

        if node.size != node.shape[-1]:  # of heads
            plain(self._new(node))
        else:
            self._emit_inputs(node, (x,), plain, lambda to, out: weights.norm_quantize(x, weight, eps, to, 1, out))

    def _emit_swiglu(self, node: Node) -> None:
        self._emit_gate(node, False)

    def _emit_relu2(self, node: Node) -> None:
        self._emit_gate(node, True)

    def _emit_gate(self, node: Node, squared: bool) -> None:
        if node in self._gated:
            first, second = (x.args[0] for x in node.reads)
            x = self._int8(node.reads[0].reads[0])
            return self._emit_inputs(node, (x,), None, lambda to, out: first.matvec_gated(second, x, to, squared, out))
        gate, up = map(self._value, node.reads)

        def plain(out: Array) -> None:
            self._run(launches.map2, (gate, up), (out,), node.kind, gate, up, out)

        self._emit_inputs(node, (gate, up), plain, lambda to, out: weights.gate_quantize(gate, up, squared, to, 1, out))

    def _emit_inputs(self, node: Node, reads: tuple[Any, ...], plain: Callable | None, fused: Callable) -> None:
        """By `fused` where matrices of codes read it, with float32 numbers beside it only where others do."""
        bytes_wanted = [self._takes_bytes(reader) for reader in node.readers]
        if plain is not None and not any(bytes_wanted):
            return plain(self._new(node))
        out = None if all(bytes_wanted) and node is not self.output else self._new(node)
        to = self._inputs[node] = Inputs(self.ops.device, 1, node.size)
        self._add(fused(to, out), reads, (to,) if out is None else (to, out))
        return None

    def _emit_rope(self, node: Node) -> None:
        x = self._value(node.reads[0])
        out, turned = self._new(node), self._rotation(node.args)
        # x + 0, since rotation works in place and others may read x
        zeros = self.ops.device.zeros(node.shape, np.float32)
        self._run(launches.map2, (x,), (out,), "add", x, zeros, out)
        args = (out, turned.table, self.position, turned.pairs, turned.interleaved)
        self._run(launches.rope, (out,), (out,), *args)

    def _rotation(self, args: tuple[Any, ...]) -> Rotation:
        freqs, interleaved, scale = args
        return self.ops.rotation(freqs, interleaved, scale, self.cache.positions)

    def _emit_attend(self, node: Node) -> None:
        cache, layer, scale, group = node.args
        q, k, rotation, norms = self._before[node]
        q, k, v = self._value(q), self._value(k), self._value(node.reads[2])
        turned = Rotation() if rotation is None else self._rotation(rotation)
        level = 1 + max(self._level.get(id(x), -1) for x in (q, k, v))
        parts = self._parts_at(level, cache, group)

        def attend(to: Inputs | None, out: Array | None) -> Launch:
            return attention.attend(q, k, v, cache, layer, self.position, parts, out, scale, turned, norms, to)

        if self.ops.fused and parts.whole_chunks and any(map(self._takes_bytes, node.readers)):
            self._emit_inputs(node, (q, k, v), None, attend)
        else:
            out = self._new(node)
            self._add(attend(None, out), (q, k, v), (out,))
        if self.ops.prefetched:
            matrices = [reader.args[0] for reader in node.readers if reader.kind == "matmul"]
            self.levels[level] += [x.prefetch(self.ops.prefetched, self.ops.device.n_sm) for x in matrices]

    def _parts_at(self, level: int, cache: CudaCache, group: int) -> Parts:
        """The launches of one level each have parts of their own; those of different levels share them."""
        key = (id(cache), group)
        pool, taken = self._parts.setdefault(key, []), self._taken.get((level, *key), 0)
        self._taken[level, *key] = taken + 1
        if taken == len(pool):
            pool.append(Parts(self.ops.device, cache, group))
        return pool[taken]


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two rotations are the same one."""
    return a[0] is b[0] and a[1:] == b[1:]


class Trace:
    """The recorded forward of one token."""

    def __init__(
        self,
        ops: CudaOps,
        network: Callable,
        config: Any,
        weights: Any,
        cache: CudaCache,
        given: tuple[int, ...] | None,
    ):
        self._key = (ops, network, config, weights, given)
        self._positions = cache.positions
        recorder = Recorder(ops)
        ops.given_shape = given or ()
        length = cache.length
        out = network(config, weights, recorder, np.zeros(1, np.int64), cache, 0)
        cache.length = length
        program = Program(ops, recorder.nodes, out.node, cache)
        self.device, self.n_vocab = ops.device, program.n_vocab
        self.call, self.given, self.levels = program.call, program.given, program.levels
        self.out = program._value(out.node).reshape(out.shape)
        for node in recorder.nodes:  # they refer to each other and to the cache, whose memory must not wait for that
            node.readers.clear()
            node.args = ()
        self.graph = self.device.capture(self.levels)
        self._word = np.zeros(2, np.int32)

    @property
    def n_launches(self) -> int:
        return sum(map(len, self.levels))

    def fits(self, ops: CudaOps, network: Callable, config: Any, weights: Any, cache: CudaCache,
             given: tuple[int, ...] | None) -> bool:  # fmt: skip
        """Whether it is the forward of this network with the cache where it was."""
        same = (a is b for a, b in zip(self._key[:4], (ops, network, config, weights), strict=True))
        return all(same) and self._key[4] == given and self._positions == cache.positions

    def run(self, token: int, start: int, given: np.ndarray | None) -> Array:
        """Queue the forward of one token at a position: logits (1, n_vocab), until the next call."""
        if self.n_vocab and not 0 <= token < self.n_vocab:
            raise UsageError(f"token id {token} is outside 0…{self.n_vocab - 1}")
        self._word[:] = token, start
        self.device.write(self.call, self._word)
        if self.given is not None and given is not None:
            self.device.write(self.given, np.ascontiguousarray(given, np.float32))
        self.graph.launch()
        return self.out


def replay(ops: CudaOps, network: Callable, config: Any, weights: Any, ids: np.ndarray, cache: CudaCache,
           given: np.ndarray | None = None) -> Array:  # fmt: skip
    """The forward of one token by the cache's trace, recorded anew where it does not fit any more."""
    start = cache.length
    cache.reserve(start + 1)
    trace, shape = cache.trace, None if given is None else given.shape
    if trace is None or not trace.fits(ops, network, config, weights, cache, shape):
        trace = cache.trace = Trace(ops, network, config, weights, cache, shape)
    logits = trace.run(int(ids[0]), start, given)
    cache.length = start + 1
    return logits
