"""Writing GGUF: a `Plan` knows every byte's place before the first is written, a `Writer` streams into it.

Version 3, little endian. The file appears under its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .blocks import TensorType, UnknownType, find
from .errors import GgufkitError, UnsupportedError, UsageError
from .gguf_metadata import DTYPES, MAX_NAME, ArrayOfArrays, ValueType
from .gguf_strings import StringArray, quote
from .source import reason
from .tensor import Tensor

VERSION = 3
DEFAULT_ALIGNMENT = 32
_TYPE_OF_DTYPE = {dtype: kind for kind, dtype in DTYPES.items()}


# -- metadata values -------------------------------------------------------------------------------


def encode_value(value: Any, key: str = "") -> bytes:
    """A metadata value with its GGUF type before it, as the file holds it.

    bool, str, bytes (a STRING), np.generic and 1-D np.ndarray by dtype; Python int is UINT32 (INT32 if negative,
    64 bits if needed), float FLOAT32; a list of str is ARRAY[STRING], of int ARRAY[INT32] (INT64 if needed), of float
    ARRAY[FLOAT32], of bool ARRAY[BOOL], of lists or arrays ARRAY[ARRAY]. An empty list has no type: UsageError.
    """
    kind, body = _encode(value, key)
    return struct.pack("<I", kind) + body


def _encode(value: Any, key: str) -> tuple[ValueType, bytes]:
    if isinstance(value, str | bytes):  # before np.generic, which np.str_ is, too
        return ValueType.STRING, _string(value, key)
    if isinstance(value, np.generic):
        return _numbers(value.dtype, key), value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, bool):
        return ValueType.BOOL, bytes([value])
    if isinstance(value, int):
        return _encode(_fitting(value, key), key)
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            single = np.float32(value)
        if math.isfinite(value) and not np.isfinite(single):
            raise UsageError(f"metadata {key!r}: {value!r} does not fit FLOAT32; use np.float64")
        return _encode(single, key)
    if isinstance(value, StringArray | np.ndarray | Sequence):
        item, count, body = _encode_array(value, key)
        return ValueType.ARRAY, struct.pack("<IQ", item, count) + body
    raise UsageError(f"metadata {key!r}: a {type(value).__name__} has no GGUF type")


def _fitting(value: int, key: str) -> np.generic:
    for dtype in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return dtype(value)
    raise UsageError(f"metadata {key!r}: {value} does not fit 64 bits")


def _encode_array(value: Any, key: str) -> tuple[ValueType, int, bytes]:
    """Item type, number of items, their bytes."""
    if isinstance(value, StringArray):
        return ValueType.STRING, len(value), value.encoded()
    if isinstance(value, np.ndarray):
        if value.ndim != 1:
            raise UsageError(f"metadata {key!r}: an array of {value.ndim} dimensions; GGUF arrays have one")
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        return _numbers(value.dtype, key), len(value), little.tobytes()
    if isinstance(value, ArrayOfArrays) or (value and all(_is_array(v) for v in value)):
        encoded = [_encode_array(v, key) for v in value]
        return ValueType.ARRAY, len(value), b"".join(struct.pack("<IQ", k, n) + body for k, n, body in encoded)
    if not value:
        raise UsageError(f"metadata {key!r}: an empty list has no GGUF type; use StringArray.of([]) or an ndarray")
    if all(isinstance(v, str | bytes) for v in value):
        return ValueType.STRING, len(value), b"".join(_string(v, key) for v in value)
    if all(isinstance(v, bool | np.bool_) for v in value):
        return _encode_array(np.array(value, dtype=np.bool_), key)
    if all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in value):
        small = min(value) >= -(1 << 31) and max(value) < 1 << 31
        return _encode_array(_as_array(value, np.int32 if small else np.int64, key), key)
    if all(isinstance(v, int | float | np.integer | np.floating) and not isinstance(v, bool) for v in value):
        return _encode_array(_as_array(value, np.float32, key), key)
    raise UsageError(f"metadata {key!r}: a list of {', '.join(sorted({type(v).__name__ for v in value}))}")


def _is_array(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _as_array(value: Sequence[Any], dtype: Any, key: str) -> np.ndarray:
    try:
        return np.array(value, dtype=dtype)
    except OverflowError:
        raise UsageError(f"metadata {key!r}: an item does not fit {np.dtype(dtype).name}") from None


def _numbers(dtype: np.dtype, key: str) -> ValueType:
    kind = _TYPE_OF_DTYPE.get(dtype.newbyteorder("="))
    if kind is None:
        raise UsageError(f"metadata {key!r}: dtype {dtype} has no GGUF type")
    return kind


def _string(value: str | bytes, key: str) -> bytes:
    try:
        raw = value.encode("utf-8") if isinstance(value, str) else value
    except UnicodeEncodeError:
        raise UsageError(f"metadata {key!r}: {quote(value)} cannot be written as UTF-8") from None
    return struct.pack("<Q", len(raw)) + raw


# -- plan ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written: `offset` counts from the start of the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]  # NumPy order
    nbytes: int
    offset: int


class Plan:
    """The header of a file and the place of every tensor in it, without their bytes.

    `tensors` are (name, type or its name, shape in NumPy order), with the number of bytes as a fourth item where the
    type's size is unknown; or a reader's `Tensor`s. `alignment` is by default what `general.alignment` in `metadata`
    says, else 32. Raises UsageError for names that are empty, too long or not unique, and for values that GGUF has no
    type for; FormatError for rows that blocks do not divide.
    """

    def __init__(self, metadata: Mapping[str, Any], tensors: Iterable[Any], alignment: int | None = None):
        self.metadata: dict[str, Any] = dict(metadata)
        self.alignment = self._settle_alignment(alignment)
        if int(self.metadata.get("split.count", 1)) > 1:
            raise UsageError("a plan is one file: leave out the metadata keys that begin with split.")
        listed = [self._described(tensor) for tensor in tensors]
        names = [name for name, *_ in listed]
        for name in (*self.metadata, *names):
            _check_name(name)
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise UsageError(f"tensor {quote(twice)} is planned twice")
        infos, offset, places = [], 0, []
        for name, kind, shape, nbytes in listed:
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
            infos.append(_string(name, name) + dims + struct.pack("<IQ", kind.id, offset))
            places.append(offset)
            offset += self._padded(nbytes)
        head = struct.pack("<4sIQQ", b"GGUF", VERSION, len(listed), len(self.metadata))
        entries = [_string(key, key) + encode_value(value, key) for key, value in self.metadata.items()]
        header = b"".join([head, *entries, *infos])
        self.header: bytes = header + b"\0" * (self._padded(len(header)) - len(header))
        start = len(self.header)
        self.tensors: list[Planned] = [
            Planned(name, kind, shape, nbytes, start + place)
            for (name, kind, shape, nbytes), place in zip(listed, places, strict=True)
        ]
        self.nbytes: int = start + offset  # the last tensor is padded, too, as llama.cpp and gguf do

    def _padded(self, n: int) -> int:
        return -(-n // self.alignment) * self.alignment

    def _settle_alignment(self, asked: int | None) -> int:
        said = self.metadata.get("general.alignment")
        if said is not None and asked is not None and int(said) != asked:
            raise UsageError(f"alignment {asked} asked for, but metadata 'general.alignment' is {said}")
        alignment = int(said if said is not None else asked if asked is not None else DEFAULT_ALIGNMENT)
        if not 0 < alignment < 1 << 32 or alignment & (alignment - 1):
            raise UsageError(f"alignment {alignment} is no power of two")
        if said is not None or alignment != DEFAULT_ALIGNMENT:
            self.metadata["general.alignment"] = np.uint32(alignment)
        return alignment

    @staticmethod
    def _described(tensor: Any) -> tuple[str, TensorType, tuple[int, ...], int]:
        if isinstance(tensor, Tensor):
            if tensor.byte_order == ">" and isinstance(tensor.type, UnknownType):
                what = f"tensor {quote(tensor.name)}: type {tensor.type.name}"
                raise UnsupportedError(f"{what} is unknown, so its big-endian bytes cannot be swapped")
            tensor = (tensor.name, tensor.type, tensor.shape, tensor.nbytes)
        name, kind, shape, *size = tensor
        kind, shape = find(kind), tuple(int(n) for n in shape)
        if not 0 <= kind.id < 1 << 32:
            raise UsageError(f"tensor {quote(name)}: type {kind.name} has no number in GGUF")
        if len(shape) > 4:
            raise UsageError(f"tensor {quote(name)} has {len(shape)} dimensions; GGUF allows 4")
        if any(n < 0 for n in shape) or math.prod(shape) >= 1 << 63:
            raise UsageError(f"tensor {quote(name)} has shape {shape}")
        cols = shape[-1] if shape else 1
        try:
            nbytes = size[0] if size else kind.row_nbytes(cols) * math.prod(shape[:-1])
        except GgufkitError as error:
            raise type(error)(f"tensor {quote(name)}: {error}") from None
        return name, kind, shape, nbytes


def _check_name(name: str) -> None:
    length = len(_string(name, name)) - 8
    if not 1 <= length <= MAX_NAME:
        raise UsageError(f"the name {quote(name)} is {length} bytes long; 1 to {MAX_NAME} are allowed")


# -- writer ----------------------------------------------------------------------------------------


def check_target(path: str | os.PathLike[str], nbytes: int = 0, overwrite: bool = False) -> None:
    """Raise what writing a file of `nbytes` there would fail with, as far as it can be known before.

    GgufkitError for an existing file without `overwrite`, a missing or read-only folder, a full disk,
    or a target that is no regular file.
    """
    target = Path(path)
    folder = target.parent
    try:
        mode = target.stat().st_mode if target.exists() else None
        if not folder.is_dir():
            raise GgufkitError(f"{target}: there is no folder {folder}")
        if mode is not None and not stat.S_ISREG(mode):
            raise GgufkitError(f"{target}: is a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}, not a file")
        if not overwrite and os.path.lexists(target):
            raise GgufkitError(f"{target} exists already; --overwrite (overwrite=True) replaces it")
        check_room(target, folder, nbytes)
    except (OSError, ValueError) as error:
        raise GgufkitError(f"{target}: {reason(error)}") from None


def check_room(target: Path, folder: Path, nbytes: int) -> None:
    """Raise GgufkitError where `folder` cannot be written to, or has no room for a target of `nbytes` bytes."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise GgufkitError(f"{target}: the folder {folder} cannot be written to")
    if hasattr(os, "statvfs"):
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize
        if space.f_blocks and free < nbytes:
            raise GgufkitError(f"{target}: needs {nbytes} bytes, but only {free} are free in {folder}")


