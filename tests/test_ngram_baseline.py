"""The n-gram baseline of the small model, against a plain one that counts with dictionaries."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest


def _load():
    path = Path(__file__).parent.parent / "tools" / "small_model" / "ngram.py"
    spec = importlib.util.spec_from_file_location("small_model_ngram", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


ngram = _load()


class Plain:
    """Interpolated modified Kneser-Ney, one n-gram at a time."""

    def __init__(self, tokens: list[int], n_vocab: int, order: int):
        self.n_vocab = n_vocab
        self.counts: list[Counter] = []
        for n in range(1, order + 1):
            grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
            if n == order:
                self.counts.append(Counter(grams))
                continue
            longer = {tuple(tokens[i : i + n + 1]) for i in range(len(tokens) - n)}
            counts = Counter(g[1:] for g in longer)
            counts[grams[0]] += 1  # the stream's first n-gram has no context to its left
            self.counts.append(counts)
        self.discounts = [self.discount(c) for c in self.counts]

    @staticmethod
    def discount(counts: Counter) -> list[float]:
        n1, n2, n3, n4 = (sum(1 for c in counts.values() if c == k) for k in (1, 2, 3, 4))
        if not (n1 and n2 and n3 and n4):
            return [0.0, 0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
        return [0.0, d1, d2, d3] if 0 < d1 < 1 and 0 < d2 < 2 and 0 < d3 < 3 else [0.0, 0.5, 1.0, 1.5]

    def p(self, context: tuple[int, ...], token: int) -> float:
        return self.interpolate(context, token, self.p(context[1:], token) if context else 1 / self.n_vocab)

    def interpolate(self, context: tuple[int, ...], token: int, lower: float) -> float:
        counts, d = self.counts[len(context)], self.discounts[len(context)]
        after = {g: c for g, c in counts.items() if g[:-1] == context}
        if not after:
            return lower
        total = sum(after.values())
        gamma = sum(d[min(c, 3)] for c in after.values()) / total
        c = after.get((*context, token), 0)
        return (c - d[min(c, 3)]) / total + gamma * lower


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    """Tokens with structure enough for counts of 1 to 4 at each order."""
    rng = np.random.default_rng(3)
    out = [0, 1]
    for _ in range(1500):
        out.append(int((out[-1] * 3 + out[-2] + rng.choice(6, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])) % 12))
    return np.array(out)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equals_the_plain_one(stream, order):
    fast, plain = ngram.KneserNey(stream[:1200], 13, order), Plain(stream[:1200].tolist(), 13, order)
    test = np.append(stream[1200:1260], [12, 12, 5])  # a token that was never seen, too
    losses = fast.losses(test)
    for i, token in enumerate(test.tolist()):
        context = tuple(test[max(0, i - order + 1) : i].tolist())
        assert losses[i] == pytest.approx(-np.log(plain.p(context, token)), rel=1e-12)


def test_sums_to_one(stream):
    model = ngram.KneserNey(stream, 13, 5)
    rng = np.random.default_rng(4)
    for context in [stream[40:44], rng.integers(0, 13, 4), np.array([-1, -1, 3, 12])]:
        p = model.probabilities(np.repeat(context[None], 13, axis=0), np.arange(13))
        assert p.sum() == pytest.approx(1, rel=1e-12)
        assert (p > 0).all()


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="63 bits"):
        ngram.KneserNey(np.zeros(4, np.int64), 32000, 5)
