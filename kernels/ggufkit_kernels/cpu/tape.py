"""A token's forward, recorded once and replayed in one compiled call.

A network calls the backend some 450 times a token (SmolLM2-135M), and each call costs 5 to 10 µs of Python: checks,
allocation, addresses. For one token all of that is the same every time but for the token's id, its position and the
rotary angles. `record` keeps the calls of a forward, with buffers of its own for the results, and from then on
`Tape.run` runs the whole program on the team of threads. Writing those three into place and copying the logits is its
first and its last kernel, with angles from a table: a model's weights pass through the caches with every token, and
leave nothing of Python's and NumPy's in them, so that a call that takes 1 µs in a loop takes 10 here.

Recording also sees what a single call cannot: which kernels depend on which. Kernels that do not (the projections
of q, k and v; gate and up) become one phase, whose items the threads share without waiting in between; inputs that
several matrices read are quantized once; and a phase of single small items runs on the calling thread alone.

The arithmetic is that of the separate calls, kernel for kernel: the same results bit for bit.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.errors import UsageError

from . import attention
from .elementwise import begin, rope
from .ops import Arrays, AttendCall, CpuCache, CpuOps, CpuWeight, Plan, shares
from .pack import aligned
from .sample import end
from .team import address, program_words, several
from .words import BOUNDS, STRIP_ITEMS

_CALL = struct.Struct("3q")  # token, position, where its logits go
_BEST = struct.Struct("qf")  # the largest logit: which, and what


@dataclass
class Step:
    """One kernel of a tape."""

    function: int
    items: int
    words: list[int]
    start_word: int | None = None  # which of the words is the position
    matrix: Plan | None = None  # what it reads from memory
    level: int = 0  # it may run as soon as all steps of lower levels have


class Recorder(CpuOps):
    """A CpuOps that keeps the calls instead of running them; the arrays it returns are filled when the tape runs."""

    def __init__(self, ops: CpuOps):
        self.threads, self.team = ops.threads, ops.team
        self.steps: list[Step] = []
        self.keep: list[Any] = []  # whatever the words hold addresses of
        self.rotations: list[tuple[np.ndarray, float, np.ndarray]] = []  # frequencies, factor, where the angles are
        self.n_vocab = 0
        self._rotating: dict[int, tuple] = {}  # calls of `rope` whose result nobody has asked for yet, by buffer
        self._passed_by: dict[int, tuple] = {}  # steps that attention made needless, unless somebody reads after it
        self._pool: set[int] = set()
        self._free: dict[int, list[np.ndarray]] = {}
        self._written: dict[int, int] = {}  # by buffer: the level of the last step that wrote it
        self._read: dict[int, int] = {}
        self._inputs: dict[tuple, tuple[np.ndarray, list[int]]] = {}  # what was made of which inputs
        self._scratch: dict[str, np.ndarray] = {}

    # -- buffers -----------------------------------------------------------------------------------

    def _array(self, *shape: int) -> np.ndarray:
        """An array in a buffer that serves again once nobody refers to the array or to a view of it."""
        count = int(np.prod(shape))
        nbytes = -(-4 * count // 64) * 64
        free = self._free.setdefault(nbytes, [])
        if free:
            buffer = free.pop()
        else:
            buffer = aligned((nbytes,), np.dtype(np.uint8))
            self.keep.append(buffer)
            self._pool.add(address(buffer))
        # Through a memoryview, since the views of an array that has one for its base refer to that array
        root = np.frombuffer(buffer.data, np.float32, count)
        weakref.finalize(root, free.append, buffer)
        return root.reshape(shape)

    def _buffer(self, name: str, nbytes: int) -> np.ndarray:
        """Scratch of at least that size, 64-aligned, by name."""
        found = self._scratch.get(name)
        if found is None or found.nbytes < nbytes:
            found = self._scratch[name] = aligned((nbytes,), np.dtype(np.uint8))
            self.keep.append(found)
        return found

    @staticmethod
    def _owner(x: np.ndarray) -> int:
        """Which buffer an array lies in: where that begins."""
        while isinstance(x.base, np.ndarray):
            x = x.base
        return address(x)

    # -- steps -------------------------------------------------------------------------------------

    def _add(self, step: Step, reads: Iterable[int], writes: Iterable[int]) -> None:
        """A step that reads and writes these buffers."""
        reads, writes = set(reads), set(writes)
        for x in reads | writes:
            if x in self._rotating:
                self._record(*self._rotating.pop(x))
            passed_by = self._passed_by.pop(x, None)
            if passed_by is not None and x in reads:
                self._add(*passed_by)
        before = [self._written.get(x, 0) for x in reads | writes] + [self._read.get(x, 0) for x in writes]
        step.level = level = 1 + max(before, default=0)
        self.steps.append(step)
        for x in reads:
            self._read[x] = max(level, self._read.get(x, 0))
        for x in writes:
            self._written[x] = level
            for key in [key for key in self._inputs if key[0] == x]:
                del self._inputs[key]

    def _launch(self, steps: list[tuple[int, int]], words: list[int], reads: Arrays, writes: Arrays) -> None:
        if steps[0][0] == rope.address:  # attention does it by the way, if nobody else comes before
            waiting = self._rotating.pop(self._owner(writes[0]), None)
            if waiting is not None:
                self._record(*waiting)
            self._rotating[self._owner(writes[0])] = steps, words, reads, writes
        else:
            self._record(steps, words, reads, writes)

    def _record(self, steps: list[tuple[int, int]], words: list[int], reads: Arrays, writes: Arrays) -> None:
        self.keep += [x for x in reads if self._owner(x) not in self._pool]
        owners = [self._owner(x) for x in writes]
        for function, items in steps:
            self._add(Step(function, items, words), map(self._owner, reads), owners)

    def _launch_matmul(self, plan: Plan, x: np.ndarray, bias: np.ndarray | None, out: np.ndarray) -> None:
        source = self._owner(x)
        call = [address(x), len(x), address(out), 0 if bias is None else address(bias)]
        self.keep += [plan, bias]
        made, made_owner = plan.scratch_at(0), source
        if plan.prep is not None:
            key = (source, address(x), plan.prep_key)
            known = self._inputs.get(key)
            if known is None:
                view = self._array(-(-plan.scratch_nbytes // 4))
                made = plan.scratch_at(address(view))
                made_owner = self._owner(view)
                words = plan.weight_words + call + made + plan.tail
                self._add(Step(*plan.prep, words), [source], [made_owner])
                self._inputs[key] = (view, made)
            else:
                made, made_owner = known[1], self._owner(known[0])
        words = plan.weight_words + call + made + plan.tail
        self._add(Step(*plan.kernel, words, matrix=plan), [source, made_owner], [self._owner(out)])

    def _launch_attend(self, call: AttendCall, steps: list[tuple[int, int]], reads: Arrays, writes: Arrays) -> None:
        for word, nbytes in (
            (attention.SCRATCH_WORD, call.worker_nbytes * self.threads),
            (attention.PARTS_WORD, call.parts_nbytes),
        ):
            call.words[word] = address(self._buffer(f"attention {word}", nbytes))
        call.words[attention.COS_WORD :], passed_by = self._taken_over(*reads[:2])
        owners = [*map(self._owner, writes), id(self._scratch)]  # the scratch is one for all layers
        for function, items in steps:
            self._add(Step(function, items, call.words, attention.START_WORD), map(self._owner, reads), owners)
        self._passed_by |= passed_by

    def _taken_over(self, *arrays: np.ndarray) -> tuple[list[int], dict[int, tuple]]:
        """Attention's words for a rotation that queries and keys still wait for (cosines, sines, pairs, interleaved),
        and, by buffer, the steps that it makes needless."""
        waiting = [self._rotating.get(self._owner(x)) for x in arrays]
        wanted = {tuple(words[k] for k in (1, 2, 6, 7)) for _, words, _, _ in filter(None, waiting)}
        same = [found is not None and found[1][0] == address(x) for x, found in zip(arrays, waiting, strict=True)]
        if not all(same) or len(wanted) > 1:
            return [0, 0, 0, 0], {}  # `_add` makes those that wait
        passed_by: dict[int, tuple] = {}
        for x in arrays:
            steps, words, reads, _ = self._rotating.pop(self._owner(x))
            self.keep += reads[1:]
            function, items = steps[0]
            passed_by[self._owner(x)] = Step(function, items, words), list(map(self._owner, reads)), [self._owner(x)]
        return list(wanted.pop()), passed_by

    # -- what differs from token to token ------------------------------------------------------------

    def _rotations(self, start: int, n: int, freqs: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
        pairs = len(freqs)
        angles = next((place for f, s, place in self.rotations if f is freqs and s == scale), None)
        if angles is None:
            angles = np.zeros((n, 2 * pairs), np.float32)
            self.rotations.append((freqs, scale, angles))
        return angles[:, :pairs], angles[:, pairs:]

    def embed(self, weight: CpuWeight, ids: np.ndarray) -> np.ndarray:
        """As in CpuOps; the ids are checked when the tape runs."""
        self.n_vocab = weight.shape[0]
        return super().embed(weight, ids)


def _shared(phase: list[Step]) -> bool:
    """Whether there is something for several threads to do."""
    return sum(step.items for step in phase) > 1


class Tape:
    """The recorded forward of one token."""

    def __init__(self, ops: CpuOps, network: Callable, config: Any, weights: Any, cache: CpuCache):
        self.team = ops.team
        self._network, self._config, self._weights, self._positions = network, config, weights, cache.positions
        self._ids = np.zeros(1, np.int64)
        recorder = Recorder(ops)
        out = network(config, weights, recorder, self._ids, cache, 0)
        self._n_vocab, self._shape = recorder.n_vocab, out.shape
        # What `begin` and `end` are told, but for the token, its position, its logits, and the places of the position
        call = [0, 0, 0, address(self._ids), address(out), out.size, 0, 0, len(recorder.rotations), 0, 0]
        self._keep = [out, recorder.keep, recorder.rotations]
        for freqs, scale, angles in recorder.rotations:
            rows = rotations(np.arange(cache.positions), freqs, scale)
            call += [address(rows), address(angles), angles.size]
            self._keep.append(rows)
        steps = recorder.steps
        steps.insert(0, Step(begin.address, 1, call))
        steps.append(Step(end.address, 1, call, level=1 + max(step.level for step in steps)))
        self._lay_out(steps, call)

    def _lay_out(self, steps: list[Step], call: list[int]) -> None:
        """Write the program: head, then a group of words for each kernel and for each phase of several."""
        phases: dict[int, list[Step]] = {}
        for step in steps:
            phases.setdefault(step.level, []).append(step)
        heads: list[list[Step]] = []
        for _, phase in sorted(phases.items()):
            if all(step.items == 1 for step in phase):
                heads += [[step] for step in phase]  # small: not worth calling the others
            else:
                heads.append(self._shared_out(phase))
        groups: list[list[int]] = []
        offset, starts, program, unique = program_words(len(heads)), [], [], {}
        place: dict[int, int] = {}
        for step in steps:  # steps of one call share their words
            if id(step.words) not in unique:
                unique[id(step.words)] = offset
                groups.append(step.words)
                if step.start_word is not None:
                    starts.append(offset + step.start_word)
                offset += len(step.words)
            place[id(step)] = unique[id(step.words)]
        nexts = self._read_next(heads)
        size = offset + sum(1 + 3 * len(head) for head in heads) + sum(map(len, nexts))
        self._words = np.zeros(size + 8, np.int64)[:size]
        base = address(self._words)
        for phase, ahead in zip(heads, nexts, strict=True):
            items = sum(step.items for step in phase)
            function, at = phase[0].function, place[id(phase[0])]
            if len(phase) > 1:
                words, first = [len(phase)], 0
                for step in phase:
                    words += [step.function, base + 8 * place[id(step)], first]
                    first += step.items
                groups.append(words)
                function, at = several.address, offset
                offset += len(words)
            program += [function, at, items, offset if ahead else 0]
            groups.append(ahead)
            offset += len(ahead)
        flat = [len(heads), *program]
        for group in groups:
            flat += group
        self._words[: len(flat)] = flat
        self._program_at = base
        self._starts = base + 8 * np.array(starts, np.int64)
        self._call_at = 8 * unique[id(call)]
        self._words[unique[id(call)] + 6 : unique[id(call)] + 8] = len(starts), self._starts.ctypes.data
        self._bytes = self._words.data.cast("B")
        self.shared = any(map(_shared, heads))

    def _shared_out(self, phase: list[Step]) -> list[Step]:
        """A phase's steps in the order in which threads take their items: large ones first, matrices as one whole."""
        plans = [step.matrix for step in phase if step.matrix is not None]
        if len(plans) < len(phase) or len(plans) == 1 or self.team.threads == 1:
            return sorted(phase, key=lambda step: -step.items)
        phase = sorted(phase, key=lambda step: step.matrix.nbytes if step.matrix else 0)
        sizes = [(step.matrix.strips, step.matrix.nbytes) for step in phase if step.matrix]
        for step, bounds in zip(phase, shares(sizes, self.team.threads), strict=True):
            kept = np.array(bounds, np.int64)
            self._keep.append(kept)
            step.items = len(bounds) - 1
            step.words[BOUNDS // 8], step.words[STRIP_ITEMS // 8] = address(kept), step.items
        return phase

    def _places(self, phase: list[Step]) -> list[int]:
        """Where each thread begins to read, if each takes one item."""
        found: list[int] = []
        for step in phase:
            if step.matrix is not None:
                bounds = ctypes.cast(step.words[BOUNDS // 8], ctypes.POINTER(ctypes.c_int64))
                found += [step.matrix.place(bounds[k]) for k in range(step.items)][: self.team.threads]
        return (found + found[:1] * self.team.threads)[: self.team.threads]

    def _read_next(self, heads: list[list[Step]]) -> list[list[int]]:
        """With each phase, where each thread begins to read what is read next; nothing where that was said already."""
        out: list[list[int]] = []
        # Behind the last matrix comes the next token's first
        places = next((self._places(phase) for phase in heads if phase[0].matrix), [])
        for phase in reversed(heads):
            out.append(places if _shared(phase) else [])
            if phase[0].matrix is not None:
                places = self._places(phase)
        out.reverse()
        said: list[int] = []
        for k, words in enumerate(out):
            out[k] = [] if words == said else words
            said = words or said
        return out

    def fits(self, ops: CpuOps, network: Callable, config: Any, weights: Any, cache: CpuCache) -> bool:
        """Whether it is the forward of this network with the cache where it was."""
        return (
            self._network is network
            and self._config is config
            and self._weights is weights
            and self.team is ops.team
            and self._positions == cache.positions
        )

    def run(self, token: int, start: int) -> np.ndarray:
        """The forward of one token at a position: logits (1, n_vocab)."""
        if not 0 <= token < self._n_vocab:
            raise UsageError(f"token id {token} is outside 0…{self._n_vocab - 1}")
        out = np.empty(self._shape, np.float32)
        with self.team.lock:
            _CALL.pack_into(self._bytes, self._call_at, token, start, address(out))
            self.team.run_at(self._program_at, self.shared)
        return out

    def best(self) -> tuple[int, float]:
        """The largest logit of the last token: which, and its value; NaN where there is one."""
        return _BEST.unpack_from(self._bytes, self._call_at + 72)


def rotations(positions: np.ndarray, freqs: np.ndarray, scale: float) -> np.ndarray:
    """Cosines, then sines, (n, 2 pairs) float32, of angles in float64."""
    out = np.empty((len(positions), 2 * len(freqs)), np.float32)
    for first in range(0, len(positions), 4096):  # bounds what float64 takes
        angle = positions[first : first + 4096, None] * np.asarray(freqs, dtype=np.float64)
        rows = out[first : first + 4096]
        np.multiply(np.cos(angle), scale, out=rows[:, : len(freqs)], casting="same_kind")
        np.multiply(np.sin(angle), scale, out=rows[:, len(freqs) :], casting="same_kind")
    return out


def record(ops: CpuOps, network: Callable, config: Any, weights: Any, cache: CpuCache) -> Tape:
    """The cache's tape, recorded anew, with room for one position more."""
    cache.reserve(cache.length + 1)
    cache.tape = Tape(ops, network, config, weights, cache)
    return cache.tape
