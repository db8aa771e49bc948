"""The largest logits by the CPU's kernels, against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_formats.errors import UsageError
from ggufkit_kernels.cpu.ops import CpuOps
from ggufkit_kernels.cpu.sample import BLOCK, MOST_TOP


def check(logits: np.ndarray, k: int) -> None:
    """NaN first, whatever its sign; of equal logits the lower index first."""
    order = np.lexsort((np.arange(len(logits)), -np.nan_to_num(logits, nan=0.0), ~np.isnan(logits)))[:k]
    ids, values = CpuOps(1).top(logits[None], k)
    assert ids.dtype == np.int64 and values.dtype == np.float32
    assert ids.tolist() == order.tolist()
    assert np.array_equal(values, logits[order], equal_nan=True)


@pytest.mark.parametrize(
    ("n", "k"),
    [
        (1, 1), (5, 3), (64, 64), (70, 64), (BLOCK - 1, 5), (BLOCK, 64), (BLOCK + 1, 64), (4 * BLOCK + 3, 40),
        (32_000, 1), (49_152, 40), (151_936, 2), (262_144, 64),
    ],
)  # fmt: skip
def test_random(n, k):
    check(10 * np.random.default_rng(n).standard_normal(n).astype(np.float32), k)


@pytest.mark.parametrize("k", [1, 2, 17, 63, 64])
def test_ties_and_odd_numbers(k):
    """Many equal logits, both zeros, infinities, NaN, and negative numbers only."""
    rng = np.random.default_rng(k)
    few = rng.integers(-3, 3, 5000).astype(np.float32)
    check(few, k)
    check(np.full(5000, -np.inf, np.float32), k)
    check(np.where(few == 0, np.float32(-0.0), few).astype(np.float32) * 0, k)
    odd = -np.abs(rng.standard_normal(5000)).astype(np.float32) - 1
    odd[[7, 4000]] = np.inf
    odd[[3, 4500]] = -np.inf
    check(odd, k)
    for places in ([4100, 2000], [4999], [0]):  # in groups, and behind the last whole one
        broken = odd.copy()
        broken[places] = [np.nan, -np.nan][: len(places)]
        check(broken, k)


def test_first_and_last():
    for n in (BLOCK - 1, BLOCK, 2 * BLOCK + 1):
        for at in (0, n - 1, min(n - 1, BLOCK - 1), min(n - 1, BLOCK)):
            logits = np.zeros(n, np.float32)
            logits[at] = 1
            check(logits, 2)


@pytest.mark.parametrize(("shape", "k"), [((1, 100), 0), ((1, 100), MOST_TOP + 1), ((1, 3), 4), ((2, 100), 1)])
def test_what_cannot_be_had(shape, k):
    with pytest.raises(UsageError, match="cannot be had"):
        CpuOps(1).top(np.zeros(shape, np.float32), k)
