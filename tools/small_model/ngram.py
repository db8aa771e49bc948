"""The baseline: an n-gram model with interpolated modified Kneser-Ney smoothing, in NumPy.

Chen and Goodman (1998), "An empirical study of smoothing techniques for language modeling":

    p(w | h) = max(c(hw) − D(c(hw)), 0) / c(h) + γ(h) p(w | h')        h' = h without its first token
    γ(h)     = (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h)                Nk(h): tokens seen exactly k times after h

The highest order counts occurrences; each lower order counts in how many different contexts an n-gram was seen,
except at the start of the stream, where there is none to its left. The discounts D1, D2, D3+ of each order follow
from its counts of counts, Y = n1/(n1 + 2 n2), Dk = k − (k + 1) Y n(k+1)/n(k); where these are not between 0 and k,
as in the few unigrams, they are 0.5, 1 and 1.5. The order below one is uniform over the vocabulary.

An n-gram is one integer, its tokens the digits in base n_vocab, so that a table is a sorted array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def grams(tokens: np.ndarray, order: int, n_vocab: int) -> np.ndarray:
    """The number of each n-gram of the stream, int64 (len(tokens) − order + 1,)."""
    n = len(tokens) - order + 1
    key = np.zeros(max(n, 0), np.int64)
    for i in range(order):
        key = key * n_vocab + tokens[i : i + n]
    return key


@dataclass(frozen=True)
class Order:
    """One order's tables. Keys are sorted."""

    keys: np.ndarray  # int64 (n,) n-grams hw
    mass: np.ndarray  # float64 (n,) (c(hw) − D) / c(h)
    contexts: np.ndarray  # int64 (m,) h
    gamma: np.ndarray  # float64 (m,)
    discounts: tuple[float, ...]


def lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    at = np.searchsorted(keys, wanted)
    at[at == len(keys)] = 0
    return np.where(keys[at] == wanted, values[at], missing)


def fit_order(keys: np.ndarray, counts: np.ndarray, n_vocab: int) -> Order:
    """The tables of one order from its n-grams (sorted, distinct) and their (adjusted) counts."""
    n = [float((counts == k).sum()) for k in range(5)]
    discounts: tuple[float, ...] = (0.5, 1.0, 1.5)
    if all(n[1:]):
        y = n[1] / (n[1] + 2 * n[2])
        estimated = tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
        if all(0 < d < k for k, d in enumerate(estimated, start=1)):
            discounts = estimated
    discount = np.array((0.0, *discounts))[np.minimum(counts, 3)]
    contexts, begin = np.unique(keys // n_vocab, return_index=True)
    total = np.add.reduceat(counts, begin).astype(np.float64)
    sizes = np.diff(np.append(begin, len(keys)))
    mass = (counts - discount) / np.repeat(total, sizes)
    return Order(keys, mass, contexts, np.add.reduceat(discount, begin) / total, discounts)


class KneserNey:
    """Fitted on one stream of tokens: `KneserNey(tokens, n_vocab, order)`; n_vocab ** order must fit in 63 bits."""

    def __init__(self, tokens: np.ndarray, n_vocab: int, order: int = 5):
        if n_vocab**order >= 2**63:
            raise ValueError(f"{order}-grams over {n_vocab} tokens do not fit in 63 bits")
        self.n_vocab, self.order = n_vocab, order
        self.orders: list[Order] = []
        for n in range(1, order + 1):
            if n == order:
                keys, counts = np.unique(grams(tokens, n, n_vocab), return_counts=True)
            else:
                # one (n + 1)-gram type is one context of the n-gram that it ends with; the stream's first
                # n-gram has had none, and counts as one
                longer = np.unique(grams(tokens, n + 1, n_vocab)) % n_vocab**n
                keys, counts = np.unique(np.append(longer, grams(tokens[:n], n, n_vocab)), return_counts=True)
            self.orders.append(fit_order(keys, counts, n_vocab))

    def probabilities(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """p of each token after its context, float64 (n,). contexts (n, order − 1): −1 before the stream."""
        p = np.full(len(tokens), 1.0 / self.n_vocab)
        h = np.zeros(len(tokens), np.int64)
        known = np.ones(len(tokens), bool)
        for n, o in enumerate(self.orders, start=1):
            if n > 1:
                column = contexts[:, self.order - n]
                known &= column >= 0
                h = np.where(known, column * self.n_vocab ** (n - 2) + h, 0)
            gamma = lookup(o.contexts, o.gamma, h, 1.0)
            better = lookup(o.keys, o.mass, h * self.n_vocab + tokens, 0.0) + gamma * p
            # a context never seen leaves the lower order as it is (γ = 1, no mass)
            p = np.where(known, better, p)
        return p

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """−ln p of each token of a stream, given the (order − 1) tokens before it; float64 (len(tokens),)."""
        padded = np.concatenate([np.full(self.order - 1, -1), tokens])
        contexts = np.lib.stride_tricks.sliding_window_view(padded, self.order - 1)[: len(tokens)]
        return -np.log(self.probabilities(contexts, tokens))
