"""GGUF files: `open` reads, `Plan` and `Writer` write.

The reader parses the header, checks all of it with Python integers against the bytes that are there, and trusts it
from then on. Versions 2 and 3, little and big endian, whole and split files. GGUF lists a tensor's dimensions from
the contiguous one outwards; they are reversed here, in `_tensor_info` and in the writer's twin of it, and nowhere else.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

from . import nf4_tensors
from .blocks import TensorType, UnknownType, by_id
from .errors import FormatError, GgufkitError, UnsupportedError
from .gguf_metadata import ArrayOfArrays, Cursor, Metadata, Slot, ValueType, parse
from .gguf_strings import StringArray, quote
from .gguf_writer import DEFAULT_ALIGNMENT, Plan, Planned, Writer, check_target
from .source import FileSource, looks_like
from .tensor import Tensor

__all__ = [
    "ArrayOfArrays",
    "GgufFile",
    "Metadata",
    "Plan",
    "Planned",
    "StringArray",
    "ValueType",
    "Writer",
    "check_target",
    "open",
]

MAX_DIMS = 4
MIN_ENTRY = 14  # bytes: key of one letter, type, value of one byte
MIN_TENSOR = 25  # bytes: name of one letter, no dimensions, type, offset
SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class GgufFile:
    """An open GGUF file, or all shards of a split one. Also a context manager.

    `metadata` is the first shard's. `paths` and `shards` are in shard order; a tensor's `source` is its shard, and
    its `offset` counts from the start of that shard. `stored` are the tensors that the file lists, `tensors` what they
    mean: the parts of an NF4 tensor are one there.
    """

    def __init__(self, shards: list[_Shard]):
        first = shards[0]
        self.path: Path = first.source.path
        self.version: int = first.version
        self.byte_order: str = "little" if first.order == "<" else "big"
        self.alignment: int = first.alignment
        self.metadata: Metadata = first.metadata
        self.sources: list[FileSource] = [shard.source for shard in shards]
        self.paths: list[Path] = [source.path for source in self.sources]
        self.nbytes: int = sum(source.nbytes for source in self.sources)
        self.stored: dict[str, Tensor] = {}
        for shard in shards:
            for name, tensor in shard.tensors.items():
                if name in self.stored:
                    raise FormatError(f"{shard.source.path}: tensor {quote(name)} stands in an earlier shard, too")
                self.stored[name] = tensor
        self.tensors: dict[str, Tensor] = nf4_tensors.join(self.metadata, self.stored, self.path)

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GgufFile({str(self.path)!r}, {len(self.tensors)} tensors, {len(self.metadata)} metadata keys)"


F = TypeVar("F", bound=GgufFile)


@overload
def open(path: str | os.PathLike[str]) -> GgufFile: ...
@overload
def open(path: str | os.PathLike[str], kind: type[F]) -> F: ...
def open(path: str | os.PathLike[str], kind: type[GgufFile] = GgufFile) -> GgufFile:
    """Open a GGUF file; any shard of a split file means the whole. `kind` is the class of what is returned.

    Raises FormatError where the file does not hold what it says, UnsupportedError for other versions of GGUF, and
    GgufkitError where it cannot be read. Source: the GGUF specification of ggml (docs/gguf.md there).
    """
    first = _Shard.open(path)
    shards = [first]
    try:
        if first.n_shards > 1:
            shards = _open_shards(first)
        return kind(shards)
    except BaseException:
        for shard in shards:
            shard.source.close()
        raise


# -- one file --------------------------------------------------------------------------------------


@dataclass
class _Shard:
    source: FileSource
    version: int
    order: str  # "<" or ">"
    alignment: int
    metadata: Metadata
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> _Shard:
        source = FileSource(path)
        try:
            return _read(source)
        except BaseException:
            source.close()
            raise

    @property
    def n_shards(self) -> int:
        return self.split("split.count") if "split.count" in self.metadata else 1

    def split(self, key: str) -> int:
        """One of the numbers that a shard carries."""
        if key not in self.metadata:
            raise FormatError(f"{self.source.path}: is a shard of a split file, but has no metadata {key!r}")
        value = self.metadata[key]
        if type(value) is not int or value < 0:
            found = self.metadata.type_name(key) if type(value) is not int else str(value)
            raise FormatError(f"{self.source.path}: metadata {key!r} is {found}; it must be an integer, not negative")
        return value


def _read(source: FileSource) -> _Shard:
    cursor = Cursor(source.path, source.view(0, source.nbytes).data)
    version = _magic_and_version(cursor)
    n_tensors = _count(cursor, "tensors", MIN_TENSOR)
    n_entries = _count(cursor, "metadata entries", MIN_ENTRY)
    slots = parse(cursor, n_entries)
    metadata = Metadata(cursor, slots)
    alignment = _alignment(cursor, metadata, slots)
    infos: dict[str, _Info] = {}
    for i in range(n_tensors):
        info = _tensor_info(cursor, i, alignment)
        if info.name in infos:
            raise cursor.error(f"tensor {quote(info.name)} at {info.at} stands there a second time")
        infos[info.name] = info
    data_start = -(-cursor.pos // alignment) * alignment
    sizes = _sizes(cursor, infos.values(), data_start)
    tensors = {
        name: Tensor(name, i.type, i.shape, sizes[name], data_start + i.offset, source, cursor.order)
        for name, i in infos.items()
    }
    return _Shard(source, version, cursor.order, alignment, metadata, tensors)


def _magic_and_version(cursor: Cursor) -> int:
    """The version; sets the cursor's byte order by it."""
    head = bytes(cursor.data[:256])
    if not head.startswith(b"GGUF"):
        what = looks_like(head)
        seems = f"the file is {what}" if what else f"the file begins with {head[:4]!r}, not b'GGUF'"
        raise cursor.error(f"not a GGUF file: {seems}")
    cursor.pos = 4
    version = cursor.uint(4, "the version")
    if version & 0xFFFF == 0 and version:  # small numbers are in the other half of the bytes
        cursor.order, cursor.pos = ">", 4
        version = cursor.uint(4, "the version")
    if version not in (2, 3):
        raise UnsupportedError(f"{cursor.path}: GGUF version {version} at 4; versions 2 and 3 can be read")
    return version


