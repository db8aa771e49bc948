"""What a tensor type is: a block of weights with named fields, a formula, and its inverse.

One class a type, one instance a class, all of them in `TYPES`. Sizes come from the fields; nothing else in the
project knows how many bytes a block takes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..errors import FormatError, UnsupportedError, UsageError


@dataclass(frozen=True)
class Quants:
    """Blocks taken apart into integer codes and two levels of scales, without rounding anything.

    For weight i of a block, in group g = i // group, with x = codes[i] - offset (or codebook[codes[i]]):

        w[i] = (d * scale[g]) * x  -  dmin * minimum[g]

    computed in float32 in this order. `scale` and `minimum` of None stand for 1; `dmin` of None for no minimum.
    The kernels pack these arrays; they never look into a block.
    """

    codes: np.ndarray  # (n, block) uint8, each < 2**bits; a block of the file may be several of these
    bits: int  # 1…8
    offset: int  # subtracted from the code; ignored with a codebook
    group: int  # weights that share a scale; divides the block
    d: np.ndarray  # (n,) float32; numbers of float16 unless `wide`
    scale: np.ndarray | None = None  # (n, block // group) int8 or uint8
    dmin: np.ndarray | None = None  # (n,) float32, may be negative
    minimum: np.ndarray | None = None  # (n, block // group) uint8
    codebook: np.ndarray | None = None  # (2**bits,) float32 or int8
    scale_bits: int = 8  # that the type has for a scale and for a minimum, where they are unsigned
    d_code: np.ndarray | None = None  # (n,) uint8: d as one of few numbers, written in `d_format`
    d_format: str = ""  # "e8m0": d = 2**(code - 128); "e4m3": half of such a float, code < 128 and no NaN
    wide: bool = False  # whether float16 does not hold every d of the type

    def decode(self) -> np.ndarray:
        """The weights, float32 (n, block), by the formula above."""
        n, block = self.codes.shape
        groups = block // self.group
        if self.codebook is not None:
            x = self.codebook[self.codes].astype(np.float32)
        else:
            x = (self.codes.astype(np.int16) - np.int16(self.offset)).astype(np.float32)
        x = x.reshape(n, groups, self.group)
        with np.errstate(invalid="ignore", over="ignore"):
            d = self.d[:, None] if self.scale is None else self.d[:, None] * self.scale.astype(np.float32)
            x *= d[:, :, None]
            if self.dmin is not None:
                m = self.dmin[:, None]
                if self.minimum is not None:
                    m = m * self.minimum.astype(np.float32)
                x -= m[:, :, None]
        return x.reshape(n, block)


class TensorType:
    """A tensor type of GGUF. Compares equal to its name, so `tensor.type == "Q4_K"` reads as it looks.

    A subclass sets `name`, `id`, `block`, `fields`, and defines `decode_blocks` and `encode_blocks`
    (and `quants`, from which `decode_blocks` follows, where the type has codes and scales).
    """

    name: str = ""
    id: int = -1
    block: int = 1  # weights in a block
    fields: np.dtype = np.dtype("u1")  # one block on disk, little endian, packed
    uses_importance: bool = True  # whether importance changes the bytes that are written, as in ggml
    needs_importance: bool = False  # whether nothing is written without one (ggml_quantize_requires_imatrix)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def block_nbytes(self) -> int:
        return self.fields.itemsize

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.fields.itemsize / self.block

    @property
    def is_quantized(self) -> bool:
        """Whether weights share scales, i.e. the type is not a plain number type."""
        return self.block > 1

    def row_nbytes(self, cols: int) -> int:
        """Bytes of a row of `cols` weights. Raises FormatError where blocks do not divide the row."""
        if cols % self.block:
            raise FormatError(f"{self.name} needs rows divisible by {self.block}, not {cols}")
        return cols // self.block * self.fields.itemsize

    # -- arrays --------------------------------------------------------------------------------

    def decode(self, raw: np.ndarray) -> np.ndarray:
        """uint8 (…, bytes per row), little endian -> float32 (…, cols). Equal to ggml's bit for bit."""
        if raw.dtype != np.uint8:
            raise UsageError(f"{self.name} is decoded from an array of uint8, not of {raw.dtype}")
        raw = np.ascontiguousarray(raw)
        if raw.shape[-1] % self.block_nbytes:
            raise FormatError(f"{self.name} rows are multiples of {self.block_nbytes} bytes, not {raw.shape[-1]}")
        blocks = raw.reshape(-1).view(self.fields)
        cols = raw.shape[-1] // self.block_nbytes * self.block
        return self.decode_blocks(blocks).reshape(*raw.shape[:-1], cols)

    def encode(self, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """float (…, cols) -> uint8 (…, bytes per row): the bytes that ggml_quantize_chunk writes.

        `importance` is one weight per column, (cols,), or None: finite and not negative (UsageError otherwise). For
        types with scales, rows and the scales that they need must be finite (FormatError otherwise). This is the plain
        definition; `ggufkit_kernels.cpu.encode` is the fast one.
        """
        x = as_float32(x)
        row_nbytes = self.row_nbytes(x.shape[-1])
        self.check_finite(x)
        weights = None
        if importance is not None:
            importance = as_importance(importance, x.shape[-1])
            if self.uses_importance and x.size:
                weights = self.error_weights(x.reshape(-1, x.shape[-1]), importance).reshape(-1, self.block)
            elif self.uses_importance:  # no rows; a type that needs importance was given it
                weights = np.zeros((0, self.block), np.float32)
        out = self.encode_blocks(x.reshape(-1, self.block), weights)
        self.check_scales(out)
        return out.view(np.uint8).reshape(*x.shape[:-1], row_nbytes)

    def check_finite(self, x: np.ndarray) -> None:
        """Raise FormatError where a quantized type is given NaN or infinity."""
        if self.is_quantized and not np.isfinite(x).all():
            raise FormatError(f"NaN or infinite weights cannot be quantized to {self.name}")

    def check_scales(self, blocks: np.ndarray) -> None:
        """Raise FormatError where encoded blocks (n,) of `fields` hold a float that is not finite.

        The weights were finite, but too large for a scale of 16 bits. ggml writes such blocks and refuses to load
        them (`ggml_validate_row_data`).
        """
        if not self.is_quantized:
            return
        for name, (dtype, *_) in (self.fields.fields or {}).items():
            if dtype.kind == "f" and not np.isfinite(blocks[name]).all():
                raise FormatError(f"weights are too large for {self.name}: scale not finite in {dtype.name}")

    # -- what a subclass defines -----------------------------------------------------------------

    def quants(self, blocks: np.ndarray) -> Quants | None:
        """Codes and scales of (n,) blocks, or None for types that are plain numbers."""
        return None

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """(n,) blocks of `fields` -> float32 (n, block)."""
        quants = self.quants(blocks)
        if quants is None:
            raise UnsupportedError(f"tensor type {self.name} cannot be decoded")
        return quants.decode()

    def error_weights(self, x: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """Rows x (rows, cols) and importance (cols,) -> what `encode_blocks` is given as importance, (rows, cols).

        For the types that look at a whole row before its blocks; all others take the importance itself.
        """
        return np.broadcast_to(importance, x.shape)

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """float32 (n, block), importance (n, block) or None -> (n,) blocks of `fields`."""
        raise UnsupportedError(f"tensor type {self.name} cannot be encoded")

    # -- identity ------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return normal(other) == self.name
        return self is other

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


def as_float32(x: np.ndarray) -> np.ndarray:
    """Contiguous float32, x itself where it is that already; what is too large becomes infinite.

    Raises UsageError for arrays of anything else than real numbers.
    """
    x = np.asarray(x)
    if x.dtype.kind in "cSUOMm":
        raise UsageError(f"numbers are wanted, not an array of {x.dtype}")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)


def as_importance(importance: np.ndarray, cols: int) -> np.ndarray:
    """Contiguous float32 (cols,), one weight a column. UsageError for another shape, NaN, infinity, or below 0."""
    if np.shape(importance) != (cols,):
        raise UsageError(f"importance has shape {np.shape(importance)}; one weight per column is wanted, {(cols,)}")
    importance = as_float32(importance)
    if not (np.isfinite(importance) & (importance >= 0)).all():
        raise UsageError("importance holds NaN, infinity or negative numbers")
    return importance


class ScaledType(TensorType):
    """A type whose weights are all multiplied with a factor that the file holds beside the tensor."""

    def __init__(self, kind: TensorType, factor: float):
        self.name, self.id = f"{kind.name} scaled", kind.id
        self.block, self.fields = kind.block, kind.fields
        self.kind, self.factor = kind, np.float32(factor)

    def quants(self, blocks: np.ndarray) -> Quants | None:
        quants = self.kind.quants(blocks)
        if quants is None:
            return None
        dmin = None if quants.dmin is None else quants.dmin * self.factor
        return replace(quants, d=quants.d * self.factor, dmin=dmin, d_code=None, d_format="", wide=True)

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return super().decode_blocks(blocks) if self.is_quantized else self.kind.decode_blocks(blocks) * self.factor


class UnknownType(TensorType):
    """A type id that ggufkit has no class for: listed and copied, never decoded. Its name is its number."""

    def __init__(self, name: str | int, id: int = -1):
        self.name = str(name)
        self.id = name if isinstance(name, int) else id

    def row_nbytes(self, cols: int) -> int:
        raise UnsupportedError(f"the size of tensor type {self.name} is unknown")


TYPES: dict[str, TensorType] = {}
BY_ID: dict[int, TensorType] = {}


T = TypeVar("T", bound=TensorType)


def register(cls: type[T]) -> type[T]:
    """Class decorator: make the one instance and enter it in `TYPES` and `BY_ID`."""
    instance = cls()
    assert instance.name not in TYPES and instance.id not in BY_ID, instance.name
    TYPES[instance.name] = instance
    if instance.id >= 0:  # NF4 has none: it is stored as several tensors
        BY_ID[instance.id] = instance
    return cls


def normal(name: str) -> str:
    """A type's name as the registry spells it: upper case, `-` and `_` alike."""
    return name.strip().upper().replace("-", "_")


def find(name: str | TensorType) -> TensorType:
    """The type of that name, in any case. Raises UnsupportedError naming the nearest known types."""
    if isinstance(name, TensorType):
        return name
    found = TYPES.get(normal(name))
    if found is None:
        near = difflib.get_close_matches(normal(name), TYPES, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UnsupportedError(f"unknown tensor type {name!r}{hint}")
    return found


def by_id(type_id: int) -> TensorType:
    """The type with that id in GGUF, or an UnknownType that carries the number."""
    return BY_ID.get(type_id) or UnknownType(type_id)
