"""sample.cu: the largest logits, against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_kernels.cuda import launches

small = pytest.mark.kernels


def wanted(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and logits by a sort that keeps the order of equals; NaN first."""
    order = np.lexsort((np.arange(len(logits)), -np.nan_to_num(logits, nan=0.0), ~np.isnan(logits)))[:k]
    return order, logits[order]


def top(device, logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scratch = device.empty((launches.top_scratch(len(logits)),), np.uint64)
    out = device.empty((2, k), np.int32)
    launches.top(device, device.upload(logits), k, scratch, out)
    return launches.top_of(device.download(out))


def check(device, logits, k):
    ids, values = top(device, logits, k)
    order, expected = wanted(logits, k)
    n = len(order)
    assert ids[:n].tolist() == order.tolist()
    assert np.array_equal(values[:n], expected, equal_nan=True)
    assert (ids[n:] == -1).all() and (values[n:] == -np.inf).all()


@pytest.mark.parametrize(
    ("n", "k"),
    [
        pytest.param(2500, 3, marks=small), pytest.param(5, 1, marks=small), pytest.param(70, 64, marks=small),
        (1, 1), (10, 64), (2048, 1), (2049, 40), (32_000, 64), (151_936, 1), (128_256, 40), (300_000, 2),
    ],
)  # fmt: skip
def test_random(device, n, k):
    check(device, 10 * np.random.default_rng(n).standard_normal(n).astype(np.float32), k)


@pytest.mark.parametrize("k", [pytest.param(5, marks=small), 1, 2, 17, 63, 64])
def test_ties_and_odd_numbers(device, k):
    """Many equal logits, both zeros, infinities, NaN, and negative numbers only."""
    rng = np.random.default_rng(k)
    few = rng.integers(-3, 3, 5000).astype(np.float32)
    check(device, few, k)
    check(device, np.full(5000, -np.inf, np.float32), k)
    check(device, np.where(few == 0, np.float32(-0.0), few).astype(np.float32) * 0, k)
    odd = -np.abs(rng.standard_normal(5000)).astype(np.float32) - 1
    odd[[7, 4000]] = np.inf
    odd[[3, 4500]] = -np.inf
    check(device, odd, k)
    odd[[4100, 2000]] = np.nan, -np.nan
    check(device, odd, k)
    assert top(device, odd, 1)[0][0] == np.argmax(odd)


def test_largest_first_or_last(device):
    """The best logit at either end of a block's part and of the row."""
    for n in (2047, 2048, 4097):
        for at in (0, n - 1, min(2047, n - 1), min(2048, n - 1)):
            logits = np.zeros(n, np.float32)
            logits[at] = 1
            check(device, logits, 2)