def _count(cursor: Cursor, what: str, smallest: int) -> int:
    at = cursor.pos
    n = cursor.uint(8, f"the number of {what}")
    left = cursor.end - cursor.pos
    if n > left // smallest:
        raise cursor.error(f"says it has {n} {what} at {at}, but the {left} bytes left hold at most {left // smallest}")
    return n


def _alignment(cursor: Cursor, metadata: Metadata, slots: dict[str, Slot]) -> int:
    key = "general.alignment"
    if key not in metadata:
        return DEFAULT_ALIGNMENT
    if slots[key].type != ValueType.UINT32:
        raise cursor.error(f"metadata {key!r} is {metadata.type_name(key)}; it must be UINT32")
    alignment = metadata[key]
    if alignment == 0 or alignment & (alignment - 1):
        raise cursor.error(f"metadata {key!r} is {alignment} at {slots[key].start}; it must be a power of two")
    return alignment


# -- tensors ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Info:
    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int  # from the start of the data
    nbytes: int  # -1 where the type's size is unknown
    at: int  # where this entry stands in the header


def _tensor_info(cursor: Cursor, index: int, alignment: int) -> _Info:
    at = cursor.pos
    name = cursor.name(f"the name of tensor {index}")
    what = f"tensor {quote(name)}"
    n_dims = cursor.uint(4, f"the number of dimensions of {what}")
    if n_dims > MAX_DIMS:
        raise cursor.error(f"{what} has {n_dims} dimensions at {cursor.pos - 4}; at most {MAX_DIMS} are allowed")
    dims_at = cursor.pos
    dims = [cursor.uint(8, f"dimension {i} of {what}") for i in range(n_dims)]
    # Dimensions of 0 make an empty tensor, as in ggml; its other dimensions must still make sense.
    if math.prod(max(d, 1) for d in dims) >= 1 << 63:
        raise cursor.error(f"{what} has dimensions {dims} at {dims_at}; their product must be less than 2**63")
    kind = by_id(cursor.uint(4, f"the type of {what}"))
    offset = cursor.uint(8, f"the offset of {what}")
    if offset % alignment:
        raise cursor.error(f"{what} has data offset {offset} at {cursor.pos - 8}, no multiple of {alignment}")
    shape = tuple(reversed(dims))
    if isinstance(kind, UnknownType):
        return _Info(name, kind, shape, offset, -1, at)
    cols = dims[0] if dims else 1
    if cols % kind.block:
        raise cursor.error(
            f"{what} of type {kind.name} has rows of {cols} at {dims_at}; they must be divisible by {kind.block}"
        )
    return _Info(name, kind, shape, offset, math.prod(dims) // kind.block * kind.block_nbytes, at)


def _sizes(cursor: Cursor, infos: Iterable[_Info], data_start: int) -> dict[str, int]:
    """Bytes of each tensor, after checking that all lie inside the file and none over another.

    A tensor of unknown type reaches to the next tensor's offset, or to the end of the file.
    """
    sizes: dict[str, int] = {}
    ordered = sorted(infos, key=lambda i: (i.offset, i.nbytes if i.nbytes >= 0 else 1))
    end, owner = 0, ""
    for i, info in enumerate(ordered):
        what = f"tensor {quote(info.name)}"
        start, nbytes = data_start + info.offset, info.nbytes
        if nbytes < 0:
            if start > cursor.end:
                raise cursor.error(f"{what} begins at {start}, but the file ends at {cursor.end}")
            stop = min(data_start + ordered[i + 1].offset, cursor.end) if i + 1 < len(ordered) else cursor.end
            nbytes = stop - start
            if nbytes == 0 and math.prod(info.shape):
                raise cursor.error(f"{what} of type {info.type.name} has no bytes between {start} and {stop}")
        if start + nbytes > cursor.end:
            raise cursor.error(f"{what} needs {nbytes} bytes at {start}, but the file ends at {cursor.end}")
        if nbytes and start < end:
            raise cursor.error(f"{what} begins at {start}, inside {owner}, which ends at {end}")
        if nbytes:
            end, owner = start + nbytes, what
        sizes[info.name] = nbytes
    return sizes


# -- split files -----------------------------------------------------------------------------------


def _open_shards(first: _Shard) -> list[_Shard]:
    """All shards of the file that `first` (any of them) belongs to, in order, each checked against the others."""
    path, n_shards = first.source.path, first.n_shards
    paths = _shard_paths(path, n_shards, first.split("split.no"))
    for i, other in enumerate(paths):
        if not other.exists():
            raise GgufkitError(f"{other}: no such file; it is shard {i + 1} of {n_shards} of {path.name}")
    shards: list[_Shard] = []
    try:
        for i, other in enumerate(paths):
            shard = first if i == first.split("split.no") else _Shard.open(other)
            shards.append(shard)
            if shard.n_shards != n_shards or shard.split("split.no") != i:
                raise FormatError(
                    f"{other}: says it is shard {shard.split('split.no') + 1} of {shard.n_shards}, "
                    f"but should be shard {i + 1} of {n_shards}"
                )
            if shard.order != first.order:
                raise FormatError(f"{other}: its byte order differs from that of {path.name}")
        wanted, found = first.split("split.tensors.count"), sum(len(s.tensors) for s in shards)
        if wanted != found:
            raise FormatError(
                f"{path}: the split file should have {wanted} tensors, but its {n_shards} shards hold {found}"
            )
        return shards
    except BaseException:
        for shard in shards:
            shard.source.close()
        raise


def _shard_paths(path: Path, n_shards: int, number: int) -> list[Path]:
    if number >= n_shards:
        raise FormatError(f"{path}: metadata 'split.no' is {number}, but 'split.count' is {n_shards}")
    match = SHARD_NAME.fullmatch(path.name)
    expected = f"NAME-{number + 1:05d}-of-{n_shards:05d}.gguf"
    if not match or (int(match[2]), int(match[3])) != (number + 1, n_shards):
        raise FormatError(f"{path}: is shard {number + 1} of {n_shards}, but is not called {expected}")
    return [path.with_name(f"{match[1]}-{i + 1:05d}-of-{n_shards:05d}.gguf") for i in range(n_shards)]
