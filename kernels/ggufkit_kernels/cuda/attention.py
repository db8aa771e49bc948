"""Keys and values on the device, and the launches of attention over them: see attention.cu, flash.cu and prompt.cu.

As in weights.py nothing is launched here: functions return the arguments of `Device.launch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.errors import UnsupportedError, UsageError

from ..ops import Positions
from .device import Array, Device
from .loader import Module, module
from .weights import Inputs, Launch

MOST_DIM, MOST_GROUP = 256, 16  # what attention.cu can be compiled for
THREADS, TILE = 256, 128  # as in attention.cu
BLOCKS = 2  # of one token's attention, on a multiprocessor
FIRST_POSITIONS = 512  # of a new cache
SCRATCH_NBYTES = 128 << 20  # of a prompt's scores and weights at a time, about
SPANS_NBYTES = 32 << 20  # at most, of what the spans of positions of flash.cu leave
SPAN_TILES = 4  # of positions, that a span has at least
PROMPT = module("prompt.cu")


def attend_module(head_dim: int, group: int) -> Module:
    """The module of one token's attention."""
    return module("attention.cu", HEAD_DIM=head_dim, GROUP=group)


@dataclass(frozen=True)
class Tiles:
    """How flash.cu is compiled: warps of a block, tiles of 16 rows of a warp, positions of a tile."""

    warps: int
    m_tiles: int
    keys: int

    @property
    def rows(self) -> int:
        return 16 * self.m_tiles * self.warps


# Up to a head_dim; what decided: see flash.cu. Turing has registers for fewer rows.
TILES = {64: Tiles(4, 2, 64), 128: Tiles(4, 2, 32), 192: Tiles(8, 1, 32), 256: Tiles(8, 1, 16)}
TURING_TILES = {64: Tiles(4, 2, 64), 96: Tiles(4, 2, 32), 192: Tiles(8, 1, 32), 256: Tiles(8, 1, 16)}


def tiles(head_dim: int, arch: int = 90) -> Tiles | None:
    """The shape of flash.cu for heads of this size, None where there is none."""
    shapes = TILES if arch >= 80 else TURING_TILES
    return None if head_dim % 16 else next((shape for most, shape in shapes.items() if head_dim <= most), None)


def flash_module(head_dim: int, shape: Tiles) -> Module:
    """The module of a prompt's attention."""
    return module("flash.cu", HEAD_DIM=head_dim, WARPS=shape.warps, M_TILES=shape.m_tiles, KEYS=shape.keys)


