"""Compiled encoders against the definition on every hard row, for whatever processor the environment asks for.

python encode_cases.py TYPE…    # prints the family and its lanes; exits 1 where bytes differ
"""

from __future__ import annotations

import sys

import numpy as np
from ggufkit_formats.blocks import find
from ggufkit_kernels.cpu.encode import WEIGHTED, encode
from ggufkit_kernels.cpu.simd import FAMILY, LANES
from nasty_weights import finite_rows, importances

ROWS = {name: rows.astype(np.float32) for name, rows in finite_rows(seed=5)}
ALL_ROWS = np.concatenate(list(ROWS.values()))


def differences(name: str) -> list[str]:
    """What differs between the compiled encoder and the definition, a line a kind of rows."""
    ours, definition = encode(name, ALL_ROWS), find(name).encode(ALL_ROWS)
    start, found = 0, []
    for what, rows in ROWS.items():
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
