"""The decorators of CPU kernels. What they make is light: Numba is imported when something has to be compiled.

    @lazy       a kernel of three int64, (args, item, worker): `.address` is where its machine code is
    @family     a function of integers that makes such a kernel: called with the integers, it gives the address
    @kernel     a function that kernels call, or that Python calls with arrays; `@kernel(inline="always")` adds
                options of numba.njit

All: one thread, no GIL, NumPy's division, no fast-math, no FMA contraction.

Kernels of the first two kinds are machine code in files of their own (store.py), which link.py brings into memory in a
millisecond each, so a process that finds all of them never imports Numba; compiler.py makes them otherwise. What Python
calls with arrays is kept by Numba's own disk cache, in the same folder, since Numba looks at a function's own source
file only: edit a function that is called from another file, and the cached caller still answers as before.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

from . import link, store
from .apart import apart

__all__ = ["Entry", "Later", "compiled", "family", "kernel", "lazy", "set_notice"]


class Later:
    """A name in a kernel's source that means something to Numba only: looked up when a kernel is compiled."""

    def __init__(self, find: Callable[[], Any]):
        self._find = find

    @cached_property
    def found(self) -> Any:
        return self._find()


class Kernel(Later):
    """A function that kernels call. Python may call it with arrays: Numba compiles it for their types."""

    def __init__(self, function: Callable, options: dict[str, Any]):
        super().__init__(self._for_kernels)
        self.function, self.options, self._called = function, options, False
        self.__doc__, self.__name__ = function.__doc__, function.__name__

    def _for_kernels(self) -> Any:
        from . import compiler

        return compiler.helper(self.function, self.options)

    @cached_property
    def dispatcher(self) -> Any:
        """Numba's, for calls from Python."""
        from . import compiler

        return compiler.dispatcher(self.function, self.options)

    def __call__(self, *args: Any) -> Any:
        if self._called:
            return self.dispatcher(*args)
        result = apart(lambda: self.dispatcher(*args))  # compiled by its first call
        self._called = True
        return result


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """Decorator: a function that kernels call, or that Python calls with arrays."""
    return partial(Kernel, options=options) if function is None else Kernel(function, options)


# -- kernels that are called by address --------------------------------------------------------------------


class Entry:
    """A kernel void (int64, int64, int64): in memory, else on disk, else compiled now. `name` is that of its file."""

    def __init__(self, name: str, make: Callable[[], Callable]):
        self.name, self._make = name, make
        self._address = 0
        self._lock = threading.Lock()
        _entries.append(self)

    @property
    def address(self) -> int:
        """Where the machine code is."""
        return self._address or apart(self._ready)

    @cached_property
    def function(self) -> Callable[[int, int, int], None]:
        """The kernel as a Python function, which runs without the GIL."""
        return link.function(self.address)

    @property
    def here(self) -> bool:
        """Whether the kernel was compiled, here or elsewhere (its file may turn out to be damaged)."""
        return self._address != 0 or store.holds(self.name)

    def assembly(self) -> str:
        """Its assembly, compiled for that."""
        from . import compiler

        return compiler.assembly(self._make())

    def _ready(self) -> int:
        with self._lock:
            if not self._address:
                code = store.read(self.name)
                if code is None:
                    with store.claim(self.name):
                        code = store.read(self.name) or self.compile()
                self._address = link.link(code)
            return self._address

    def compile(self) -> bytes:
        """Compile it, and keep the object code."""
        from . import compiler

        compiling()
        code = compiler.object_code(self._make())
        store.write(self.name, code)
        return code


_entries: list[Entry] = []


def _after_fork() -> None:
    """A lock that another thread of the parent held is nobody's in a child."""
    for entry in _entries:
        entry._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def lazy(function: Callable) -> Entry:
    """Decorator: a kernel (args, item, worker)."""
    return Entry(_name(function), lambda: function)


class Family:
    """Kernels that a function makes, one for each choice of its integers. Called with them, it gives the address."""

    def __init__(self, make: Callable[..., Callable]):
        self._make, self._entries = make, {}
        self.__doc__, self.__name__ = make.__doc__, make.__name__

    def entry(self, *settings: int) -> Entry:
        """The kernel for these integers."""
        found = self._entries.get(settings)
        if found is None:
            name = "-".join([_name(self._make), *map(str, settings)])
            found = self._entries.setdefault(settings, Entry(name, partial(self._make, *settings)))
        return found

    def __call__(self, *settings: int) -> int:
        return self.entry(*settings).address


def family(make: Callable[..., Callable]) -> Family:
    """Decorator: a function of integers that makes a kernel (args, item, worker)."""
    return Family(make)


def _name(function: Callable) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


# -- the notice --------------------------------------------------------------------------------------------


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_notice: Callable[[str], None] | None = _to_stderr
_compiled = 0


def compiled() -> int:
    """How many kernels had to be compiled in this process, because there was no file of them."""
    return _compiled


def set_notice(say: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """Who is told, at most once a process, that kernels are being compiled; None for nobody. Gives who was."""
    global _notice
    before, _notice = _notice, say
    return before


def compiling() -> None:
    """A kernel is about to be compiled: count it, and say so."""
    global _compiled
    _compiled += 1
    announce()


def announce() -> None:
    """Tell whom `set_notice` named that kernels are being compiled, unless that was said already."""
    global _notice
    if _notice is None:
        return
    say, _notice = _notice, None
    how = "once" if store.CACHE_DIR else "and there is no writable folder to keep them in"
    say(f"compiling kernels for this processor, {how} …")
