"""GGUF metadata: parsed and checked once, decoded when asked for.

Opening a file walks over each value just far enough to know where it ends; a vocabulary of 262,144 tokens stays
bytes in the mapped file until a token is asked for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .errors import FormatError
from .gguf_strings import StringArray, quote, walk

MAX_NAME = 65535  # bytes of a key or a tensor name, from the specification
MAX_DEPTH = 8  # arrays in arrays; the specification sets no limit, real files use 1


class ValueType(enum.IntEnum):
    """Types of metadata values, by their numbers in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES = {
    ValueType.UINT8: np.dtype("u1"),
    ValueType.INT8: np.dtype("i1"),
    ValueType.UINT16: np.dtype("u2"),
    ValueType.INT16: np.dtype("i2"),
    ValueType.UINT32: np.dtype("u4"),
    ValueType.INT32: np.dtype("i4"),
    ValueType.FLOAT32: np.dtype("f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("u8"),
    ValueType.INT64: np.dtype("i8"),
    ValueType.FLOAT64: np.dtype("f8"),
}
_KNOWN = {int(t): t for t in ValueType}
_SMALLEST = {ValueType.STRING: 8, ValueType.ARRAY: 12} | {t: d.itemsize for t, d in DTYPES.items()}


class Cursor:
    """A position in a file's bytes. Each read is checked against the bytes that remain."""

    __slots__ = ("data", "end", "order", "path", "pos")

    def __init__(self, path: object, data: memoryview, order: str = "<"):
        self.path = path
        self.data = data
        self.end = len(data)
        self.order = order
        self.pos = 0

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.path}: {message}")

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.end - self.pos:
            raise self.error(f"{what} needs {nbytes} bytes at {self.pos}, but the file ends at {self.end}")

    def uint(self, nbytes: int, what: str) -> int:
        self.need(nbytes, what)
        raw = self.data[self.pos : self.pos + nbytes]
        self.pos += nbytes
        return int.from_bytes(raw, "little" if self.order == "<" else "big")

    def name(self, what: str) -> str:
        """A key or a tensor name: UTF-8, 1 to 65535 bytes."""
        at = self.pos
        length = self.uint(8, f"the length of {what}")
        if length == 0:
            raise self.error(f"{what} at {at} is empty")
        if length > MAX_NAME:
            raise self.error(f"{what} at {at} is {length} bytes long; at most {MAX_NAME} are allowed")
        self.need(length, what)
        raw = bytes(self.data[self.pos : self.pos + length])
        self.pos += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} at {at} is not UTF-8: {quote(raw)}") from None


class Slot(NamedTuple):
    """Where a value stands. `item` and `n` are of arrays."""

    type: ValueType
    start: int  # of the value, or of an array's first item
    end: int
    item: ValueType = ValueType.UINT8
    n: int = 0


# -- parsing: where each value ends ----------------------------------------------------------------


def parse(cursor: Cursor, n_entries: int) -> dict[str, Slot]:
    """The keys and the places of `n_entries` values from the cursor on, each checked."""
    slots: dict[str, Slot] = {}
    for i in range(n_entries):
        at = cursor.pos
        key = cursor.name(f"metadata key {i}")
        if key in slots:
            raise cursor.error(f"metadata key {quote(key)} at {at} stands there a second time")
        what = f"metadata {quote(key)}"
        slots[key] = _skip(cursor, _value_type(cursor, what), what, 0)
    return slots


def _value_type(cursor: Cursor, what: str) -> ValueType:
    at = cursor.pos
    number = cursor.uint(4, f"the type of {what}")
    if number not in _KNOWN:
        raise cursor.error(f"{what} has value type {number} at {at}; 0 to {max(ValueType)} are allowed")
    return _KNOWN[number]


def _skip(cursor: Cursor, kind: ValueType, what: str, depth: int) -> Slot:
    """Move the cursor behind a value of that type."""
    if kind == ValueType.ARRAY:
        return _skip_array(cursor, what, depth + 1)
    start = cursor.pos
    if kind == ValueType.STRING:
        length = cursor.uint(8, f"the length of {what}")
        cursor.need(length, what)
        cursor.pos += length
        return Slot(kind, start, cursor.pos)
    cursor.need(DTYPES[kind].itemsize, what)
    if kind == ValueType.BOOL and cursor.data[start] > 1:
        raise cursor.error(f"{what} is a BOOL with value {cursor.data[start]} at {start}; 0 and 1 are allowed")
    cursor.pos += DTYPES[kind].itemsize
    return Slot(kind, start, cursor.pos)


