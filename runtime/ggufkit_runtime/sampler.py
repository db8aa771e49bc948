"""Choosing the next token from logits: the filters of llama.cpp's default chain, in its order.

Repeat penalty (CTRL, arXiv 1909.05858), top-k (arXiv 1805.04833), top-p (arXiv 1904.09751), min-p (arXiv
2407.01082), temperature, then one draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from ggufkit_formats.errors import UsageError

LAST_N = 64  # tokens that the repeat penalty looks back on
COLUMNS = 512


@dataclass
class Sampler:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repeat_penalty 1 switch a filter off."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None  # None: a new one each time
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        limits = {
            "temperature": (self.temperature, 0, 1e6),
            "top_k": (self.top_k, 0, 2**31),
            "top_p": (self.top_p, 0, 1),
            "min_p": (self.min_p, 0, 1),
            "repeat_penalty": (self.repeat_penalty, 1e-6, 1e6),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise UsageError(f"{name} = {value} is not between {low:g} and {high:g}")
        if self.seed is not None and self.seed < 0:
            self.seed = None
        self._random = np.random.default_rng(self.seed)

    def __call__(self, logits: np.ndarray, recent: Sequence[int] = ()) -> int:
        """The next token's id. `logits` is float32 (n_vocab,); `recent` are the tokens so far, newest last."""
        if self.repeat_penalty != 1.0 and len(recent):
            logits = self._penalized(logits, recent)
        if self.temperature == 0:
            return int(np.argmax(logits))
        ids = self._top_k(logits)
        return self.choose(ids, logits[ids])

    @property
    def candidates(self) -> int | None:
        """How many of the largest logits decide, whatever the tokens so far; None where all of them may."""
        if self.repeat_penalty != 1.0:
            return None
        return 1 if self.temperature == 0 else self.top_k or None

    def choose(self, ids: np.ndarray, logits: np.ndarray) -> int:
        """The next token of the `candidates` with the largest logits, ids (k,) and float32 (k,), best first."""
        if self.temperature == 0:
            return int(ids[0])
        probabilities = _softmax(logits)
        if self.top_p < 1:
            kept = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
            ids, probabilities = ids[:kept], probabilities[:kept]
        if self.min_p > 0:
            kept = int(np.count_nonzero(probabilities >= self.min_p * probabilities[0]))
            ids = ids[: max(kept, 1)]
        with np.errstate(over="ignore"):  # a tiny temperature: what is below the best gets -inf
            probabilities = _softmax((logits[: len(ids)].astype(np.float64) - logits[0]) / self.temperature)
        cumulative = np.cumsum(probabilities)
        drawn = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(drawn, len(ids) - 1)])

    def _penalized(self, logits: np.ndarray, recent: Sequence[int]) -> np.ndarray:
        seen = np.unique(np.asarray(recent[-LAST_N:], dtype=np.int64))
        logits = logits.copy()
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / self.repeat_penalty, values * self.repeat_penalty)
        return logits

    def _top_k(self, logits: np.ndarray) -> np.ndarray:
        """Ids of the k largest logits, best first, of equal ones the lower id first."""
        n = len(logits)
        k = min(self.top_k, n) if self.top_k > 0 else n
        ids = _candidates(logits, k)
        return ids[np.argsort(-logits[ids], kind="stable")][:k]


def _candidates(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids, ascending, that hold the k largest logits and few others.

    The k-th largest of the maxima of COLUMNS columns is reached by k logits at least. One pass over the logits and
    one comparison: four times as fast as np.argpartition on 49,152 logits.
    """
    n = len(logits)
    if k == n:
        return np.arange(n)
    if 2 * k > COLUMNS or n < 4 * COLUMNS:
        return np.flatnonzero(logits >= np.partition(logits, n - k)[n - k])
    rows = n // COLUMNS
    maxima = logits[: rows * COLUMNS].reshape(rows, COLUMNS).max(axis=0)
    return np.flatnonzero(logits >= np.partition(maxima, COLUMNS - k)[COLUMNS - k])


def _softmax(logits: np.ndarray) -> np.ndarray:
    """float64 probabilities, (k,)."""
    exp = np.exp(logits.astype(np.float64) - np.max(logits))
    return exp / exp.sum()
