"""The sampler against its definition: filters by hand, and frequencies of many draws."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_formats.errors import UsageError
from ggufkit_runtime.sampler import Sampler

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}


def frequencies(n: int = 8000, recent=(), **settings) -> np.ndarray:
    sampler = Sampler(**{**OFF, **settings}, seed=7)
    return np.bincount([sampler(LOGITS, recent) for _ in range(n)], minlength=5) / n


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"temperature": 0.5}, np.array([0.0025, 0.16, 0.01, 0.0625, 0.04]) / 0.275),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 50}, [0.05, 0.4, 0.1, 0.25, 0.2]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.3}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.45}, [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
    ],
)
def test_frequencies(settings, expected):
    assert np.abs(frequencies(**settings) - expected).max() < 0.02


def test_repeat_penalty_divides_positive_and_multiplies_negative():
    logits = np.array([2.0, -1.0, 1.5], np.float32)
    greedy = Sampler(temperature=0, repeat_penalty=2.0)
    assert greedy(logits, []) == 0
    assert greedy(logits, [0]) == 2  # 2.0 / 2 < 1.5
    assert greedy(np.array([-3.0, -1.0], np.float32), [1]) == 1  # -2 is still above -3
    assert greedy(np.array([-1.5, -1.0], np.float32), [1]) == 0
    assert greedy(logits, [0] + [1] * 64) == 0  # out of the last 64
    assert logits.tolist() == [2.0, -1.0, 1.5]


@pytest.mark.filterwarnings("error")
def test_tiny_temperatures_and_impossible_tokens():
    assert frequencies(50, temperature=1e-320)[1] == 1
    assert frequencies(50, temperature=1e-30)[1] == 1
    logits = np.array([-np.inf, 1.0, -np.inf], np.float32)
    for settings in ({}, {"top_k": 2}, OFF):
        assert Sampler(**settings, seed=0)(logits) == 1


def test_seeds():
    def draws(seed):
        sampler = Sampler(**OFF, seed=seed)
        return [sampler(LOGITS) for _ in range(50)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(None) != draws(None)
    assert draws(-1) != draws(-1)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1},
     {"repeat_penalty": 0}],
)  # fmt: skip
def test_senseless_settings_are_refused(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        Sampler(**settings)


@pytest.mark.parametrize("n", [5, 300, 2049, 49_152])
@pytest.mark.parametrize("k", [1, 40, 255, 2000])
@pytest.mark.parametrize("ties", [False, True])
def test_top_k_is_the_head_of_a_stable_sort(n, k, ties):
    logits = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    if ties:
        logits = np.round(logits)
        logits[::7] = -np.inf
    expected = np.argsort(-logits, kind="stable")[: min(k, n)]
    assert np.array_equal(Sampler(top_k=k)._top_k(logits), expected)
