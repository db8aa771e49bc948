"""The kernels that a network needs, known from its tensors' types before a weight is read, made ready meanwhile.

`prepare` works in the background: kernels on disk are linked, a millisecond each; the others are compiled, here and by
a process for each other processor, since Numba compiles under one lock a process. Who compiles a kernel claims it
(store.py), so none is compiled twice, and several programs that start at once share the work too.
"""

from __future__ import annotations

import atexit
import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.blocks.iq import GridType

from . import attention, elementwise, jit, pack_fast, pack_grid, sample, store, team
from .apart import PATIENCE, Done
from .inputs import PLAIN_TOKENS, interleave_inputs
from .jit import Entry, Family
from .matmul import TOKENS, matmul_kernel, prep_kernel
from .pack import PLAIN, Layout, canonical, layout_of
from .pack_expand import form_of
from .pack_map import map_of

Progress = Callable[[int, int], None]  # (kernels compiled, kernels to compile)
PROCESSES = 4  # that compile at once, at most
FEW = 3  # kernels that are not worth a process more
_running: list[subprocess.Popen[bytes]] = []
_starting = threading.Lock()


# -- which -------------------------------------------------------------------------------------------------


def common() -> list[Entry]:
    """What every network needs, whatever its types."""
    found = [
        team.run_program,
        team.serve,
        team.several,
        attention.append,
        elementwise.rmsnorm,
        elementwise.rope,
    ]
    found += [elementwise.swiglu, elementwise.relu2, elementwise.add, elementwise.begin, sample.end, sample.top]
    for tile in sorted({4, attention.QUERIES}):
        found += [attention.join.entry(tile), attention.attend_split.entry(tile), attention.attend.entry(tile)]
    return found


def of_types(types: Iterable[TensorType], many: bool = True) -> list[Entry]:
    """What matrices of these types need beside: packing, embedding, products with one token and (`many`) with more.

    A ScaledType stands for matrices that the file has a scale for.
    """
    found: dict[str, Entry] = {}
    for type in types:
        layout = Layout(PLAIN[type.name]) if type.name in PLAIN else None
        if layout is None:
            bitmap = map_of(form_of(type))
            layout = bitmap.layout if bitmap is not None else layout_of_zeros(type) or Layout("f32")
            packed = type if bitmap is not None else pack_fast.packed_as(type)
            entries = [] if packed is None else [pack_fast.kernel_of(packed)]
            entries += [pack_grid.pack_points] if isinstance(type, GridType) else []
        else:
            entries = [pack_fast.pack_floats if type.block_nbytes == 4 else pack_fast.pack_halves]
        tiles = (1, PLAIN_TOKENS if layout.is_plain else TOKENS)[: 1 + many]
        entries += [matmul_kernel(layout, tile) for tile in tiles]
        if layout.is_plain:
            entries += [interleave_inputs] * many + [elementwise.embed_plain]
        else:
            entries += [prep_kernel(layout, tile)[0] for tile in tiles]
            entries.append(elementwise.embed_codes)
        found |= {entry.name: entry for entry in entries}
    return list(found.values())


def layout_of_zeros(type: TensorType) -> Layout | None:
    """The layout of a type that NumPy packs, told from a block of zeros; None where it has no codes."""
    quants = type.quants(np.zeros(1, type.fields)) if type.is_quantized else None
    quants = None if quants is None else canonical(quants)
    return None if quants is None else layout_of(quants)


def of_network(types: Iterable[TensorType], ends: Iterable[TensorType]) -> list[Entry]:
    """All that a network needs: `types` in its layers, `ends` for embedding and output, which is asked for one row."""
    return list(dict.fromkeys([*of_types(types), *of_types(ends, many=False), *common()]))


def named(name: str) -> Entry:
    """The kernel with this name: `file.function`, and the integers of a family."""
    first, *settings = name.split("-")
    file, _, attribute = first.partition(".")
    found = getattr(importlib.import_module(f".{file}", __package__), attribute)
    return found.entry(*map(int, settings)) if isinstance(found, Family) else found


# -- made ready --------------------------------------------------------------------------------------------


