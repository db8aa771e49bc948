"""From a kernel's name and settings to CUDA C++ source: the files beside this one, headers pasted in.

A `.cu` file holds kernels, `extern "C" __global__`; what varies (a layout, tokens a tile) are macros, so a file
compiled with other macros is another module. Headers are pasted as text, since what compiles at run time has no
include path and caches by the text that it is given. No header of the CUDA toolkit is used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
_KERNEL = re.compile(r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\s*\(')


@dataclass(frozen=True)
class Module:
    """A `.cu` file and the macros that it is compiled with."""

    file: str
    defines: tuple[tuple[str, int | str], ...] = ()
    fmad: bool = True  # whether a * b + c may be rounded once

    def kernel(self, name: str) -> Kernel:
        return Kernel(self, name)


@dataclass(frozen=True)
class Kernel:
    """One kernel of a module."""

    module: Module
    name: str


def module(file: str, **defines: int | str) -> Module:
    """The module of a file with these macros."""
    return Module(file, tuple(sorted(defines.items())))


def files() -> list[str]:
    """All files that hold kernels."""
    return sorted(path.name for path in FOLDER.glob("*.cu"))


@lru_cache(maxsize=64)
def text(file: str) -> str:
    """A file's text with the headers that it includes pasted in, each once."""
    seen: set[str] = set()

    def paste(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        return _INCLUDE.sub(paste, (FOLDER / name).read_text(encoding="utf-8"))

    return _INCLUDE.sub(paste, (FOLDER / file).read_text(encoding="utf-8"))


def source(module: Module) -> str:
    """What is compiled: the macros, then the file."""
    macros = "".join(f"#define {name} {value}\n" for name, value in module.defines)
    return macros + text(module.file)


def options(module: Module) -> tuple[str, ...]:
    """What nvrtc is told, but for the architecture. Subnormal numbers stay what they are: CuPy's own way to compile,
    RawModule, always flushes them to zero, and a subnormal weight would not be decoded as it is on the CPU."""
    return ("-std=c++17", "-ftz=false", f"-fmad={'true' if module.fmad else 'false'}")


def kernel_names(file: str) -> list[str]:
    """The kernels that a file defines."""
    return _KERNEL.findall(text(file))


@lru_cache(maxsize=64)
def waits(kernel: Kernel) -> bool:
    """Whether a kernel waits for what was launched before it, so that it may begin early (common.cuh)."""
    whole = text(kernel.module.file)
    for match in _KERNEL.finditer(whole):
        if match[1] == kernel.name:
            return "wait_for_earlier();" in whole[match.start() : whole.index("\n}", match.start())]
    return False
