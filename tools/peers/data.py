"""What every contender is given: NumPy only, so that any environment makes the same numbers."""

from __future__ import annotations

from functools import cache

import numpy as np

SAMPLE = 256  # logits that are compared
ROWS, COLS = 512, 4096  # weights that are encoded: 2 million


@cache
def weights() -> np.ndarray:
    """float32 (ROWS, COLS) as weights are spread: normal, standard deviation 0.02.

    From integers, so that any version of NumPy makes the same: sums of four uniform ones are near enough to normal.
    """
    state = np.arange(ROWS * COLS * 4, dtype=np.uint64) + np.uint64(12345)
    state *= np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    uniform = (state >> np.uint64(40)).astype(np.int64).reshape(-1, 4).sum(axis=1) - (1 << 25)
    return (uniform * (0.02 / (3**-0.5 * (1 << 24)))).astype(np.float32).reshape(ROWS, COLS)


def tokens(n: int, n_vocab: int, seed: int = 1) -> list[int]:
    """n token ids, the same for every contender."""
    return np.random.default_rng(seed).integers(3, n_vocab, n).tolist()
