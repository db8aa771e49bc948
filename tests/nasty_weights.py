"""Rows of 256 weights that are hard to quantize the same way twice: ties, zeros of both signs, denormals, outliers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

COLS = 256


def finite_rows(seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 (rows, 256)) with scales that every block type can hold."""
    rng = np.random.default_rng(seed)

    def normal(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, COLS)).astype(np.float32)

    yield "normal", normal(600)
    yield "weights", normal(300) * 0.02
    yield "heavy tails", np.clip(rng.standard_t(2, (300, COLS)), -1000, 1000)
    yield "positive", np.abs(normal(100))
    yield "negative", -np.abs(normal(100))
    yield "zeros", np.zeros((2, COLS))
    yield "negative zeros", -np.zeros((2, COLS))
    signed = np.where(rng.random((100, COLS)) < 0.5, -0.0, 0.0)
    yield "zeros of both signs", signed
    low = np.where(rng.random((100, COLS)) < 0.4, signed, np.abs(normal(100)))
    yield "zero as the minimum", low
    yield "zero as the maximum", -low
    constants = [1, -1, 0.3, -2.7, 2000, 1e-4, 1e-15, 9.99e-16, 1e-20, -1e-30, 3e-39, 1e-44, 1e-45]
    yield "constants", np.repeat(np.array(constants)[:, None], COLS, axis=1)
    yield "ties of quarters", rng.integers(-32, 32, (300, COLS)) / 4
    yield "ties of halves", rng.integers(-255, 256, (300, COLS)) / 2
    yield "few values", np.round(normal(200) * 3)
    yield "sparse", normal(200) * (rng.random((200, COLS)) < 0.02)
    outlier = normal(200) * 0.01
    outlier[np.arange(200), rng.integers(0, COLS, 200)] = 1000
    yield "one huge outlier", outlier
    yield "every magnitude", normal(200) * 10.0 ** rng.integers(-42, 3, (200, COLS))
    groups = np.repeat(10.0 ** rng.integers(-42, 3, (200, COLS // 16)), 16, axis=1)
    yield "every magnitude a group", normal(200) * groups
    steps = 10.0 ** np.arange(-46.0, 4.0)
    yield "from denormal to large", normal(4 * len(steps)) * np.repeat(steps, 4)[:, None]
    bits = rng.integers(0, 2**32, (300, COLS), dtype=np.uint32).view(np.float32)
    yield "random bits", np.where(np.isfinite(bits) & (np.abs(bits) < 1000), bits, np.float32(0))


def with_scales(name: str, rows: np.ndarray) -> np.ndarray:
    """The rows that a type has scales for: MXFP4 has none where a block's largest is from 2**-126 to 2**-125."""
    if name != "MXFP4":
        return rows
    largest = np.abs(rows).reshape(len(rows), -1, 32).max(axis=2)
    return rows[~((largest > 1.17e-38) & (largest < 2.36e-38)).any(axis=1)]


def powers_of_two() -> np.ndarray:
    """float32 (n, 32): blocks whose largest weight is at, just below or just above a power of two."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32).view(np.int32)
    largest = np.maximum(powers[:, None] + np.arange(-100, 3, dtype=np.int32), 1).reshape(-1).view(np.float32)
    rows = np.zeros((len(largest), 32), np.float32)
    rows[:, 5], rows[:, 20] = largest, largest * np.float32(-0.4)
    return with_scales("MXFP4", rows)


def midpoints(seed: int = 2) -> np.ndarray:
    """float32 (600, 64): weights at and just beside the midpoints of 4-bit floats, and the levels themselves."""
    rng = np.random.default_rng(seed)
    levels = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], np.float32)
    rows = rng.choice(levels, (600, 64)) * rng.choice([-1, 1], (600, 64)).astype(np.float32)
    rows[:, ::16] = 6
    rows *= np.ldexp(rng.integers(8, 16, (600, 1)), rng.integers(-16, 5, (600, 1))).astype(np.float32)
    beside = np.nextafter(rows, rng.choice([-np.inf, np.inf], rows.shape).astype(np.float32))
    return np.where(rng.random(rows.shape) < 0.6, beside, rows).astype(np.float32)


def large_rows(seed: int = 1) -> Iterator[np.ndarray]:
    """float32 (1, 256) around the magnitudes at which the types' scales leave float16."""
    rng = np.random.default_rng(seed)
    for exponent in np.arange(4.0, 38.0, 0.1):
        yield (rng.uniform(-1, 1, (1, COLS)) * 10.0**exponent).astype(np.float32)


def importances(seed: int = 2) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 (256,)) importances of columns, none negative."""
    rng = np.random.default_rng(seed)

    def squares() -> np.ndarray:
        return rng.standard_normal(COLS) ** 2

    kinds = {
        "ones": np.ones(COLS),
        "squares": squares(),
        "zeros among them": squares() * (rng.random(COLS) < 0.6),
        "groups of zeros": squares() * np.repeat(rng.random(COLS // 16) < 0.5, 16),
        "all zeros": np.zeros(COLS),
        "only one": np.eye(COLS)[100],
        "huge ratios": squares() * 10.0 ** rng.uniform(-12, 12, COLS),
        "tiny": squares() * 1e-36,
        "one huge outlier": np.where(np.arange(COLS) == 77, 1e12, squares()),
    }
    for name, importance in kinds.items():
        yield name, importance.astype(np.float32)
