"""Tensors of type NF4 in a new file: which codebook they share, what must be stored otherwise, and their bytes.

An NF4 tensor is several stored tensors (docs/formats/nf4.md). Codes are made slab by slab; the maxima that come with
them are kept until the codes are written, 4 bytes for each 64 weights of one tensor.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ggufkit_formats import nf4_tensors
from ggufkit_formats.blocks import TYPES
from ggufkit_formats.blocks.nf4 import FourBitType, dynamic_map
from ggufkit_formats.errors import FormatError
from ggufkit_formats.four_bit import FourBitTensor
from ggufkit_formats.gguf import Planned
from ggufkit_runtime.models import permuted_rows

from ..quantize.rules import Choice
from .job import Input

NAME = "NF4"
Step = Callable[[], np.ndarray]
Piece = tuple[Planned, int, Step]  # tensor, bytes of the source, what makes its next bytes


@dataclass(frozen=True, slots=True)
class Codebook:
    """What all NF4 tensors of a file share, and whether their maxima are to be quantized again."""

    kind: FourBitType
    nested: bool
    nested_levels: np.ndarray

    def metadata(self) -> dict[str, Any]:
        return nf4_tensors.metadata(self.kind, self.nested_levels if self.nested else None)


def codebook(inputs: list[Input], nested: bool) -> Codebook:
    """That of the source where it has NF4 tensors, so that codes can be copied; else bitsandbytes' own."""
    sources = [source for each in inputs if (source := _source(each)) is not None]
    usual = TYPES[NAME]
    assert isinstance(usual, FourBitType)
    kind = sources[0].four_bit if sources else usual
    maps = [source.maxima.levels for source in sources if source.maxima.levels is not None]
    return Codebook(kind, nested, maps[0] if maps else dynamic_map())


def _source(each: Input) -> FourBitTensor | None:
    """The tensor whose codes may be copied."""
    tensor = each.tensor
    return tensor if isinstance(tensor, FourBitTensor) and tensor.type.name == NAME else None


def fallback(each: Input, choice: Choice) -> Choice:
    """F16 for a matrix that cannot be NF4, with the reason."""
    cols, source = each.shape[-1], _source(each)
    if cols % 2:
        reason = f"rows of {cols} are of an odd length"
    elif source is not None and each.head_rows and cols % source.four_bit.block:
        reason = f"rows of {cols} hold no whole blocks of {source.four_bit.block}, and have to be reordered"
    else:
        return choice
    return replace(choice, type="F16", reason=reason, fell_back=True)


