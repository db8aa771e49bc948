"""Registers, stack and spills of every CUDA kernel, as the assembler in nvrtc tells them; needs no GPU.

python tools/cuda_registers.py [ARCH…]    # 75 80 90 120 …; default 90

A line a kernel and architecture: in how many modules (layouts, tiles of tokens) it is compiled, the registers of the
leanest and of the widest, and the modules whose registers do not suffice, by the bytes that they store to memory.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "cuda"))

import nvrtc_binding as nvrtc
from ggufkit_kernels.cuda import loader
from ggufkit_kernels.cuda.loader import Module
from ggufkit_kernels.cuda.modules import modules


def assembler_log(module: Module, arch: int) -> str:
    """What is said about a module."""
    program = nvrtc.createProgram(loader.source(module), module.file, (), ())
    nvrtc.compileProgram(program, (*loader.options(module), f"-arch=sm_{arch}", "--ptxas-options=-v"))
    log = nvrtc.getProgramLog(program)
    nvrtc.destroyProgram(program)
    return log


def kernels(log: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, bytes of spill stores) of a log."""
    pattern = r"Function properties for (\w+).*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return [(name, int(used), int(spilled)) for name, spilled, used in re.findall(pattern, log, re.DOTALL)]


def main() -> None:
    archs = [int(arch) for arch in sys.argv[1:]] or [90]
    jobs = [(module, arch) for module in dict.fromkeys(modules()) for arch in archs]
    found: dict[tuple[str, str, int], list[tuple[int, int, Module]]] = defaultdict(list)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for (module, arch), log in zip(jobs, threads.map(lambda job: assembler_log(*job), jobs), strict=True):
            for name, used, spilled in kernels(log):
                found[module.file, name, arch].append((spilled, used, module))
    for (file, name, arch), all_of in sorted(found.items()):
        used = [each[1] for each in all_of]
        print(f"{file} {name} sm_{arch}: {len(all_of)} modules, {min(used)} to {max(used)} registers")
        for spilled, registers, module in sorted(all_of, key=lambda each: -each[0]):
            if spilled:
                macros = " ".join(f"{macro}={value}" for macro, value in module.defines)
                print(f"    {spilled} bytes spilled of {registers} registers: {macros}")


if __name__ == "__main__":
    if not nvrtc.found:
        sys.exit(nvrtc.reason)
    main()
