"""What a source is made into before anything is written: names, metadata, and where each tensor's values are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ggufkit_formats.tensor import Tensor

from ..quantize.file_types import ModelFacts

FILE_TYPE = "general.file_type"
QUANTIZATION_VERSION_KEY = "general.quantization_version"


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor that will be written, and what it is written from: a tensor of the source, or computed values."""

    name: str  # in GGUF
    shape: tuple[int, ...]  # NumPy order
    tensor: Tensor | None
    values: np.ndarray | None = None  # float32, of `shape`
    head_rows: int = 0  # > 0: rows in a head, reordered from halves to pairs
    scale: float = 0.0  # > 0: only the weights' signs are written; what they are times stands in a tensor beside

    @property
    def n_elements(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def label(self) -> str:
        """The name for messages: the source's, and GGUF's where it differs."""
        theirs = self.tensor.name if self.tensor is not None else self.name
        return f"tensor {theirs!r}" + (f" ({self.name})" if theirs != self.name else "")


@dataclass(slots=True)
class Job:
    """A source, read as far as its headers."""

    source: str  # for messages
    name: str  # for the default output
    metadata: dict[
        str, Any
    ]  # typed, in the order of the file; FILE_TYPE and the quantization version are filled in later
    inputs: list[Input]
    facts: ModelFacts
    close: Callable[[], None]
    is_gguf: bool = False
    notes: list[str] = field(default_factory=list)  # what the user should know
