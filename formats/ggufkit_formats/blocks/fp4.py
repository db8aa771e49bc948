"""The 4-bit floats: MXFP4 of the Open Compute Project's microscaling formats, and NVIDIA's NVFP4.

A weight is an e2m1: a sign, two bits of exponent, one of mantissa; 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. ggml
keeps them doubled, as integers, and halves the scale instead. Scales are floats of 8 bits without a mantissa (e8m0)
or without a sign (e4m3).

Encoding repeats the float32 operations of ggml's `quantize_row_*_ref`. Importance changes nothing.
"""

from __future__ import annotations

import numpy as np

from ..errors import FormatError
from .base import Quants, TensorType, register
from .legacy import nibbles, unpack_nibbles

F32 = np.float32
LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
LN_2 = 0.6931471805599453


def e8m0(e: np.ndarray) -> np.ndarray:
    """float32 2**(e - 128) of uint8: half of what an e8m0 says, and no NaN."""
    wide = e.astype(np.uint32)
    return np.where(wide < 2, np.uint32(0x00200000) << wide, (wide - 1) << 23).astype(np.uint32).view(F32)


def e4m3(code: np.ndarray) -> np.ndarray:
    """float32 of uint8 without its highest bit: half of what an e4m3 says, and no NaN but numbers up to 480 / 2."""
    exponent, mantissa = (code >> 3 & 15).astype(np.int32), (code & 7).astype(F32)
    small = exponent == 0
    return np.ldexp(np.where(small, mantissa, mantissa + F32(8)), np.where(small, 1, exponent) - 11).astype(F32)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """uint8 of float32 >= 0 as ggml rounds: halves up, all from 256 on to 448, below 2**-6 to multiples of 2**-9."""
    x = np.minimum(x, F32(448))
    word = x.view(np.uint32).astype(np.int64)
    # the exponent's bias is 7 instead of 127; a mantissa that rounds beyond 7 carries into the exponent
    rounded = (word - (120 << 23) >> 20) + (word >> 19 & 1)
    small = np.minimum((x * F32(512) + F32(0.5)).astype(np.int64), 7)
    is_small = word >> 23 <= 120
    return np.where(is_small, small, np.where(rounded >= 120, 126, rounded)).astype(np.uint8)


def floor_log2(x: np.ndarray) -> np.ndarray:
    """int32: floorf(log2f(x)) of float32 > 0. Just below 2**k a correctly rounded log2f is k already."""
    mantissa, k = np.frexp(x)
    half_a_step = np.spacing(np.abs(np.nextafter(k.astype(F32), F32(-np.inf)))) / 2
    return k - 1 + (1 - mantissa < half_a_step * LN_2)


def nearest(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    """uint8 (n, k): which of d * LEVELS is nearest to x (n, k), d (n,), the first of equals."""
    codes, least = np.zeros(x.shape, np.uint8), np.abs(x)
    for code in range(1, 16):
        error = np.abs(F32(LEVELS[code]) * d[:, None] - x)
        better = error < least
        codes[better], least[better] = code, error[better]
    return codes


class Fp4Type(TensorType):
    uses_importance = False

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        out = np.zeros(len(x), self.fields)
        with np.errstate(all="ignore"):
            self.fill(out, x)
        return out

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        """Write all fields of the blocks `out` (n,) for the weights x (n, block)."""
        raise NotImplementedError


@register
class MXFP4(Fp4Type):
    """w = d * level[q], d = 2**(e - 128), level = 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12

    ::

        e   u8         exponent of the scale; 255 is not written
        qs  16 bytes   byte j:  | q of x[j + 16] : 4 | q of x[j] : 4 |
    """

    name, id, block = "MXFP4", 39, 32
    fields = np.dtype([("e", "u1"), ("qs", "u1", 16)])

    def quants(self, blocks: np.ndarray) -> Quants:
        e = blocks["e"]
        return Quants(unpack_nibbles(blocks["qs"]), 4, 0, 32, e8m0(e), codebook=LEVELS, d_code=e, d_format="e8m0")

    def check_scales(self, blocks: np.ndarray) -> None:
        """Raise FormatError where an exponent is 255, which ggml refuses to load.

        Its encoder writes that for blocks with a largest magnitude from 2**-126 to 2**-125; below, the exponent
        wraps around and the block is one of zeros.
        """
        if (blocks["e"] == 255).any():
            raise FormatError("weights of 1e-38 are too small for MXFP4: scale not finite in e8m0")

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        largest = np.abs(x).max(axis=1)
        # C's cast of a negative float to uint8 keeps the low byte on x86
        out["e"] = np.where(largest > 0, floor_log2(largest) + 125, 0).astype(np.uint8)
        out["qs"] = nibbles(nearest(x, e8m0(out["e"])))


@register
class NVFP4(Fp4Type):
    """w = d[g] * level[q], g = j // 16, level as in MXFP4, four groups of 16

    ::

        d   4 × u8     byte g:        | ignored : 1 | exponent e : 4 | mantissa m : 3 |
                                      d[g] = (8 + m) * 2**(e - 11), m * 2**-10 where e = 0; 0 where the byte is 127
        qs  32 bytes   byte 8g + j:   | q of x[16g + j + 8] : 4 | q of x[16g + j] : 4 |
    """

    name, id, block = "NVFP4", 40, 64
    fields = np.dtype([("d", "u1", 4), ("qs", "u1", 32)])

    def quants(self, blocks: np.ndarray) -> Quants:
        """Each group is a block of its own here: (4n, 16) codes."""
        d = blocks["d"].reshape(-1)
        d = np.where(d == 127, np.uint8(0), d & np.uint8(127))
        codes = unpack_nibbles(blocks["qs"].reshape(-1, 8))
        return Quants(codes, 4, 0, 16, e4m3(d), codebook=LEVELS, d_code=d, d_format="e4m3")

    def fill(self, out: np.ndarray, x: np.ndarray) -> None:
        groups = x.reshape(-1, 16)
        d = to_e4m3(np.abs(groups).max(axis=1) / F32(6))
        out["d"] = d.reshape(-1, 4)
        out["qs"] = nibbles(nearest(groups, e4m3(d))).reshape(-1, 32)