def spans(n_sm: int, heads: int, rows: int, stop: int, head_dim: int, shape: Tiles) -> int:
    """Spans of positions that flash.cu's blocks take, for `rows` queries a key head: more than one where there would
    not be more blocks than multiprocessors."""
    blocks = heads * -(-rows // shape.rows)
    most = -(-stop // shape.keys) // SPAN_TILES, SPANS_NBYTES // (4 * heads * rows * (head_dim + 2))
    return max(1, min(2 * n_sm // blocks, *most))


class CudaCache(Positions):
    """Keys and values of one sequence, float16 (n_layers, n_kv_heads, positions, head_dim) each, zeros at first.

    Room doubles when it is needed, up to n_ctx positions.
    """

    def __init__(self, device: Device, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx: int):
        if min(n_layers, n_kv_heads, head_dim, n_ctx) < 1:
            raise UsageError(f"a cache of {n_layers} layers, {n_kv_heads} heads of {head_dim}, {n_ctx} positions")
        if head_dim > MOST_DIM or head_dim % 2:
            raise UnsupportedError(f"heads of {head_dim}: attention on CUDA takes even sizes up to {MOST_DIM}")
        super().__init__(n_ctx)
        self.device, self.positions = device, 0
        self.n_layers, self.n_kv_heads, self.head_dim = n_layers, n_kv_heads, head_dim
        self.trace: Any = None  # the recorded forward of one token: see trace.py
        self.keys: Array = None
        self.values: Array = None

    @property
    def nbytes(self) -> int:
        return 0 if self.positions == 0 else self.keys.nbytes + self.values.nbytes

    def reserve(self, stop: int) -> None:
        """Make room for positions below `stop`. Raises UsageError beyond n_ctx, DeviceMemoryError without memory."""
        self.check(stop)
        if stop <= self.positions:
            return
        wanted = min(max(stop, 2 * self.positions, FIRST_POSITIONS), self.n_ctx)
        positions = -(-wanted // 8) * 8  # rows of a prompt's scores are whole for the tensor cores
        self.trace = None  # which holds the old arrays
        self.keys, self.values = self._grown(self.keys, positions), self._grown(self.values, positions)
        self.positions = positions

    def _grown(self, old: Array | None, positions: int) -> Array:
        new = self.device.zeros((self.n_layers, self.n_kv_heads, positions, self.head_dim), np.float16)
        if old is not None and self.length:
            for layer in range(self.n_layers):
                for head in range(self.n_kv_heads):
                    self.device.copy(new[layer, head, : self.length], old[layer, head, : self.length])
        return new


@dataclass(frozen=True)
class Rotation:
    """Rotary angles: the table float32 (positions, 2 pairs) on the device, or none."""

    table: Array | None = None
    pairs: int = 0
    interleaved: bool = False

    @property
    def words(self) -> tuple[int, int]:
        return self.pairs, int(self.interleaved)


class Parts:
    """How one token's attention is cut up, for a group of queries that share a key head, and what its blocks leave for
    the last of them. It serves one launch after another."""

    def __init__(self, device: Device, cache: CudaCache, group: int):
        self.group = next(size for size in range(MOST_GROUP, 0, -1) if group % size == 0)  # of a block
        self.shared = group // self.group  # blocks that read the same key head
        self.heads = cache.n_kv_heads * self.shared
        # Spans of positions. More than the cache holds tiles make no difference to who does what, so results do not
        # depend on the cache's room.
        self.splits = min(max(1, BLOCKS * device.n_sm // self.heads), TILE, -(-cache.positions // TILE))
        self.whole_chunks = self.group * cache.head_dim % 32 == 0  # of int8 inputs, in a block's results
        self.values = device.empty((self.heads, self.splits, self.group * (cache.head_dim + 2)), np.float32)
        self.tickets = device.zeros((self.heads,), np.int32)


def attend(q: Array, k: Array, v: Array, cache: CudaCache, layer: int, position: Array, parts: Parts, out: Array | None,
           scale: float, rotation: Rotation, norms: tuple[Array, Array, float] | None = None,
           to: Inputs | None = None) -> Launch:  # fmt: skip
    """One token: q and k normed, where `norms` (q's, k's, eps) says so, and rotated, k and v stored, attention to out
    and, where `parts.whole_chunks`, as int8 to `to`.

    q (1, n_heads, head_dim), k and v (1, n_kv_heads, head_dim); position int32 (1,); out (1, n_heads * head_dim).
    """
    assert to is None or parts.whole_chunks
    kernel = attend_module(cache.head_dim, parts.group).kernel("attend")
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    return (
        kernel, (parts.heads, parts.splits), THREADS, q, k, v, q_norm, k_norm, rotation.table, position,
        cache.keys[layer], cache.values[layer], parts.values, parts.tickets, out,
        *((to.q, to.a) if to else (None, None)), cache.positions, parts.shared, *rotation.words, float(eps),
        float(scale),
    )  # fmt: skip


def rope_append(q: Array | None, k: Array, v: Array, cache: CudaCache, layer: int, position: Array, n_heads: int,
                rotation: Rotation) -> Launch:  # fmt: skip
    """n tokens: q rotated in place (where it is given), k and v stored; positions from `position` on."""
    heads, dim = cache.n_kv_heads, cache.head_dim
    grid = (k.shape[0], (0 if q is None else n_heads) + 2 * heads)
    return (
        PROMPT.kernel("rope_append"), grid, 64, q, k, v, rotation.table, position, cache.keys[layer],
        cache.values[layer], n_heads, heads, dim, *rotation.words, cache.positions,
    )  # fmt: skip


def prompt(device: Device, scratch: Any, q: Array, cache: CudaCache, layer: int, position: Array, start: int,
           scale: float, out: Array, fused: bool = True) -> None:  # fmt: skip
    """Attention of the queries q (n, n_heads, head_dim) at start …, whose keys are stored already, to out.

    `scratch(name, shape, dtype)` gives memory. `fused`: by flash.cu, where the size of a head has a kernel.
    """
    shape = tiles(cache.head_dim, device.arch) if fused else None
    if shape is None:
        _apart(device, scratch, q, cache, layer, position, start, scale, out)
        return
    n, n_heads, dim = q.shape
    heads = cache.n_kv_heads
    group = n_heads // heads
    rows, kernels = n * group, flash_module(dim, shape)
    count = spans(device.n_sm, heads, rows, start + n, dim, shape)
    parts = scratch("spans", (count, heads, rows, dim + 2), np.float32) if count > 1 else None
    grid = (heads, -(-rows // shape.rows), count)
    device.launch(kernels.kernel("flash"), grid, 32 * shape.warps, q, cache.keys[layer], cache.values[layer], position,
                  out, parts, n, group, cache.positions, float(scale))  # fmt: skip
    if parts is not None:
        device.launch(kernels.kernel("join_spans"), (-(-rows // 4), heads), 128, parts, out, count, rows, group)


def prompt_nbytes(n: int, n_heads: int, head_dim: int) -> int:
    """What `prompt` takes of scratch for n tokens, at most."""
    return SPANS_NBYTES if tiles(head_dim) else 10 * n * n_heads * head_dim + SCRATCH_NBYTES


def _apart(device: Device, scratch: Any, q: Array, cache: CudaCache, layer: int, position: Array, start: int,
           scale: float, out: Array) -> None:  # fmt: skip
    """The same by products with the scores in memory, by tiles of tokens, so that these are bounded."""
    n, n_heads, dim = q.shape
    heads = cache.n_kv_heads
    group = n_heads // heads
    width = min(-(-(start + n) // 8) * 8, cache.positions)
    tile = min(n, max(1, SCRATCH_NBYTES // (6 * n_heads * width)))
    for first in range(0, n, tile):
        count = min(tile, n - first)
        rows, width = count * group, min(-(-(start + first + count) // 8) * 8, cache.positions)
        queries = scratch("queries", (heads, rows, dim), np.float16)
        scores = scratch("scores", (heads, rows, width), np.float32)
        weights = scratch("weights", (heads, rows, width), np.float16)
        sums = scratch("sums", (heads, rows), np.float32)
        result = scratch("result", (heads, rows, dim), np.float32)
        device.launch(PROMPT.kernel("gather"), (count, heads), 128, q[first : first + count], queries, group, dim,
                      float(scale))  # fmt: skip
        device.gemm(queries, cache.keys[layer][:, :width], scores)
        device.launch(PROMPT.kernel("softmax"), (rows, heads), 256, scores, weights, sums, position, first, group,
                      width)  # fmt: skip
        device.gemm(weights, cache.values[layer][:, :width], result, transposed=False)
        device.launch(PROMPT.kernel("scatter"), (count, heads), 128, result, sums, out[first : first + count], group,
                      dim)  # fmt: skip
