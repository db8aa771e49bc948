"""The folder that keeps compiled kernels, so that a process has machine code without compiling, or loading Numba.

A kernel is one file: its name with its settings, a checksum, the object code. The folder's name carries a digest of all
that machine code depends on: the kernels' sources, the versions of Python, Numba and llvmlite, the processor, NUMBA_*
settings and GGUFKIT_SIMD. Files are written under another name and renamed, so a process that ends in the middle
leaves nothing half done, and a file whose checksum is wrong counts as none. Who compiles a kernel locks a file
meanwhile (`claim`): of several processes, one compiles and the others take its result; the system releases the lock
of a process that is killed.

`$GGUFKIT_CACHE_DIR` moves the folder; an unwritable one falls back to a private folder under the temporary
folder, and that one to none.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from . import link
from .apart import apart

try:
    import fcntl
except ImportError:  # no POSIX: processes that meet compile the same kernel twice
    fcntl = None

KEEP = 6  # digest folders that stay; others go once they were unused for an hour
UNUSED_SECONDS = 3600
# Settings that change where or how Numba runs, but not the machine code.
IRRELEVANT = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "NUMBA_DEBUG_CACHE"}
SUFFIX = ".kernel"


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
    add(_numba_version(), sys.version, *apart(link.host))
    for key in sorted(os.environ):
        if key == "GGUFKIT_SIMD" or (key.startswith("NUMBA_") and key not in IRRELEVANT):
            add(key, os.environ[key])
    with contextlib.suppress(OSError):
        add(Path(".numba_config.yaml").read_bytes())  # Numba reads it in the current folder
    return state.hexdigest()[:16]


def _numba_version() -> bytes:
    """Numba's version, without a quarter of a second to import it."""
    spec = importlib.util.find_spec("numba")
    if spec is not None and spec.origin:
        with contextlib.suppress(OSError):
            return (Path(spec.origin).parent / "_version.py").read_bytes()
    import numba

    return numba.__version__.encode()


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


# -- one file a kernel -------------------------------------------------------------------------------------


def holds(name: str) -> bool:
    """Whether there is a file for the kernel (which may be damaged: `read` looks)."""
    return CACHE_DIR is not None and (CACHE_DIR / (name + SUFFIX)).exists()


def read(name: str) -> bytes | None:
    """What was written under this name; None where nothing was, or where the file is damaged."""
    if CACHE_DIR is None:
        return None
    try:
        data = (CACHE_DIR / (name + SUFFIX)).read_bytes()
    except OSError:
        return None
    return data[32:] if len(data) > 32 and data[:32] == hashlib.sha256(data[32:]).digest() else None


def write(name: str, data: bytes) -> None:
    """Keep `data` under this name. A full disk costs the cache, not the run."""
    if CACHE_DIR is None:
        return
    temporary = CACHE_DIR / f"{name}.{os.getpid()}.part"
    try:
        temporary.write_bytes(hashlib.sha256(data).digest() + data)
        temporary.replace(CACHE_DIR / (name + SUFFIX))
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def claim(name: str) -> Iterator[None]:
    """Compile this kernel alone among all processes, as far as the system can see to it; wait for who is at it."""
    if CACHE_DIR is None or fcntl is None:
        yield
        return
    try:
        file = (CACHE_DIR / f"{name}.lock").open("ab")
    except OSError:
        yield
        return
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):
            Path(file.name).unlink()


def unclaimed(name: str) -> bool:
    """Whether nobody is compiling this kernel just now."""
    if CACHE_DIR is None or fcntl is None:
        return True
    try:
        with (CACHE_DIR / f"{name}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # nobody was, or nobody can know
        pass
    return True


def used() -> tuple[int, int]:
    """(files, bytes) in the folder."""
    if CACHE_DIR is None:
        return 0, 0
    sizes = [path.stat().st_size for path in CACHE_DIR.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return len(sizes), sum(sizes)
