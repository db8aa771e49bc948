"""From a kernel's module to a library for the CPU: its source, or what nvrtc makes of it, as C++ with shim.h."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from ggufkit_formats.errors import DeviceError
from ggufkit_kernels.cpu import store
from ggufkit_kernels.cuda import loader
from ggufkit_kernels.cuda.loader import Kernel, Module

SHIM = [Path(__file__).with_name(name) for name in ("shim.h", "instructions.h", "matrices.h", "ptx.h", "ptx.py")]
CHECKER = Path(__file__).with_name("checker.cpp")
WORDS = os.environ.get("GGUFKIT_EMULATED", "").split()
SANITIZED = "sanitize" in WORDS
COMPILER = shutil.which("g++")
THREADS, STACK_BYTES = 1024, (256 if SANITIZED else 64) * 1024
UNUSED_SECONDS = 2 * 86400
_BOUNDS = r'extern "C" __global__ void\s+__launch_bounds__\(([^,)]*)[^)]*\)\s+%s\s*\('


def flags(ptx: int) -> list[str]:
    """What g++ is told. `ptx`: the compute capability whose PTX is compiled; 0: the source is."""
    out = ["-std=c++17", "-g1", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden"]
    out += ["-fno-gnu-unique", "-fPIC", "-shared", "-Werror=return-type"]
    if ptx:  # whose memory checker.cpp watches
        return out
    out += ["-Werror=uninitialized"]
    if SANITIZED:
        out += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
        out += ["-fsanitize-sections=shared_memory"]
    return out + (["-DSHIM_UCONTEXT"] if "ucontext" in WORDS else [])


def generated(module: Module, ptx: int) -> str:
    """The C++ text of a module: shim, kernels, an entry point for each kernel."""
    entries = "".join(f"SHIM_KERNEL({name})\n" for name in loader.kernel_names(module.file))
    if ptx:
        from ptx import compiled, translated

        return f"{translated(compiled(module, ptx), loader.source(module))}\n{entries}"
    text = loader.source(module).replace("#pragma once", "")
    return f'#include "shim.h"\nnamespace {{\n{text}\n}}\n{entries}'


@functools.lru_cache(maxsize=1)
def folder() -> Path:
    """Where libraries are kept; those that nobody used for two days are removed."""
    path = store.cache_root() / "emulated"
    path.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < time.time() - UNUSED_SECONDS:
                file.unlink()
    return path


def library_path(module: Module, ptx: int = 0) -> Path:
    """The module's library, compiled now if it is not there."""
    origin = loader.source(module)
    if ptx:
        import nvrtc_binding

        origin = f"{ptx} {nvrtc_binding.getVersion()} {loader.options(module)} {origin}"
    return _built(Path(module.file).stem, origin, lambda: generated(module, ptx), ptx)


def _built(name: str, origin: str, text: Callable[[], str], ptx: int) -> Path:
    """The library of a C++ text that is made of `origin` by the shim's files, compiled now if it is not there."""
    assert COMPILER is not None, "there is no g++"
    parts = [origin, *(path.read_text(encoding="utf-8") for path in SHIM), *flags(ptx), COMPILER]
    stem = f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}"
    library = folder() / f"{stem}.so"
    if library.exists():
        os.utime(library)
        return library
    with store.claim(f"emulated-{stem}"):
        if not library.exists():
            source = folder() / f"{stem}.cpp"  # stays: reports of the sanitizer name its lines
            source.write_text(text(), encoding="utf-8")
            part = folder() / f"{stem}.{os.getpid()}.part"
            command = [COMPILER, *flags(ptx), f"-I{SHIM[0].parent}", str(source), "-o", str(part)]
            env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # of the sanitizer
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                raise DeviceError(f"g++ refuses {source}:\n{done.stderr[:4000]}")
            part.replace(library)
    return library


class Entry:
    """A kernel's entry points in its library."""

    def __init__(self, kernel: Kernel, ptx: int):
        library = _library(kernel.module, ptx)
        signature = getattr(library, f"signature_{kernel.name}")
        signature.restype = ctypes.c_char_p
        self.parameters: list[str] = signature().decode().split()
        self.launch = getattr(library, f"launch_{kernel.name}")
        self.launch.restype = ctypes.c_char_p
        self.launch.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.launch.argtypes += [ctypes.c_int]
        self.most = _most_threads(kernel)


def _most_threads(kernel: Kernel) -> int:
    """What the kernel's __launch_bounds__ says; products of numbers and macros, those of the source too."""
    source = loader.source(kernel.module)
    bounds = re.search(_BOUNDS % kernel.name, source)
    if bounds is None:
        return THREADS
    macros = dict(re.findall(r"^#define (\w+) (.+?)\s*(?://.*)?$", source, re.MULTILINE))

    def value(text: str) -> int:
        factors = (factor.strip() for factor in text.strip("() ").split("*"))
        return math.prod(value(macros[factor]) if factor in macros else int(factor) for factor in factors)

    return value(bounds[1])


@functools.cache
def _library(module: Module, ptx: int) -> ctypes.CDLL:
    if ptx:
        checker()  # is called by what is loaded now
    return ctypes.CDLL(str(library_path(module, ptx)))


@functools.cache
def entry_of(kernel: Kernel, ptx: int = 0) -> Entry:
    """A kernel's entry points."""
    if kernel.name not in loader.kernel_names(kernel.module.file):
        raise DeviceError(f"{kernel.module.file} has no kernel {kernel.name}")
    return Entry(kernel, ptx)


@functools.cache
def checker() -> ctypes.CDLL:
    """What watches the memory of kernels made of PTX."""
    text = CHECKER.read_text(encoding="utf-8")
    library = ctypes.CDLL(str(_built("checker", text, lambda: text, 1)), mode=ctypes.RTLD_GLOBAL)
    for name, n in (("allocate", 2), ("free", 1), ("written", 2), ("level", 0), ("early", 1)):
        function = getattr(library, f"checker_{name}")
        function.argtypes, function.restype = [ctypes.c_uint64] * n, None
    return library


@functools.lru_cache(maxsize=1)
def stacks() -> tuple[mmap.mmap, int]:
    """Stacks for the threads of a block, shared by all libraries, and their address."""
    memory = mmap.mmap(-1, THREADS * STACK_BYTES)
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))
