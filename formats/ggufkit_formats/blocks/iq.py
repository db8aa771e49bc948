"""The IQ types of one to three bits: 256 weights a block, cut into runs of eight or four that are points of a grid.

Diagrams show a block's bytes in order of the file, one row a field. `x[j]` is weight j of the block, bits of a byte or
word stand with the low ones right. The grids and their levels stand in `tables`; `point[i]` is number i of a grid. All
these types store scales s that stand for odd numbers 2s + 1, and signs beside the points:

    signs   one bit a weight, 1 for minus, the first weight's in the lowest bit. Where seven bits hold the signs of
            eight weights, the eighth makes the number of minus signs even.

For the kernels a weight's level and sign become one code of 3 or 4 bits with a codebook of signed levels. What is
multiplied there is exact in float32, so the order of ggml's products does not matter.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import FormatError, UsageError
from . import iq1_search, iq_search
from .base import Quants, TensorType, register
from .k import CHUNK, bits, pack_bits
from .tables import IQ2_LEVELS, IQ3_S_LEVELS, IQ3_XXS_LEVELS, grid

F32 = np.float32
# Seven bits with the eighth that makes their number even.
EVEN_SIGNS = np.array([s | (s.bit_count() & 1) << 7 for s in range(128)], np.uint8)


def signed_levels(levels: tuple[int, ...], size: int) -> np.ndarray:
    """int8 (2 * size,): the levels, then their negatives, each filled up with zeros."""
    out = np.zeros((2, size), np.int8)
    out[:, : len(levels)] = levels
    out[1] *= np.int8(-1)
    return out.reshape(-1)


@lru_cache(maxsize=8)
def sign_words(bit: int) -> np.ndarray:
    """uint64 (256,): eight bytes for the eight bits of a byte, `1 << bit` where it is set, in order."""
    each = np.arange(256)[:, None] >> np.arange(8) & 1
    return (each << bit).astype(np.uint8).view(np.uint64)[:, 0]


@lru_cache(maxsize=8)
def point_words(name: str) -> np.ndarray:
    """A grid's points as words: uint64 (n,) of eight numbers, or uint32 (n,) of four."""
    points = grid(name)
    return points.view(np.uint64 if points.shape[1] == 8 else np.uint32)[:, 0]


