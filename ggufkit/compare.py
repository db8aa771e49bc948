"""How far tensors are from one another: relative RMSE and largest difference, in slabs of bounded memory.

The one place for that measure: `diff`, `convert --report` and `types` all take it from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.blocks import TensorType, UnknownType
from ggufkit_formats.errors import UnsupportedError
from ggufkit_formats.gguf import GgufFile
from ggufkit_formats.tensor import Tensor

SLAB_NBYTES = 32 << 20  # float32 bytes that are decoded at a time
PIECE = 1 << 17  # values that are compared at a time: in double precision, they stay in the cache


@dataclass(frozen=True, slots=True)
class Distance:
    """Of values from reference values. NaN and infinities that both have in the same place count as equal; both
    numbers are NaN where only one of them has NaN."""

    relative_rmse: float  # √(Σ (a - b)² / Σ b²); infinite where b is all 0 and a is not
    max_difference: float


class Summed:
    """Squares and largest difference, as values come."""

    def __init__(self) -> None:
        self.difference, self.reference, self.largest = 0.0, 0.0, 0.0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Values a beside b, of the same shape."""
        a, b = a.reshape(-1), b.reshape(-1)
        for start in range(0, a.size, PIECE):
            self._add(a[start : start + PIECE], b[start : start + PIECE])

    def _add(self, a: np.ndarray, b: np.ndarray) -> None:
        with np.errstate(all="ignore"):
            off = a.astype(np.float64) - b
            off[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
            b = np.where(np.isfinite(b), b, np.float32(0))
            self.difference += float(np.square(off).sum())
            self.reference += float(np.square(b, dtype=np.float64).sum())
            self.largest = float(np.maximum(self.largest, np.abs(off).max(initial=0)))  # NaN stays NaN

    def add_encoded(self, kind: TensorType, raw: np.ndarray, x: np.ndarray, scale: float = 1.0) -> None:
        """Rows of blocks of `kind`, uint8 (rows, bytes per row), times `scale`, beside x (rows, cols) float32, which
        they were made from."""
        step = max(1, PIECE // max(1, x.shape[-1]))
        for start in range(0, len(x), step):
            decoded = kind.decode(raw[start : start + step])
            self.add(decoded if scale == 1 else decoded * np.float32(scale), x[start : start + step])

    def merge(self, other: Summed) -> None:
        """All that `other` has seen."""
        self.difference += other.difference
        self.reference += other.reference
        self.largest = float(np.maximum(self.largest, other.largest))

    @property
    def distance(self) -> Distance:
        if self.difference == 0:
            return Distance(0.0, self.largest)
        ratio = self.difference / self.reference if self.reference else float("inf")
        return Distance(ratio**0.5, self.largest)


def distance(a: Tensor, b: Tensor, progress: Callable[[int], None] | None = None) -> Distance:
    """Of tensor a from tensor b, of the same shape. UnsupportedError for types that cannot be decoded.

    `progress` is called with the number of values that were compared.
    """
    for tensor in (a, b):
        if isinstance(tensor.type, UnknownType):
            raise UnsupportedError(f"tensor {tensor.name!r} has type {tensor.type}, which cannot be decoded")
    summed = Summed()
    same = a.type is b.type
    for start, stop in a.slabs(SLAB_NBYTES):
        raw_a, raw_b = a.read_rows(start, stop), b.read_rows(start, stop)
        y = b.type.decode(raw_b)
        summed.add(y if same and np.array_equal(raw_a, raw_b) else a.type.decode(raw_a), y)
        if progress is not None:
            progress((stop - start) * a.cols)
    return summed.distance


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that both files have, and how far A's is from B's (None: shapes or types forbid it)."""

    name: str
    a: Tensor
    b: Tensor
    distance: Distance | None

    @property
    def is_equal(self) -> bool:
        alike = self.a.type.name == self.b.type.name and self.a.shape == self.b.shape
        if self.distance is None:
            return alike and bool(np.array_equal(self.a.raw, self.b.raw))
        return alike and self.distance.max_difference == 0


def keys(a: GgufFile, b: GgufFile) -> tuple[list[str], list[str], list[str]]:
    """Metadata keys that only A has, that only B has, and whose values or types differ."""
    only_a = [key for key in a.metadata if key not in b.metadata]
    only_b = [key for key in b.metadata if key not in a.metadata]
    both = [key for key in a.metadata if key in b.metadata]
    return only_a, only_b, [key for key in both if not _same(a.metadata.typed(key), b.metadata.typed(key))]


def _same(a: Any, b: Any) -> bool:
    from ggufkit_formats.gguf_writer import encode_value

    return encode_value(a) == encode_value(b)


def tensors(a: GgufFile, b: GgufFile, progress: Callable[[int], None] | None = None) -> Iterator[Difference]:
    """Each tensor that both files have, in A's order."""
    for name, tensor in a.tensors.items():
        other = b.tensors.get(name)
        if other is None:
            continue
        known = not isinstance(tensor.type, UnknownType) and not isinstance(other.type, UnknownType)
        comparable = known and tensor.shape == other.shape
        yield Difference(name, tensor, other, distance(tensor, other, progress) if comparable else None)
