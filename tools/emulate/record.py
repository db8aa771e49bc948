"""Programs of kernels on paper: what they read, what they left behind, and the kernels' code for another processor.

    python record.py run FOLDER        run tests/simd_cases.py here; write FOLDER/records and FOLDER/names.json
    python record.py compile FOLDER    compile the kernels of names.json, run none; write FOLDER/<k>.o

The second is told its processor by NUMBA_CPU_NAME, the first the family of instructions by GGUFKIT_SIMD. All arrays
of the backend lie in one arena at a fixed address (`arena.c`), so that addresses in them mean the same elsewhere.
`main.c` reads the records and plays them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ggufkit_kernels.cpu.team as team
import numpy as np
from ggufkit_kernels.cpu import jit

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
ARENA, ARENA_NBYTES = 0x7000_1000_0000, 128 << 20  # low memory from 256 MB on, in boot.S's mapping
END, PATCH, RUN, EXPECT = range(4)
METHODS = ("weight", "matmul", "embed", "attend", "rmsnorm", "rope", "swiglu", "relu2", "add")


class Arena:
    """NumPy's allocator while `with` lasts."""

    def __init__(self, library: str):
        self.library = ctypes.CDLL(library)
        self.library.used.restype = ctypes.c_uint64
        assert self.library.begin(ctypes.c_uint64(ARENA), ctypes.c_uint64(ARENA_NBYTES)), "the address is taken"
        api: Any = ctypes.pythonapi
        api.PyCapsule_New.restype = ctypes.py_object
        api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        table = api.PyCapsule_GetPointer(np._core._multiarray_umath._ARRAY_API, None)  # type: ignore[attr-defined]
        set_handler = ctypes.cast(table, ctypes.POINTER(ctypes.c_void_p))[304]  # PyDataMem_SetHandler
        assert set_handler
        self._set = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(set_handler)
        handler = ctypes.addressof(ctypes.c_char.in_dll(self.library, "handler"))
        self._mine = api.PyCapsule_New(handler, b"mem_handler", None)

    def __enter__(self) -> None:
        self._before = self._set(self._mine)

    def __exit__(self, *error: object) -> None:
        self._set(self._before)

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """NumPy's own allocator for a while, inside `with`."""
        self._set(self._before)
        yield
        self._set(self._mine)

    def image(self) -> np.ndarray:
        """A copy of all that was ever used."""
        nbytes = -(-self.library.used() // 64) * 64
        return np.frombuffer((ctypes.c_char * nbytes).from_address(ARENA), np.uint8).copy()


def digest(image: np.ndarray) -> int:
    """As main.c computes it."""
    words = image.view("<u8")
    return int((words * (2 * np.arange(len(words), dtype=np.uint64) + 1)).sum(dtype=np.uint64))


def pieces(before: np.ndarray, after: np.ndarray) -> list[tuple[int, bytes]]:
    """(offset, bytes) where two images differ, in runs that are not torn by less than 64 equal bytes."""
    differ = np.ones(len(after), bool)
    differ[: len(before)] = before != after[: len(before)]
    differ[len(before) :] = after[len(before) :] != 0
    where = np.flatnonzero(differ)
    if not len(where):
        return []
    cuts = np.flatnonzero(np.diff(where) > 64)
    first, last = where[np.r_[0, cuts + 1]], where[np.r_[cuts, len(where) - 1]]
    return [(int(a), after[a : b + 1].tobytes()) for a, b in zip(first, last, strict=True)]


class Recorder:
    """Records each program that a team runs."""

    def __init__(self, arena: Arena):
        self.names: list[str] = []  # of kernels
        self.image = np.zeros(0, np.uint8)
        self.out = [struct.pack("<qq", ARENA, ARENA_NBYTES)]
        self.labels: list[str] = []
        self.label = ""
        inner = team.Team._run

        def run(one: Any, program_at: int, shared: bool) -> None:
            with arena.left():
                note(one, program_at, shared)

        def note(one: Any, program_at: int, shared: bool) -> None:
            before = arena.image()
            for offset, data in pieces(self.image, before):
                self._piece(offset, data, PATCH)
            words = before.view("<i8")
            known = {entry._address: entry.name for entry in jit._entries if entry._address}
            found = np.flatnonzero(np.isin(words, np.array(list(known))))
            self._words(RUN, program_at, len(found))
            for k in found.tolist():
                self._words(8 * k, self._number(known[int(words[k])]), int(words[k]))
            inner(one, program_at, shared)
            self.image = arena.image()
            changed = pieces(before, self.image)
            assert changed and self.label, "a program that leaves nothing"
            self.out.append(struct.pack("<qqQq", EXPECT, len(self.image) // 8, digest(self.image), len(changed)))
            for offset, data in changed:
                self._piece(offset, data)
            self.labels.append(self.label)

        vars_of: Any = team.Team
        vars_of._run = run

    def _number(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def _words(self, *words: int) -> None:
        self.out.append(struct.pack(f"<{len(words)}q", *words))

    def _piece(self, offset: int, data: bytes, *head: int) -> None:
        self._words(*head, offset, len(data))
        self.out.append(data + bytes(-len(data) % 8))


def record(folder: Path) -> None:
    """Run the compact set with each method of the backend inside the arena."""
    import simd_cases  # pyright: ignore[reportMissingImports]
    from ggufkit_kernels.cpu import memory
    from ggufkit_kernels.cpu.ops import CpuOps
    from ggufkit_kernels.cpu.simd import FAMILY

    arena = Arena(str(folder / "arena.so"))
    recorder = Recorder(arena)
    memory.SEGMENT = 4 << 20
    memory._segment = lambda nbytes: np.zeros(-(-nbytes // memory.LARGE) * memory.LARGE, np.uint8)
    with arena:
        team.team(1)  # its words are part of the programs
        ops: Any = CpuOps(1)

    def inside(name: str, method: Callable) -> Callable:
        def call(*args: Any) -> Any:
            shapes = [str(x.shape) for x in args if hasattr(x, "shape")]
            layout = getattr(getattr(args[0], "packed", None), "layout", "")
            recorder.label = f"{name} {' '.join(shapes)} {layout or getattr(args[0], 'type', '')}".strip()
            with arena:
                if name == "weight":
                    args[0].source.data = args[0].source.data.copy()  # kernels that pack read it
                return method(*[x.copy() if isinstance(x, np.ndarray) else x for x in args])

        return call

    for name in METHODS:
        setattr(ops, name, inside(name, getattr(ops, name)))
    simd_cases.run(ops, simd_cases.MORE)
    recorder._words(END)
    (folder / "records").write_bytes(b"".join(recorder.out))
    found = {"family": FAMILY.name, "kernels": recorder.names, "runs": recorder.labels}
    (folder / "names.json").write_text(json.dumps(found))


def compile_only(folder: Path) -> None:
    """Object code of the same kernels, each with the function `ggufkit_entry`."""
    from ggufkit_kernels.cpu.simd import FAMILY

    found = json.loads((folder / "names.json").read_text())
    assert found["family"] == FAMILY.name, f"recorded for {found['family']}, this is {FAMILY.name}"
    for k, name in enumerate(found["kernels"]):
        place, *settings = name.split("-")
        module, function = place.rsplit(".", 1)
        entry = getattr(importlib.import_module(f"ggufkit_kernels.cpu.{module}"), function)
        entry = entry.entry(*map(int, settings)) if settings else entry
        assert entry.name == name
        (folder / f"{k}.o").write_bytes(entry.compile())


if __name__ == "__main__":
    {"run": record, "compile": compile_only}[sys.argv[1]](Path(sys.argv[2]))
