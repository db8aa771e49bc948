"""A loaded model: `load`, then `generate`, `chat`, `logits`. A Session is one conversation with its cache."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ggufkit_formats import gguf
from ggufkit_formats.blocks import ScaledType, TensorType
from ggufkit_formats.errors import FormatError, UsageError
from ggufkit_formats.tensor import Tensor

from . import fit, models, tokenizer, weights
from .devices import backend
from .sampler import Sampler

N_BATCH = 512  # tokens of a prompt that go through the network at a time, where the backend does not say


def load(
    path: str | os.PathLike[str],
    device: str = "auto",
    threads: int | None = None,
    n_ctx: int | None = None,
    pre: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    kernels: Callable[[int, int], None] | None = None,
    n_gpu_layers: int | None = None,
) -> Model:
    """Open a GGUF file and load it for running.

    `device` is auto (cuda where there is a GPU and what drives it, else cpu), cpu, cuda, or reference (plain NumPy in
    float32, slow, for checking). `n_gpu_layers` are the last layers that go to the GPU (more than there are: the output
    too), None as many as fit. `pre` overrides the file's pre-tokenizer. `progress` is told (bytes loaded, in all),
    `kernels` (kernels compiled, in all) where some have to be, from another thread; without it a line on stderr says
    so. Raises FormatError for a broken file, UnsupportedError for an unknown architecture, DeviceError where the device
    is not to be had.
    """
    began = time.perf_counter()
    with gguf.open(path) as file:
        name = str(Path(path).name)
        arch = file.metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise FormatError(f"{name}: general.architecture is missing, so this is not a model")
        architecture = models.by_arch(arch)
        config = architecture.config_from_metadata(file.metadata)
        if n_ctx is not None and n_ctx < 1:
            raise UsageError(f"a context of {n_ctx} tokens is too small")
        weights.check(architecture.tensors(config), file.tensors, name)
        ops = backend(device, threads, fit.Plan(architecture, config, file.tensors, n_ctx), n_gpu_layers)
        preparing = ops.prepare(*matrix_types(file.tensors), kernels)
        words = tokenizer.from_metadata(file.metadata, pre=pre)
        packed = weights.load(architecture, config, file.tensors, ops, name, progress)
        title, file_type = file.metadata.get("general.name"), file.metadata.get("general.file_type")
        info = Info(
            path=Path(path),
            name=title if isinstance(title, str) else Path(path).stem,
            arch=arch,
            file_type=file_type if type(file_type) is int else None,
            n_parameters=sum(t.n_elements for t in file.tensors.values()),
            n_bytes=sum(t.nbytes for t in file.tensors.values()),
            main_type=_main_type(file.tensors.values()),
        )
    if preparing is not None and preparing.missing:
        preparing.wait()
    elif preparing is not None:  # linking, in the background, while the first text is read
        preparing.start()
    return Model(
        architecture, config, packed, ops, words, info, n_ctx or config.n_ctx_train, time.perf_counter() - began
    )


def matrix_types(tensors: Mapping[str, Tensor]) -> tuple[list[TensorType], list[TensorType]]:
    """The types of a file's matrices, in its layers and elsewhere; a ScaledType where the file has a scale for one."""
    layers, ends = {}, {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            is_scaled = weights.scale_name(name) in tensors  # then its d are float32
            kind = ScaledType(tensor.type, 1.0) if is_scaled else tensor.type
            (layers if name.startswith("blk.") else ends)[kind.name] = kind
    return [*layers.values()], [*ends.values()]


def _main_type(tensors: Iterable[Tensor]) -> str:
    weights: dict[str, int] = {}
    for tensor in tensors:
        weights[tensor.type.name] = weights.get(tensor.type.name, 0) + tensor.n_elements
    return max(weights, key=weights.__getitem__, default="")


@dataclass(frozen=True)
class Info:
    """What a report says about a model's file."""

    path: Path
    name: str
    arch: str
    file_type: int | None
    n_parameters: int
    n_bytes: int
    main_type: str  # that most weights have


@dataclass
class Model:
    """A network with its weights in a backend's memory, and its tokenizer."""

    architecture: ModuleType
    config: Any
    weights: weights.Weights
    ops: Any
    tokenizer: Any
    info: Info
    n_ctx: int  # most positions of a session
    load_s: float

    def cache(self, n_ctx: int | None = None) -> Any:
        """An empty key-value cache for at most n_ctx positions."""
        c = self.config
        return self.ops.cache(c.n_layers, c.n_kv_heads, c.head_dim, n_ctx or self.n_ctx)

    @property
    def n_batch(self) -> int:
        """Tokens of a prompt that go through the network at a time."""
        return getattr(self.ops, "n_batch", N_BATCH)

    def forward(self, ids: Sequence[int] | np.ndarray, cache: Any, first: int = 0) -> np.ndarray:
        """Append ids (n,) to the cache; logits of ids[first:], float32 (n - first, n_vocab).

        Raises UsageError for ids out of range or too many, FormatError where the weights lead to NaN or infinity.
        """
        return self.fetch(self.queue(ids, cache, first))

    def queue(self, ids: Sequence[int] | np.ndarray, cache: Any, first: int = 0) -> Any:
        """As `forward`, but the logits stay where they are, and may not be there yet."""
        ids = np.asarray(ids, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise UsageError("a forward needs at least one token")
        low, high = (ids[0], ids[0]) if len(ids) == 1 else (ids.min(), ids.max())
        if low < 0 or high >= self.config.n_vocab:
            raise UsageError(f"token ids are 0 to {self.config.n_vocab - 1}, not {low} to {high}")
        if cache.length + len(ids) > cache.n_ctx:
            raise UsageError(f"{cache.length + len(ids)} tokens do not fit a context of {cache.n_ctx}")
        return self.ops.forward(self.architecture.forward, self.config, self.weights, ids, cache, first)

    def fetch(self, logits: Any) -> np.ndarray:
        """The logits that `queue` returned, (n, n_vocab). Raises FormatError for NaN and infinity."""
        logits = self.ops.to_numpy(logits)
        if len(logits) == 1:
            good = math.isfinite(getattr(self.ops, "largest", np.max)(logits))  # some backends know it already
        else:
            good = np.isfinite(logits.max(axis=1)).all()
        if not good:
            raise self._broken()
        return logits

    def top(self, logits: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest of logits (1, n_vocab) that `queue` returned: ids and values, best first."""
        ids, values = self.ops.top(logits, min(k, self.config.n_vocab))
        if not math.isfinite(values[0]):
            raise self._broken()
        return ids, values

    def advance(self, ids: Sequence[int] | np.ndarray, cache: Any) -> None:
        """Append ids (n,) to the cache, and wait until the largest of the last logits is known, as to go on."""
        logits = self.queue(ids, cache, len(ids) - 1)
        if getattr(self.ops, "most_top", 0):
            self.top(logits, 1)
        else:
            self.fetch(logits)

    def _broken(self) -> FormatError:
        return FormatError(f"{self.info.name}: the network's output is NaN or infinite: its weights are broken")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Teacher-forced logits, float32 (len(ids), n_vocab): row i predicts token i + 1."""
        cache = self.cache(max(len(ids), 1))
        batch = self.n_batch
        parts = [self.forward(ids[i : i + batch], cache) for i in range(0, max(len(ids), 1), batch)]
        return np.concatenate(parts)

    def session(self, n_ctx: int | None = None) -> Session:
        """A conversation: tokens that stay in the cache from one call to the next."""
        return Session(self, n_ctx or self.n_ctx)

    def generate(self, prompt: str, max_tokens: int | None = None, **sampling: Any) -> Iterator[str]:
        """Text that follows the prompt, in pieces as they come; never half a character.

        Stops at an end token, after `max_tokens`, or at the end of the context. Sampling: temperature, top_k,
        top_p, min_p, repeat_penalty, seed, as `Sampler` has them.
        """
        ids = self.tokenizer.encode(prompt, add_special=True, parse_special=True)
        return self.session().text(ids, Sampler(**sampling), max_tokens)

    def chat(
        self, messages: Sequence[Mapping[str, str]], max_tokens: int | None = None, **sampling: Any
    ) -> Iterator[str]:
        """The assistant's answer to messages [{"role": …, "content": …}, …], by the file's chat template."""
        return self.session().text(self.chat_ids(messages), Sampler(**sampling), max_tokens)

    def chat_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation by the file's chat template, ready for the assistant's answer."""
        return self.tokenizer.encode_chat(messages)


@dataclass
class Timings:
    """Seconds and tokens of one answer."""

    prompt_tokens: int = 0  # tokens that went through the network, those found in the cache excepted
    prompt_s: float = 0.0
    generated_tokens: int = 0
    generate_s: float = 0.0


@dataclass
class Session:
    """One conversation. `tokens` are those in the cache; a new prompt reuses the longest common beginning."""

    model: Model
    n_ctx: int
    tokens: list[int] = field(default_factory=list)
    timings: Timings = field(default_factory=Timings)
    finish_reason: str | None = None  # "stop": an end token; "length": max_tokens, or the end of the context
    context_full: bool = False
    generated: list[int] = field(default_factory=list)
    progress: Callable[[int, int], None] | None = None  # told (tokens read, tokens in all) while a prompt is read

    def __post_init__(self) -> None:
        self.cache = self.model.cache(self.n_ctx)
        self._queued: Any = None  # the last logits, where they are
        self._fetched: np.ndarray | None = None  # the same, here
        self._n_top: int = getattr(self.model.ops, "most_top", 0)  # logits that the backend finds the largest of
        self._sound = 0  # tokens after which the logits were seen to be numbers

    def stream(self, ids: Sequence[int], sampler: Sampler, max_tokens: int | None = None) -> Iterator[int]:
        """Generated token ids, the end token not included. `ids` is the whole conversation so far."""
        if not len(ids):
            raise UsageError("the prompt is empty, and this model has no token that begins a text")
        if max_tokens is not None and max_tokens < 0:
            raise UsageError(f"max_tokens is {max_tokens}; None means no limit")
        if len(ids) > self.n_ctx:
            raise UsageError(f"the prompt has {len(ids)} tokens, more than the context of {self.n_ctx}")
        self.timings, self.finish_reason, self.context_full, self.generated = Timings(), None, False, []
        limit = float("inf") if max_tokens is None else max_tokens
        self._prompt(list(ids))
        end = self.model.tokenizer.eog_ids
        while True:
            if len(self.generated) >= limit:
                self.finish_reason = "length"
                return
            began = time.perf_counter()
            token = self._choose(sampler)
            self.timings.generate_s += time.perf_counter() - began
            if token in end:
                self.finish_reason = "stop"
                return
            self.generated.append(token)
            self.timings.generated_tokens += 1
            yield token
            if len(self.generated) >= limit:
                continue
            if len(self.tokens) >= self.n_ctx:
                self.finish_reason, self.context_full = "length", True
                return
            began = time.perf_counter()
            self._advance([token])
            self.timings.generate_s += time.perf_counter() - began

    def text(self, ids: Sequence[int], sampler: Sampler, max_tokens: int | None = None) -> Iterator[str]:
        """Generated text in whole characters."""
        decoder = self.model.tokenizer.stream()
        for token in self.stream(ids, sampler, max_tokens):
            if piece := decoder.push(token):
                yield piece
        if piece := decoder.finish():
            yield piece

    @property
    def last_logits(self) -> np.ndarray | None:
        """The logits after the last token, float32 (n_vocab,); None before there are any."""
        if self._fetched is None and self._queued is not None:
            self._fetched = self.model.fetch(self._queued)[0]
        return self._fetched

    @property
    def logits_hash(self) -> str | None:
        """SHA-256 of the last logits, float32 little endian: equal numbers, equal hash."""
        logits = self.last_logits
        return None if logits is None else hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest()

    def _choose(self, sampler: Sampler) -> int:
        """The next token; where few logits decide and the backend finds them, only those are fetched."""
        wanted = sampler.candidates
        if wanted is not None and wanted <= self._n_top:
            return sampler.choose(*self._top(wanted))
        if self._fetched is None:
            self._top(1)
        logits = self.last_logits
        assert logits is not None
        return sampler(logits, self.tokens)

    def _top(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k largest of the last logits; cache and tokens go back to where the logits were numbers, if these are
        none."""
        try:
            found = self.model.top(self._queued, k)
        except FormatError:
            self.cache.truncate(self._sound)
            del self.tokens[self._sound :]
            raise
        self._sound = len(self.tokens)
        return found

    def _prompt(self, ids: list[int]) -> None:
        began = time.perf_counter()
        common = 0
        for ours, theirs in zip(self.tokens, ids, strict=False):
            if ours != theirs:
                break
            common += 1
        common = min(common, len(ids) - 1)  # one token at least must run, to give logits
        self.cache.truncate(common)
        del self.tokens[common:]
        self._sound = common
        batch = self.model.n_batch
        for i in range(common, len(ids), batch):
            self._advance(ids[i : i + batch])
            if self.progress is not None:
                self.progress(len(self.tokens) - common, len(ids) - common)
        self.timings.prompt_tokens = len(ids) - common
        if self._n_top:  # what is queued counts when it is done
            self._top(1)
        self.timings.prompt_s = time.perf_counter() - began

    def _advance(self, ids: list[int]) -> None:
        try:
            queued = self.model.queue(ids, self.cache, first=len(ids) - 1)
            fetched = None if self._n_top else self.model.fetch(queued)[0]
        except BaseException:
            self.cache.truncate(len(self.tokens))  # interrupted: cache and tokens stay in step
            raise
        self.tokens += ids
        self._queued, self._fetched = queued, fetched
