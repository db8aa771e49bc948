"""Codebooks of up to 16 levels as the integers that matmul kernels look up: exact bytes, near bytes, 16-bit numbers.

Levels that are no small integers (NF4, FP4) are rounded to integers times a common step: to bytes where those come near
enough (OFF, EACH), else to 16-bit numbers, right to 1.5e-5 of the largest level. `embed` has the levels themselves.

What a chunk of 32 inputs and 16 rows takes with 16 lanes, in whole vectors (Zen 4 begins one `vpdpbusd` and one
`vpshufb` a cycle, on three half-width pipes between them):

    one token   4 loads, 4 shifts, 8 ands, 8 or 16 look-ups, 8 or 16 products, about 8 for scales
    8 tokens    the same before the products, and 64 or 128 products

So two look-ups and two products a code cost nearly twice in a tile, where products are all that counts; and one token
from memory hides them, as 256 bytes of codes take twice as long to arrive. Nothing is spilled, in either. Measured on
one thread of a Zen 4, times of Q4_0 out of the cache (320 x 2048, best of 1500 in turn), and mean KL to the file as
float32 (SmolLM2-135M, small model; 768 tokens; most of it comes from rounding the inputs to int8):

                                            one token   64 tokens   KL
    16-bit numbers                            1.39        1.74     2.88e-3   4.97e-5
    9 bits: bytes of the magnitude, the       1.32        1.35     3.04e-3   5.20e-5
      sign moved to the inputs (1 / 243.1)
    bytes (1 / 112.03)                        1.09        1.00     3.58e-3   6.52e-5

With 16-bit numbers a token of a 1.1 B model took 1.04 times as long a byte as Q4_0's on two threads, 1.06 on one, but a
prompt 1.7 to 1.8 times. With bytes both take what IQ4_NL takes. Normal weights in NF4 are off by 0.47 % of their root
mean square then, as much as inputs are by their rounding, and a twentieth of what NF4 is off by itself (9.2 %). Levels
moved by a fraction of a step (taken back through the inputs' sums) would be off by 0.34 %, but no weight would be 0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

LARGEST = 127  # of a byte; -128 has no counterpart
WIDE = 127 * 256  # the largest level as a 16-bit number
OFF = 0.005  # of the levels' root mean square: what bytes may be off by, root mean square (NF4 0.0033)
EACH = 0.03  # of a level itself: what a byte may be off by (NF4 0.020)
TRIED = 4096  # steps


def are_bytes(levels: np.ndarray) -> bool:
    """Whether levels are integers from -127 to 127."""
    return bool(np.all((levels == np.rint(levels)) & (np.abs(levels.astype(np.float64)) <= LARGEST)))


def kind_of(levels: np.ndarray) -> str:
    """How a layout holds a codebook (n,): as "table" (bytes) or "table16"."""
    return "table16" if _as_bytes(levels) is None else "table"


def tables(levels: np.ndarray, kind: str) -> tuple[np.ndarray, float]:
    """int8 (2, 16), the bytes or the high parts of 16-bit numbers and their low parts; and what they are times."""
    whole, low = np.zeros(16), np.zeros(16)
    if kind == "table":
        found = _as_bytes(levels)
        assert found is not None
        whole[: len(levels)], step = found
    else:
        step = float(np.abs(levels).max()) / WIDE
        whole[: len(levels)] = np.rint(levels / step)
        low = (whole + 128) % 256 - 128
        whole = (whole - low) / 256
    return np.array([whole, low]).astype(np.int8), step


def _as_bytes(levels: np.ndarray) -> tuple[tuple[int, ...], float] | None:
    if are_bytes(levels):
        return tuple(int(x) for x in levels), 1.0
    return near_bytes(tuple(levels.astype(np.float64).tolist()))


@lru_cache(64)
def near_bytes(levels: tuple[float, ...]) -> tuple[tuple[int, ...], float] | None:
    """The integers, and the step, that together come nearest to levels which are not all 0: the least mean square, each
    level as likely (NF4's are, by design). None where that is too far off. Levels of 0 stay 0."""
    exact = np.array(levels)
    largest = np.linspace(LARGEST / 2, LARGEST + 0.499, TRIED)[:, None]
    whole = np.rint(exact * (largest / np.abs(exact).max()))
    step = (whole @ exact / (whole * whole).sum(axis=1))[:, None]
    errors = whole * step - exact
    best = int(np.argmin((errors**2).mean(axis=1)))
    near = (errors[best] ** 2).mean() <= OFF**2 * (exact**2).mean()
    if not near or not (np.abs(errors[best]) <= EACH * np.abs(exact)).all():
        return None
    return tuple(int(x) for x in whole[best]), float(step[best, 0])
