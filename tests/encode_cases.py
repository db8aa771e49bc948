"""Compiled encoders against the definition on every hard row, for whatever processor the environment asks for.

python encode_cases.py TYPE…    # prints the family and its lanes; exits 1 where bytes differ
"""

from __future__ import annotations

import sys

import numpy as np
from ggufkit_formats.blocks import find
from ggufkit_kernels.cpu.encode import encode
from ggufkit_kernels.cpu.simd import FAMILY, LANES
from nasty_weights import COLS, finite_rows, large_rows, midpoints, powers_of_two, with_scales

ROWS = {name: rows.astype(np.float32) for name, rows in finite_rows(seed=5)}


def in_rows(blocks: np.ndarray) -> np.ndarray:
    """Blocks (n, 32) as rows (…, COLS), the last few left out."""
    return blocks[: len(blocks) // 8 * 8].reshape(-1, COLS)


def differences(name: str) -> list[str]:
    """What differs between the compiled encoder and the definition, a line a kind of rows."""
    kinds = {what: with_scales(name, rows) for what, rows in ROWS.items()}
    if name in ("MXFP4", "NVFP4"):
        kinds |= {"midpoints": midpoints().reshape(-1, COLS), "powers of two": in_rows(powers_of_two())}
        kinds["large"] = np.concatenate(list(large_rows()))
    every = np.concatenate(list(kinds.values()))
    ours, definition = encode(name, every), find(name).encode(every)
    start, found = 0, []
    for what, rows in kinds.items():
        part = slice(start, start + len(rows))
        different = np.flatnonzero((ours[part] != definition[part]).any(axis=1))
        if len(different):
            found.append(f"{name}, {what}: rows {different[:5]} of {len(rows)}")
        start += len(rows)
    return found


if __name__ == "__main__":
    print(f"{FAMILY.name} {LANES}")
    wrong = [line for name in sys.argv[1:] for line in differences(name)]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))
