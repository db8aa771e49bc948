"""The IQ types decoded by plain loops, with the grids of the `gguf` package. Nobody optimises this file."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache

import numpy as np

F = np.float32
LEVELS = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def half(data: bytes, at: int) -> np.float32:
    return F(struct.unpack_from("<e", data, at)[0])


def u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


@lru_cache
def grid(name: str) -> list[list[int]]:
    """The grid's points, as the gguf package spells them."""
    from gguf import quants

    cls = getattr(quants, name)
    cls.init_grid()
    return [[int(x) for x in point] for point in np.asarray(cls.grid).reshape(cls.grid_shape)]


def even(seven: int) -> int:
    """Seven signs, and an eighth that makes the number of minus signs even."""
    return seven | (bin(seven).count("1") % 2) << 7


def sign(signs: int, i: int) -> np.float32:
    return F(-1 if signs >> i & 1 else 1)


def iq4_nl(b: bytes) -> list[np.float32]:
    return [half(b, 0) * F(LEVELS[b[2 + i % 16] >> 4 * (i // 16) & 15]) for i in range(32)]


def iq4_xs(b: bytes) -> list[np.float32]:
    d, high, low, qs = half(b, 0), u16(b, 2), b[4:8], b[8:]
    out = []
    for i in range(256):
        g = i // 32
        scale = (low[g // 2] >> 4 * (g % 2) & 15) + 16 * (high >> 2 * g & 3) - 32
        out.append((d * F(scale)) * F(LEVELS[qs[16 * g + i % 16] >> 4 * (i % 32 // 16) & 15]))
    return out


def iq2_xxs(b: bytes) -> list[np.float32]:
    d, out = half(b, 0), []
    for g in range(8):
        index, word = b[2 + 8 * g : 6 + 8 * g], int.from_bytes(b[6 + 8 * g : 10 + 8 * g], "little")
        scale = d * (F(0.5) + F(word >> 28)) * F(0.25)
        for k in range(4):
            signs = even(word >> 7 * k & 127)
            out += [scale * F(grid("IQ2_XXS")[index[k]][j]) * sign(signs, j) for j in range(8)]
    return out


def iq2_xs(b: bytes) -> list[np.float32]:
    d, out = half(b, 0), []
    for p in range(32):
        word, scales = u16(b, 2 + 2 * p), b[66 + p // 4]
        scale = d * (F(0.5) + F(scales >> 4 * (p % 4 // 2) & 15)) * F(0.25)
        out += [scale * F(grid("IQ2_XS")[word & 511][j]) * sign(even(word >> 9), j) for j in range(8)]
    return out


def iq2_s(b: bytes) -> list[np.float32]:
    d, qs, signs, qh, scales = half(b, 0), b[2:34], b[34:66], b[66:74], b[74:82]
    out = []
    for p in range(32):
        scale = d * (F(0.5) + F(scales[p // 4] >> 4 * (p % 4 // 2) & 15)) * F(0.25)
        index = qs[p] + 256 * (qh[p // 4] >> 2 * (p % 4) & 3)
        out += [scale * F(grid("IQ2_S")[index][j]) * sign(signs[p], j) for j in range(8)]
    return out


def iq3_xxs(b: bytes) -> list[np.float32]:
    d, out = half(b, 0), []
    for i in range(256):
        word = int.from_bytes(b[66 + 4 * (i // 32) : 70 + 4 * (i // 32)], "little")
        scale = d * (F(0.5) + F(word >> 28)) * F(0.5)
        signs = even(word >> 7 * (i % 32 // 8) & 127)
        out.append(scale * F(grid("IQ3_XXS")[b[2 + i // 4]][i % 4]) * sign(signs, i % 8))
    return out


def iq3_s(b: bytes) -> list[np.float32]:
    d, qs, qh, signs, scales = half(b, 0), b[2:66], b[66:74], b[74:106], b[106:110]
    out = []
    for i in range(256):
        p, g = i // 4, i // 32
        scale = d * F(1 + 2 * (scales[g // 2] >> 4 * (g % 2) & 15))
        index = qs[p] + 256 * (qh[p // 8] >> p % 8 & 1)
        out.append(scale * F(grid("IQ3_S")[index][i % 4]) * sign(signs[i // 8], i % 8))
    return out


def iq1_s(b: bytes) -> list[np.float32]:
    d, out = half(b, 0), []
    for p in range(32):
        word = u16(b, 34 + 2 * (p // 4))
        scale = d * F(2 * (word >> 12 & 7) + 1)
        delta = F(-0.125 if word & 0x8000 else 0.125)
        index = b[2 + p] + 256 * (word >> 3 * (p % 4) & 7)
        out += [scale * (F(x) + delta) for x in grid("IQ1_S")[index]]
    return out


def iq1_m(b: bytes) -> list[np.float32]:
    words = [u16(b, 48 + 2 * k) for k in range(4)]
    d = half(sum((word >> 12) << 4 * k for k, word in enumerate(words)).to_bytes(2, "little"), 0)
    out = []
    for p in range(32):
        scale = d * F(2 * (words[p // 8] >> 3 * (p // 2 % 4) & 7) + 1)
        nibble = b[32 + p // 2] >> 4 * (p % 2) & 15
        delta = F(-0.125 if nibble & 8 else 0.125)
        out += [scale * (F(x) + delta) for x in grid("IQ1_S")[b[p] + 256 * (nibble & 7)]]
    return out


DECODERS: dict[str, Callable[[bytes], list[np.float32]]] = {
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "IQ2_XXS": iq2_xxs,
    "IQ2_XS": iq2_xs,
    "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
    "IQ1_S": iq1_s,
    "IQ1_M": iq1_m,
}
