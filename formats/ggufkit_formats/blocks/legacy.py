"""The first types of ggml: 32 weights a block, one scale, sometimes a minimum, 4, 5 or 8 bits a weight.

Diagrams show a block's bytes in order of the file, one row a field. `x[j]` is weight j of the block (counted from 0),
low bits stand right.

Encoding repeats the float32 operations of ggml's `quantize_row_*_ref` in their order, so the bytes are equal.
The integer conversions there are C casts, which truncate to 32 bits and keep the low byte; see `low_byte`.
"""

from __future__ import annotations

import numpy as np

from . import k_search
from .base import Quants, TensorType, register

F32 = np.float32
CHUNK = 8192  # blocks encoded at once with importance: bounds the memory of the searches


def low_byte(x: np.ndarray) -> np.ndarray:
    """uint8 of float32 as x86 casts: truncated to int32 (out of range and NaN: -2**31), then the low byte."""
    fits = np.abs(x) < F32(2.0**31)
    return np.where(fits, x, F32(0)).astype(np.int32).astype(np.uint8)


def round_away(x: np.ndarray) -> np.ndarray:
    """C's roundf: to nearest, halves away from zero. (x + 0.5 would round 0.49999997 up.)"""
    whole = np.trunc(x)
    return whole + np.where(np.abs(x - whole) >= F32(0.5), np.copysign(F32(1), x), F32(0))


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, or 0 where d is 0; infinite for the smallest denormals."""
    return np.where(d != 0, F32(1) / d, F32(0))


def largest(x: np.ndarray) -> np.ndarray:
    """float32 (n,): the weight of largest magnitude in each row of x (n, k), the first of equals; +0 for zeros."""
    value = taken(x, np.argmax(np.abs(x), axis=1))
    return np.where(value == 0, F32(0), value)


def taken(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """x[i, at[i]] for each row i."""
    return np.take_along_axis(x, at[:, None], axis=1)[:, 0]


def columns(x: np.ndarray) -> np.ndarray:
    """(n, 32) -> (32, n), as the searches take weights, and back for the codes they give."""
    return np.ascontiguousarray(x.T)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """(n, 2k) codes -> (n, k) bytes: the first half in the low nibbles, the second in the high ones."""
    codes, k = codes & np.uint8(15), codes.shape[1] // 2
    return codes[:, :k] | codes[:, k:] << 4


def unpack_nibbles(qs: np.ndarray) -> np.ndarray:
    """The inverse of `nibbles`."""
    return np.concatenate([qs & np.uint8(15), qs >> 4], axis=1)


def fifth_bits(codes: np.ndarray) -> np.ndarray:
    """(n, 32) codes -> (n,) uint32, bit j from code j's bit 4."""
    bits = np.packbits(codes >> 4 & 1, axis=1, bitorder="little")
    return bits.view("<u4")[:, 0]


def unpack_fifth_bits(qh: np.ndarray) -> np.ndarray:
    """(n,) uint32 -> (n, 32) uint8 of 0 or 16."""
    as_bytes = np.ascontiguousarray(qh, dtype="<u4")[:, None].view(np.uint8)
    return np.unpackbits(as_bytes, axis=1, bitorder="little") << 4


