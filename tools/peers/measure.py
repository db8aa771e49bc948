"""Contenders in turn: workers held open, each round begins with another one, and only one computes at a time."""

from __future__ import annotations

import contextlib
import importlib.util
import mmap
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats import blocks, gguf
from ggufkit_runtime import models

from . import data
from .wire import Remote, WorkerError

OURS = "ggufkit"
SETTLE = 0.05  # seconds before each turn: threads of the one before spin for a while before they sleep
WHAT = ("prefill", "decode", "decode4096", "load", "memory", "encode", "limits")
ENCODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Contender:
    """How to start one."""

    name: str
    module: str
    python: str = sys.executable
    arguments: tuple[str, ...] = ()

    def start(self) -> Remote:
        """Its process, once all is imported."""
        worker = Remote(self.name, self.module, self.python, self.arguments)
        try:
            worker.ask("about")
        except WorkerError:
            worker.close()
            raise
        return worker


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    pairs: int = 5
    prompt: int = 512
    generate: int = 64
    deep: int = 32  # tokens generated after `depth`
    depth: int = 4096
    encode_s: float = 0.3
    peak_s: float = 0.15
    passes: int = 5  # over the buffer
    buffer: int = 5 << 27
    n_ctx: int = 1024  # where loading and memory are measured


QUICK = Sizes(pairs=2, prompt=64, generate=8, deep=4, depth=256, encode_s=0.01, peak_s=0.02, passes=1, buffer=1 << 27)


@dataclass
class Series:
    """One quantity: a value of every contender each round."""

    name: str
    unit: str
    less_is_better: bool = False
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, contender: str, value: float) -> None:
        self.values.setdefault(contender, []).append(value)

    def brief(self) -> str:
        """Medians in one line, said as soon as they are there: a long run may be cut short."""
        return (
            f"  {self.name}: " + ", ".join(f"{n} {np.median(v):.4g}" for n, v in self.values.items()) + f" {self.unit}"
        )


@dataclass(frozen=True)
class Facts:
    """What of a file a report says or divides by."""

    path: Path
    type: str
    n_bytes: int  # of all tensors
    bytes_per_token: int  # that a forward of one token reads
    layer_weights: int  # that every token of a prompt is multiplied with
    output_weights: int  # that the last one is
    quantized: float  # share of layer_weights in quantized types
    n_vocab: int
    n_kv: int  # float16 numbers that one position takes in the cache

    @classmethod
    def of(cls, path: Path) -> Facts:
        from ggufkit.quantize import file_types

        with gguf.open(path) as file:
            arch = file.metadata["general.architecture"]
            config = models.by_arch(arch).config_from_metadata(file.metadata)
            number = file.metadata.get("general.file_type")
            found = file_types.by_id(number) if isinstance(number, int) else None
            tensors = file.tensors
            matrices = [t for name, t in tensors.items() if name.startswith("blk.") and len(t.shape) > 1]
            n_bytes = sum(t.nbytes for t in tensors.values())
            embedding, output = tensors["token_embd.weight"], tensors.get("output.weight")
            layer_weights = sum(t.n_elements for t in matrices)
            return cls(
                path=path,
                type=found.name if found else "?",
                n_bytes=n_bytes,
                bytes_per_token=n_bytes - (embedding.nbytes if output is not None else 0),
                layer_weights=layer_weights,
                output_weights=(embedding if output is None else output).n_elements,
                quantized=sum(t.n_elements for t in matrices if t.type.is_quantized) / max(layer_weights, 1),
                n_vocab=config.n_vocab,
                n_kv=2 * config.n_layers * config.n_kv_heads * config.head_dim,
            )


@dataclass
class Idle:
    """Processor time that workers took while another one was asked."""

    seconds: dict[str, float] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        return {name: self.seconds[name] / max(self.waited[name], 1e-9) for name in self.seconds}


def _touch(nbytes: int) -> None:
    """Write and free so much memory. A virtual machine may have given idle memory back to its host, which then takes
    seconds to return it, from whoever asks first. Large pages, so that what is freed can be taken as either kind."""
    with mmap.mmap(-1, nbytes + (1 << 28), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(memory), 1 << 22):
            memory[at : at + (1 << 22)] = bytes(min(1 << 22, len(memory) - at))


