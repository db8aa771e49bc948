"""A packed matrix on the device, and the launches that read it: products, unpacking to float16, embedding.

The device holds the bytes that the CPU's packer made (cpu/pack.py); a layout's fields become the macros that its
kernels are compiled with. Nothing is launched here: functions return the arguments of `Device.launch`, so that a
caller may launch them, or record them into a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from ggufkit_formats.blocks import TYPES, TensorType

from ..cpu.pack import PLAIN, Layout, Packed, canonical, layout_of
from ..cpu.simd import LANES, QUAD
from .device import Array, Device
from .loader import Kernel, Module, module

Launch = tuple[Any, ...]  # the arguments of `Device.launch`

TILES = (1, 2, 4, 8)  # tokens that a matvec may take at once
MOST_TOKENS = TILES[-1]
MANY_STRIPS = 512  # from which smaller blocks have enough warps together
THREADS = 256  # of blocks that share a row among them
UNPACK_TILES = 4  # tiles of a block of `unpack`
PLAIN_TILE = 256  # columns, as in plain_unpack.cu
SIGNS = {"": "S_NONE", "i1": "S_SIGNED", "u1": "S_UNSIGNED"}


# -- modules --------------------------------------------------------------------------------------------


def layout_defines(layout: Layout, lanes: int = LANES) -> dict[str, Any]:
    """The macros of layout.cuh, or of plain.cuh."""
    if layout.is_plain:
        return {"NUMBER": f"N_{layout.values.upper()}", "LANES": lanes}
    return {
        "VALUES": f"V_{layout.values.upper()}",
        "BITS": layout.bits,
        "BLOCK": layout.block,
        "GROUP": layout.group,
        "OFFSET": layout.offset,
        "SCALE": SIGNS[layout.scale],
        "MINIMUM": layout.minimum,
        "JOINED": layout.joined,
        "NUMBER": f"N_{layout.number.upper()}",
        "LANES": lanes,
    }


def most_warps(layout: Layout) -> int:
    """Warps of a block of a matvec, so many that two blocks find registers on a multiprocessor: 64, 85 or 128 a thread.
    What they are taken by is a codebook, or many vectors of codes."""
    if layout.values == "table16":
        return 8
    return 12 if layout.bits > 4 or layout.values == "table" else 16


def stages_of(layout: Layout, tokens: int) -> int:
    """Chunks of a thread that are on their way at once."""
    few = layout.is_plain or (layout.bits < 3 and layout.group > 16)
    return 2 if few and tokens <= 2 else 1


def matvec_module(layout: Layout, tokens: int, lanes: int = LANES, persistent: bool = False) -> Module:
    """The module of products with a tile of `tokens` tokens; `persistent`: of blocks that take several strips."""
    file = "plain.cu" if layout.is_plain else "matvec.cu"
    macros = layout_defines(layout, lanes) | ({"PERSISTENT": 1} if persistent else {})
    return module(file, TOKENS=tokens, STAGES=stages_of(layout, tokens), MOST_WARPS=most_warps(layout), **macros)


def fused_module(layout: Layout, lanes: int = LANES) -> Module:
    """The module of one token's products with what follows them."""
    macros = layout_defines(layout, lanes)
    return module("fused.cu", TOKENS=1, STAGES=stages_of(layout, 1), MOST_WARPS=most_warps(layout), **macros)


def unpack_module(layout: Layout, lanes: int = LANES) -> Module:
    """The module of unpacking and embedding."""
    return module("plain_unpack.cu" if layout.is_plain else "unpack.cu", **layout_defines(layout, lanes))


def layout_of_type(type: TensorType) -> Layout:
    """The layout of most tensors of a type, told from a block whose floats are 0.1 (rounded to what they are)."""
    if type.name in PLAIN:
        return Layout(PLAIN[type.name])
    if not type.is_quantized:
        return Layout("f32")
    block = np.zeros(1, type.fields)
    for name in type.fields.names or ():
        if block[name].dtype.kind == "f":
            block[name] = 0.1
    quants = type.quants(block)
    quants = None if quants is None else canonical(quants)
    layout = None if quants is None else layout_of(quants)
    return layout or Layout("f32")


