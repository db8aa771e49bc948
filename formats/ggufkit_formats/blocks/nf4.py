"""The 4-bit types of bitsandbytes: sixteen levels, and a float32 maximum for each block of a tensor read row by row.

GGUF has no id for them. A file holds codes and maxima as tensors of their own (see nf4_tensors.py and
docs/formats/nf4.md); the blocks here are how they meet in memory, where a tensor of such a type is like any other.

Sources: QLoRA (arXiv 2305.14314) for the levels and for quantizing the maxima again, 8-bit optimizers (arXiv
2110.02861) for the dynamic map, bitsandbytes 0.50 for the order of every float32 operation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import FormatError
from .base import Quants, TensorType, register

F32 = np.float32
BLOCK = 64  # bitsandbytes' default
NESTED_BLOCK = 256  # maxima that share a second-level maximum
SMALLEST = F32(1e-38)  # what a block is divided by, at least
CHUNK = 1 << 16  # weights whose codes are found at once: they stay in the cache

# Quantiles of a normal distribution, scaled to -1…1, with a level at 0: as bitsandbytes has them.
NF4_LEVELS = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], F32)  # fmt: skip
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], F32) / F32(12)  # sign, two bits of exponent, one of fraction
FP4_LEVELS = np.concatenate([_FP4, F32(0) - _FP4])  # both zeros are positive


def encode_4bit(x: np.ndarray, levels: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Float32 (n,) -> packed codes uint8 (ceil(n / 2),), maxima float32 (ceil(n / block),), as in bitsandbytes.

    A code is that of the level nearest to x / maximum; halfway between two, the lower one. The first of two codes is
    in the high half of a byte. x must be finite. The last block may be short, and is then divided by its maximum where
    the others are multiplied with 1 / maximum; its maximum is never 0.
    """
    order = np.argsort(levels, kind="stable")
    sorted_levels = levels[order]
    bounds = (sorted_levels[:-1] + sorted_levels[1:]) / F32(2)
    n, whole = len(x), len(x) // block * block
    blocks = x[:whole].reshape(-1, block)
    maxima = np.abs(blocks).max(axis=1, initial=0)
    codes = np.zeros(n + n % 2, np.uint8)
    step = max(1, CHUNK // block)
    for first in range(0, len(blocks), step):
        part = slice(first, first + step)
        inverse = F32(1) / np.maximum(maxima[part], SMALLEST)
        scaled = np.clip(blocks[part] * inverse[:, None], F32(-1), F32(1)).reshape(-1)
        codes[first * block : first * block + len(scaled)] = _nearest(scaled, bounds)
    if whole < n:
        last = np.maximum(np.abs(x[whole:]).max(), SMALLEST)
        maxima = np.append(maxima, last)
        codes[whole:n] = _nearest(np.clip(x[whole:] / last, F32(-1), F32(1)), bounds)
    if n % 2:
        codes[n] = _nearest(np.zeros(1, F32), bounds)[0]
    if not np.array_equal(order, np.arange(16)):
        codes = order.astype(np.uint8)[codes]
    return codes[::2] << np.uint8(4) | codes[1::2], maxima


def _nearest(x: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many bounds are below each x: uint8, of x's shape."""
    codes = np.zeros(x.shape, np.uint8)
    for bound in bounds:
        codes += x > bound
    return codes


def unpack_4bit(packed: np.ndarray) -> np.ndarray:
    """uint8 (…, n) -> codes uint8 (…, 2n): the high half of a byte first."""
    return np.stack([packed >> np.uint8(4), packed & np.uint8(15)], axis=-1).reshape(
        *packed.shape[:-1], 2 * packed.shape[-1]
    )


# -- maxima that are quantized again -----------------------------------------------------------------


@lru_cache
def dynamic_map() -> np.ndarray:
    """The 256 levels of the signed dynamic 8-bit type, float32, sorted: finer steps for smaller numbers.

    For each power of ten from 1e-6 to 1 twice as many levels as for the one before, in the middle of equal steps from
    0.1 to 1, with both signs; and 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        edges = _edges(2**i)
        middles = F32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / F32(2))
        found += [*middles.tolist(), *(-middles).tolist()]
    levels = np.array(sorted(found), F32)
    levels.flags.writeable = False
    return levels


def encode_maxima(maxima: np.ndarray, levels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Float32 (n,) -> codes uint8 (n,), second-level maxima float32 (ceil(n / 256),), and the offset: the mean.

    What is stored of a maximum is its distance from the offset. bitsandbytes rounds that on the CPU by way of a grid
    of 65536 steps from -1 to 1, and so does this; from the nearest level it differs only next to the middle of two.
    The mean is rounded once; bitsandbytes' own depends on the machine in its last bit.
    """
    offset = F32(np.mean(maxima, dtype=np.float64)) if len(maxima) else F32(0)
    codes, second = encode_distances(maxima - offset, dynamic_map() if levels is None else levels)
    return codes, second, offset


def encode_distances(x: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 (n,) -> codes uint8 (n,) among the sorted `levels` (256,), and maxima float32 (ceil(n / 256),)."""
    bounds = F32(0.5) * (levels[:-1] + levels[1:])
    grid = F32(-1) + F32(2) * np.arange(65536, dtype=F32) / F32(65535)
    nearest = np.searchsorted(bounds, grid, side="left").astype(np.uint8)
    padded = np.zeros(-(-len(x) // NESTED_BLOCK) * NESTED_BLOCK, F32)
    padded[: len(x)] = x
    blocks = padded.reshape(-1, NESTED_BLOCK)
    second = np.abs(blocks).max(axis=1, initial=0)
    inverse = F32(1) / np.where(second > 0, second, F32(1))
    scaled = np.clip(blocks * inverse[:, None], F32(-1), F32(1))
    at = ((scaled + F32(1)) * F32(0.5) * F32(65535) + F32(0.5)).astype(np.uint16)
    codes = np.where(second[:, None] > 0, nearest[at], np.uint8(0))
    return codes.reshape(-1)[: len(x)], second


def decode_maxima(codes: np.ndarray, second: np.ndarray, offset: np.float32, levels: np.ndarray) -> np.ndarray:
    """Codes uint8 (n,) and the second-level maximum of each (n,) -> maxima float32 (n,)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return levels[codes] * second + F32(offset)


def _edges(n: int) -> np.ndarray:
    """n + 1 numbers from 0.1 to 1 in even steps, float32, as torch.linspace has them to the last bit: from the nearer
    end, the product with the step not rounded."""
    low, step = F32(0.1), float((F32(1) - F32(0.1)) / F32(n))
    i = np.arange(n + 1)
    return np.where(i < (n + 1) // 2, float(low) + step * i, 1 - step * (n - i)).astype(F32)


# -- types -------------------------------------------------------------------------------------------


class FourBitType(TensorType):
    """Codes of four bits for sixteen levels, blocks along the rows. Levels and block are the tensor's own."""

    id = -1  # in no file
    uses_importance = False  # a block has no scale to be chosen

    def __init__(self, levels: np.ndarray, block: int):
        self.levels = levels
        self.block = block
        self.fields = np.dtype([("d", "<f4"), ("qs", "u1", block // 2)])

    def quants(self, blocks: np.ndarray) -> Quants:
        return Quants(unpack_4bit(blocks["qs"]), 4, 0, self.block, blocks["d"].astype(F32), codebook=self.levels)

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """As bitsandbytes does. Importance changes nothing: a block has no scale to be chosen."""
        out = np.empty(len(x), self.fields)
        packed, out["d"] = encode_4bit(x.reshape(-1), self.levels, self.block)
        out["qs"] = packed.reshape(len(x), self.block // 2)
        return out


@register
class NF4(FourBitType):
    """w = d * levels[q], the sixteen levels of QLoRA

    ::

        d    f32        the largest |x| of the block
        qs   32 bytes   byte j: | x[2j] : 4 | x[2j + 1] : 4 |
    """

    name = "NF4"

    def __init__(self, levels: np.ndarray = NF4_LEVELS, block: int = BLOCK):
        super().__init__(levels, block)


class FP4(FourBitType):
    """w = d * levels[q], q a float of four bits: read from checkpoints, written to no file. Laid out like NF4."""

    name = "FP4"


class FlatType(TensorType):
    """A 4-bit type whose blocks run across the rows: rows are decoded while they are read, and are float32 here."""

    id = -1
    fields = np.dtype("<f4")

    def __init__(self, of: FourBitType):
        self.name, self.of = of.name, of

    @property
    def is_quantized(self) -> bool:
        return True

    @property
    def bits_per_weight(self) -> float:
        return self.of.bits_per_weight

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return blocks.astype(F32)[:, None]


@lru_cache(64)
def _type(name: str, levels: bytes, block: int) -> FourBitType:
    values = np.frombuffer(levels, F32)
    return NF4(values, block) if name == "NF4" else FP4(values, block)


@lru_cache(64)
def flat(of: FourBitType) -> FlatType:
    """The type of tensors whose rows its blocks do not divide."""
    return FlatType(of)


def four_bit(name: str, levels: Any, block: int) -> FourBitType:
    """The type NF4 or FP4 with these levels (16,) and blocks of that many weights: the same for the same.

    Raises FormatError for levels that are not sixteen finite numbers, and for a block that is no power of two from 32
    to 4096.
    """
    from .base import TYPES

    values = np.asarray(levels, F32)
    if values.shape != (16,):
        raise FormatError(f"the levels of {name} are {values.size} numbers; 16 are needed")
    if not np.isfinite(values).all():
        raise FormatError(f"the levels of {name} are not all finite")
    if block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise FormatError(f"{name} has blocks of {block} weights; a power of two from 32 to 4096 is needed")
    usual = TYPES["NF4"]
    if name == "NF4" and block == BLOCK and values.tobytes() == NF4_LEVELS.tobytes():
        assert isinstance(usual, FourBitType)
        return usual
    return _type(name, values.tobytes(), block)
