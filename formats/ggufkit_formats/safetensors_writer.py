"""Writing safetensors files: a header planned from names, dtypes and shapes, then the tensors' bytes in any order.

Tensors lie by the size of their numbers, the largest first, so that each is aligned whatever its length; so does the
reference implementation write them. A tensor may be open: its length is known when its bytes are (JSON text, say).
Such tensors are short, lie last, and the header, whose room was reserved, is written when all is known.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import GgufkitError, UsageError
from .gguf_strings import quote
from .source import reason

NBYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
          "I8": 1, "U8": 1, "BOOL": 1}  # fmt: skip
ALIGNMENT = 8  # of the first tensor, and so of all


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written. An open one is a vector of bytes, `shape` the most that it may have."""

    name: str
    dtype: str  # a key of NBYTES
    shape: tuple[int, ...]
    is_open: bool = False

    @property
    def n_elements(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n

    @property
    def nbytes(self) -> int:
        """Of an open tensor: the most that it may have."""
        return self.n_elements * NBYTES[self.dtype]


class Writer:
    """Writes one file; use it as a context manager.

    The file is there from the start and unfinished until the `with` block is left, which checks that every tensor got
    its bytes, and syncs; an exception removes it. Whoever writes a checkpoint renames its folder afterwards. Raises
    UsageError for bytes that were not planned, GgufkitError where the system refuses.
    """

    def __init__(self, path: str | os.PathLike[str], tensors: Iterable[Planned], metadata: Mapping[str, str]):
        self.path = Path(path)
        self.metadata = dict(metadata)
        self.tensors = sorted(tensors, key=lambda t: (t.is_open, -NBYTES[t.dtype], t.name))
        self._planned = {t.name: t for t in self.tensors}
        if len(self._planned) < len(self.tensors):
            raise UsageError(f"{self.path}: a tensor is planned twice")
        self._open: dict[str, bytes] = {t.name: b"" for t in self.tensors if t.is_open}
        self._written = dict.fromkeys(self._planned, 0)
        self._start, self._places = 0, {}
        header = self._header({t.name: t.nbytes for t in self.tensors})
        self._start = -(-(8 + len(header)) // ALIGNMENT) * ALIGNMENT
        self._file: BinaryIO | None = None

    def __enter__(self) -> Writer:
        try:
            self._file = self.path.open("xb")
        except (OSError, ValueError) as error:
            raise GgufkitError(f"{self.path}: {reason(error)}") from None
        return self

    def write(self, name: str, chunk: np.ndarray | bytes) -> None:
        """Append bytes to the tensor `name`."""
        data = chunk if isinstance(chunk, bytes) else np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        tensor = self._planned.get(name)
        if tensor is None:
            raise UsageError(f"{self.path}: tensor {quote(name)} was not planned")
        if self._written[name] + len(data) > tensor.nbytes:
            raise UsageError(f"tensor {quote(name)} has {tensor.nbytes} bytes; more were given")
        if tensor.is_open:
            self._open[name] += bytes(data)
        else:
            self._put(self._start + self._places[name] + self._written[name], data)
        self._written[name] += len(data)

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _header(self, nbytes: Mapping[str, int]) -> bytes:
        """The JSON, with each tensor's place for these sizes. Remembers the places."""
        entries: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        position = 0
        for tensor in self.tensors:
            self._places[tensor.name] = position
            end = position + nbytes[tensor.name]
            shape = [nbytes[tensor.name]] if tensor.is_open else list(tensor.shape)
            entries[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [position, end]}
            position = end
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")

    def _finish(self) -> None:
        for tensor in self.tensors:
            if not tensor.is_open and self._written[tensor.name] != tensor.nbytes:
                raise UsageError(
                    f"tensor {quote(tensor.name)} got {self._written[tensor.name]} of its {tensor.nbytes} bytes"
                )
        header = self._header(self._written)
        for name, data in self._open.items():
            self._put(self._start + self._places[name], data)
        length = self._start - 8
        self._put(0, length.to_bytes(8, "little") + header.ljust(length))
        file, self._file = self._file, None
        assert file is not None
        try:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        except OSError as error:
            raise GgufkitError(f"{self.path}: {reason(error)}") from None

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        assert self._file is not None
        try:
            self._file.seek(offset)
            self._file.write(data)
        except OSError as error:
            raise GgufkitError(f"{self.path}: {reason(error)}") from None

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink()


def shards(groups: Iterable[list[Planned]], limit: int) -> list[list[Planned]]:
    """Files of at most `limit` bytes each, in order; the tensors of a group share one, even where that is larger."""
    files: list[list[Planned]] = []
    size = 0
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if not files or size + nbytes > limit:
            files.append([])
            size = 0
        files[-1] += group
        size += nbytes
    return files