@dataclass(frozen=True, slots=True)
class Nf4Output:
    """One NF4 tensor of the new file."""

    input: Input
    book: Codebook
    nested: bool  # its own maxima: not where that would change those of the source

    @classmethod
    def of(cls, each: Input, book: Codebook) -> Nf4Output:
        source = _source(each)
        copied = source is not None and source.four_bit is book.kind
        regrouped = copied and source is not None and source.maxima.is_nested and bool(each.head_rows)
        return cls(each, book, book.nested and not regrouped)

    @property
    def keeps_maxima(self) -> bool:
        """Whether its maxima are not quantized again though the file type asks for that."""
        return self.book.nested and not self.nested

    @property
    def rows(self) -> list[nf4_tensors.Row]:
        return nf4_tensors.rows(self.input.name, self.input.shape, self.nested, self.book.kind.block)

    def steps(self, parts: list[Planned], weights: int) -> Iterator[Piece]:
        """What makes the bytes of the stored tensors, in order; a slab has about that many weights."""
        source = _source(self.input)
        if source is not None and source.four_bit is self.book.kind:
            yield from self._copied(source, parts, weights)
        else:
            yield from self._encoded(parts, weights)

    # -- codes that are copied -----------------------------------------------------------------------

    def _copied(self, source: FourBitTensor, parts: list[Planned], weights: int) -> Iterator[Piece]:
        rows, cols, head_rows = source.rows, source.cols, self.input.head_rows
        unit = max(1, head_rows)
        step = max(unit, weights // max(1, cols) // unit * unit)

        def codes(start: int, stop: int) -> np.ndarray:
            packed = source.read_packed(start * cols, stop * cols)
            if not head_rows:
                return packed
            return packed.reshape(stop - start, cols // 2)[permuted_rows(stop - start, (stop - start) // head_rows)]

        def maxima() -> np.ndarray:
            found = _finite(source.maxima.read(0, source.maxima.n))
            if head_rows:
                found = found.reshape(rows, -1)[permuted_rows(rows, rows // head_rows)].reshape(-1)
            return found

        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield parts[0], (stop - start) * cols // 2, lambda start=start, stop=stop: codes(start, stop)
        levels, nbytes = source.maxima.levels, source.nbytes - rows * cols // 2
        if self.nested and levels is not None and levels.tobytes() == self.book.nested_levels.tobytes():
            yield parts[1], nbytes, lambda: source.maxima.read_codes(0, source.maxima.n)
            second, offset = source.maxima.read_second, source.maxima.read_offset
            yield parts[2], 0, lambda: nf4_tensors.nested_bytes(_finite(second()), _finite(offset()))
        else:
            yield from self._maxima(parts, nbytes, maxima)

    # -- codes that are made ---------------------------------------------------------------------------

    def _encoded(self, parts: list[Planned], weights: int) -> Iterator[Piece]:
        from ggufkit_kernels.cpu.encode.four_bit import encode_4bit

        from .pipeline import decoded, share

        each, kind = self.input, self.book.kind
        tensor = each.tensor
        assert tensor is not None
        rows, cols = tensor.rows, tensor.cols
        unit = math.lcm(max(1, each.head_rows), kind.block // math.gcd(kind.block, cols))  # whole blocks
        step = max(unit, weights // max(1, cols) // unit * unit)
        starts = range(0, rows, step)
        collected = _Collected(len(starts))

        def codes(i: int, start: int, stop: int) -> np.ndarray:
            with collected.part(i):
                x = decoded(tensor, start, stop, each.head_rows)
                kind.check_finite(x)
                packed, maxima = encode_4bit(x.reshape(-1), kind.levels, kind.block)
                collected.found[i] = maxima
                return packed

        for i, start in enumerate(starts):
            stop = min(start + step, rows)
            yield parts[0], share(tensor, start, stop), lambda a=(i, start, stop): codes(*a)
        yield from self._maxima(parts, 0, collected.all)

    def _maxima(self, parts: list[Planned], nbytes: int, maxima: Callable[[], np.ndarray]) -> Iterator[Piece]:
        if not self.nested:
            yield parts[1], nbytes, lambda: nf4_tensors.encode_absmax(maxima(), False)[0]
            return
        both = _Once(lambda: nf4_tensors.encode_absmax(maxima(), True, self.book.nested_levels))
        yield parts[1], nbytes, lambda: both()[0]
        yield parts[2], 0, lambda: both()[1]


def _finite(maxima: Any) -> Any:
    if not np.isfinite(maxima).all():
        raise FormatError("maxima of blocks that are NaN or infinite")
    return maxima


class _Collected:
    """Maxima of a tensor's slabs, which workers make at the same time."""

    def __init__(self, n: int):
        self.found: list[np.ndarray] = [np.empty(0, np.float32)] * n
        self._done = [threading.Event() for _ in range(n)]

    def part(self, i: int) -> _Part:
        return _Part(self._done[i])

    def all(self) -> np.ndarray:
        """All of them in order. Waits for slabs that other workers are at; all were begun before this is called."""
        for done in self._done:
            done.wait()
        return np.concatenate(self.found)


class _Part:
    """Marks a slab as done, failed or not: nobody may wait for ever."""

    def __init__(self, done: threading.Event):
        self._done = done

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._done.set()


class _Once:
    """A value that several workers want, made by the first."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._value, self._lock = make, None, threading.Lock()

    def __call__(self) -> Any:
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value
