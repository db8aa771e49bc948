"""Arrays of strings in GGUF metadata: length (uint64), bytes, length, bytes … with no index; decoded on demand."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from .errors import FormatError

WINDOW = 1 << 18  # bytes looked at in one go
STEP = 512  # strings walked one by one where a window helped little


def quote(name: str | bytes) -> str:
    """A name from a file as error messages show it: quoted, escaped, at most 80 characters."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return repr(text) if len(text) <= 80 else repr(text[:79] + "…")


def walk(data: memoryview, start: int, count: int, order: str = "<", starts: np.ndarray | None = None) -> int | None:
    """Where `count` strings from `start` on end, or None if that is outside of `data`.

    Fills `starts`, int64 (count,), with the place of each string's length. The strings are a chain, to be followed
    link by link, which costs Python 0.2 µs a string. Most strings are short, though: the few places where a uint64
    below 256 can be read are nearly all true lengths, so NumPy finds them for a window at once, and the chain is
    checked rather than followed: a place is believed only if the string before it ends there. 4 times as fast.
    """
    unpack, end = struct.Struct(order + "Q").unpack_from, len(data)
    pos, i, step = start, 0, STEP
    while i < count:
        links = 0
        n = min(WINDOW, end - pos - 7)
        if n > 0 and count - i >= 64:  # from pos, where a string begins, to the last one that begins in the window
            values = np.ndarray((n,), order + "u8", data, pos, (1,))
            places = np.flatnonzero(values < 256)
            if len(places) and places[0] == 0:
                unlinked = np.flatnonzero(places[:-1] + 8 + values[places[:-1]].astype(np.int64) != places[1:])
                links = min(int(unlinked[0]) if len(unlinked) else len(places) - 1, count - i - 1)
                if starts is not None:
                    starts[i : i + links] = places[:links] + pos
                pos, i = pos + int(places[links]), i + links
        step = 1 if links >= STEP else max(STEP, 2 * step)  # where windows help little, ever fewer are looked at
        for k in range(i, min(count, i + step)):
            if pos + 8 > end:
                return None
            if starts is not None:
                starts[k] = pos
            pos += 8 + unpack(data, pos)[0]
        i += step
    return pos if pos <= end else None


class StringArray(Sequence[str]):
    """An ARRAY of STRING, still in the file's bytes. Items are decoded when asked for; equal to a list of the same.

    Raises FormatError for an item that is not UTF-8; `raw(i)` and `raw_items()` give the bytes.
    """

    __hash__ = None  # type: ignore[assignment]  # compares by content

    def __init__(self, data: memoryview, start: int, end: int, count: int, order: str = "<", what: str = "strings"):
        self._data, self._start, self._end, self._count = data, start, end, count
        self._order, self._what = order, what
        self._offsets: np.ndarray | None = None  # (count,) int64, where each item's length stands

    @classmethod
    def of(cls, items: Sequence[str | bytes]) -> StringArray:
        """A StringArray that holds these strings: an empty one keeps its type when it is written."""
        raw = [item.encode() if isinstance(item, str) else item for item in items]
        data = b"".join(len(item).to_bytes(8, "little") + item for item in raw)
        return cls(memoryview(data), 0, len(data), len(raw))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._decode(self.raw(i), i) for i in range(*index.indices(self._count))]
        return self._decode(self.raw(index), index)

    def __iter__(self) -> Iterator[str]:
        return (self._decode(raw, i) for i, raw in enumerate(self.raw_items()))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringArray):
            return len(self) == len(other) and all(
                a == b for a, b in zip(self.raw_items(), other.raw_items(), strict=True)
            )
        if isinstance(other, list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __repr__(self) -> str:
        return f"StringArray({self._count} strings)"

    def raw(self, index: int) -> bytes:
        """The bytes of one item."""
        i = range(self._count)[index]
        if self._offsets is None:
            self._offsets = np.empty(self._count, dtype=np.int64)
            end = walk(self._data, self._start, self._count, self._order, self._offsets)
            assert end == self._end
        start = int(self._offsets[i]) + 8
        stop = int(self._offsets[i + 1]) if i + 1 < self._count else self._end
        return bytes(self._data[start:stop])

    def raw_items(self) -> Iterator[bytes]:
        """The bytes of each item in turn, without an index being built."""
        unpack, data, pos = struct.Struct(self._order + "Q").unpack_from, self._data, self._start
        for _ in range(self._count):
            start = pos + 8
            pos = start + unpack(data, pos)[0]
            yield bytes(data[start:pos])

    def encoded(self) -> bytes:
        """The items as a little-endian file holds them: length, bytes, length, bytes …"""
        if self._order == "<":
            return bytes(self._data[self._start : self._end])
        return b"".join(len(item).to_bytes(8, "little") + item for item in self.raw_items())

    def _decode(self, raw: bytes, index: int) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"string {index} of {self._what} is not UTF-8: {quote(raw)}") from None
