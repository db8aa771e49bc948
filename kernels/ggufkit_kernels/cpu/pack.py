"""The compute layout of a matrix: what the kernels read, made once at load from a type's `Quants`.

LANES rows stand side by side in a *strip*, so that a vector holds the same inputs of LANES rows and no sum across
lanes is needed. Codes are cut into bit planes of 4, 2 and 1 bits (or whole bytes); for each 32 inputs of a strip
(a *chunk*) the planes follow one another:

    quad q, q = 0…7:    inputs 4q…4q+3 of LANES rows, a byte a code, row by row: 4 LANES bytes
    plane of 4 bits:    4 vectors; vector v holds quad v in bits 0–3, quad v + 4 in bits 4–7
    plane of 2 bits:    2 vectors; vector v holds quad v + 2j in bits 2j, 2j + 1
    plane of 1 bit:     1 vector; quad q in bit q
    8 bits:             8 vectors of signed bytes, code - 128

    codes    uint8  (strips, chunks, bits * 4 * LANES)
    d, dmin  float16 bits, float32, or d alone as a float of 8 bits (see Quants.d_format) (strips, blocks, LANES)
    scale, minimum   int8 or uint8 (strips, groups, LANES)

Scales and minima of 4 bits share a byte of `scale` (the minimum above); of those of 6 bits, `scale` has the low four
bits likewise, and `minimum` (strips, groups / 2, LANES) the high two: scale, minimum of an even group, then of an odd.

Plain numbers are strips of columns: (strips, cols, LANES) of float32, float16 bits or bfloat16 bits.
A layout is a row of data; a tensor type that no line here names runs too, if its `quants` has groups of 16 or of
multiples of 16. What has not (or no quants at all) is held as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from ggufkit_formats.blocks import Quants
from ggufkit_formats.errors import UsageError
from ggufkit_formats.tensor import Tensor

from .simd import BIAS, FAMILY, LANES, QUAD, planes

SLAB_NBYTES = 8 << 20  # float32 bytes of the rows that are packed at a time
PLAIN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}  # types whose bytes are kept as they are
NUMBERS = {"f32": np.dtype("<f4"), "f16": np.dtype("<u2"), "bf16": np.dtype("<u2")}
D_NUMBERS = {"f32": np.dtype("<f4"), "f16": np.dtype("<u2"), "e8m0": np.dtype("u1"), "e4m3": np.dtype("u1")}
TABLE_STEPS = 127 * 256  # a float codebook's largest level, as a 16-bit number


@dataclass(frozen=True)
class Layout:
    """How a matrix is packed: all that a kernel is compiled for, and nothing else."""

    values: str  # "codes" (unsigned, below 8 bits), "bytes", "table" (int8), "table16", "f32", "f16", "bf16"
    bits: int = 0
    block: int = 32  # weights that share d: a multiple of 32, or 16
    group: int = 32  # weights that share a scale: 16, or a multiple of 32 that divides the block
    offset: int = 0
    scale: str = ""  # "", "i1", "u1"
    minimum: int = 0  # 0 none, 1 dmin alone, 2 dmin * minimum
    joined: int = 0  # bits of a scale and of a minimum that share bytes: 4, 6, or 0 where each has its own
    number: str = "f16"  # what d and dmin are: one of D_NUMBERS

    @property
    def is_plain(self) -> bool:
        return self.values in NUMBERS

    @property
    def wide(self) -> bool:
        """Whether d and dmin are float32."""
        return self.number == "f32"

    @property
    def unit(self) -> int:
        """Inputs of a chunk that share one scale and one minimum."""
        return min(self.group, 32)

    @property
    def span(self) -> int:
        """Inputs whose products with int8 fit one int16 sum a lane (which takes half of them); 0: none do."""
        largest = max(abs(self.offset), abs((1 << self.bits) - 1 - self.offset))
        fits = [n for n in (32, 16, 8, 4) if n <= self.unit and largest * 127 * (n // 2) < 1 << 15]
        return fits[0] if fits else 0

    @property
    def too_much(self) -> int:
        """What the kernels' operand is larger than the value: taken back through the inputs' sums (the starts)."""
        if self.values == "codes":
            return self.offset
        return 0 if self.is_plain else BIAS

    @property
    def start_span(self) -> int:
        """Inputs that share one start."""
        return self.span if FAMILY.dot == "pairs" else self.unit


@dataclass
class Packed:
    """A matrix (rows, cols) in its compute layout. Unused arrays are empty."""

    shape: tuple[int, int]
    layout: Layout
    codes: np.ndarray
    d: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    scale: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))
    dmin: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint16))
    minimum: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    levels: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # the codebook, exact
    table: np.ndarray = field(default_factory=lambda: np.empty(0, np.int8))  # (2, QUAD): int8 values, low parts
    table_step: float = 1.0  # what the table's integers are multiplied with

    @property
    def nbytes(self) -> int:
        arrays = (self.codes, self.d, self.scale, self.dmin, self.minimum, self.levels, self.table)
        return sum(a.nbytes for a in arrays)

    @property
    def strips(self) -> int:
        return -(-self.shape[0] // LANES)

    @property
    def padded_cols(self) -> int:
        """Inputs that the kernels read: a multiple of 32 for codes, of 4 for plain numbers."""
        unit = 4 if self.layout.is_plain else 32
        return -(-self.shape[1] // unit) * unit


Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]  # zeros, at a multiple of 64 bytes


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A zeroed array that begins at a multiple of 64 bytes."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + nbytes].view(dtype).reshape(shape)


# -- from Quants to a layout ----------------------------------------------------------------------------


def canonical(quants: Quants) -> Quants | None:
    """The same weights in a form that a layout describes, or None where there is none."""
    block, group = quants.codes.shape[1], quants.group
    if group % 16:
        return None
    if quants.codebook is not None and quants.bits > 4:
        values = quants.codebook
        if not _are_bytes(values):
            return None
        quants = replace(
            quants,
            codes=(values.astype(np.int16) + 128).astype(np.uint8)[quants.codes],
            bits=8,
            offset=128,
            codebook=None,
        )
    if block % 32 or (group != 16 and group % 32):
        # One d for each 16 weights. The formula's first step, d * scale in float32, is done here instead.
        times = group // 16
        with np.errstate(invalid="ignore", over="ignore"):
            d = _product(quants.d, quants.scale, block // group)
            dmin = None if quants.dmin is None else _product(quants.dmin, quants.minimum, block // group)
        quants = replace(
            quants,
            codes=quants.codes.reshape(-1, 16),
            group=16,
            d=np.repeat(d, times),
            d_code=None if quants.scale is not None or quants.d_code is None else np.repeat(quants.d_code, times),
            scale=None,
            dmin=None if dmin is None else np.repeat(dmin, times),
            minimum=None,
        )
    if quants.codebook is None and quants.bits == 8:
        return quants if quants.offset == 128 else None
    return quants


def _product(d: np.ndarray, scale: np.ndarray | None, groups: int) -> np.ndarray:
    """(n,) times (n, groups), flat, in float32."""
    factors = np.ones((len(d), groups), np.float32) if scale is None else scale.astype(np.float32)
    return (d[:, None] * factors).reshape(-1)


def _are_bytes(values: np.ndarray) -> bool:
    return bool(np.all((values == np.rint(values)) & (np.abs(values.astype(np.float64)) <= 127)))


def is_half(x: np.ndarray) -> bool:
    """Whether every float32 is a float16."""
    with np.errstate(over="ignore"):
        back = x.astype(np.float16).astype(np.float32)
    return bool(np.all((back == x) | np.isnan(x)))


def halves(x: np.ndarray) -> np.ndarray | None:
    """The bits of float32 as float16, or None where some are none."""
    return x.astype(np.float16).view(np.uint16) if is_half(x) else None


def layout_of(quants: Quants) -> Layout | None:
    """The layout of canonical quants, or None."""
    if quants.codebook is not None:
        values = "table" if _are_bytes(quants.codebook) else "table16"
    else:
        values = "bytes" if quants.bits == 8 else "codes"
    layout = Layout(
        values=values,
        bits=quants.bits,
        block=quants.codes.shape[1],
        group=quants.group,
        offset=quants.offset if quants.codebook is None else 0,
        scale="" if quants.scale is None else ("i1" if quants.scale.dtype == np.int8 else "u1"),
        minimum=0 if quants.dmin is None else (1 if quants.minimum is None else 2),
        joined=_joined(quants),
        number=_number(quants),
    )
    return None if values == "codes" and not layout.span else layout


def _number(quants: Quants) -> str:
    """What d and dmin fit in."""
    if quants.d_code is not None and quants.dmin is None:
        return quants.d_format
    return "f16" if not quants.wide and is_half(quants.d) and (quants.dmin is None or is_half(quants.dmin)) else "f32"


def number_arrays(quants: Quants, layout: Layout) -> tuple[np.ndarray | None, np.ndarray | None] | None:
    """What goes into `d` and `dmin`, each where there is any; None where the layout's float16 cannot hold some."""
    if layout.number == "f32":
        return quants.d, quants.dmin
    if layout.number != "f16":
        return quants.d_code, None
    d, dmin = halves(quants.d), None if quants.dmin is None else halves(quants.dmin)
    return None if d is None or (dmin is None and quants.dmin is not None) else (d, dmin)


