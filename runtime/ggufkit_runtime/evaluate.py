"""How good and how fast a model is: perplexity as llama-perplexity defines it, divergence, tokens per second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.errors import UnsupportedError, UsageError

from .generate import N_BATCH, Model


@dataclass(frozen=True)
class Perplexity:
    """perplexity = exp(mean negative log-likelihood); stderr is that of the perplexity."""

    perplexity: float
    stderr: float
    n_tokens: int  # scored
    n_chunks: int


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence KL(reference ‖ model) in nats over the scored tokens."""

    kl_mean: float
    kl_stderr: float
    kl_p99: float
    same_top: float  # share of positions where both have the same most likely token


def windows(model: Model, text: str, n_ctx: int, n_chunks: int | None) -> list[list[int]]:
    """The text in windows of n_ctx tokens, each beginning with BOS where the model wants one."""
    if n_ctx < 4:
        raise UsageError(f"a context of {n_ctx} tokens is too small to score")
    if n_ctx > model.n_ctx:
        raise UsageError(f"the model has a context of {model.n_ctx} tokens, not {n_ctx}")
    ids = model.tokenizer.encode(text, add_special=True, parse_special=False)
    if len(ids) < 2 * n_ctx:
        raise UsageError(f"the text has {len(ids)} tokens, and at least {2 * n_ctx} are needed (two windows)")
    count = len(ids) // n_ctx
    count = min(count, n_chunks) if n_chunks is not None and n_chunks > 0 else count
    out = []
    for i in range(count):
        window = list(ids[i * n_ctx : (i + 1) * n_ctx])
        if model.tokenizer.add_bos:
            window[0] = model.tokenizer.bos_id
        out.append(window)
    return out


def batch_of(*models: Model) -> int:
    """Tokens that go through the networks at a time, the same for all."""
    return min(getattr(model.ops, "n_batch", N_BATCH) for model in models)


def scored(model: Model, window: Sequence[int], n_batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (log-probabilities float64 (n, n_vocab), targets (n,)) over the second half of a window."""
    cache, half = model.cache(len(window)), len(window) // 2
    for start in range(0, len(window), n_batch):
        batch = np.asarray(window[start : start + n_batch])
        first = max(0, min(half - start, len(batch) - 1))
        logits = model.forward(batch, cache, first=first)
        begin = start + first
        targets = np.asarray(window[max(begin, half) + 1 : start + len(batch) + 1])
        logits = logits[max(half - begin, 0) :][: len(targets)]
        for i in range(0, len(targets), 64):  # in float64 a vocabulary is large: few rows at a time
            yield log_softmax(logits[i : i + 64]), targets[i : i + 64]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 (n, n_vocab) -> log-probabilities float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def perplexity(
    model: Model,
    text: str,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    progress: Callable[[int, int, float], Any] | None = None,
) -> Perplexity:
    """llama-perplexity's number: windows of n_ctx tokens, the second half of each scored.

    `progress` is told (windows done, windows in all, perplexity so far).
    """
    chunks = windows(model, text, n_ctx, n_chunks)
    total, squares, count = 0.0, 0.0, 0
    for done, window in enumerate(chunks, 1):
        for log_p, targets in scored(model, window, batch_of(model)):
            losses = -log_p[np.arange(len(targets)), targets]
            total, squares, count = total + losses.sum(), squares + (losses**2).sum(), count + len(targets)
        if progress is not None:
            progress(done, len(chunks), _exp(total / count))
    return _perplexity(total, squares, count, len(chunks))


def against(
    model: Model,
    reference: Model,
    text: str,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    progress: Callable[[int, int, float], Any] | None = None,
) -> tuple[Perplexity, Divergence]:
    """Perplexity of the model, and its divergence from a reference with the same vocabulary."""
    if model.config.n_vocab != reference.config.n_vocab:
        raise UnsupportedError(
            f"the reference has {reference.config.n_vocab} tokens, the model {model.config.n_vocab}: not comparable"
        )
    chunks = windows(model, text, n_ctx, n_chunks)
    if chunks != windows(reference, text, n_ctx, n_chunks):
        raise UnsupportedError("the reference splits the text into other tokens: not comparable")
    losses, kls, same = [], [], 0
    n_batch = batch_of(model, reference)
    for done, window in enumerate(chunks, 1):
        both = (scored(each, window, n_batch) for each in (model, reference))
        for (log_p, targets), (log_q, _) in zip(*both, strict=True):
            losses.append(-log_p[np.arange(len(targets)), targets])
            kls.append((np.exp(log_q) * (log_q - log_p)).sum(axis=1))
            same += int((log_p.argmax(axis=1) == log_q.argmax(axis=1)).sum())
        if progress is not None:
            progress(done, len(chunks), float(np.concatenate(kls).mean()))
    loss, kl = np.concatenate(losses), np.concatenate(kls)
    result = _perplexity(float(loss.sum()), float((loss**2).sum()), len(loss), len(chunks))
    stderr = float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else math.nan
    return result, Divergence(float(kl.mean()), stderr, float(np.quantile(kl, 0.99)), same / len(kl))


def _perplexity(total: float, squares: float, count: int, n_chunks: int) -> Perplexity:
    mean = total / count
    variance = max(squares / count - mean * mean, 0.0)
    value = _exp(mean)
    return Perplexity(value, math.sqrt(variance / max(count - 1, 1)) * value, count, n_chunks)


def _exp(x: float) -> float:
    """e to the x; infinity, not an error, where that is too large."""
    return math.exp(x) if x < 700 else math.inf


@dataclass(frozen=True)
class Speed:
    """One of llama-bench's tests: pp512 reads a prompt of 512 tokens, tg128 generates 128."""

    test: str
    tokens_per_s: float  # median
    stdev: float
    gb_per_s: float  # bytes of weights passed over, per second


def bench(
    model: Model,
    n_prompt: int = 512,
    n_generate: int = 128,
    repetitions: int = 5,
    progress: Callable[[int, int], Any] | None = None,
) -> list[Speed]:
    """Time reading and generating random tokens, after one run of each that is not counted."""
    random = np.random.default_rng(0)
    tests = [(f"pp{n_prompt}", n_prompt, batch_of(model))] if n_prompt else []
    tests += [(f"tg{n_generate}", n_generate, 1)] if n_generate else []
    out, done = [], 0
    for name, n_tokens, batch in tests:
        if n_tokens > model.n_ctx:
            raise UsageError(f"{n_tokens} tokens do not fit the model's context of {model.n_ctx}")
        rates = []
        for repetition in range(repetitions + 1):
            ids = random.integers(0, model.config.n_vocab, n_tokens if repetition else min(n_tokens, 2 * batch))
            cache = model.cache(n_tokens)
            began = time.perf_counter()
            for i in range(0, len(ids), batch):
                part = ids[i : i + batch]
                model.advance(part, cache)
            if repetition:
                rates.append(len(ids) / (time.perf_counter() - began))
            done += 1
            if progress is not None:
                progress(done, len(tests) * (repetitions + 1))
        rate = float(np.median(rates))
        passes = math.ceil(n_tokens / batch) / n_tokens
        gb = rate * passes * model.weights.nbytes_per_token / 1e9
        out.append(Speed(name, rate, float(np.std(rates, ddof=1)) if len(rates) > 1 else 0.0, gb))
    return out