def _skip_array(cursor: Cursor, what: str, depth: int) -> Slot:
    at = cursor.pos
    if depth > MAX_DEPTH:
        raise cursor.error(f"{what} nests arrays more than {MAX_DEPTH} deep at {at}")
    item = _value_type(cursor, f"items of {what}")
    count = cursor.uint(8, f"the length of {what}")
    start, left = cursor.pos, cursor.end - cursor.pos
    if count > left // _SMALLEST[item]:
        raise cursor.error(
            f"{what} says it has {count} items of {item.name} at {at}, "
            f"but the {left} bytes left hold at most {left // _SMALLEST[item]}"
        )
    if item == ValueType.STRING:
        cursor.pos = _strings_end(cursor, count, what)
    elif item == ValueType.ARRAY:
        for _ in range(count):
            _skip_array(cursor, what, depth + 1)
    else:
        cursor.pos += count * DTYPES[item].itemsize
        if item == ValueType.BOOL and count:
            _check_bools(cursor, start, count, what)
    return Slot(ValueType.ARRAY, start, cursor.pos, item, count)


def _check_bools(cursor: Cursor, start: int, count: int, what: str) -> None:
    flags = np.frombuffer(cursor.data, np.uint8, count, start)
    if flags.max() > 1:
        i = int(np.argmax(flags > 1))
        raise cursor.error(f"item {i} of {what} is a BOOL with value {flags[i]} at {start + i}; 0 and 1 are allowed")


def _strings_end(cursor: Cursor, count: int, what: str) -> int:
    """Where `count` strings end."""
    end = walk(cursor.data, cursor.pos, count, cursor.order)
    if end is None:  # the same again, slowly, to say which string it was
        for i in range(count):
            length = cursor.uint(8, f"the length of string {i} of {what}")
            cursor.need(length, f"string {i} of {what}")
            cursor.pos += length
    assert end is not None
    return end


# -- values ----------------------------------------------------------------------------------------


class ArrayOfArrays(list):
    """An ARRAY of ARRAY in typed form: written as such even when it is empty."""


class Metadata(Mapping[str, Any]):
    """Keys and values of a GGUF file, in file order; a value is decoded each time it is asked for.

    `metadata[key]` is an int, float, bool or str; an array of numbers is a 1-D ndarray view of the file, one of
    strings a StringArray, one of arrays a list. Raises FormatError for a string that is not UTF-8.
    """

    def __init__(self, cursor: Cursor, slots: dict[str, Slot]):
        self._data, self._order, self._path = cursor.data, cursor.order, cursor.path
        self._slots = slots

    def __getitem__(self, key: str) -> Any:
        value = self._value(self._slots[key], key)
        if isinstance(value, bytes):
            raise FormatError(f"{self._path}: metadata {quote(key)} is not UTF-8: {quote(value)}")
        if isinstance(value, ArrayOfArrays):
            return _plain(value)
        return value.item() if isinstance(value, np.generic) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def typed(self, key: str) -> Any:
        """The same value in a form that is written with the same GGUF type.

        np.generic for numbers and bools, str (bytes where it is not UTF-8), ndarray, StringArray, ArrayOfArrays.
        """
        return self._value(self._slots[key], key)

    def copy(self) -> dict[str, Any]:
        """All typed values, as a copy in one file needs them: without `split.*`, which say how a file was cut."""
        return {key: self.typed(key) for key in self if not key.startswith("split.")}

    def type_name(self, key: str) -> str:
        """The GGUF type: `UINT32`, `ARRAY[STRING]`."""
        slot = self._slots[key]
        return f"ARRAY[{slot.item.name}]" if slot.type == ValueType.ARRAY else slot.type.name

    def _value(self, slot: Slot, key: str) -> Any:
        if slot.type == ValueType.ARRAY:
            return self._array(slot, key)
        if slot.type == ValueType.STRING:
            raw = bytes(self._data[slot.start + 8 : slot.end])
            try:
                return raw.decode("utf-8")
            except UnicodeDecodeError:
                return raw
        return np.frombuffer(self._data, DTYPES[slot.type].newbyteorder(self._order), 1, slot.start)[0]

    def _array(self, slot: Slot, key: str) -> Any:
        if slot.item == ValueType.STRING:
            what = f"metadata {quote(key)}"
            return StringArray(self._data, slot.start, slot.end, slot.n, self._order, f"{self._path}: {what}")
        if slot.item == ValueType.ARRAY:
            cursor = Cursor(self._path, self._data, self._order)
            cursor.pos = slot.start
            inner = (_skip_array(cursor, quote(key), 1) for _ in range(slot.n))
            return ArrayOfArrays(self._array(item, key) for item in inner)
        dtype = DTYPES[slot.item].newbyteorder(self._order)
        if not slot.n:
            return np.empty(0, dtype)
        return np.frombuffer(self._data, dtype, slot.n, slot.start)


def _plain(values: ArrayOfArrays) -> list[Any]:
    return [_plain(v) if isinstance(v, ArrayOfArrays) else v for v in values]