class Writer:
    """Writes a planned file, tensor by tensor; use it as a context manager.

    The bytes go to a hidden file beside the target, which takes the target's name on leaving the `with` block: after
    fsync, and only if every tensor got exactly its bytes. With an exception (also KeyboardInterrupt) it is removed.
    Raises UsageError for bytes out of order, and GgufkitError where the system refuses to write.
    """

    def __init__(self, path: str | os.PathLike[str], plan: Plan, overwrite: bool = False):
        self.path = Path(path)
        self.plan = plan
        self.overwrite = overwrite
        self._fd = -1
        self._temporary = self.path
        self._current = 0  # index of the tensor that is being written
        self._written = 0  # bytes of it so far

    def __enter__(self) -> Writer:
        check_target(self.path, self.plan.nbytes, self.overwrite)
        self._temporary = self.path.with_name(f".{self.path.name[:200]}.{secrets.token_hex(4)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            self._fd = os.open(self._temporary, flags, 0o666)
        except (OSError, ValueError) as error:
            raise GgufkitError(f"{self.path}: {reason(error)}") from None
        try:
            self._put(self.plan.header)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, chunk: np.ndarray | bytes | memoryview) -> None:
        """Append bytes to the tensor `name`. Tensors come in the plan's order, each in any number of chunks."""
        data = _as_bytes(chunk)
        self._advance()
        tensors = self.plan.tensors
        if self._current == len(tensors):
            raise UsageError(f"tensor {quote(name)}: all planned tensors are written")
        tensor = tensors[self._current]
        if name != tensor.name:
            had = f" ({self._written} of {tensor.nbytes} bytes written)" if self._written else ""
            raise UsageError(f"tensor {quote(name)} is out of order: {quote(tensor.name)}{had} is next")
        if self._written + len(data) > tensor.nbytes:
            raise UsageError(f"tensor {quote(name)} has {tensor.nbytes} bytes; {self._written + len(data)} were given")
        self._put(data)
        self._written += len(data)

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except OSError as error:
            self._discard()
            raise GgufkitError(f"{self.path}: {reason(error)}") from None
        except BaseException:
            self._discard()
            raise

    def _advance(self) -> None:
        """Step over finished (and empty) tensors, padding each."""
        tensors = self.plan.tensors
        while self._current < len(tensors) and self._written == tensors[self._current].nbytes:
            self._put(b"\0" * (-self._written % self.plan.alignment))
            self._current += 1
            self._written = 0

    def _finish(self) -> None:
        self._advance()
        if self._current < len(self.plan.tensors):
            tensor = self.plan.tensors[self._current]
            raise UsageError(f"tensor {quote(tensor.name)} got {self._written} of its {tensor.nbytes} bytes")
        os.fsync(self._fd)
        size = os.fstat(self._fd).st_size
        assert size == self.plan.nbytes, (size, self.plan.nbytes)
        fd, self._fd = self._fd, -1
        os.close(fd)
        check_target(self.path, 0, self.overwrite)  # another program may have made the file meanwhile
        self._temporary.replace(self.path)
        _sync_folder(self.path.parent)

    def _put(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._fd, left[: 1 << 30]) :]
        except OSError as error:
            raise GgufkitError(f"{self.path}: {reason(error)}") from None

    def _discard(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def _as_bytes(chunk: np.ndarray | bytes | memoryview) -> memoryview:
    if isinstance(chunk, np.ndarray):
        return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return memoryview(chunk).cast("B")


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where folders can be synced."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
