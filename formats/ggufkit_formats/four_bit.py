"""Tensors of 4-bit codes whose block maxima stand beside them: what NF4 in GGUF and bitsandbytes' checkpoints share.

Codes run over the tensor row by row, two a byte, and so do the blocks that share a maximum. Maxima are float32, or
quantized again: codes of 8 bits, a second-level maximum for each 256 of them, and an offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .blocks.nf4 import NESTED_BLOCK, FlatType, FourBitType, decode_maxima, flat, unpack_4bit
from .tensor import Tensor

F32 = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class Maxima:
    """The maxima of a tensor's blocks, where they are and how they are meant."""

    values: Tensor  # float32, or codes of 8 bits
    n: int
    levels: np.ndarray | None = None  # float32 (256,) where they are codes; the rest goes with it
    second: Tensor | None = None  # float32: the second-level maxima, from item `skip` on
    skip: int = 0
    offset: float | None = None  # None: the first item of `second`

    @property
    def is_nested(self) -> bool:
        """Whether the maxima are quantized again."""
        return self.second is not None

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (self.second.nbytes if self.second is not None else 0)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The maxima start…stop, float32 (stop - start,)."""
        if self.second is None or self.levels is None:
            return numbers(self.values, F32, start, stop)
        first, last = start // NESTED_BLOCK, -(-stop // NESTED_BLOCK)
        second = numbers(self.second, F32, self.skip + first, self.skip + last)
        which = np.arange(start, stop) // NESTED_BLOCK - first
        return decode_maxima(self.read_codes(start, stop), second[which], self.read_offset(), self.levels)

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """The codes of nested maxima, uint8 (stop - start,)."""
        return numbers(self.values, np.dtype("u1"), start, stop)

    def read_second(self) -> np.ndarray:
        """The second-level maxima of nested ones, float32 (ceil(n / 256),)."""
        assert self.second is not None
        return numbers(self.second, F32, self.skip, self.skip + -(-self.n // NESTED_BLOCK))

    def read_offset(self) -> np.float32:
        """The offset of nested maxima."""
        if self.offset is not None:
            return np.float32(self.offset)
        assert self.second is not None
        return numbers(self.second, F32, 0, 1)[0]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FourBitTensor(Tensor):
    """One logical tensor made of several stored ones. `nbytes` is what they take together, `offset` the codes'.

    `read_rows` and `raw` are blocks of `type`, put together while they are read; where the blocks run across the rows
    they are float32. The stored tensors are `codes`, and `maxima.values` and `maxima.second`.
    """

    codes: Tensor
    maxima: Maxima

    @property
    def in_one_piece(self) -> bool:
        return False

    @property
    def four_bit(self) -> FourBitType:
        """The type with its levels and block, whether or not the blocks divide the rows."""
        kind = self.type.of if isinstance(self.type, FlatType) else self.type
        assert isinstance(kind, FourBitType)
        return kind

    @property
    def parts(self) -> list[Tensor]:
        """The stored tensors."""
        found = [self.codes, self.maxima.values, self.maxima.second]
        return [part for part in found if part is not None]

    @property
    def raw(self) -> np.ndarray:
        """uint8 (…, bytes per row), a copy: blocks of `type`, as `dequantize` takes them."""
        return self.read_rows(0, self.rows).reshape(*self.shape[:-1], self.row_nbytes)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop of the flattened (rows, cols) tensor, uint8 (stop - start, bytes per row)."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}:{stop} of {self.rows}")
        first, last, block = start * self.cols, stop * self.cols, self.four_bit.block
        packed = self.read_packed(first, last)
        maxima = self.maxima.read(first // block, -(-last // block))
        if not isinstance(self.type, FlatType):
            out = np.empty(len(maxima), self.type.fields)
            out["d"] = maxima
            out["qs"] = packed.reshape(len(maxima), block // 2)
            return out.view(np.uint8).reshape(stop - start, self.row_nbytes)
        codes = unpack_4bit(packed)[first % 2 : first % 2 + last - first]
        with np.errstate(invalid="ignore", over="ignore"):
            x = self.four_bit.levels[codes] * maxima[np.arange(first, last) // block - first // block]
        return x.view(np.uint8).reshape(stop - start, self.row_nbytes)

    def read_packed(self, first: int, last: int) -> np.ndarray:
        """The bytes that hold the codes of weights first…last, uint8."""
        return numbers(self.codes, np.dtype("u1"), first // 2, -(-last // 2))


def four_bit_tensor(
    name: str, kind: FourBitType, shape: tuple[int, ...], codes: Tensor, maxima: Maxima
) -> FourBitTensor:
    """The logical tensor, of the type that its rows allow."""
    cols = shape[-1] if shape else 1
    type = flat(kind) if cols % kind.block else kind
    nbytes = codes.nbytes + maxima.nbytes
    return FourBitTensor(name, type, shape, nbytes, codes.offset, codes.source, codes=codes, maxima=maxima)


def numbers(tensor: Tensor, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
    """Items start…stop of a stored tensor, read with pread, in the machine's byte order."""
    raw = tensor.source.read(tensor.offset + start * dtype.itemsize, (stop - start) * dtype.itemsize)
    order = dtype.newbyteorder(">") if tensor.byte_order == ">" else dtype.newbyteorder("<")
    return raw.view(order).astype(dtype.newbyteorder("="), copy=False)