def _joined(quants: Quants) -> int:
    """Whether scales and minima are small enough to share bytes."""
    if quants.scale is None or quants.minimum is None or quants.scale.dtype != np.uint8:
        return 0
    pairs = quants.codes.shape[1] // quants.group % 2 == 0
    return 4 if quants.scale_bits <= 4 else (6 if quants.scale_bits <= 6 and pairs else 0)


def scale_arrays(quants: Quants, layout: Layout) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What goes into `scale` and `minimum`, (n, groups) or half of it, each where there is any."""
    scale, minimum = quants.scale, quants.minimum
    if not layout.joined or scale is None or minimum is None:
        return scale, minimum
    low = scale & np.uint8(15) | minimum << np.uint8(4)
    if layout.joined == 4:
        return low, None
    high = scale >> np.uint8(4) | minimum >> np.uint8(4) << np.uint8(2)
    return low, high[:, ::2] | high[:, 1::2] << np.uint8(4)


def _strips(x: np.ndarray) -> np.ndarray:
    """(rows, k) -> (strips, k, LANES), rows padded with zeros."""
    rows, k = x.shape
    strips = -(-rows // LANES)
    if rows % LANES:
        x = np.concatenate([x, np.zeros((strips * LANES - rows, k), x.dtype)])
    return x.reshape(strips, LANES, k).transpose(0, 2, 1)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """(rows, cols) uint8 -> (strips, chunks, bits * 4 * LANES): the bit planes described above."""
    rows, cols = codes.shape
    strips, chunks = -(-rows // LANES), -(-cols // 32)
    if rows % LANES or cols % 32:
        padded = np.zeros((strips * LANES, chunks * 32), np.uint8)
        padded[:rows, :cols] = codes
        codes = padded
    quads = codes.view(np.uint32).reshape(strips, LANES, chunks, 8).transpose(0, 2, 3, 1)
    quads = np.ascontiguousarray(quads).view(np.uint8)  # (strips, chunks, 8, 4 * LANES)
    if bits == 8:
        return (quads ^ np.uint8(0x80)).reshape(strips, chunks, -1)
    out = np.empty((strips, chunks, bits, 4 * LANES), np.uint8)
    first, low = 0, 0
    for width in planes(bits):
        plane = out[:, :, first : first + width]
        for j in range(8 // width):
            part = quads[:, :, j * width : (j + 1) * width] >> np.uint8(low)
            part &= np.uint8((1 << width) - 1)
            if j:
                plane |= part << np.uint8(width * j)
            else:
                plane[...] = part
        first, low = first + width, low + width
    return out.reshape(strips, chunks, -1)


# -- a whole tensor -------------------------------------------------------------------------------------


def pack(tensor: Tensor, run: Callable = map, new: Allocate = aligned) -> Packed:
    """Pack a tensor (rows, cols), read by slabs of rows. `run` is `map`, or that of an executor of threads.

    This is the definition, and the way of all types; `pack_fast.pack` is quicker for most.
    """
    if tensor.n_elements == 0:
        raise UsageError(f"tensor '{tensor.name}' is empty")
    if tensor.type.name in PLAIN:
        return _pack_plain(tensor, PLAIN[tensor.type.name], run, new)
    first = _quants(tensor, 0, 1)
    layout = None if first is None else layout_of(first)
    if first is None or layout is None:
        return _pack_plain(tensor, "f32", run, new)
    out = _pack_quants(tensor, layout, first.codebook, run, new)
    if out is None:  # a later row's d is no float16
        out = _pack_quants(tensor, replace(layout, number="f32"), first.codebook, run, new)
    assert out is not None
    return out


def allocate(shape: tuple[int, int], layout: Layout, codebook: np.ndarray | None, new: Allocate = aligned) -> Packed:
    """The empty arrays of a matrix (rows, cols)."""
    out = Packed(shape, layout, np.empty(0, np.uint8))
    if layout.is_plain:
        out.codes = new((out.strips, out.padded_cols, LANES), NUMBERS[layout.values])
        return out
    blocks = out.padded_cols // layout.block
    groups = out.padded_cols // layout.group
    number = D_NUMBERS[layout.number]
    out.codes = new((out.strips, out.padded_cols // 32, layout.bits * 4 * LANES), np.dtype(np.uint8))
    out.d = new((out.strips, blocks, LANES), number)
    if layout.scale:
        out.scale = new((out.strips, groups, LANES), np.dtype(layout.scale))
    if layout.minimum:
        out.dmin = new((out.strips, blocks, LANES), number)
    if layout.minimum == 2 and layout.joined != 4:
        out.minimum = new((out.strips, groups // (2 if layout.joined else 1), LANES), np.dtype(np.uint8))
    if codebook is not None:
        _set_table(out, codebook)
    return out


def _pack_quants(
    tensor: Tensor, layout: Layout, codebook: np.ndarray | None, run: Callable, new: Allocate
) -> Packed | None:
    """The packed matrix, or None where the layout's float16 cannot hold some d."""
    out = allocate((tensor.rows, tensor.cols), layout, codebook, new)
    return out if all(run(lambda part: fill(out, tensor, *part), _slabs(tensor))) else None


