"""The decorators that every CPU kernel is compiled with, and the folder that keeps what they compiled.

Numba caches each function beside a stamp of its own source file only: edit a function that is called from
another file, and the cached caller still answers as before. So the folder's name carries a digest of everything
that the machine code depends on: all kernel sources, the versions, the processor, NUMBA_* settings and GGUFKIT_SIMD.

    @kernel                      one thread, no GIL, NumPy's division, no fast-math, no FMA contraction
    @kernel(inline="always")     the same with further options of numba.njit
    @parallel                    with prange

`$GGUFKIT_CACHE_DIR` moves the cache; an unwritable one falls back to a private folder under the temporary
folder, and that one to no cache. `set_notice` takes the one line that is said while kernels compile.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numba.core.config
import numba.core.event
import platformdirs
from numba import prange

__all__ = ["CACHE_DIR", "compiled", "kernel", "parallel", "prange", "set_notice"]

KEEP = 6  # digest folders that stay; others go once they were unused for an hour
UNUSED_SECONDS = 3600
# Settings that change where or how Numba runs, but not the machine code.
IRRELEVANT = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_DEBUG_CACHE"}


def digest() -> str:
    """16 hex digits over all that the machine code of the kernels depends on."""
    state = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            state.update(len(data).to_bytes(8, "little") + data)

    here = Path(__file__).parent
    for path in sorted(here.rglob("*.py")):
        add(str(path.relative_to(here)), path.read_bytes())
    add(numba.__version__, llvmlite.__version__, sys.version, llvmlite.binding.get_host_cpu_name())
    try:
        add(llvmlite.binding.get_host_cpu_features().flatten())
    except RuntimeError:  # a platform where LLVM cannot ask
        add("unknown features")
    for key in sorted(os.environ):
        if key == "GGUFKIT_SIMD" or (key.startswith("NUMBA_") and key not in IRRELEVANT):
            add(key, os.environ[key])
    return state.hexdigest()[:16]


def cache_root() -> Path:
    """The folder that holds one folder a digest."""
    own = os.environ.get("GGUFKIT_CACHE_DIR")
    return Path(own).expanduser() if own else Path(platformdirs.user_cache_dir("ggufkit", appauthor=False))


def usable(folder: Path) -> bool:
    """Whether the folder could be made and takes a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        os.utime(folder)  # "used just now", for prune()
    except OSError:
        return False
    return True


def private_temporary() -> Path | None:
    """A folder under the temporary one that nobody else can write to: cached code is run as it is found."""
    uid = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"ggufkit-{uid}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    mine = not hasattr(os, "getuid") or (status.st_uid == uid and not status.st_mode & 0o077)
    return folder if mine and folder.is_dir() and not folder.is_symlink() else None


def prune(root: Path, keep: Path) -> None:
    """Remove digest folders that were not used lately, except the newest few and `keep`."""
    found = []
    for path in root.glob("numba-*"):
        try:
            found.append((path.stat().st_mtime, path))
        except OSError:
            continue
    for used, path in sorted(found, reverse=True)[KEEP:]:
        if path != keep and used < time.time() - UNUSED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def cache_folder() -> Path | None:
    """This digest's folder, made and writable, or None where nothing can be written."""
    name = f"numba-{digest()}"
    for root in (cache_root(), private_temporary()):
        if root is not None and usable(root / name):
            prune(root, root / name)
            return root / name
    return None


CACHE_DIR = cache_folder()
_lock = threading.Lock()


def _compile(function: Callable, options: dict[str, Any]) -> Any:
    # Numba reads its setting when the function is decorated. Setting it for that moment only leaves the
    # kernels of others in this process where they are.
    config: Any = numba.core.config
    with _lock:
        before = config.CACHE_DIR
        try:
            config.CACHE_DIR = str(CACHE_DIR or "")
            return _forgiving(numba.njit(**options)(function))
        finally:
            config.CACHE_DIR = before


def _forgiving(dispatcher: Any) -> Any:
    """A damaged cache file counts as none, and a full disk costs the cache, not the run."""
    cache = getattr(dispatcher, "_cache", None)  # Numba's own: FunctionCache
    load, save = getattr(cache, "load_overload", None), getattr(cache, "save_overload", None)
    if cache is None or load is None or save is None:
        return dispatcher

    def load_or_miss(*args: Any) -> Any:
        try:
            return load(*args)
        except Exception:  # whatever unpickling of broken bytes may raise
            return None

    def save_or_not(*args: Any) -> None:
        try:
            save(*args)
        except OSError:
            pass
        except Exception:  # a damaged index: begin a new one
            with contextlib.suppress(Exception):
                dispatcher._cache.flush()
                save(*args)

    cache.load_overload, cache.save_overload = load_or_miss, save_or_not
    return dispatcher


def _decorate(function: Callable | None, options: dict[str, Any]) -> Any:
    settings = {"cache": CACHE_DIR is not None, "nogil": True, "error_model": "numpy", **options}
    if function is None:
        return lambda inner: _compile(inner, settings)
    return _compile(function, settings)


def kernel(function: Callable | None = None, **options: Any) -> Any:
    """Compile for one thread: `@kernel` or `@kernel(option=…)`."""
    return _decorate(function, options)


def parallel(function: Callable | None = None, **options: Any) -> Any:
    """Compile with prange over Numba's threads: `@parallel` or `@parallel(option=…)`."""
    return _decorate(function, {"parallel": True, **options})


# -- the notice --------------------------------------------------------------------------------


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_notice: Callable[[str], None] | None = _to_stderr
_compiled = 0


def compiled() -> int:
    """How many kernels had to be compiled in this process, because the disk cache had them not."""
    return _compiled


def set_notice(say: Callable[[str], None] | None) -> None:
    """Who is told, at most once a process, that kernels are being compiled; None for nobody."""
    global _notice
    _notice = say


class _Listener(numba.core.event.Listener):
    """Hears of each compilation that the disk cache could not answer."""

    def on_start(self, event: numba.core.event.Event) -> None:
        global _notice, _compiled
        dispatcher = event.data.get("dispatcher") if isinstance(event.data, dict) else None
        module = getattr(getattr(dispatcher, "py_func", None), "__module__", "") or ""
        if not module.startswith("ggufkit_kernels."):
            return
        _compiled += 1
        if _notice is None:
            return
        say, _notice = _notice, None
        how = "once" if CACHE_DIR else "and there is no writable folder to keep them in"
        say(f"compiling kernels for this processor, {how} …")

    def on_end(self, event: numba.core.event.Event) -> None:
        pass


numba.core.event.register("numba:compile", _Listener())
