"""The K types of ggml: 256 weights a block, in groups of 16 or 32 whose scales are integers themselves.

Diagrams show a block's bytes in order of the file, one row a field. `x[j]` is weight j of the block, `h` a half of it
(128 weights), bits of a byte stand with the low ones right. The searches for good scales stand in `k_search`,
those with importance in `k_search_weighted`.
"""

from __future__ import annotations

import numpy as np

from . import k_search, k_search_weighted
from .base import Quants, TensorType, register

F32 = np.float32
CHUNK = 1024  # blocks encoded at once: bounds the memory of the searches


def bits(qs: np.ndarray, halves: int, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """Fields of equal width taken out of bytes: (n, bytes) -> (n, halves * len(shifts) * bytes // halves).

    Each of the `halves` runs of bytes gives all its fields at the first shift, then all at the second, …
    """
    n, nbytes = qs.shape
    runs = qs.reshape(n, halves, 1, nbytes // halves) >> np.array(shifts, np.uint8)[:, None]
    return (runs & np.uint8(mask)).reshape(n, nbytes * len(shifts))


def pack_bits(codes: np.ndarray, halves: int, shifts: tuple[int, ...]) -> np.ndarray:
    """The inverse of `bits`; the codes must fit in their fields."""
    n, nbytes = len(codes), codes.shape[1] // len(shifts)
    runs = codes.reshape(n, halves, len(shifts), nbytes // halves) << np.array(shifts, np.uint8)[:, None]
    return np.bitwise_or.reduce(runs, axis=2).reshape(n, nbytes)


def unpack_scales_6(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes (n, 12) of Q4_K and Q5_K -> eight scales and eight minima, (n, 8) uint8 below 64 each."""
    a, b, c = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    minimum = np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], axis=1)
    return scale, minimum


def pack_scales_6(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """The inverse of `unpack_scales_6`."""
    a = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    b = minimum[:, :4] | (minimum[:, 4:] >> 4) << 6
    c = (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4
    return np.concatenate([a, b, c], axis=1)


class KType(TensorType):
    block = 256

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        out = np.zeros(len(x), self.fields)
        with np.errstate(all="ignore"):
            for start in range(0, len(x), CHUNK):
                part = slice(start, start + CHUNK)
                self.fill(out[part], x[part], None if importance is None else importance[part])
        return out

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        """Write all fields of the zeroed blocks `out` (n,) for the weights x (n, 256); importance likewise or None."""
        raise NotImplementedError


@register
class Q2_K(KType):
    """w = (d * scale) * q - dmin * minimum, sixteen groups of 16

    ::

        scales  16 bytes   byte g:        | minimum of group g : 4 | scale of group g : 4 |
        qs      64 bytes   byte 32h + j:  | x[128h + j + 96] : 2 | … j + 64 : 2 | … j + 32 : 2 | x[128h + j] : 2 |
        d       f16        scale of the scales
        dmin    f16        scale of the minima
    """

    name, id = "Q2_K", 10
    fields = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])

    def quants(self, blocks: np.ndarray) -> Quants:
        s = blocks["scales"]
        codes = bits(blocks["qs"], 2, (0, 2, 4, 6), 3)
        d, dmin = blocks["d"].astype(F32), blocks["dmin"].astype(F32)
        return Quants(codes, 2, 0, 16, d, s & np.uint8(15), dmin, s >> 4, scale_bits=4)

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        out["scales"], out["d"], out["dmin"], codes = (
            k_search.q2_k(x) if importance is None else k_search_weighted.q2_k(x, importance)
        )
        out["qs"] = pack_bits(codes, 2, (0, 2, 4, 6))


@register
class Q3_K(KType):
    """w = (d * scale) * (q - 4), sixteen groups of 16

    ::

        hmask   32 bytes   byte j, bit b:  bit 2 of x[32b + j]'s q
        qs      64 bytes   byte 32h + j:   | x[128h + j + 96] : 2 | … j + 64 : 2 | … j + 32 : 2 | x[128h + j] : 2 |
        scales  12 bytes   byte g < 8:     | low bits of scale g + 8 : 4 | low bits of scale g : 4 |
                           byte 8 + g:     | high bits of scale g + 12 : 2 | … g + 8 : 2 | … g + 4 : 2 | … g : 2 |
                           a scale is stored as scale + 32
        d       f16        scale of the scales
    """

    name, id = "Q3_K", 11
    fields = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])

    def quants(self, blocks: np.ndarray) -> Quants:
        s = blocks["scales"]
        low = bits(s[:, :8], 1, (0, 4), 15)
        high = bits(s[:, 8:], 1, (0, 2, 4, 6), 3)
        scale = (low | high << 4).view(np.int8) - np.int8(32)
        codes = bits(blocks["qs"], 2, (0, 2, 4, 6), 3)
        codes |= bits(blocks["hmask"], 1, tuple(range(8)), 1) << 2
        return Quants(codes, 3, 4, 16, blocks["d"].astype(F32), scale)

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        scale, out["d"], codes = k_search.q3_k(x) if importance is None else k_search_weighted.q3_k(x, importance)
        low = pack_bits(scale & 15, 1, (0, 4))
        out["scales"] = np.concatenate([low, pack_bits(scale >> 4, 1, (0, 2, 4, 6))], axis=1)
        out["hmask"] = pack_bits(codes >> 2, 1, tuple(range(8)))
        out["qs"] = pack_bits(codes & 3, 2, (0, 2, 4, 6))


@register
class Q4_K(KType):
    """w = (d * scale) * q - dmin * minimum, eight groups of 32

    ::

        d       f16         scale of the scales
        dmin    f16         scale of the minima
        scales  12 bytes    byte g < 4:      | high bits of scale g + 4 : 2 | scale g : 6 |
                            byte 4 + g:      | high bits of minimum g + 4 : 2 | minimum g : 6 |
                            byte 8 + g:      | low bits of minimum g + 4 : 4 | low bits of scale g + 4 : 4 |
        qs      128 bytes   byte 32p + j:    | x[64p + j + 32] : 4 | x[64p + j] : 4 |
    """

    name, id = "Q4_K", 12
    fields = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])

    def quants(self, blocks: np.ndarray) -> Quants:
        scale, minimum = unpack_scales_6(blocks["scales"])
        codes = bits(blocks["qs"], 4, (0, 4), 15)
        d, dmin = blocks["d"].astype(F32), blocks["dmin"].astype(F32)
        return Quants(codes, 4, 0, 32, d, scale, dmin, minimum, scale_bits=6)

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        scale, minimum, out["d"], out["dmin"], codes = (
            k_search.q45_k(x, 4) if importance is None else k_search_weighted.q45_k(x, importance, 4)
        )
        out["scales"] = pack_scales_6(scale, minimum)
        out["qs"] = pack_bits(codes, 4, (0, 4))


@register
class Q5_K(KType):
    """w = (d * scale) * q - dmin * minimum, eight groups of 32

    ::

        d       f16         scale of the scales
        dmin    f16         scale of the minima
        scales  12 bytes    as in Q4_K
        qh      32 bytes    byte j, bit g:   bit 4 of x[32g + j]'s q
        qs      128 bytes   byte 32p + j:    | low bits of x[64p + j + 32] : 4 | low bits of x[64p + j] : 4 |
    """

    name, id = "Q5_K", 13
    fields = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])

    def quants(self, blocks: np.ndarray) -> Quants:
        scale, minimum = unpack_scales_6(blocks["scales"])
        codes = bits(blocks["qs"], 4, (0, 4), 15)
        codes |= bits(blocks["qh"], 1, tuple(range(8)), 1) << 4
        d, dmin = blocks["d"].astype(F32), blocks["dmin"].astype(F32)
        return Quants(codes, 5, 0, 32, d, scale, dmin, minimum, scale_bits=6)

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        scale, minimum, out["d"], out["dmin"], codes = (
            k_search.q45_k(x, 5) if importance is None else k_search_weighted.q45_k(x, importance, 5)
        )
        out["scales"] = pack_scales_6(scale, minimum)
        out["qh"] = pack_bits(codes >> 4, 1, tuple(range(8)))
        out["qs"] = pack_bits(codes & 15, 4, (0, 4))


@register
class Q6_K(KType):
    """w = (d * scale) * (q - 32), sixteen groups of 16

    ::

        ql      128 bytes   byte 64h + j:   | low bits of x[128h + j + 64] : 4 | low bits of x[128h + j] : 4 |
                            (j below 64)
        qh      64 bytes    byte 32h + j:   | high bits of x[128h + j + 96] : 2 | j + 64 : 2 | j + 32 : 2 | j : 2 |
        scales  16 × i8     byte g:         scale of group g
        d       f16         scale of the scales
    """

    name, id = "Q6_K", 14
    fields = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = bits(blocks["ql"], 2, (0, 4), 15)
        codes |= bits(blocks["qh"], 2, (0, 2, 4, 6), 3) << 4
        return Quants(codes, 6, 32, 16, blocks["d"].astype(F32), blocks["scales"])

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        out["scales"], out["d"], codes = k_search.q6_k(x, importance)
        out["ql"] = pack_bits(codes & 15, 2, (0, 4))
        out["qh"] = pack_bits(codes >> 4, 2, (0, 2, 4, 6))


@register
class Q8_K(KType):
    """w = d * q. ggml uses it for activations only; no model file holds it. Its d is float32, not f16.

    ::

        d       f32         scale
        qs      256 × i8    byte j:  q of x[j]
        bsums   16 × i16    sums of q over each 16 weights
    """

    name, id = "Q8_K", 15
    uses_importance = False
    fields = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = np.ascontiguousarray(blocks["qs"]).view(np.uint8) ^ np.uint8(128)
        return Quants(codes, 8, 128, 256, blocks["d"].astype(F32))

    def fill(self, out: np.ndarray, x: np.ndarray, importance: np.ndarray | None) -> None:
        out["d"], out["qs"] = k_search.q8_k(x)
        out["bsums"] = out["qs"].reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