class Rounds:
    """Asks workers in turn. Whoever fails is left out from then on, with a line in `notes`."""

    def __init__(self, pairs: int, say: Callable[[str], None]):
        self.pairs, self.say, self.idle, self.notes = pairs, say, Idle(), list[str]()

    def run(self, workers: dict[str, Remote], turn: Callable[[str, Remote], None]) -> None:
        """`turn(name, worker)` of every worker, `pairs` times, each time beginning with the next one."""
        for number in range(self.pairs):
            names = [name for name, worker in workers.items() if not worker.closed]
            k = number % max(len(names), 1)
            for name in names[k:] + names[:k]:
                self.one(workers, name, turn)

    def one(self, workers: dict[str, Remote], name: str, turn: Callable[[str, Remote], None]) -> None:
        time.sleep(SETTLE)
        others = {other: worker for other, worker in workers.items() if other != name and not worker.closed}
        before = {other: worker.cpu_seconds() for other, worker in others.items()}
        began = time.perf_counter()
        try:
            turn(name, workers[name])
        except WorkerError as error:
            self.note(f"{name} is left out: {error}")
            workers[name].close()
            return
        taken = time.perf_counter() - began
        for other, worker in others.items():
            used = worker.cpu_seconds() - before[other]
            self.idle.seconds[other] = self.idle.seconds.get(other, 0.0) + used
            self.idle.waited[other] = self.idle.waited.get(other, 0.0) + taken

    def note(self, line: str) -> None:
        self.notes.append(line)
        self.say(line)


@dataclass
class Result:
    """One model: its series by name, and what the limits were in the same rounds."""

    facts: Facts
    series: dict[str, Series] = field(default_factory=dict)
    bandwidth: dict[str, list[float]] = field(default_factory=dict)  # streams: bytes a second
    peak: dict[str, list[float]] = field(default_factory=dict)  # instruction: operations a second
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, unit: str, contender: str, value: float, less_is_better: bool = False) -> None:
        self.series.setdefault(name, Series(name, unit, less_is_better)).add(contender, value)


