"""What a GGUF file is made into before anything is written: its network, and the origin of each of its tensors.

The architecture's table of tensors, which convert reads from left to right, is read from right to left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
from ggufkit_formats.errors import GgufkitError
from ggufkit_formats.gguf import GgufFile
from ggufkit_formats.tensor import Tensor
from ggufkit_runtime import models, weights

from ..convert import bitnet


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the checkpoint, by the name it has there, and the tensor of the file that holds its values."""

    name: str
    tensor: Tensor
    head_rows: int = 0  # > 0: rows in a head, which go from pairs back to halves
    scale: float = 1.0  # the file's number beside the matrix, a float32
    is_inner: bool = False  # a matrix inside the blocks

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def label(self) -> str:
        return f"tensor {self.tensor.name!r}"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop of the checkpoint's tensor, float32 (stop - start, cols)."""
        first, last = self._heads(start, stop)
        x = self.tensor.type.decode(self.tensor.read_rows(first, last))
        if self.scale != 1:
            x = x * np.float32(self.scale)
        return self.ordered(x)[start - first : stop - first]

    def raw_rows(self, start: int, stop: int) -> np.ndarray:
        """The same rows as the file has them, uint8 (stop - start, bytes per row)."""
        first, last = self._heads(start, stop)
        return self.ordered(self.tensor.read_rows(first, last))[start - first : stop - first]

    def ordered(self, rows: np.ndarray) -> np.ndarray:
        """Rows of whole heads (n, …), or a single one of a vector (1, …), in the checkpoint's order."""
        if not self.head_rows:
            return rows
        if len(self.shape) == 1:
            n = self.shape[0]
            return rows.reshape(n, -1)[models.restored_rows(n, n // self.head_rows)].reshape(1, -1)
        return rows[models.restored_rows(len(rows), len(rows) // self.head_rows)]

    def slabs(self, n_weights: int, unit: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about that many weights: whole heads, and multiples of `unit` rows."""
        rows, cols = self.tensor.rows, self.tensor.cols
        unit = int(np.lcm(max(1, self.head_rows if len(self.shape) > 1 else 1), unit))
        step = max(unit, n_weights // max(1, cols) // unit * unit)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def _heads(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of the heads that these rows are in."""
        if not self.head_rows or len(self.shape) == 1:
            return start, stop
        return start // self.head_rows * self.head_rows, -(-stop // self.head_rows) * self.head_rows


@dataclass(frozen=True, slots=True)
class Source:
    """A GGUF file, read as far as its headers."""

    metadata: Mapping[str, Any]
    module: ModuleType
    config: Any
    parts: list[Part]
    names: set[str]  # of the file's tensors


def read(file: GgufFile) -> Source:
    """The file's network. UnsupportedError for an unknown architecture, FormatError for tensors that do not fit it."""
    metadata = bitnet.renamed(dict(file.metadata))
    where = str(file.path)
    tensors = {name: bitnet.imported(tensor) for name, tensor in file.tensors.items()}
    try:
        module = models.by_arch(str(metadata.get("general.architecture", "")))
        config = module.config_from_metadata(metadata)
        specs = module.tensors(config)
        factors = tensors.get("rope_freqs.weight")
        if factors is not None:
            config = replace(config, rope=config.rope.with_factors(factors.dequantize()))
    except GgufkitError as error:
        raise type(error)(f"{where}: {error}") from None
    weights.check(specs, tensors, where)
    parts = [_part(spec, tensors, where) for spec in specs if spec.hf and spec.gguf in tensors]
    return Source(metadata, module, config, parts, set(tensors))


def _part(spec: models.TensorSpec, tensors: Mapping[str, Tensor], where: str) -> Part:
    head_rows = spec.shape[0] // spec.permute_heads if spec.permute_heads else 0
    scale = weights.scale_of(tensors, spec.gguf, where) if spec.is_matrix else 1.0
    inner = spec.is_matrix and spec.gguf.startswith("blk.")
    return Part(spec.hf[0], tensors[spec.gguf], head_rows, scale, inner)
