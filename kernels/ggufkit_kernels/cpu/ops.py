"""The backend for the CPU: checks and allocates in Python, computes in Numba kernels, shares work among a team.

`CpuOps(threads)` is an `Ops`. Arrays are NumPy float32. Several Python threads may use one CpuOps, or several; the
kernels of one team take turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.errors import UsageError
from ggufkit_formats.tensor import Tensor

from ..ops import Positions
from . import attention, elementwise, pack_fast, prepare, sample
from .matmul import (
    NUMBERS,
    PLAIN_TOKENS,
    SCALES,
    TOKENS,
    interleave_inputs,
    matmul_kernel,
    prep_kernel,
)
from .memory import Arena
from .pack import Packed
from .plain_matmul import COLUMNS
from .simd import LANES
from .team import address, cores_alike, default_threads, team
from .words import CODES, STRIP_NBYTES, float_bits, weight_words

__all__ = ["CpuCache", "CpuOps", "CpuWeight", "default_threads"]

TOKEN_BLOCK_NBYTES = 192 << 10  # inputs that an item goes over again and again: they stay in the L2 cache
ITEM_VALUES = 16384  # values that elementwise kernels take at a time
FIRST_POSITIONS = 256  # of a new cache
ITEM_NBYTES = 96 << 10  # of weights: what is worth taking at least, for one token, if there is enough for all
FIRST_SHARE, FIRST_SHARE_UNLIKE = 0.9, 0.67  # of the rest over the number of threads, that an item takes
NOTHING = [0, 0, 0, 0]
Arrays = tuple[np.ndarray, ...]


class Plan:
    """How a weight is multiplied with n tokens: kernels, items, the args' last words, the scratch for the inputs."""

    def __init__(self, packed: Packed, n: int, threads: int):
        layout, cols = packed.layout, packed.padded_cols
        plain = layout.is_plain
        tile = PLAIN_TOKENS if plain else TOKENS
        tile = tile if n >= tile else 1
        token_nbytes = 4 * min(cols, COLUMNS) if plain else cols  # of an input that is gone over at a time
        tokens_per_item = max(tile, TOKEN_BLOCK_NBYTES // token_nbytes // tile * tile)
        token_items = -(-n // tokens_per_item)
        self.bounds = np.array(_bounds(packed, token_items if n > 1 else 0, threads), np.int64)
        strip_items = len(self.bounds) - 1
        tiles = -(-n // tile)
        prep_tiles = max(1, 8192 // (cols * tile))
        self.kernel = (matmul_kernel(layout, tile).address, strip_items * token_items)
        # What is made of the inputs first, and what it depends on beside the inputs themselves
        self.prep: tuple[int, int] | None = None
        # int8 inputs, their scales, starts and sums, each at a multiple of 64 bytes of the scratch
        sizes: list[int] = []
        values = tiles * tile * cols
        if plain and tile > 1:
            self.prep, sizes = (interleave_inputs.address, tiles), [values * 4, 0, 0, 0]
        elif not plain:
            prep, span, unit = prep_kernel(layout, tile)
            self.prep = (prep.address, -(-tiles // prep_tiles))
            sizes = [values, values // 8, values // span * 4 if span else 0, values // unit * 4 if unit else 0]
        self.sections = []
        self.scratch_nbytes = 0
        for nbytes in sizes:
            self.sections.append(self.scratch_nbytes)
            self.scratch_nbytes += -(-nbytes // 64) * 64
        self.strips, self.nbytes = packed.strips, packed.nbytes
        self.weight_words = weight_words(packed)
        self.prep_key = (self.prep, cols, layout.too_much, packed.table_step)
        self.tail = [address(self.bounds), tokens_per_item, strip_items, prep_tiles]

    def place(self, strip: int) -> int:
        """Where a strip's codes are."""
        return self.weight_words[CODES // 8] + strip * self.weight_words[STRIP_NBYTES // 8]

    def scratch_at(self, base: int) -> list[int]:
        """The addresses of the scratch's sections."""
        return [base + offset for offset in self.sections] or NOTHING


def _bounds(packed: Packed, token_items: int, threads: int) -> list[int]:
    """Where items begin among the strips, and the end: equal items for many tokens (in `token_items` groups), at least
    eight a thread; for one token (0) as `shares` has it."""
    strips = packed.strips
    if threads == 1:
        return [0, strips]
    if token_items:
        step = max(-(-strips // -(-8 * threads // token_items)), min(4, strips))
        return [*range(0, strips, step), strips]
    return shares([(strips, packed.nbytes)], threads)[0]


def shares(matrices: Sequence[tuple[int, int]], threads: int) -> list[list[int]]:
    """Where items begin among the strips of matrices (strips, bytes) that are multiplied with one token in turn.

    A thread that jumps to another place waits for the memory, and one that takes an item for the line of the cache
    that says which. So items begin large, and shrink as the end of the last matrix comes near, for an item that comes
    late holds up all others (guided self-scheduling, Polychronopoulos and Kuck, 1987). An item is nearly a fair share
    of the rest where processors are alike, and two thirds of one elsewhere.

    Tokens over those with a guided sequence for each matrix, half a share first and items of 32 KB at least, Zen 4, 2
    threads, pairs in one process: SmolLM2-135M's shape in Q4_K_M 1.03 by one sequence for matrices that can go at the
    same time, 1.07 more by items of 128 KB, 1.02 by two thirds first, 1.04 by nine tenths, 1.09 where the threads share
    no cache; 1B shapes 1.00 and, without a common cache, 1.02–1.04.
    """
    share = FIRST_SHARE if cores_alike() else FIRST_SHARE_UNLIKE
    rest = sum(nbytes for _, nbytes in matrices)
    found: list[list[int]] = []
    least = min(ITEM_NBYTES, share * rest / threads)
    for strips, nbytes in matrices:
        each = nbytes / strips
        bounds = [0]
        while bounds[-1] < strips:
            wanted = max(least, share * rest / threads)
            first = bounds[-1]
            bounds.append(min(strips, first + max(1, math.ceil(wanted / each))))
            rest -= (bounds[-1] - first) * each
        found.append(bounds)
    return found


@dataclass
class AttendCall:
    """The words of attention's kernels, and the scratch that they want: for each worker, and for all parts."""

    words: list[int]
    worker_nbytes: int
    parts_nbytes: int


class CpuWeight:
    """A packed matrix. Kernels are compiled when first needed."""

    def __init__(self, packed: Packed):
        self.packed = packed
        self.shape = packed.shape
        self.nbytes = packed.nbytes
        self._plans: dict[tuple[int, int], Plan] = {}

    def plan(self, n: int, threads: int) -> Plan:
        """The plan for n tokens; that for one token is kept, and the last other one."""
        found = self._plans.get((n, threads))
        if found is None:
            found = Plan(self.packed, n, threads)
            for key in [key for key in list(self._plans) if key[0] > 1]:
                self._plans.pop(key, None)
            self._plans[n, threads] = found
        return found


class CpuCache(Positions):
    """Keys and values of one sequence in float16, a pair of arrays a layer (see attention.py for their shapes).

    Room doubles when it is needed, up to n_ctx positions.
    """

    def __init__(self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int):
        if min(n_layers, n_kv_heads, head_dim, n_ctx) < 1:
            raise UsageError(f"a cache of {n_layers} layers, {n_kv_heads} heads of {head_dim}, {n_ctx} positions")
        super().__init__(n_ctx)
        self.positions = 0
        self.n_kv_heads, self.head_dim = n_kv_heads, head_dim
        self.padded_dim = -(-head_dim // (2 * LANES)) * 2 * LANES  # attention takes two vectors at a time
        self.tape: Any = None  # the recorded forward of one token: see tape.py
        # All layers in one array each: large enough for the system's large pages
        self.keys = np.zeros((n_layers, n_kv_heads, 0, head_dim, LANES), np.uint16)
        self.values = np.zeros((n_layers, n_kv_heads, self.padded_dim // (2 * LANES), 0, 2 * LANES), np.uint16)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def reserve(self, stop: int) -> None:
        """Make room for positions below `stop`. Raises UsageError beyond n_ctx."""
        self.check(stop)
        if stop <= self.positions:
            return
        wanted = min(max(stop, 2 * self.positions, FIRST_POSITIONS), self.n_ctx)
        blocks = -(-wanted // (2 * LANES)) * 2  # attention takes two at a time
        filled = self.positions // LANES
        n_layers, heads = self.keys.shape[:2]
        keys = np.zeros((n_layers, heads, blocks, self.head_dim, LANES), np.uint16)
        keys[:, :, :filled] = self.keys
        self.keys = keys
        values = np.zeros((n_layers, heads, self.padded_dim // (2 * LANES), blocks * LANES, 2 * LANES), np.uint16)
        values[:, :, :, : filled * LANES] = self.values
        self.values = values
        self.positions = blocks * LANES


class CpuOps:
    """The Numba backend on `threads` threads (default: the physical cores that this process may use)."""

    name = "cpu"
    most_top = sample.MOST_TOP  # logits that `top` finds at most

    def __init__(self, threads: int | None = None):
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} threads: at least 1 is needed")
        self.threads = threads or default_threads()
        self.team = team(self.threads)
        self.memory = Arena()
        nothing = np.empty((0, 0), np.float32)
        self._last: tuple[Any, Any] = (None, None)  # the logits of the last single token, and what has run
        self._last_rotations: tuple = (None, (0, 0, 0.0), (nothing, nothing))

    # -- weights -----------------------------------------------------------------------------------

    def prepare(
        self,
        types: Iterable[TensorType],
        ends: Iterable[TensorType],
        progress: Callable[[int, int], None] | None = None,
    ) -> prepare.Preparation:
        """Begin to make ready the kernels that a network with matrices of these types needs; see `Ops.prepare`."""
        return prepare.prepare(prepare.of_network(types, ends), progress)

    def weight(self, tensor: Tensor, scale: float = 1.0) -> CpuWeight:
        """Pack a matrix (rows, cols) of any tensor type, times `scale`, read with pread by a few rows at a time."""
        return CpuWeight(pack_fast.pack(tensor, self.team, self.memory, scale))

    def vector(self, tensor: Tensor) -> np.ndarray:
        """A small tensor as float32, flattened."""
        rows = tensor.read_rows(0, tensor.rows)
        return tensor.type.decode(rows).astype(np.float32, copy=False).reshape(-1)

    def cache(self, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int) -> CpuCache:
        """An empty cache."""
        return CpuCache(n_layers, n_kv_heads, head_dim, n_ctx)

    # -- launching: CpuOps runs each call at once, a tape's recorder keeps it (tape.py) -------------------

    def _array(self, *shape: int) -> np.ndarray:
        """An array for a result."""
        return np.empty(shape, np.float32)

    def _launch(self, steps: list[tuple[int, int]], words: list[int], reads: Arrays, writes: Arrays) -> None:
        """Run kernels (address, items), in turn, with the same words. `reads` and `writes` are what they touch."""
        self.team.run(steps, words)

    def _launch_matmul(self, plan: Plan, x: np.ndarray, bias: np.ndarray | None, out: np.ndarray) -> None:
        call = [address(x), len(x), address(out), 0 if bias is None else address(bias)]
        with self.team.lock:
            words = plan.weight_words + call + plan.scratch_at(self.team.scratch(plan.scratch_nbytes)) + plan.tail
            self.team.run([step for step in (plan.prep, plan.kernel) if step], words)

    def _launch_attend(self, call: AttendCall, steps: list[tuple[int, int]], reads: Arrays, writes: Arrays) -> None:
        with self.team.lock:
            call.words[attention.SCRATCH_WORD] = self.team.scratch(
                call.worker_nbytes * self.threads + call.parts_nbytes
            )
            call.words[attention.PARTS_WORD] = call.words[attention.SCRATCH_WORD] + call.worker_nbytes * self.threads
            self.team.run(steps, call.words)

    def forward(
        self, network: Callable, config: Any, weights: Any, ids: np.ndarray, cache: CpuCache, first: int = 0
    ) -> Any:
        """network(config, weights, self, ids, cache, first); one token's calls are recorded once, then replayed."""
        if len(ids) != 1:
            return network(config, weights, self, ids, cache, first)
        tape, start = cache.tape, cache.length
        if (
            tape is None
            or start >= min(cache.positions, cache.n_ctx)
            or not tape.fits(self, network, config, weights, cache)
        ):
            from .tape import record

            tape = record(self, network, config, weights, cache)
        logits = tape.run(ids[0], start)
        self._last = logits, tape
        cache.length = start + 1
        return logits

    # -- matrices ----------------------------------------------------------------------------------

    def embed(self, weight: CpuWeight, ids: np.ndarray) -> np.ndarray:
        """Rows `ids` (n,) of the weight, decoded exactly: (n, cols). Raises UsageError for an id out of range."""
        ids = np.ascontiguousarray(ids, dtype=np.int64).reshape(-1)
        rows, cols = weight.shape
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise UsageError(f"token ids {int(ids.min())}…{int(ids.max())} are outside 0…{rows - 1}")
        out = self._array(len(ids), cols)
        packed, layout = weight.packed, weight.packed.layout
        levels = address(packed.levels) if packed.levels.size else 0
        number = NUMBERS[layout.values if layout.is_plain else layout.number]
        words = [address(ids), len(ids), address(out), cols, packed.padded_cols, layout.block, layout.group]
        words += [layout.bits, SCALES[layout.scale], layout.minimum, levels, number, 16, layout.offset]
        words += [layout.joined]
        kernel = elementwise.embed_plain if layout.is_plain else elementwise.embed_codes
        self._launch([(kernel.address, -(-len(ids) // 16))], weight_words(packed) + words, (ids,), (out,))
        return out

    def matmul(self, weight: CpuWeight, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x (n, cols) @ weight.T (+ bias (rows,)): (n, rows)."""
        x = values(x)
        rows, cols = weight.shape
        if x.ndim != 2 or x.shape[1] != cols:
            raise UsageError(f"inputs {x.shape} do not fit a weight of {weight.shape}")
        n = len(x)
        out = self._array(n, rows)
        if n == 0:
            return out
        padded = weight.packed.padded_cols
        if padded != cols:
            wide = self._array(n, padded)
            words = [address(x), address(wide), n, cols, padded]
            self._launch([(elementwise.widen.address, 1)], words, (x,), (wide,))
            x = wide
        if bias is not None:
            if bias.shape != (rows,):
                raise UsageError(f"a bias {bias.shape} does not fit a weight of {weight.shape}")
            bias = values(bias)
            if rows % LANES:
                bias = np.pad(bias, (0, -rows % LANES))
        self._launch_matmul(weight.plan(n, self.threads), x, bias, out)
        return out

    # -- the rest ----------------------------------------------------------------------------------

    def rmsnorm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension."""
        x, weight = values(x), values(weight)
        dim = x.shape[-1]
        if weight.shape != (dim,):
            raise UsageError(f"a norm of {weight.shape} does not fit {x.shape}")
        out = self._array(*x.shape)
        rows = x.size // dim
        per_item = max(1, ITEM_VALUES // dim)
        words = [address(x), address(weight), address(out), rows, dim, float_bits(eps), per_item]
        self._launch([(elementwise.rmsnorm.address, -(-rows // per_item))], words, (x, weight), (out,))
        return out

    def rope(self, x: np.ndarray, start: int, freqs: np.ndarray, interleaved: bool, scale: float = 1.0) -> np.ndarray:
        """Rotate pairs of x (n, heads, head_dim) in place; angles are computed in float64, once a position."""
        x = values(x)
        n, heads, head_dim = x.shape
        pairs = len(freqs)
        if 2 * pairs > head_dim:
            raise UsageError(f"{pairs} pairs do not fit a head of {head_dim}")
        cos, sin = self._rotations(start, n, freqs, scale)
        per_item = max(1, ITEM_VALUES // (heads * head_dim))
        words = [address(x), address(cos), address(sin), n, heads, head_dim, pairs, int(interleaved), per_item]
        self._launch([(elementwise.rope.address, -(-n // per_item))], words, (x, cos, sin), (x,))
        return x

    def _rotations(self, start: int, n: int, freqs: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines (n, pairs), float32. The last are kept: every layer asks for the same twice."""
        last = self._last_rotations
        if last[0] is freqs and last[1] == (start, n, scale):
            return last[2]
        angle = np.arange(start, start + n)[:, None] * np.asarray(freqs, dtype=np.float64)
        found = ((scale * np.cos(angle)).astype(np.float32), (scale * np.sin(angle)).astype(np.float32))
        self._last_rotations = (freqs, (start, n, scale), found)
        return found

    def attend(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: CpuCache, layer: int, start: int, scale: float
    ) -> np.ndarray:
        """Store k and v at `start`, then causal attention of q over positions 0 … own; see `Ops.attend`."""
        q, k, v = values(q), values(k), values(v)
        n, n_heads, head_dim = q.shape
        heads = cache.n_kv_heads
        if k.shape != (n, heads, head_dim) or v.shape != k.shape or head_dim != cache.head_dim or n_heads % heads:
            raise UsageError(f"queries {q.shape}, keys {k.shape}, values {v.shape} and the cache do not fit")
        if start < 0:
            raise UsageError(f"position {start} is below 0")
        cache.reserve(start + n)
        out = self._array(n, n_heads * head_dim)
        group = n_heads // heads
        queries = n * group
        tile = attention.QUERIES if queries > 4 else 4
        tiles, splits = -(-queries // tile), -(-cache.positions // attention.SPLIT)
        per_item = 32 if queries * heads > 64 * self.threads else tile
        words = [address(q), address(k), address(v), address(cache.keys[layer]), address(cache.values[layer])]
        words += [address(out), n, n_heads, heads, head_dim, cache.padded_dim, cache.positions, start]
        words += [float_bits(scale), 0, attention.scratch_nbytes(tile, head_dim, cache.padded_dim), 0, splits]
        call = AttendCall(words, words[attention.SCRATCH_WORD + 1], 0)
        if n == 1:
            call.parts_nbytes = heads * tiles * splits * attention.part_nbytes(tile, cache.padded_dim)
            per_join = heads if splits <= 4 else 1
            words += [tiles, tile, per_join, 0, 0, 0, 0]
            steps = [
                (attention.attend_split(tile), heads * splits),
                (attention.join(tile), -(-heads // per_join)),
            ]
        else:
            query_items, tokens = -(-queries // per_item), max(1, 4096 // (heads * head_dim))
            words += [query_items, per_item, tokens]
            steps = [(attention.append.address, -(-n // tokens)), (attention.attend(tile), heads * query_items)]
        self._launch_attend(call, steps, (q, k, v), (out,))
        return out

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """silu(gate) * up, elementwise, into `gate`."""
        return self._elementwise(elementwise.swiglu.address, gate, up)

    def relu2(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """max(gate, 0)² * up, elementwise, into `gate`."""
        return self._elementwise(elementwise.relu2.address, gate, up)

    def add(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """x + y, elementwise, into `x`."""
        return self._elementwise(elementwise.add.address, x, y)

    def _elementwise(self, kernel: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x, y = values(x), values(y)
        if x.shape != y.shape:
            raise UsageError(f"shapes {x.shape} and {y.shape} differ")
        at = address(x)
        words = [at, address(y), at, x.size, ITEM_VALUES]
        self._launch([(kernel, -(-x.size // ITEM_VALUES))], words, (x, y), (x,))
        return x

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        """The values themselves."""
        return np.asarray(x, dtype=np.float32)

    def top(self, logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest of logits (1, n_vocab): ids int64 (k,) and values float32 (k,), best first, of equal ones the
        lower id first. NaN counts as largest. Raises UsageError for a k out of 1 … `most_top`."""
        last, tape = self._last
        if k == 1 and last is logits:
            index, value = tape.best()
            return np.array([index]), np.array([value], np.float32)
        logits = values(logits)
        n = logits.shape[-1]
        if not 1 <= k <= min(self.most_top, n) or logits.size != n:
            raise UsageError(f"the {k} largest of {logits.shape} logits cannot be had")
        ids, found, room = np.empty(k, np.int64), np.empty(k, np.float32), np.empty(sample.groups(n), np.float32)
        words = [address(logits), n, k, address(ids), address(found), address(room)]
        self._launch([(sample.top.address, 1)], words, (logits,), (ids, found))
        return ids, found

    def largest(self, logits: np.ndarray) -> float:
        """The largest of the logits (n, n_vocab); NaN where there is one."""
        last, tape = self._last
        return tape.best()[1] if last is logits else float(np.max(logits))


def values(x: np.ndarray) -> np.ndarray:
    """Contiguous float32, x itself where it is that already."""
    return np.ascontiguousarray(x, dtype=np.float32)
