"""What each tensor becomes in the checkpoint: numbers of a dtype, parts of a 4-bit matrix, or packed ternary codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from ggufkit_formats import bitsandbytes, blocks
from ggufkit_formats.bitnet import pack
from ggufkit_formats.blocks.nf4 import FourBitType, dynamic_map, encode_4bit, encode_maxima, four_bit
from ggufkit_formats.errors import FormatError, UnsupportedError
from ggufkit_formats.four_bit import FourBitTensor
from ggufkit_formats.safetensors_writer import Planned

from ..convert import bitnet
from ..convert.collected import Collected, Once
from ..convert.pipeline import check_plain, encode, share
from ..quantize import ternary
from .parts import Part

Step = Callable[[], np.ndarray]
Piece = tuple[str, int, Step]  # tensor of the file, bytes of the source, what makes its next bytes
PEEK = 1 << 16  # weights that are looked at at a time: most tensors are not ternary


class Output(Protocol):
    """One tensor of the checkpoint as a model means it, and what it is stored as."""

    @property
    def part(self) -> Part: ...

    @property
    def dtype(self) -> str: ...

    @property
    def planned(self) -> list[Planned]: ...

    def pieces(self, n_weights: int) -> Iterator[Piece]:
        """What makes the bytes, in slabs of about that many weights."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """Numbers of one dtype, which safetensors and GGUF both have: F32, F16, BF16."""

    part: Part
    dtype: str

    @property
    def planned(self) -> list[Planned]:
        return [Planned(self.part.name, self.dtype, self.part.shape)]

    def pieces(self, n_weights: int) -> Iterator[Piece]:
        part, kind = self.part, blocks.find(self.dtype)
        same = part.tensor.type is kind and part.scale == 1

        def rows(start: int, stop: int) -> np.ndarray:
            if not same:
                return encode(kind, part.rows(start, stop))
            raw = part.raw_rows(start, stop)
            check_plain(kind, raw)
            return raw

        for start, stop in part.slabs(n_weights):
            yield part.name, share(part.tensor, start, stop), lambda a=start, b=stop: rows(a, b)


@dataclass(frozen=True, slots=True)
class FourBit:
    """A matrix as bitsandbytes stores it. Codes of an NF4 tensor are copied, and its maxima where that can be."""

    part: Part
    kind: str  # nf4 or fp4
    nested: bool
    type: FourBitType
    copied: bool
    torch_dtype: str = "bfloat16"

    @classmethod
    def of(cls, part: Part, kind: str, nested: bool, keep: bool) -> FourBit:
        """`keep`: maxima that are F32 in an NF4 tensor stay so."""
        tensor = part.tensor
        usual = four_bit(bitsandbytes.KINDS[kind], bitsandbytes.LEVELS[kind], 64)
        if not isinstance(tensor, FourBitTensor) or tensor.type.name != bitsandbytes.KINDS[kind] or part.scale != 1:
            return cls(part, kind, nested, usual, False)
        own = tensor.four_bit
        if part.head_rows and tensor.cols % own.block:  # blocks run across rows that change places
            return cls(part, kind, nested, usual, False)
        kept = part.head_rows > 0 if tensor.maxima.is_nested else keep
        return cls(part, kind, nested and not kept, own, True)

    @property
    def dtype(self) -> str:
        return self.kind.upper()

    @property
    def planned(self) -> list[Planned]:
        return bitsandbytes.planned(self.part.name, self.part.shape, self.kind, self.nested, self.type.block)

    def pieces(self, n_weights: int) -> Iterator[Piece]:
        name = self.part.name
        levels = self.type.levels.astype("<f4")
        yield f"{name}.quant_map", 0, lambda: levels
        if self.copied:
            yield from self._copied(n_weights)
        else:
            yield from self._encoded(n_weights)

    def _copied(self, n_weights: int) -> Iterator[Piece]:
        part, tensor = self.part, self.part.tensor
        assert isinstance(tensor, FourBitTensor)
        cols = tensor.cols

        def codes(start: int, stop: int) -> np.ndarray:
            packed = tensor.read_packed(start * cols, stop * cols)
            return part.ordered(packed.reshape(stop - start, -1)) if part.head_rows else packed

        def maxima() -> np.ndarray:
            found = finite(tensor.maxima.read(0, tensor.maxima.n))
            return part.ordered(found.reshape(tensor.rows, -1)).reshape(-1) if part.head_rows else found

        for start, stop in part.slabs(n_weights, 2 if cols % 2 else 1):
            yield part.name, (stop - start) * cols // 2, lambda a=start, b=stop: codes(a, b)
        if not (self.nested and tensor.maxima.is_nested):
            yield from self._maxima(maxima, tensor.maxima.nbytes)
            return
        kept = tensor.maxima
        assert kept.levels is not None
        second, offset = finite(kept.read_second()), finite(kept.read_offset())
        made = kept.read_codes(0, kept.n), second, offset, kept.levels
        yield from self._nested(lambda: made, kept.nbytes)

    def _encoded(self, n_weights: int) -> Iterator[Piece]:
        part, kind = self.part, self.type
        slabs = list(part.slabs(n_weights, kind.block // math.gcd(kind.block, part.tensor.cols)))  # whole blocks
        collected = Collected(len(slabs))

        def codes(i: int, start: int, stop: int) -> np.ndarray:
            with collected.part(i):
                x = part.rows(start, stop).reshape(-1)
                kind.check_finite(x)
                packed, collected.found[i] = encode_4bit(x, kind.levels, kind.block)
                return packed

        for i, (start, stop) in enumerate(slabs):
            yield part.name, share(part.tensor, start, stop), lambda a=(i, start, stop): codes(*a)
        yield from self._maxima(collected.all, 0)

    def _maxima(self, maxima: Callable[[], np.ndarray], nbytes: int) -> Iterator[Piece]:
        if self.nested:
            yield from self._nested(lambda: (*encode_maxima(maxima()), dynamic_map()), nbytes)
            return
        yield f"{self.part.name}.absmax", nbytes, lambda: maxima().astype("<f4", copy=False)
        yield self._state_name, 0, lambda: self._state(None)

    def _nested(self, make: Callable[[], tuple[Any, ...]], nbytes: int) -> Iterator[Piece]:
        """The pieces of maxima that are quantized again; `make` gives codes, second-level maxima, offset and levels."""
        made = Once(make)
        yield f"{self.part.name}.absmax", nbytes, lambda: made()[0]
        yield f"{self.part.name}.nested_absmax", 0, lambda: made()[1].astype("<f4", copy=False)
        yield f"{self.part.name}.nested_quant_map", 0, lambda: made()[3].astype("<f4", copy=False)
        yield self._state_name, 0, lambda: self._state(float(made()[2]))

    @property
    def _state_name(self) -> str:
        return f"{self.part.name}{bitsandbytes.STATE}{self.kind}"

    def _state(self, offset: float | None) -> np.ndarray:
        text = bitsandbytes.state(self.kind, self.part.shape, self.type.block, self.torch_dtype, offset)
        return np.frombuffer(text, np.uint8)


@dataclass(frozen=True, slots=True)
class Packed:
    """A ternary matrix as BitNet checkpoints have it: four rows in a byte, and a scale that multiplies."""

    part: Part
    weight_scale: np.float32
    dtype: str = "U8"

    @classmethod
    def of(cls, part: Part) -> Packed:
        """UnsupportedError for a matrix that is not ternary, or that has no such form. Reads the matrix."""
        if part.tensor.rows % 4:
            raise UnsupportedError(
                f"{part.label} has {part.tensor.rows} rows, which 4 does not divide: it cannot be packed"
            )
        scale = ternary.common_scale(part.rows(*slab) for slab in part.slabs(PEEK))
        if scale is None and any(part.rows(*slab).any() for slab in part.slabs(PEEK)):
            raise UnsupportedError(f"{part.label} is not ternary (weights -s, 0 and s): it cannot be packed")
        if scale is not None and scale > bitnet.LARGEST_FACTOR:
            raise UnsupportedError(
                f"{part.label} has the scale {scale:g}: readers would take that of a packed matrix for one that divides"
            )
        return cls(part, np.float32(1 if scale is None else scale))

    @property
    def planned(self) -> list[Planned]:
        rows, cols = self.part.shape
        return [Planned(self.part.name, "U8", (rows // 4, cols)), Planned(f"{self.part.name}_scale", "F32", (1,))]

    def pieces(self, n_weights: int) -> Iterator[Piece]:
        part, band = self.part, self.part.tensor.rows // 4
        step = max(1, n_weights // 4 // max(1, part.tensor.cols))

        def rows(start: int, stop: int) -> np.ndarray:
            signs = [np.sign(part.rows(k * band + start, k * band + stop)).astype(np.int8) for k in range(4)]
            return pack(np.concatenate(signs))

        for start in range(0, band, step):
            stop = min(start + step, band)
            yield part.name, 4 * share(part.tensor, start, stop), lambda a=start, b=stop: rows(a, b)
        yield f"{part.name}_scale", 0, lambda: np.array([self.weight_scale], "<f4")


def finite(maxima: Any) -> Any:
    if not np.isfinite(maxima).all():
        raise FormatError("maxima of blocks that are NaN or infinite")
    return maxima