def fill(out: Packed, tensor: Tensor, start: int, stop: int) -> bool:
    """Pack rows start…stop, start a multiple of LANES; False where the layout's float16 cannot hold some d."""
    n, strips, layout = stop - start, slice(start // LANES, -(-stop // LANES)), out.layout
    if layout.is_plain:
        raw = tensor.read_rows(start, stop)
        x = raw.view(NUMBERS[layout.values]) if tensor.type.name in PLAIN else tensor.type.decode(raw)
        out.codes[strips, : tensor.cols] = _strips(x)
        return True
    quants = _quants(tensor, start, stop)
    assert quants is not None
    out.codes[strips] = pack_codes(quants.codes.reshape(n, tensor.cols), layout.bits)
    numbers = number_arrays(quants, layout)
    if numbers is None:
        return False
    for to, values in zip((out.d, out.dmin), numbers, strict=True):
        if values is not None:
            strip = _strips(values.reshape(n, -1))
            to[strips, : strip.shape[1]] = strip
    for to, values in zip((out.scale, out.minimum), scale_arrays(quants, layout), strict=True):
        if values is not None:
            to[strips] = _strips(values.reshape(n, -1))
    return True


def _slabs(tensor: Tensor) -> list[tuple[int, int]]:
    step = max(LANES, SLAB_NBYTES // (4 * tensor.cols) // LANES * LANES)
    return [(a, min(a + step, tensor.rows)) for a in range(0, tensor.rows, step)]


def _quants(tensor: Tensor, start: int, stop: int) -> Quants | None:
    raw = tensor.read_rows(start, stop)
    quants = tensor.type.quants(raw.reshape(-1).view(tensor.type.fields))
    return None if quants is None else canonical(quants)


def _set_table(out: Packed, codebook: np.ndarray) -> None:
    levels = np.zeros(16, np.float32)
    levels[: len(codebook)] = codebook
    out.levels = levels
    whole = levels.astype(np.float64)
    if out.layout.values == "table16":
        out.table_step = float(np.abs(whole).max()) / TABLE_STEPS
        whole = np.rint(whole / out.table_step)
        low = (whole + 128) % 256 - 128
        tables = [(whole - low) / 256, low]
    else:
        tables = [whole, np.zeros(16)]
    out.table = aligned((2, QUAD), np.dtype(np.int8))
    out.table[...] = np.tile(np.array(tables), QUAD // 16)


def _pack_plain(tensor: Tensor, values: str, run: Callable, new: Allocate) -> Packed:
    """Plain numbers as they are; everything else decoded to float32."""
    out = allocate((tensor.rows, tensor.cols), Layout(values), None, new)
    list(run(lambda part: fill(out, tensor, *part), _slabs(tensor)))
    return out


def unpack_codes(packed: np.ndarray, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `pack_codes`: (rows, cols) uint8, for tests."""
    strips, chunks = packed.shape[:2]
    planes_in = packed.reshape(strips, chunks, -1, 4 * LANES)
    quads = np.zeros((strips, chunks, 8, 4 * LANES), np.uint8)
    if bits == 8:
        quads[...] = planes_in ^ np.uint8(0x80)
    else:
        first, low = 0, 0
        for width in planes(bits):
            for q in range(8):
                part = planes_in[:, :, first + q % width] >> np.uint8(width * (q // width))
                quads[:, :, q] |= (part & np.uint8((1 << width) - 1)) << np.uint8(low)
            first, low = first + width, low + width
    codes = quads.reshape(strips, chunks, 8, LANES, 4).transpose(0, 3, 1, 2, 4).reshape(strips * LANES, chunks * 32)
    return codes[: shape[0], : shape[1]]