class Preparation:
    """Kernels that are being made ready in the background. `missing` of them were not on disk: without any, there is
    only linking to do, which begins with `start`.

    `progress` is told of those, in that thread; without it, a line is said, as for any kernel that is compiled.
    """

    def __init__(self, entries: Iterable[Entry], progress: Progress | None = None):
        self.entries = list(dict.fromkeys(entries))
        self.missing = [entry for entry in self.entries if not entry.here]
        self._progress, self._told, self._stop = progress, -1, False
        self._others: list[subprocess.Popen[bytes]] = []
        if self.missing and progress is None:
            jit.announce()
        self._thread = threading.Thread(target=self._work, name="ggufkit-prepare", daemon=True)
        self._done = Done()
        atexit.register(self.stop)  # LLVM must not be at work when the process ends
        if self.missing:  # what only has to be linked waits until packing needs the processors no more
            self.start()

    def start(self) -> None:
        """Begin, if that has not happened yet."""
        if self._thread.ident is None:
            self._thread.start()

    def wait(self) -> None:
        """Wait for the end; Ctrl-C is heard meanwhile."""
        if self._thread.ident is not None:
            self._done.wait()

    def stop(self) -> None:
        """Give up, after the kernel that is being compiled now."""
        self._stop = True
        for other in self._others:
            other.terminate()
        if self._thread.ident is not None:
            self._done.wait(PATIENCE)

    def _work(self) -> None:
        said = jit.set_notice(None) if self.missing and self._progress is not None else None
        try:
            self._report()
            self._start_others()
            for entry in self.entries:
                if entry not in self.missing and not self._stop:
                    _ = entry.address
            for wait in (False, True):  # first what nobody else is at
                for entry in self.missing:
                    if self._stop:
                        return
                    if wait or store.unclaimed(entry.name):
                        _ = entry.address
                    self._report()
        except Exception:
            return  # whoever asks for that kernel meets the error, in a thread that can tell it
        finally:
            for other in self._others:
                other.wait()
            if said is not None:
                jit.set_notice(said)
            atexit.unregister(self.stop)
            self._done.set()

    def _report(self) -> None:
        done = sum(entry.here for entry in self.missing)
        if self._progress is not None and self.missing and done > self._told:
            self._told = done
            self._progress(done, len(self.missing))

    def _start_others(self) -> None:
        """Further processes that compile into the same folder: from the end of the list, or from further places on."""
        if store.CACHE_DIR is None or not sys.executable or getattr(sys, "frozen", False):
            return
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with _starting:  # another preparation's count, too
            _running[:] = [other for other in _running if other.poll() is None]
            count = min(PROCESSES - 1 - len(_running), processors - 1 - len(_running), len(self.missing) // FEW - 1)
            names = [entry.name for entry in reversed(self.missing)]
            for k in range(count):
                first = k * len(names) // count
                try:
                    self._others.append(_start([*names[first:], *names[:first]]))
                except OSError:
                    return
                _running.append(self._others[-1])


def prepare(entries: Iterable[Entry], progress: Progress | None = None) -> Preparation:
    """Begin to make kernels ready, in a thread of their own."""
    return Preparation(entries, progress)


def compile(entries: Iterable[Entry], progress: Progress | None = None) -> int:
    """Make kernels ready, and how many of them had to be compiled; `progress` is told (done, all)."""
    preparation = Preparation(entries, progress)
    preparation.wait()
    for entry in preparation.missing:  # an error in the background is raised here
        _ = entry.address
    return len(preparation.missing)


def _start(names: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that compiles kernels, and ends early when this one does."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import work; work()", str(os.getpid()), *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def end_others() -> None:
    """End the processes that compile for this one."""
    for other in _running:
        other.terminate()


def work() -> None:
    """What a further process does: compile the kernels that its arguments name, unless others are at them."""
    jit.set_notice(None)
    parent, *names = sys.argv[1:]
    for name in names:
        if hasattr(os, "getppid") and os.getppid() != int(parent):
            return
        entry = named(name)
        if not entry.here and store.unclaimed(name):
            with store.claim(name):
                if not entry.here:
                    entry.compile()