class Bench:
    """Measures one file after the other with the same contenders."""

    def __init__(self, contenders: Sequence[Contender], what: Sequence[str], threads: int, sizes: Sizes, flash: str,
                 say: Callable[[str], None]):  # fmt: skip
        self.contenders, self.what, self.threads, self.sizes, self.flash = contenders, what, threads, sizes, flash
        self.say, self.told = say, 0  # series of the model that were said
        self.rounds = Rounds(sizes.pairs, say)
        self.limits = Contender("limits", "peers.limits")

    def model(self, path: Path) -> Result:
        """Everything asked for that needs a model."""
        result, self.told = Result(Facts.of(path)), 0
        self.rounds.notes = result.notes
        self._read(path)
        if {"load", "memory"} & set(self.what):
            self._compile_first(result)
        if "load" in self.what:
            self._fresh(result, self._load, self.sizes.pairs)
        if "memory" in self.what:
            self._fresh(result, self._memory, 1)
        if {"prefill", "decode", "decode4096", "limits"} & set(self.what):
            self._held(result)
        return result

    def _read(self, path: Path) -> None:
        """The whole file once: then it is in the page cache, if it fits."""
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass

    def _compile_first(self, result: Result) -> None:
        """Kernels into their cache, which is measured as full."""
        self.say(f"{result.facts.path.name}: warming up")
        for contender in self.contenders:
            with contender.start() as worker:
                try:
                    self._warm_up(result, worker, self.sizes.n_ctx)
                except WorkerError as error:
                    self.rounds.note(f"{error}")

    def _warm_up(self, result: Result, worker: Remote, n_ctx: int) -> None:
        self._open(result, worker, n_ctx)
        ids = data.tokens(self.sizes.prompt, result.facts.n_vocab)
        worker.ask("prefill", ids=ids)
        worker.ask("decode", ids=ids[:4])

    def _open(self, result: Result, worker: Remote, n_ctx: int) -> float:
        return worker.ask("load", path=str(result.facts.path), n_ctx=n_ctx, threads=self.threads, flash=self.flash)

    # -- in fresh processes ------------------------------------------------------------------------

    def _fresh(self, result: Result, turn: Callable[[Result, Remote], None], pairs: int) -> None:
        """`turn` of each contender in a process of its own, `pairs` times, in changing order."""
        self.say(f"{result.facts.path.name}: {turn.__name__.strip('_')}")
        for number in range(pairs):
            k = number % len(self.contenders)
            for contender in [*self.contenders[k:], *self.contenders[:k]]:
                with contender.start() as worker:
                    try:
                        time.sleep(SETTLE)
                        _touch(result.facts.path.stat().st_size)
                        turn(result, worker)
                    except WorkerError as error:
                        self.rounds.note(f"{error}")
        self._tell(result)

    def _tell(self, result: Result) -> None:
        for series in list(result.series.values())[self.told :]:
            self.say(series.brief())
        self.told = len(result.series)

    def _load(self, result: Result, worker: Remote) -> None:
        first = self._open(result, worker, self.sizes.n_ctx)
        token = worker.ask("decode", ids=[3])
        worker.ask("unload")
        result.add("load", "s", worker.name, first, True)
        result.add("load and first token", "s", worker.name, first + token, True)
        result.add("load again", "s", worker.name, self._open(result, worker, self.sizes.n_ctx), True)

    def _memory(self, result: Result, worker: Remote) -> None:
        before = worker.ask("memory")["now"]
        self._open(result, worker, self.sizes.n_ctx)
        ids = data.tokens(self.sizes.prompt, result.facts.n_vocab)
        worker.ask("prefill", ids=ids)
        worker.ask("decode", ids=ids[: self.sizes.generate], at=len(ids))
        peak = worker.ask("memory")["peak"]
        result.add("peak memory", "MB", worker.name, peak / 1e6, True)
        result.add("peak less imports", "MB", worker.name, (peak - before) / 1e6, True)

    # -- in processes held open ----------------------------------------------------------------------

    def _held(self, result: Result) -> None:
        sizes, name, n_vocab = self.sizes, result.facts.path.name, result.facts.n_vocab
        deep = "decode4096" in self.what
        n_ctx = -(-(sizes.depth + sizes.deep if deep else sizes.n_ctx) // 256) * 256
        with ExitStack() as stack:
            limits = {"limits": stack.enter_context(self.limits.start())} if "limits" in self.what else {}
            workers: dict[str, Remote] = {}
            if {"prefill", "decode", "decode4096"} & set(self.what):
                self.say(f"{name}: loading")
                workers = {c.name: stack.enter_context(c.start()) for c in self.contenders}
                self._rounds(result, workers, lambda _, worker: self._warm_up(result, worker, n_ctx), 1)
                self._compare(result, workers)
            prompt, generated = data.tokens(sizes.prompt, n_vocab), data.tokens(sizes.generate, n_vocab, 2)
            if "prefill" in self.what or (limits and not workers):
                self.say(f"{name}: prefill of {sizes.prompt} tokens")
                turn = self._timed(result, f"pp{sizes.prompt}", "prefill", prompt)
                asked = workers if "prefill" in self.what else {}
                self._rounds(
                    result, asked | limits, lambda n, w: self._peak(result, w) if n == "limits" else turn(n, w)
                )
            if "decode" in self.what or (limits and not workers):
                self.say(f"{name}: {sizes.generate} tokens one by one")
                turn = self._timed(result, f"tg{sizes.generate}", "decode", generated)
                asked = workers if "decode" in self.what else {}
                self._rounds(
                    result, asked | limits, lambda n, w: self._bandwidth(result, w) if n == "limits" else turn(n, w)
                )
            if deep:
                self.say(f"{name}: {sizes.deep} tokens after {sizes.depth}")
                context = data.tokens(sizes.depth, n_vocab, 3)
                self._rounds(result, workers, lambda _, worker: worker.ask("prefill", ids=context), 1)
                turn = self._timed(result, f"tg{sizes.deep} @ {sizes.depth}", "decode", generated[: sizes.deep],
                                   sizes.depth)  # fmt: skip
                self._rounds(result, workers, turn)

    def _rounds(
        self, result: Result, workers: dict[str, Remote], turn: Callable[[str, Remote], Any], pairs: int | None = None
    ) -> None:
        self.rounds.pairs = self.sizes.pairs if pairs is None else pairs
        self.rounds.run(workers, turn)
        self._tell(result)

    def _timed(self, result: Result, name: str, method: str, ids: list[int], at: int = 0
               ) -> Callable[[str, Remote], None]:  # fmt: skip
        def turn(contender: str, worker: Remote) -> None:
            result.add(name, "tokens/s", contender, len(ids) / worker.ask(method, ids=ids, at=at))

        return turn

    def _bandwidth(self, result: Result, worker: Remote) -> None:
        found = worker.ask("bandwidth", threads=self.threads, passes=self.sizes.passes, nbytes=self.sizes.buffer)
        for streams, rate in found.items():
            result.bandwidth.setdefault(streams, []).append(rate)

    def _peak(self, result: Result, worker: Remote) -> None:
        for name, rate in worker.ask("peak", threads=self.threads, seconds=self.sizes.peak_s).items():
            result.peak.setdefault(name, []).append(rate)

    def _compare(self, result: Result, workers: dict[str, Remote]) -> None:
        """Say so where a peer computes something else: then a ratio means nothing."""
        ids = data.tokens(16, result.facts.n_vocab, 4)
        found = {name: np.array(worker.ask("logits", ids=ids)) for name, worker in workers.items() if not worker.closed}
        for name, logits in found.items():
            if OURS in found and (likeness := float(np.corrcoef(found[OURS], logits)[0, 1])) < 0.99:
                self.rounds.note(f"{name} computes other logits than {OURS}: correlation {likeness:.3f}")


def encode(contenders: Sequence[Contender], sizes: Sizes, rounds: Rounds) -> tuple[list[Series], dict[str, list[str]]]:
    """Weights a second of one thread by type; and which contenders wrote other bytes than ours, by type."""
    found, differ = [], {}
    with ExitStack() as stack:
        workers = {c.name: stack.enter_context(c.start()) for c in contenders}
        for name in ENCODED:
            kind, series, digests = blocks.find(name), Series(name, "million weights/s"), {}

            def turn(contender: str, worker: Remote, kind: Any = kind, series: Series = series,
                     digests: dict[str, str] = digests) -> None:  # fmt: skip
                answer = worker.ask("encode", type=kind.name, type_id=kind.id, seconds=sizes.encode_s)
                series.add(contender, answer["rate"] / 1e6)
                digests[contender] = answer["digest"]

            rounds.pairs = sizes.pairs
            rounds.run(workers, turn)
            found.append(series)
            differ[name] = [c for c, digest in digests.items() if digest != digests.get(OURS, digest)]
    return found, differ


def contenders(native_python: str | None, say: Callable[[str], None]) -> list[tuple[Contender, dict[str, Any]]]:
    """Those that start, with what they say of themselves: ours first. Absent ones are said in one line each."""
    candidates = [Contender(OURS, "peers.ours")]
    if native_python or importlib.util.find_spec("llama_cpp"):
        candidates.append(Contender("native", "peers.llama", native_python or sys.executable, ("native",)))
    else:
        say("native llama.cpp is not here: pip install llama-cpp-python==0.3.36, or --native-python PATH")
    for name, module, argument in (("xllamacpp", "peers.llama", "xllamacpp"), ("libgguf", "peers.libgguf_encode", "")):
        if importlib.util.find_spec(name):
            candidates.append(Contender(name, module, arguments=(argument,) if argument else ()))
        else:
            say(f"{name} is not here: pip install 'ggufkit[bench]'")
    found = []
    for contender in candidates:
        try:
            with contender.start() as worker:
                found.append((contender, worker.ask("about")))
        except (WorkerError, OSError) as error:  # it died of its imports, or there is no such Python
            say(f"{contender.name} cannot be measured: {error}")
    return found
