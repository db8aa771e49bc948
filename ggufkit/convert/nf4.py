"""Tensors of type NF4 in a new file: which codebook they share, what must be stored otherwise, and their bytes.

An NF4 tensor is several stored tensors (docs/formats/nf4.md). Codes are made slab by slab; the maxima that come with
them are kept until the codes are written, 4 bytes for each 64 weights of one tensor. Where maxima are quantized again,
what the weights became is known only after the last slab: to measure errors, the tensor's slabs are read once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from ggufkit_formats import nf4_tensors
from ggufkit_formats.blocks import TYPES
from ggufkit_formats.blocks.nf4 import (
    NESTED_BLOCK,
    FourBitType,
    decode_maxima,
    dynamic_map,
    encode_maxima,
    unpack_4bit,
)
from ggufkit_formats.errors import FormatError
from ggufkit_formats.four_bit import FourBitTensor
from ggufkit_formats.gguf import Planned
from ggufkit_runtime.models import permuted_rows

from ..compare import PIECE, Summed
from ..quantize.rules import Choice
from .collected import Collected, Once
from .job import Input

NAME = "NF4"
Step = Callable[[Summed | None], np.ndarray]
Piece = tuple[Planned, int, Step]  # tensor, bytes of the source, what makes its next bytes


@dataclass(frozen=True, slots=True)
class Codebook:
    """What all NF4 tensors of a file share, and whether their maxima are to be quantized again."""

    kind: FourBitType
    nested: bool
    nested_levels: np.ndarray
    mixed: bool  # the source has nested maxima: those that are F32 there are so because they could not stay nested

    def metadata(self) -> dict[str, Any]:
        return nf4_tensors.metadata(self.kind, self.nested_levels if self.nested else None)


def codebook(inputs: list[Input], nested: bool) -> Codebook:
    """That of the source where it has NF4 tensors, so that codes can be copied; else bitsandbytes' own."""
    sources = [source for each in inputs if (source := _source(each)) is not None]
    usual = TYPES[NAME]
    assert isinstance(usual, FourBitType)
    kind = sources[0].four_bit if sources else usual
    maps = [source.maxima.levels for source in sources if source.maxima.levels is not None]
    return Codebook(kind, nested, maps[0] if maps else dynamic_map(), bool(maps))


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
        if not copied or source is None:
            return cls(each, book, book.nested)
        kept = each.head_rows > 0 if source.maxima.is_nested else book.mixed
        return cls(each, book, book.nested and not kept)

    @property
    def keeps_maxima(self) -> bool:
        """Whether its maxima are not quantized again though the file type asks for that."""
        return self.book.nested and not self.nested

    @property
    def rows(self) -> list[nf4_tensors.Row]:
        return nf4_tensors.rows(self.input.name, self.input.shape, self.nested, self.book.kind.block)

    def steps(self, parts: list[Planned], weights: int, measure: bool) -> Iterator[Piece]:
        """What makes the bytes of the stored tensors, in order; a slab has about that many weights.

        With `measure` there may be steps at the end that make no bytes, and only look at errors.
        """
        source = _source(self.input)
        if source is not None and source.four_bit is self.book.kind:
            yield from self._copied(source, parts, weights, measure)
        else:
            yield from self._encoded(parts, weights, measure)

    def _slabs(self, rows: int, cols: int, unit: int, weights: int) -> list[tuple[int, int]]:
        step = max(unit, weights // max(1, cols) // unit * unit)
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    # -- codes that are copied -----------------------------------------------------------------------

    def _copied(self, source: FourBitTensor, parts: list[Planned], weights: int, measure: bool) -> Iterator[Piece]:
        from .pipeline import decoded

        rows, cols, head_rows = source.rows, source.cols, self.input.head_rows
        slabs = self._slabs(rows, cols, max(1, head_rows), weights)
        levels, nbytes = source.maxima.levels, source.nbytes - rows * cols // 2
        same_map = levels is not None and levels.tobytes() == self.book.nested_levels.tobytes()
        exact = same_map or not self.nested

        def codes(start: int, stop: int) -> np.ndarray:
            packed = source.read_packed(start * cols, stop * cols)
            if not head_rows:
                return packed
            return packed.reshape(stop - start, cols // 2)[permuted_rows(stop - start, (stop - start) // head_rows)]

        def run(start: int, stop: int, error: Summed | None) -> np.ndarray:
            if error is not None and exact:  # no error, but it counts in that of all weights
                x = source.type.decode(source.read_rows(start, stop))
                error.add(x, x)
            return codes(start, stop)

        def maxima() -> np.ndarray:
            found = _finite(source.maxima.read(0, source.maxima.n))
            if head_rows:
                found = found.reshape(rows, -1)[permuted_rows(rows, rows // head_rows)].reshape(-1)
            return found

        def again(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            return decoded(source, start, stop, head_rows), codes(start, stop)

        for start, stop in slabs:
            yield parts[0], (stop - start) * cols // 2, partial(run, start, stop)
        if self.nested and same_map:
            yield parts[1], nbytes, lambda _: source.maxima.read_codes(0, source.maxima.n)
            second, offset = source.maxima.read_second, source.maxima.read_offset
            yield parts[2], 0, lambda _: nf4_tensors.nested_bytes(_finite(second()), _finite(offset()))
        else:
            yield from self._maxima(parts, nbytes, maxima, again, slabs if measure else [])

    # -- codes that are made ---------------------------------------------------------------------------

    def _encoded(self, parts: list[Planned], weights: int, measure: bool) -> Iterator[Piece]:
        from ggufkit_kernels.cpu.encode.four_bit import encode_4bit

        from .pipeline import decoded, share

        each, kind = self.input, self.book.kind
        tensor = each.tensor
        assert tensor is not None
        rows, cols = tensor.rows, tensor.cols
        unit = math.lcm(max(1, each.head_rows), kind.block // math.gcd(kind.block, cols))  # whole blocks
        slabs = self._slabs(rows, cols, unit, weights)
        collected = Collected(len(slabs))

        def encoded(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            x = decoded(tensor, start, stop, each.head_rows)
            kind.check_finite(x)
            return x, *encode_4bit(x.reshape(-1), kind.levels, kind.block)

        def codes(i: int, start: int, stop: int, error: Summed | None) -> np.ndarray:
            with collected.part(i):
                x, packed, maxima = encoded(start, stop)
                collected.found[i] = maxima
                if error is not None and not self.nested:
                    _add(error, kind, x, packed, maxima)
                return packed

        for i, (start, stop) in enumerate(slabs):
            yield parts[0], share(tensor, start, stop), partial(codes, i, start, stop)
        yield from self._maxima(parts, 0, collected.all, lambda *a: encoded(*a)[:2], slabs if measure else [])

    def _maxima(
        self,
        parts: list[Planned],
        nbytes: int,
        maxima: Callable[[], np.ndarray],
        again: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
        slabs: list[tuple[int, int]],
    ) -> Iterator[Piece]:
        """The maxima; where they are quantized again, then `slabs` once more: `again` gives weights and codes."""
        if not self.nested:
            yield parts[1], nbytes, lambda _: nf4_tensors.encode_absmax(maxima(), False)[0]
            return
        levels, kind, cols = self.book.nested_levels, self.book.kind, self.input.shape[-1]
        both = Once(lambda: encode_maxima(maxima(), levels))
        yield parts[1], nbytes, lambda _: both()[0]
        yield parts[2], 0, lambda _: nf4_tensors.nested_bytes(*both()[1:])

        def measured(start: int, stop: int, error: Summed | None) -> np.ndarray:
            assert error is not None
            first, last = start * cols // kind.block, -(-stop * cols // kind.block)
            codes, second, offset = both()
            which = np.arange(first, last) // NESTED_BLOCK
            x, packed = again(start, stop)
            read = decode_maxima(codes[first:last], second[which], offset, levels)
            _add(error, kind, x, packed, read, start * cols % kind.block)
            return np.empty(0, np.uint8)

        for start, stop in slabs:
            yield parts[2], 0, partial(measured, start, stop)


def _add(
    error: Summed, kind: FourBitType, x: np.ndarray, packed: np.ndarray, maxima: np.ndarray, skip: int = 0
) -> None:
    """What the codes uint8 (…,) and their blocks' maxima say, beside x; the first block lacks `skip` weights."""
    x, packed = x.reshape(-1), packed.reshape(-1)
    for start in range(0, x.size, PIECE):
        stop = min(start + PIECE, x.size)
        which = np.arange(skip + start, skip + stop) // kind.block
        error.add(kind.levels[unpack_4bit(packed[start // 2 : stop // 2])] * maxima[which], x[start:stop])


def _finite(maxima: Any) -> Any:
    if not np.isfinite(maxima).all():
        raise FormatError("maxima of blocks that are NaN or infinite")
    return maxima
