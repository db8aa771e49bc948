"""Object code into memory, by LLVM's linker, without Numba: 1 ms a kernel, where unpickling one takes 10.

Each object has an engine of its own, since the names of functions inside one are unique in the process that compiled
it and nowhere else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite
import llvmlite.binding as llvm

ENTRY = "ggufkit_entry"  # the function that every object has: void (int64, int64, int64)
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
_engines: list[Any] = []  # for good: addresses of what they hold are in programs and tapes


def host() -> tuple[str, str, str]:
    """llvmlite's version, the processor's name and its instruction sets."""
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # a platform where LLVM cannot ask
        features = "unknown features"
    return llvmlite.__version__, llvm.get_host_cpu_name(), features


@cache
def _target() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(llvm.get_process_triple())


def link(code: bytes) -> int:
    """The address of the entry of an object."""
    machine = _target().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(ENTRY)


def function(address: int) -> Callable[[int, int, int], None]:
    """What is at the address, as a Python function; it runs without the GIL."""
    return _FUNCTION(address)