class LegacyType(TensorType):
    block = 32

    def error_weights(self, x: np.ndarray, importance: np.ndarray) -> np.ndarray:
        """importance * sqrt(mean square of the row + x²), the mean summed in ggml's order: column after column."""
        with np.errstate(all="ignore"):
            squares = x * x
            mean = np.add.accumulate(squares, axis=1)[:, -1] / F32(x.shape[1])
            return importance * np.sqrt(mean[:, None] + squares)

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """float32 (n, 32) -> blocks. `importance` (n, 32) is what `error_weights` makes of it, or None."""
        out = np.zeros(len(x), self.fields)
        with np.errstate(all="ignore"):
            if importance is None:
                self.fill(out, x)
                return out
            for start in range(0, len(x), CHUNK):
                part = slice(start, start + CHUNK)
                self.fill_weighted(out[part], x[part], importance[part])
        return out

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        """Write all fields of the blocks `out` (n,) for the weights x (n, 32)."""
        raise NotImplementedError

    def fill_weighted(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
        """The same with the least sum of w * error², w (n, 32), that ggml's search finds."""
        raise NotImplementedError


class Signed(LegacyType):
    """d * (q - 2**(bits - 1)): the weight of largest magnitude gets the most negative code.

    With importance the scale is searched for, as in `k_search.signed`.
    """

    bits = 4

    def codes(self, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        half = 1 << (self.bits - 1)
        q = low_byte(x * inverse(d)[:, None] + F32(half + 0.5)).view(np.int8)
        return np.minimum(q, np.int8(2 * half - 1)).view(np.uint8)

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        d = largest(x) / F32(-(1 << (self.bits - 1)))
        self.put(out, d, self.codes(x, d))

    def fill_weighted(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
        d, codes = k_search.signed(columns(x), 1 << (self.bits - 1), columns(w))
        self.put(out, d, columns(codes.astype(np.uint8)))

    def put(self, out: np.ndarray, d: np.ndarray, codes: np.ndarray) -> None:
        out["d"] = d
        out["qs"] = nibbles(codes)
        if self.bits == 5:
            out["qh"] = fifth_bits(codes)


class Ranged(LegacyType):
    """d * q + m, with m the smallest weight of the block and d the range over 2**bits - 1.

    With importance both are searched for, as in `k_search.ranged`.
    """

    bits = 4

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        # Of 0 and -0 the first counts, as in a loop of comparisons: the sign is stored.
        low, high = taken(x, np.argmin(x, axis=1)), taken(x, np.argmax(x, axis=1))
        d = (high - low) / F32((1 << self.bits) - 1)
        codes = low_byte((x - low[:, None]) * inverse(d)[:, None] + F32(0.5))
        if self.bits == 4:
            codes = np.minimum(codes.view(np.int8), np.int8(15)).view(np.uint8)
        self.put(out, d, low, codes)

    def fill_weighted(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
        n_max = (1 << self.bits) - 1
        d, minimum, codes = k_search.ranged(
            columns(x), columns(w), n_max, -0.9, 36, absolute=False, r_step=0.05, held=True
        )
        self.put(out, d, -minimum, columns(codes.astype(np.uint8)))

    def put(self, out: np.ndarray, d: np.ndarray, m: np.ndarray, codes: np.ndarray) -> None:
        out["d"], out["m"] = d, m
        out["qs"] = nibbles(codes)
        if self.bits == 5:
            out["qh"] = fifth_bits(codes)


@register
class Q4_0(Signed):
    """w = d * (q - 8)

    ::

        d   f16        scale
        qs  16 bytes   byte j:  | q of x[j + 16] : 4 | q of x[j] : 4 |
    """

    name, id = "Q4_0", 2
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    bits = 4

    def quants(self, blocks: np.ndarray) -> Quants:
        return Quants(unpack_nibbles(blocks["qs"]), 4, 8, 32, blocks["d"].astype(F32))


@register
class Q4_1(Ranged):
    """w = d * q + m

    ::

        d   f16        scale
        m   f16        minimum
        qs  16 bytes   byte j:  | q of x[j + 16] : 4 | q of x[j] : 4 |
    """

    name, id = "Q4_1", 3
    fields = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
    bits = 4

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = unpack_nibbles(blocks["qs"])
        return Quants(codes, 4, 0, 32, blocks["d"].astype(F32), dmin=-blocks["m"].astype(F32))


@register
class Q5_0(Signed):
    """w = d * (q - 16)

    ::

        d   f16        scale
        qh  u32        bit j:   bit 4 of x[j]'s q
        qs  16 bytes   byte j:  | low bits of x[j + 16]'s q : 4 | low bits of x[j]'s q : 4 |
    """

    name, id = "Q5_0", 6
    fields = np.dtype([("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])
    bits = 5

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = unpack_nibbles(blocks["qs"]) | unpack_fifth_bits(blocks["qh"])
        return Quants(codes, 5, 16, 32, blocks["d"].astype(F32))


@register
class Q5_1(Ranged):
    """w = d * q + m

    ::

        d   f16        scale
        m   f16        minimum
        qh  u32        bit j:   bit 4 of x[j]'s q
        qs  16 bytes   byte j:  | low bits of x[j + 16]'s q : 4 | low bits of x[j]'s q : 4 |
    """

    name, id = "Q5_1", 7
    fields = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])
    bits = 5

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = unpack_nibbles(blocks["qs"]) | unpack_fifth_bits(blocks["qh"])
        return Quants(codes, 5, 0, 32, blocks["d"].astype(F32), dmin=-blocks["m"].astype(F32))


class Bytes(LegacyType):
    """d * q with signed bytes."""

    uses_importance = False

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        d = np.abs(x).max(axis=1) / F32(127)
        q = low_byte(round_away(x * inverse(d)[:, None])).view(np.int8)
        out["d"], out["qs"] = d, q
        if "s" in self.fields.fields:  # type: ignore[operator]
            out["s"] = q.sum(axis=1, dtype=np.int32).astype(F32) * d

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = np.ascontiguousarray(blocks["qs"]).view(np.uint8) ^ np.uint8(128)
        return Quants(codes, 8, 128, 32, blocks["d"].astype(F32))


@register
class Q8_0(Bytes):
    """w = d * q

    ::

        d   f16        scale
        qs  32 × i8    byte j:  q of x[j]
    """

    name, id = "Q8_0", 8
    fields = np.dtype([("d", "<f2"), ("qs", "i1", 32)])


@register
class Q8_1(Bytes):
    """w = d * q. ggml uses it for activations only; no model file holds it.

    ::

        d   f16        scale
        s   f16        d * sum of all q, with d before its rounding to f16
        qs  32 × i8    byte j:  q of x[j]
    """

    name, id = "Q8_1", 9
    fields = np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)])