def modules(types: Iterable[TensorType] | None = None, lanes: int = LANES) -> Iterator[Module]:
    """All modules that matrices of these types (None: all that are registered) and their inputs need, each once."""
    types = TYPES.values() if types is None else types
    yield INPUTS
    yield PREFETCH
    for layout in dict.fromkeys(map(layout_of_type, types)):
        yield unpack_module(layout, lanes)
        for tokens in TILES:
            yield matvec_module(layout, tokens, lanes)
        if not layout.is_plain:
            yield fused_module(layout, lanes)


# -- inputs ---------------------------------------------------------------------------------------------

INPUTS, PREFETCH = module("inputs.cu"), module("prefetch.cu")


def padded_cols(cols: int) -> int:
    """Columns of int8 inputs."""
    return -(-cols // 32) * 32


class Inputs:
    """Room for n inputs of `cols` numbers as int8: `q` (n, padded), and `a`, two words for each 32 of them (inputs.cu).

    `normed`: of one token, before its norm, whose factor is still to be told from `squares`, sums of each 32 squares.
    """

    def __init__(self, device: Device, n: int, cols: int, normed: bool = False):
        assert n == 1 or not normed
        self.n, self.cols, self.padded = n, cols, padded_cols(cols)
        self.q = device.empty((n, self.padded), np.int8)
        self.a = device.empty((n, self.padded // 32, 2), np.float32)
        self.squares = device.empty((self.padded // 32,), np.float32) if normed else None
        self.eps = 0.0  # of that norm


def _share(n: int, padded: int) -> tuple[int, int]:
    return -(-padded // (4 * THREADS)), n


def quantize(x: Array, to: Inputs, n: int) -> Launch:
    """x float32 (n, cols) into the first n rows of `to`."""
    return INPUTS.kernel("quantize"), _share(n, to.padded), THREADS, x, to.q, to.a, to.cols, to.padded


def norm_quantize(x: Array, weight: Array, eps: float, to: Inputs, n: int, y: Array | None = None) -> Launch:
    """rmsnorm of x (n, cols) into `to`, and into `y` float32 (n, cols) where one is given."""
    threads = min(1024, -(-to.padded // 128) * 32)
    args = (x, weight, y, to.q, to.a, to.cols, to.padded, float(eps))
    return INPUTS.kernel("norm_quantize"), (n,), threads, *args


def gate_quantize(gate: Array, up: Array, squared: bool, to: Inputs, n: int, y: Array | None = None) -> Launch:
    """silu(gate) * up, or max(gate, 0)² * up where `squared`, of (n, cols) into `to`, and into `y` if one is given."""
    args = (gate, up, y, to.q, to.a, to.cols, to.padded, int(squared))
    return INPUTS.kernel("gate_quantize"), _share(n, to.padded), THREADS, *args


# -- a matrix -------------------------------------------------------------------------------------------


def warps_of(steps: int, stages: int, most: int) -> int:
    """Warps of a block whose rows take `steps` steps of a warp: as many as have all of it on their way at once, else a
    number near `most` that shares it evenly."""
    if steps <= most * stages:
        return -(-steps // stages)
    return min(range(most, most // 2, -1), key=lambda warps: -(-steps // warps) * warps)


def tile_of(n: int) -> int:
    """Tokens of a tile for n of them."""
    return next((tile for tile in TILES if n <= tile), MOST_TOKENS)


class CudaWeight:
    """A matrix (rows, cols) in device memory."""

    blocks = 0  # that stay and go from strip to strip in `matvec`; 0: a block a strip. For measurements

    def __init__(self, device: Device, packed: Packed):
        self.shape, self.layout, self.nbytes = packed.shape, packed.layout, packed.nbytes
        self.factor = float(packed.table_step)
        self.codebook = packed.table.tobytes()

        def there(array: np.ndarray) -> Array | None:
            return device.upload(array) if array.size else None

        self.codes = device.upload(packed.codes)
        self.d, self.scale, self.dmin, self.minimum = map(there, (packed.d, packed.scale, packed.dmin, packed.minimum))
        self.levels, self.table = there(packed.levels), there(packed.table)
        self.strips, self.padded = packed.strips, packed.padded_cols
        self.parts = (self.codes, self.d, self.scale, self.dmin, self.minimum)

    @property
    def takes_bytes(self) -> bool:
        """Whether it is multiplied with `Inputs`; with float32 else."""
        return not self.layout.is_plain

    @property
    def unpacked_dtype(self) -> type[np.float16 | np.float32]:
        """What `unpack` makes: halves, but of F32 weights, which those would round."""
        return np.float32 if self.layout.values == "f32" else np.float16

    @property
    def warps(self) -> int:
        """Of a block of a matvec: the same for all numbers of tokens, so that sums have one order."""
        most = most_warps(self.layout)
        most = most if self.strips <= MANY_STRIPS else min(most, 8)
        return warps_of(self.steps, stages_of(self.layout, 1), most)

    @property
    def steps(self) -> int:
        """Of a warp, for all columns of a strip."""
        if self.layout.is_plain:
            side_by_side = 16 // (4 if self.layout.values == "f32" else 2)
            return -(-self.padded // (4 * 32 * side_by_side // LANES))
        return -(-self.padded // (32 * 32 * 4 // LANES))

    def matvec(
        self, x: Array | Inputs, out: Array, n: int, bias: Array | None = None, add: Array | None = None
    ) -> Launch:
        """out (n, rows) = x @ weight.T (+ bias (rows,)) (+ add (n, rows), which may be `out`).

        x is `Inputs` where `takes_bytes`, else float32 (n, cols); the order of sums does not depend on n.
        """
        rows, cols = self.shape
        tokens = tile_of(n)
        stays = 0 < self.blocks < self.strips and not self.layout.is_plain
        grid, threads = (self.blocks if stays else self.strips, -(-n // tokens)), 32 * self.warps
        compiled = matvec_module(self.layout, tokens, persistent=stays)
        if self.layout.is_plain:
            return compiled.kernel("plain_matvec"), grid, threads, self.codes, x, bias, add, out, rows, cols, n
        assert isinstance(x, Inputs) and x.cols == cols and n <= x.n
        assert n == 1 or x.squares is None
        args = (x.q, x.a, x.squares, bias, add, out, rows, cols, n, self.factor, x.eps)
        return compiled.kernel("matvec"), grid, threads, *self.parts, self.table, *args

    def matvec_norm(
        self,
        x: Inputs,
        out: Array,
        weight: Array,
        eps: float,
        to: Inputs,
        bias: Array | None = None,
        add: Array | None = None,
    ) -> Launch:
        """`matvec` of one token, and what rmsnorm(out, weight, eps) makes of it as int8: `to`, which is `normed`."""
        rows, cols = self.shape
        assert to.squares is not None and (x.cols, to.cols) == (cols, rows)
        to.eps = float(eps)
        most = 2 * most_warps(self.layout) * LANES // 32
        warps = warps_of(self.steps, stages_of(self.layout, 1), most)
        args = (x.q, x.a, x.squares, bias, add, weight, out, to.q, to.a, to.squares)
        args += (rows, cols, warps, self.factor, x.eps)
        kernel = fused_module(self.layout).kernel("matvec_norm")
        return kernel, (to.padded // 32,), 32 * warps * (32 // LANES), *self.parts, self.table, *args

    def matvec_gated(self, other: CudaWeight, x: Inputs, to: Inputs, squared: bool, out: Array | None = None) -> Launch:
        """Of one token, silu(gate) * up, or max(gate, 0)² * up where `squared`, as int8, and as `out` float32
        (1, rows) where one is given: this matrix makes the gate, `other`, of the same shape and layout, the factor.
        """
        rows, cols = self.shape
        assert self.goes_with(other) and (x.cols, to.cols) == (cols, rows)
        most = most_warps(self.layout) * LANES // 64
        warps = warps_of(self.steps, stages_of(self.layout, 1), most)
        args = (x.q, x.a, x.squares, out, to.q, to.a, rows, cols, warps, self.factor, other.factor, x.eps, int(squared))
        kernel = fused_module(self.layout).kernel("matvec_gated")
        grid, threads = (to.padded // 32,), 64 * warps * (32 // LANES)
        return kernel, grid, threads, *self.parts, self.table, *other.parts, *args

    def alike(self, other: CudaWeight) -> bool:
        """Whether what codes mean is the same, and as many columns: `matvecs` takes such matrices."""
        ours = (self.shape[1], self.layout, self.codebook)
        return self.takes_bytes and ours == (other.shape[1], other.layout, other.codebook)

    def goes_with(self, other: CudaWeight) -> bool:
        """Whether `matvec_gated` takes the two: alike, and of one shape."""
        return self.shape == other.shape and self.alike(other)

    def prefetch(self, nbytes: int, n_sm: int) -> Launch:
        """Ask the second-level cache for the first nbytes of the codes; for a launch beside what comes before."""
        lines = -(-min(nbytes, self.codes.nbytes) // 128)
        return PREFETCH.kernel("prefetch"), (n_sm,), 128, self.codes, lines

    def unpack(self, first: int, last: int, out: Array) -> Launch:
        """Rows first … last - 1 as `unpacked_dtype`, row-major: out (at least last - first, cols). `first` is a
        multiple of the strip's rows; `last` is too, or the number of all rows. Finite weights beyond float16's 65,504
        become that."""
        rows, cols = self.shape
        assert first % LANES == 0 and first < last <= rows and (last % LANES == 0 or last == rows)
        strips = -(-(last - first) // LANES)
        compiled = unpack_module(self.layout)
        if self.layout.is_plain:
            grid = (-(-cols // PLAIN_TILE), strips)
            return compiled.kernel("plain_unpack"), grid, 128, self.codes, out, first, rows, cols
        tiles = -(-self.padded // (32 * 32 // (LANES // 4)))
        args = (out, first, rows, cols, self.padded // 32)
        grid = (-(-tiles // UNPACK_TILES), strips)
        return compiled.kernel("unpack"), grid, 32 * UNPACK_TILES, *self.parts, self.levels, *args

    def embed(self, ids: Array, out: Array, n: int) -> Launch:
        """Rows ids (n,), int32 on the device, each less than `rows`, as float32: out (n, cols), exactly."""
        cols = self.shape[1]
        compiled = unpack_module(self.layout)
        if self.layout.is_plain:
            return compiled.kernel("plain_embed"), (-(-cols // THREADS), n), THREADS, self.codes, ids, out, cols
        args = (ids, out, cols, self.padded // 32)
        grid = (-(-cols // (4 * THREADS)), n)
        return compiled.kernel("embed"), grid, THREADS, *self.parts, self.levels, *args

    def kernels(self, n: int) -> list[Kernel]:
        """What products with n tokens, unpacking and embedding need."""
        name = "plain_" if self.layout.is_plain else ""
        unpack = unpack_module(self.layout)
        matvec = matvec_module(self.layout, tile_of(n)).kernel(name + "matvec")
        return [matvec, unpack.kernel(name + "unpack"), unpack.kernel(name + "embed")]


def matvecs(several: Sequence[CudaWeight], x: Inputs, outs: Sequence[Array], biases: Sequence[Array | None]) -> Launch:
    """`CudaWeight.matvec` of one token for two or three matrices that are `alike`, in one launch."""
    first, none = several[0], 3 - len(several)
    assert len(several) in (2, 3) and all(map(first.alike, several)) and x.cols == first.shape[1]
    parts = [part for weight in several for part in weight.parts] + [None] * 5 * none
    rows = [weight.shape[0] for weight in several] + [0] * none
    factors = [weight.factor for weight in several] + [0.0] * none
    arrays = (*biases, *[None] * none, *outs, *[None] * none)
    kernel, grid = fused_module(first.layout).kernel("matvecs"), (sum(weight.strips for weight in several),)
    threads = 32 * max(weight.warps for weight in several)
    return kernel, grid, threads, *parts, first.table, x.q, x.a, x.squares, *arrays, *rows, x.cols, *factors, x.eps


assert QUAD == 4 * LANES
