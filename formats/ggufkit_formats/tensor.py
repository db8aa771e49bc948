"""The one noun both readers yield: a tensor's name, type, shape, and where its bytes are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .blocks import TensorType, UnknownType


class Source(Protocol):
    """An open file that hands out bytes which were checked to be there."""

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 (nbytes,), a read-only view of the mapped file, no copy."""
        ...

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 (nbytes,), read with pread into memory of its own: pages of the file are not mapped."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor in a file. Nothing is loaded until `.raw`, `.read_rows` or `.dequantize` is asked for."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # NumPy order: the last dimension is the one that is contiguous
    nbytes: int
    offset: int  # in the file of `source`
    source: Source
    byte_order: str = "<"  # ">" for big-endian files

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return self.n_elements // self.cols if self.cols else 0

    @property
    def row_nbytes(self) -> int:
        return self.type.row_nbytes(self.cols)

    @property
    def in_one_piece(self) -> bool:
        """Whether the file holds the blocks of `type` one after the other: `nbytes` from `offset` on."""
        return True

    @property
    def raw(self) -> np.ndarray:
        """uint8 (…, bytes per row): a view of the mapped file, or a swapped copy if it is big-endian.

        For a type of unknown size, the flat bytes (nbytes,).
        """
        flat = self._little_endian(self.source.view(self.offset, self.nbytes))
        if isinstance(self.type, UnknownType):
            return flat
        return flat.reshape(*self.shape[:-1], self.row_nbytes)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop of the flattened (rows, cols) tensor, uint8 (stop - start, bytes per row), copied."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}:{stop} of {self.rows}")
        size = self.row_nbytes
        raw = self.source.read(self.offset + start * size, (stop - start) * size)
        return self._little_endian(raw).reshape(stop - start, size)

    def slabs(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """(start, stop) row ranges whose float32 values take at most `nbytes` (one row at least)."""
        step = max(1, nbytes // max(1, 4 * self.cols))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)

    def dequantize(self) -> np.ndarray:
        """The weights as float32, in `shape`."""
        return self.type.decode(self.raw).reshape(self.shape)

    def _little_endian(self, raw: np.ndarray) -> np.ndarray:
        if self.byte_order == "<":
            return raw
        return raw.view(self.type.fields.newbyteorder(">")).astype(self.type.fields).view(np.uint8)
