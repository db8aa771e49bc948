"""IQ4_NL and IQ4_XS: four bits a weight that choose one of 16 uneven levels.

Diagrams show a block's bytes in order of the file, one row a field. `x[j]` is weight j of the block, low bits stand
right. `level` is `tables.IQ4_LEVELS`: -127 … 113, closer together around 0, where most weights are.

Encoding repeats the float32 operations of ggml in their order (see k_search), so the bytes are equal.
"""

from __future__ import annotations

import numpy as np

from .base import Quants, TensorType, register
from .k import CHUNK, bits, pack_bits
from .k_search import SMALLEST, by_block, by_group, first_largest, nearest, quotient, total
from .tables import IQ4_LEVELS

F32 = np.float32
LEVELS = IQ4_LEVELS.astype(F32)
# Where the nearest level changes; a tie takes the upper one. ggml compares two differences, which are exact there.
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / F32(2)
STEPS = 7  # scales tried on each side of the first one


def nearest_level(x: np.ndarray) -> np.ndarray:
    """The code of the level nearest to each float32; 15 for NaN, as in ggml."""
    return np.searchsorted(MIDDLES, x, side="right")


def importance_weights(x: np.ndarray, importance: np.ndarray, factor: float) -> np.ndarray:
    """importance * sqrt(factor * mean x² + x²), blocks (n, k): how much an error of each weight counts."""
    square = x * x
    mean = total(np.ascontiguousarray(square.T)) * F32(factor / x.shape[1])
    return importance * np.sqrt(mean[:, None] + square)


def search(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The scale s (groups,) that minimises sum w (s level - x)² for the nearest levels, of 16; x, w (32, groups).

    The largest weight is put on the level of -127 and seven steps to either side. 0 for groups that count as zero.
    """
    largest, at = first_largest(x)
    zero = largest < SMALLEST

    def tried(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        level = LEVELS[nearest_level(inverse * x)]
        weighted = w * level
        return total(weighted * x), total(weighted * level)

    lx, l2 = tried(F32(1) / (-at / LEVELS[0]))
    scale = quotient(lx, l2)
    best = scale * lx
    for step in range(-STEPS, STEPS + 1):
        lx, l2 = tried((F32(step) + LEVELS[0]) / at)
        better = (l2 > 0) & (lx * lx > best * l2)
        scale = np.where(better, lx / l2, scale)
        best = np.where(better, scale * lx, best)
    return np.where(zero, F32(0), scale)


def inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, 0 where d is 0."""
    return np.where(d != 0, F32(1) / d, F32(0))


class IQ4(TensorType):
    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        out = np.zeros(len(x), self.fields)
        step = CHUNK * 256 // self.block
        with np.errstate(all="ignore"):
            for start in range(0, len(x), step):
                part = x[start : start + step]
                weights = None
                if importance is not None:
                    weights = importance_weights(part, importance[start : start + step], 2)
                self.fill(out[start : start + step], part, part * part if weights is None else weights)
        return out

    def fill(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
        """Write all fields of the blocks `out` (n,) for x (n, block), whose errors count w times."""
        raise NotImplementedError


@register
class IQ4_NL(IQ4):
    """w = d * level[q]

    ::

        d   f16        scale
        qs  16 bytes   byte j:  | q of x[j + 16] : 4 | q of x[j] : 4 |
    """

    name, id, block = "IQ4_NL", 20, 32
    fields = np.dtype([("d", "<f2"), ("qs", "u1", 16)])

    def quants(self, blocks: np.ndarray) -> Quants:
        codes = bits(blocks["qs"], 1, (0, 4), 15)
        return Quants(codes, 4, 0, 32, blocks["d"].astype(F32), codebook=IQ4_LEVELS)

    def fill(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
        columns = by_group(x, 32)
        scale = search(columns, by_group(w, 32))
        out["d"] = scale
        codes = nearest_level(inverse(scale) * columns).T.astype(np.uint8)
        out["qs"] = pack_bits(codes, 1, (0, 4))


@register
class IQ4_XS(IQ4):
    """w = (d * (scale - 32)) * level[q], eight groups of 32

    ::

        d         f16         scale of the scales
        scales_h  u16         bits 2g, 2g + 1:  high bits of scale g
        scales_l  4 bytes     byte p:           | low bits of scale 2p + 1 : 4 | low bits of scale 2p : 4 |
        qs        128 bytes   byte 16g + j:     | q of x[32g + j + 16] : 4 | q of x[32g + j] : 4 |
    """

    name, id, block = "IQ4_XS", 23, 256
    fields = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])

    def quants(self, blocks: np.ndarray) -> Quants:
        low = bits(blocks["scales_l"], 4, (0, 4), 15)
        high = (blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16)).astype(np.uint8) & np.uint8(3)
        scale = (low | high << np.uint8(4)).view(np.int8) - np.int8(32)
        codes = bits(blocks["qs"], 8, (0, 4), 15)
        return Quants(codes, 4, 0, 32, blocks["d"].astype(F32), scale, codebook=IQ4_LEVELS)

    def fill(self, out: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
        columns = by_group(x, 32)
        scale = search(columns, by_group(w, 32)).reshape(-1, 8)
        magnitude, most = first_largest(np.ascontiguousarray(scale.T))
        # A block of zeros gets d = -0. The codes follow from d before its rounding to float16.
        d = -np.where(magnitude == 0, F32(0), most) / F32(32)
        factor = np.clip(nearest(inverse(d)[:, None] * scale), -32, 31)
        group_d = (d[:, None] * factor.astype(F32)).reshape(-1)
        stored = (factor + 32).astype(np.uint8)
        out["d"] = d
        out["scales_l"] = pack_bits(stored & 15, 4, (0, 4))
        high = (stored >> 4).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
        out["scales_h"] = np.bitwise_or.reduce(high, axis=1)
        out["qs"] = pack_bits(by_block(nearest_level(inverse(group_d) * columns)), 8, (0, 4))