class GridType(TensorType):
    """A type whose codes are the numbers of points of a grid; `take_apart` says where they are in a block."""

    block = 256
    grid_name = ""  # in `tables`
    group = 32
    code_bits = 3
    codebook: np.ndarray
    step = 1.0  # the power of two between d and the product of the odd scale and the level

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of (n,) blocks: numbers of points (n, 32 or 64), signs (n, 32) uint8 of eight weights, scales (n, groups)."""
        raise NotImplementedError

    def float_d(self, blocks: np.ndarray) -> np.ndarray:
        """(n,) float32: the scale of the scales."""
        return blocks["d"].astype(F32)

    def quants(self, blocks: np.ndarray) -> Quants:
        numbers, signs, scale = self.take_apart(blocks)
        points = point_words(self.grid_name)[numbers]
        minus = sign_words(self.code_bits - 1)[signs]
        codes = (points | minus.view(points.dtype)).view(np.uint8)
        d, odd = self.scaled_d(blocks), self.odd(scale)
        return Quants(codes, self.code_bits, 0, self.group, d, odd, codebook=self.codebook, wide=self.step != 1)

    def scaled_d(self, blocks: np.ndarray) -> np.ndarray:
        """(n,) float32: what the products of odd scales and levels are multiplied with."""
        with np.errstate(invalid="ignore"):  # a d that is a signalling NaN
            return self.float_d(blocks) * F32(self.step)

    def odd(self, scale: np.ndarray) -> np.ndarray:
        """uint8: the odd numbers that scales stand for."""
        return (2 * scale + 1).astype(np.uint8)

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        if importance is None and self.needs_importance:
            raise UsageError(f"{self.name} is encoded with importance only: one weight per column")
        out = np.zeros(len(x), self.fields)
        with np.errstate(all="ignore"):
            for start in range(0, len(x), CHUNK):
                part = slice(start, start + CHUNK)
                self.fill(out[part], x[part], None if importance is None else importance[part])
        return out

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        """Write all fields of the zeroed blocks `out` (n,) for the weights x (n, 256)."""
        raise NotImplementedError


class SearchedType(GridType):
    """A type of two or three bits; `put` writes what the search finds."""

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        out["d"], *found = iq_search.encode(iq_search.KINDS[self.name], x, importance)
        self.put(out, *found)

    def put(self, out: np.ndarray, s: np.ndarray, numbers: np.ndarray, signs: np.ndarray, live: np.ndarray) -> None:
        """The inverse of `take_apart`, into blocks `out` (n,); live (n, groups) tells groups that are not zero."""
        raise NotImplementedError


def seven_signs(signs: np.ndarray, s: np.ndarray) -> np.ndarray:
    """(n, 32) signs of seven bits and (n, 8) scales of four -> (n, 8) words."""
    four = signs.astype(np.uint32).reshape(-1, 8, 4) << np.arange(0, 28, 7, dtype=np.uint32)
    return np.bitwise_or.reduce(four, axis=2) | s.astype(np.uint32) << np.uint32(28)


def pair_nibbles(scales: np.ndarray) -> np.ndarray:
    """(n, k) bytes -> (n, 2k): the low four bits of each, then its high ones."""
    return bits(scales, scales.shape[1], (0, 4), 15)


@register
class IQ2_XXS(SearchedType):
    """w = (d * (2 s + 1)) * level[point[i]] / 8 with a sign, eight groups of 32

    ::

        d   f16        scale of the scales
        qs  64 bytes   bytes 8g … 8g + 3:   i of x[32g … 32g + 7], of x[32g + 8 …], of x[32g + 16 …], of x[32g + 24 …]
                       word from 8g + 4:    | s : 4 | signs : 7 | … : 7 | … : 7 | signs of x[32g … 32g + 7] : 7 |
    """

    name, id = "IQ2_XXS", 16
    fields = np.dtype([("d", "<f2"), ("qs", "<u2", 32)])
    grid_name, codebook, step = "IQ2_XXS", signed_levels(IQ2_LEVELS, 4), 1 / 8
    needs_importance = True

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        qs = np.ascontiguousarray(blocks["qs"], "<u2").view("<u4").reshape(-1, 8, 2)
        numbers = np.ascontiguousarray(qs[:, :, 0]).view(np.uint8)
        signs = qs[:, :, 1, None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
        return numbers, EVEN_SIGNS[signs.reshape(-1, 32)], qs[:, :, 1] >> np.uint32(28)

    def put(self, out: np.ndarray, s: np.ndarray, numbers: np.ndarray, signs: np.ndarray, live: np.ndarray) -> None:
        words = np.stack([numbers.astype(np.uint8).view("<u4"), seven_signs(signs, s)], axis=2).astype("<u4")
        out["qs"] = words.reshape(len(out), 16).view("<u2")


@register
class IQ2_XS(SearchedType):
    """w = (d * (2 s + 1)) * level[point[i]] / 8 with a sign, sixteen groups of 16

    ::

        d       f16        scale of the scales
        qs      32 × u16   number p:   | signs of x[8p … 8p + 7] : 7 | i of x[8p … 8p + 7] : 9 |
        scales  8 bytes    byte g:     | s of group 2g + 1 : 4 | s of group 2g : 4 |
    """

    name, id = "IQ2_XS", 17
    fields = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])
    grid_name, codebook, step, group = "IQ2_XS", signed_levels(IQ2_LEVELS, 4), 1 / 8, 16
    needs_importance = True

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        qs = blocks["qs"]
        return qs & np.uint16(511), EVEN_SIGNS[qs >> np.uint16(9)], pair_nibbles(blocks["scales"])

    def put(self, out: np.ndarray, s: np.ndarray, numbers: np.ndarray, signs: np.ndarray, live: np.ndarray) -> None:
        out["qs"] = numbers | signs.astype(np.uint16) << np.uint16(9)
        out["scales"] = pack_bits(s, 8, (0, 4))


@register
class IQ2_S(SearchedType):
    """w = (d * (2 s + 1)) * level[point[i]] / 8 with a sign, sixteen groups of 16

    ::

        d       f16        scale of the scales
        qs      32 bytes   byte p:       low bits of x[8p … 8p + 7]'s i
        signs   32 bytes   byte p:       signs of x[8p … 8p + 7]
        qh      8 bytes    byte q:       | high bits of i number 4q + 3 : 2 | … 4q + 2 : 2 | … 4q + 1 : 2 | … 4q : 2 |
        scales  8 bytes    byte g:       | s of group 2g + 1 : 4 | s of group 2g : 4 |
    """

    name, id = "IQ2_S", 22
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])
    grid_name, codebook, step, group = "IQ2_S", signed_levels(IQ2_LEVELS, 4), 1 / 8, 16

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        high = bits(blocks["qh"], 8, (0, 2, 4, 6), 3).astype(np.uint16)
        return blocks["qs"] | high << np.uint16(8), blocks["signs"], pair_nibbles(blocks["scales"])

    def put(self, out: np.ndarray, s: np.ndarray, numbers: np.ndarray, signs: np.ndarray, live: np.ndarray) -> None:
        out["qs"], out["signs"] = numbers & 255, signs
        out["qh"] = pack_bits(numbers >> 8, 8, (0, 2, 4, 6))
        out["scales"] = pack_bits(s, 8, (0, 4))


@register
class IQ3_XXS(SearchedType):
    """w = (d * (2 s + 1)) * level[point[i]] / 4 with a sign, eight groups of 32

    ::

        d      f16        scale of the scales
        qs     64 bytes   byte p:            i of x[4p … 4p + 3]
        signs  32 bytes   word from 4g:      | s : 4 | signs : 7 | … : 7 | … : 7 | signs of x[32g … 32g + 7] : 7 |
    """

    name, id = "IQ3_XXS", 18
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("signs", "u1", 32)])
    grid_name, codebook, step, code_bits = "IQ3_XXS", signed_levels(IQ3_XXS_LEVELS, 8), 1 / 4, 4

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        words = np.ascontiguousarray(blocks["signs"]).view("<u4")
        signs = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
        return blocks["qs"], EVEN_SIGNS[signs.reshape(-1, 32)], words >> np.uint32(28)

    def put(self, out: np.ndarray, s: np.ndarray, numbers: np.ndarray, signs: np.ndarray, live: np.ndarray) -> None:
        out["qs"] = numbers
        out["signs"] = seven_signs(signs, s).astype("<u4").view(np.uint8)


@register
class IQ3_S(SearchedType):
    """w = (d * (2 s + 1)) * level[point[i]] with a sign, eight groups of 32

    ::

        d       f16        scale of the scales
        qs      64 bytes   byte p:            low bits of x[4p … 4p + 3]'s i
        qh      8 bytes    byte g, bit p:     bit 8 of x[32g + 4p … 32g + 4p + 3]'s i
        signs   32 bytes   byte p:            signs of x[8p … 8p + 7]
        scales  4 bytes    byte g:            | s of group 2g + 1 : 4 | s of group 2g : 4 |
    """

    name, id = "IQ3_S", 21
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])
    grid_name, codebook, code_bits = "IQ3_S", signed_levels(IQ3_S_LEVELS, 8), 4

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        high = np.unpackbits(blocks["qh"], axis=1, bitorder="little").astype(np.uint16)
        return blocks["qs"] | high << np.uint16(8), blocks["signs"], pair_nibbles(blocks["scales"])

    def put(self, out: np.ndarray, s: np.ndarray, numbers: np.ndarray, signs: np.ndarray, live: np.ndarray) -> None:
        # ggml skips groups of zeros as it goes on: the low bits and signs of later groups move up to their places.
        moved = np.argsort(~live, axis=1, kind="stable")[:, :, None]
        out["qs"] = np.take_along_axis((numbers & 255).reshape(-1, 8, 8), moved, axis=1).reshape(-1, 64)
        out["signs"] = np.take_along_axis(signs.reshape(-1, 8, 4), moved, axis=1).reshape(-1, 32)
        out["qh"] = np.packbits(numbers >> 8, axis=1, bitorder="little")
        out["scales"] = pack_bits(s, 4, (0, 4))


# -1, 0, 1 with an eighth added, then with an eighth taken away; in eighths.
IQ1_LEVELS = np.array([-7, 1, 9, 0, -9, -1, 7, 0], np.int8)


@register
class IQ1_S(GridType):
    """w = (d * (2 s + 1)) * (point[i] - 1 ± 1/8), eight groups of 32

    ::

        d   f16        scale of the scales
        qs  32 bytes   byte p:      low bits of x[8p … 8p + 7]'s i
        qh  8 × u16    number g:    | 1 for -1/8 : 1 | s : 3 | high bits of i 4g + 3 : 3 | … : 3 | … : 3 | … 4g : 3 |
    """

    name, id = "IQ1_S", 19
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])
    grid_name, codebook, step = "IQ1_S", IQ1_LEVELS, 1 / 8
    needs_importance = True

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        qh = blocks["qh"]
        high = qh[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
        minus = (qh >> np.uint16(15)).astype(np.uint8) * np.uint8(255)
        numbers = blocks["qs"] | high.reshape(-1, 32) << np.uint16(8)
        return numbers, np.repeat(minus, 4, axis=1), qh >> np.uint16(12) & np.uint16(7)

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        d, s, shift, numbers, _ = iq1_search.encode(x, importance, 32, 1e-12)
        out["d"] = d * F32(1.125)
        out["qs"] = numbers & 255
        high = np.bitwise_or.reduce((numbers >> 8).reshape(-1, 8, 4) << np.arange(0, 12, 3), axis=2)
        out["qh"] = high | s << 12 | shift << 15


@register
class IQ1_M(GridType):
    """w = (d * (2 s + 1)) * (point[i] - 1 ± 1/8), sixteen groups of 16; d is a float16 in four pieces

    ::

        qs      32 bytes   byte p:      low bits of x[8p … 8p + 7]'s i
        qh      16 bytes   byte g:      | the same of p = 2g + 1 : 4 | 1 for -1/8 : 1 | high bits of i, p = 2g : 3 |
        scales  4 × u16    number q:    | bits 4q … 4q + 3 of d : 4 | s of group 4q + 3 : 3 | … : 3 | … : 3 | … 4q : 3 |
    """

    name, id = "IQ1_M", 29
    fields = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])
    grid_name, codebook, step, group = "IQ1_S", IQ1_LEVELS, 1 / 8, 16

    def take_apart(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        high = bits(blocks["qh"], 16, (0, 4), 15)
        minus = (high >> np.uint8(3)) * np.uint8(255)
        scale = blocks["scales"][:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
        numbers = blocks["qs"] | (high & np.uint8(7)).astype(np.uint16) << np.uint16(8)
        return numbers, minus, scale.reshape(-1, 16)

    def float_d(self, blocks: np.ndarray) -> np.ndarray:
        pieces = blocks["scales"] >> np.uint16(12) << np.arange(0, 16, 4, dtype=np.uint16)
        return np.bitwise_or.reduce(pieces, axis=1).astype(np.uint16).view(np.float16).astype(F32)

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        d, s, shift, numbers, w = iq1_search.encode(x, importance, 16, 1e-7)
        used = d != 0
        half = (iq1_search.common_scale(x, w, s, shift, numbers, d) * F32(1.1125)).astype(np.float16)
        half[np.isnan(d)] = np.nan
        pieces = half.view(np.uint16)[:, None] >> np.arange(0, 16, 4, dtype=np.uint16) & np.uint16(15)
        words = np.bitwise_or.reduce(s.reshape(-1, 4, 4) << np.arange(0, 12, 3), axis=2) | pieces.astype(np.intp) << 12
        out["scales"][used] = words[used]
        out["qs"] = numbers & 255
        high = numbers >> 8
        out["qh"] = high[:, ::2] | high[:, 1::2] << 4 | (shift >> 1) << 3 | (shift & 1) << 7

    def check_scales(self, blocks: np.ndarray) -> None:
        if not np.isfinite(self.float_d(blocks)).all():
            raise FormatError(f"weights are too large for {self.name}: scale not finite in float16")
