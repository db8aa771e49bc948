"""The types of two bits and less without a search: ternary TQ1_0 and TQ2_0, Q2_0, and the signs of Q1_0.

Diagrams show a block's bytes in order of the file, one row a field. `x[j]` is weight j of the block, a *trit* is
q = 0, 1 or 2 for -1, 0 or 1, bits of a byte stand with the low ones right.

Encoding repeats the float32 operations of ggml's `quantize_row_*_ref`. All but Q1_0 take the largest magnitude as d and
round x * (1 / d) to nearest, halves away from zero: lossless for weights that are ternary already, poor for others.
Importance changes nothing.
"""

from __future__ import annotations

import numpy as np

from .base import Quants, TensorType, register
from .k import bits, pack_bits
from .legacy import inverse, round_away

F32 = np.float32


def signs(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """d (n,), the largest magnitudes in the rows of x (n, k); x / d rounded, int8 (n, k); where 1 / d is finite (n,).

    Where 1 / d is infinite (the smallest denormals), the rounded numbers are 0: what C casts make of infinity differs.
    """
    d = np.abs(x).max(axis=1)
    by = inverse(d)
    finite = np.isfinite(by)
    return d, round_away(x * np.where(finite, by, F32(0))[:, None]).astype(np.int8), finite


def trit_bytes(trits: np.ndarray) -> np.ndarray:
    """(n, 5, k) trits -> (n, k) bytes: the number with these digits in base 3, the first the highest, as a fraction.

    The fraction is number / 243, as 256ths and rounded up; so the highest digit is what the byte times 3 carries.
    """
    number = np.zeros((len(trits), trits.shape[2]), np.uint16)
    for digit in range(5):
        number = number * np.uint16(3) + trits[:, digit]
    return ((number * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8)


def byte_trits(raw: np.ndarray, count: int) -> np.ndarray:
    """(n, k) bytes -> (n, count * k) trits: the first digit of all bytes, then the second, …

    Bytes that `trit_bytes` does not make have trits, too.
    """
    out = np.empty((len(raw), count, raw.shape[1]), np.uint8)
    for digit in range(count):
        carried = (raw * np.uint8(3**digit)).astype(np.uint16) * np.uint16(3)
        out[:, digit] = carried >> np.uint16(8)
    return out.reshape(len(raw), count * raw.shape[1])


class TernaryType(TensorType):
    uses_importance = False

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        out = np.zeros(len(x), self.fields)
        with np.errstate(all="ignore"):
            self.fill(out, x)
        return out

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        """Write all fields of the blocks `out` (n,) for the weights x (n, block)."""
        out["d"], q, _ = signs(x)
        self.put(out, (q + np.int8(1)).view(np.uint8))

    def put(self, out: np.ndarray, codes: np.ndarray) -> None:
        """Write the codes (n, block), uint8, into the blocks `out` (n,); d stays as it is."""
        raise NotImplementedError

    def assemble(self, d: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Scales d (n,) and codes (n, block), uint8, each for d * (code - 1) -> uint8 (n, bytes of a block).

        Codes are 0, 1 and 2, of Q2_0 3, too. Where another way than ggml's has chosen the scales.
        """
        out = np.zeros(len(codes), self.fields)
        out["d"] = d
        self.put(out, codes)
        return out.view(np.uint8).reshape(len(codes), self.block_nbytes)


@register
class TQ1_0(TernaryType):
    """w = d * (q - 1), q a trit; 5 trits a byte, 4 in the last four bytes

    ::

        qs  48 bytes   byte j < 32:   the trits of x[j], x[j + 32], x[j + 64], x[j + 96], x[j + 128]
                       byte 32 + j:   the trits of x[160 + j], x[176 + j], x[192 + j], x[208 + j], x[224 + j]
        qh  4 bytes    byte j:        the trits of x[240 + j], x[244 + j], x[248 + j], x[252 + j]
        d   f16        scale
                       a byte with trits t0 … t4 (t4 = 0 in qh) is 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4, times 256 / 243,
                       rounded up; trit k is the byte times 3^k, without what leaves 8 bits, times 3, over 256
    """

    name, id, block = "TQ1_0", 34, 256
    fields = np.dtype([("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2")])

    def quants(self, blocks: np.ndarray) -> Quants:
        qs, qh = blocks["qs"], blocks["qh"]
        codes = np.concatenate([byte_trits(qs[:, :32], 5), byte_trits(qs[:, 32:], 5), byte_trits(qh, 4)], axis=1)
        return Quants(codes, 2, 1, 256, blocks["d"].astype(F32))

    def put(self, out: np.ndarray, codes: np.ndarray) -> None:
        last = np.zeros((len(codes), 5, 4), np.uint8)
        last[:, :4] = codes[:, 240:].reshape(-1, 4, 4)
        out["qs"][:, :32] = trit_bytes(codes[:, :160].reshape(-1, 5, 32))
        out["qs"][:, 32:] = trit_bytes(codes[:, 160:240].reshape(-1, 5, 16))
        out["qh"] = trit_bytes(last)


@register
class TQ2_0(TernaryType):
    """w = d * (q - 1), q a trit (3 is read, too, as 2 * d)

    ::

        qs  64 bytes   byte 32h + j:  | x[128h + j + 96] : 2 | … j + 64 : 2 | … j + 32 : 2 | x[128h + j] : 2 |
        d   f16        scale
    """

    name, id, block = "TQ2_0", 35, 256
    fields = np.dtype([("qs", "u1", 64), ("d", "<f2")])

    def quants(self, blocks: np.ndarray) -> Quants:
        return Quants(bits(blocks["qs"], 2, (0, 2, 4, 6), 3), 2, 1, 256, blocks["d"].astype(F32))

    def put(self, out: np.ndarray, codes: np.ndarray) -> None:
        out["qs"] = pack_bits(codes, 2, (0, 2, 4, 6))


@register
class Q1_0(TernaryType):
    """w = d where the bit is set, -d where not

    ::

        d   f16        scale: the mean magnitude
        qs  16 bytes   byte j, bit b:  whether x[8j + b] is not negative
    """

    name, id, block = "Q1_0", 41, 128
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    levels = np.array([-1, 1], np.int8)

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = np.unpackbits(blocks["qs"], axis=1, bitorder="little")
        return Quants(codes, 1, 0, 128, blocks["d"].astype(F32), codebook=self.levels)

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        # one after the other, as in ggml's loop; NumPy's sum is pairwise
        out["d"] = np.add.accumulate(np.abs(x), axis=1, dtype=F32)[:, -1] / F32(128)
        out["qs"] = np.packbits(x >= 0, axis=1, bitorder="little")


@register
class Q2_0(TernaryType):
    """w = d * (q - 1), q = 0 … 3; ggml's encoder never takes 3

    ::

        d   f16        scale
        qs  16 bytes   byte j:  | q of x[4j + 3] : 2 | q of x[4j + 2] : 2 | q of x[4j + 1] : 2 | q of x[4j] : 2 |
    """

    name, id, block = "Q2_0", 42, 64
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    def quants(self, blocks: np.ndarray) -> Quants:
        four = blocks["qs"][:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
        return Quants(four.reshape(len(blocks), 64), 2, 1, 64, blocks["d"].astype(F32))

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        out["d"], q, finite = signs(x)
        # An infinite product is cast to the least int32 here, and the lowest code; in TQ1_0 and TQ2_0 to int64, and 0.
        self.put(out, np.where(finite[:, None], q + np.int8(1), np.int8(0)).view(np.uint8))

    def put(self, out: np.ndarray, codes: np.ndarray) -> None:
        out["qs"] = np.bitwise_or.reduce(codes.reshape(-1, 16, 4) << np.array([0, 2, 4, 6], np.uint8), axis=2)
