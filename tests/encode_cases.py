"""Compiled encoders against the definition on every hard row, for whatever processor the environment asks for.

python encode_cases.py TYPE…    # prints the family and its lanes; exits 1 where bytes differ
"""

from __future__ import annotations

import sys

import numpy as np
from ggufkit_formats.blocks import find
from ggufkit_formats.blocks.nf4 import NF4_LEVELS
from ggufkit_kernels.cpu.encode import WEIGHTED, encode
from ggufkit_kernels.cpu.simd import FAMILY, LANES
from nasty_weights import COLS, finite_rows, importances, large_rows, midpoints, powers_of_two, with_scales

ROWS = {name: rows.astype(np.float32) for name, rows in finite_rows(seed=5)}
ALL_ROWS = np.concatenate(list(ROWS.values()))


def in_rows(blocks: np.ndarray) -> np.ndarray:
    """Blocks (n, 32) as rows (…, COLS), the last few left out."""
    return blocks[: len(blocks) // 8 * 8].reshape(-1, COLS)


def nf4_rows() -> np.ndarray:
    """Rows (…, COLS): each block has its maximum, all midpoints of levels times it, and their neighbours."""
    bounds = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / np.float32(2)
    block = np.concatenate([[1, -1, 0, -0.0], bounds, np.nextafter(bounds, 2), np.nextafter(bounds, -2), bounds])
    sizes = np.array([1, 0.3, 7, 1e-38, 1e-41, 3e38, 65536, 1 / 3], np.float32)[:, None]
    blocks = (block.astype(np.float32) * sizes)[:, :64]
    return np.concatenate([blocks, -blocks]).reshape(-1, COLS)


def needed(name: str, cols: int) -> np.ndarray | None:
    """Importance for a type that is not encoded without."""
    if not find(name).needs_importance:
        return None
    return np.random.default_rng(6).chisquare(1, cols).astype(np.float32)


def differences(name: str) -> list[str]:
    """What differs between the compiled encoder and the definition, a line a kind of rows."""
    kinds = {what: with_scales(name, rows) for what, rows in ROWS.items()}
    if name.startswith(("IQ1", "IQ2", "IQ3")):  # a slow definition
        kinds = {what: rows[:12] for what, rows in kinds.items()}
    if name in ("MXFP4", "NVFP4"):
        kinds |= {"midpoints": midpoints().reshape(-1, COLS), "powers of two": in_rows(powers_of_two())}
        kinds["large"] = np.concatenate(list(large_rows()))
    if name == "NF4":
        kinds["midpoints"] = nf4_rows()
    every = np.concatenate(list(kinds.values()))
    importance = needed(name, every.shape[1])
    ours, definition = encode(name, every, importance), find(name).encode(every, importance)
    start, found = 0, []
    for what, rows in kinds.items():
        part = slice(start, start + len(rows))
        different = np.flatnonzero((ours[part] != definition[part]).any(axis=1))
        if len(different):
            found.append(f"{name}, {what}: rows {different[:5]} of {len(rows)}")
        start += len(rows)
    return found


def weighted_differences(name: str) -> list[str]:
    """The same with importance: some rows of every kind by each importance."""
    kinds, found = list(importances(seed=6)), []
    for i, (what, importance) in enumerate(kinds):
        x = ALL_ROWS[i :: len(kinds)]
        different = np.flatnonzero((encode(name, x, importance) != find(name).encode(x, importance)).any(axis=1))
        if len(different):
            found.append(f"{name}, {what}: rows {different[:5]} of {len(x)}")
    return found


if __name__ == "__main__":
    print(f"{FAMILY.name} {LANES}")
    wrong = [
        line
        for name in sys.argv[1:]
        for line in differences(name) + (weighted_differences(name) if name in WEIGHTED else [])
    ]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))
