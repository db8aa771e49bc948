"""Kernels to machine code, by Numba. Nothing imports this before something has to be compiled.

A kernel's source holds names that stand for something of Numba's (`Later`): functions of simd, and other kernels. They
are put in their places in a copy of the function, so that the module with the kernel needs no Numba.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import types
from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
import numba
import numba.core.config
import numba.core.event
import numpy as np
from numba.core import lowering, typed_passes
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass

from . import jit
from .link import ENTRY
from .store import CACHE_DIR

SETTINGS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
NO_WRAPPERS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_lock = threading.RLock()


def _complete(function: Any) -> Any:
    """A copy of the function with what its `Later` names stand for."""
    names, codes = set(), [function.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    globals_ = dict(function.__globals__)
    for name in names & globals_.keys():
        globals_[name] = _meaning(globals_[name])
    cells = tuple(types.CellType(_meaning(cell.cell_contents)) for cell in function.__closure__ or ())
    made = types.FunctionType(function.__code__, globals_, function.__name__, function.__defaults__, cells or None)
    made.__module__, made.__doc__ = function.__module__, function.__doc__
    made.__qualname__ = function.__qualname__ + _tag(function)
    return made


def _tag(function: Any) -> str:
    """What tells kernels of one factory from each other, for the names of their symbols.

    Numba numbers functions as they are compiled. Two that were compiled in different processes may have one number, and
    when both come from the disk into a third process, the second one's calls end in the first one's code.
    """
    parts = []
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        if isinstance(value, jit.Kernel):
            parts.append(value.function.__qualname__ + _tag(value.function))
        else:
            plain = value is None or isinstance(value, (int, float, str, tuple, np.generic))
            parts.append(repr(value) if plain else type(value).__name__)
    return "_" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:12] if parts else ""


def _meaning(value: Any) -> Any:
    return value.found if isinstance(value, jit.Later) else value


def helper(function: Callable, options: dict[str, Any]) -> Any:
    """What a kernel calls: compiled with it, without what Python would need to call it."""
    with _lock:
        settings: dict[str, Any] = {**SETTINGS, **NO_WRAPPERS, **options}
        return numba.njit(**settings)(_complete(function))


# -- kernels that are called by address --------------------------------------------------------------------


class _Lower(lowering.Lower):
    """Where Numba makes a wrapper for C, these get one that does not know Python: they raise nothing."""

    def create_cfunc_wrapper(self) -> None:
        descriptor: Any = self.fndesc
        module = self.library.create_ir_module("entry")
        i64 = ir.IntType(64)
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * len(descriptor.argtypes)), ENTRY)
        builder = ir.IRBuilder(function.append_basic_block())
        callee = self.context.declare_function(module, descriptor)
        call: Any = self.context.call_conv.call_function
        call(builder, callee, descriptor.restype, descriptor.argtypes, function.args)
        builder.ret_void()
        self.library.add_ir_module(module)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(typed_passes.BaseNativeLowering):
    _name = "ggufkit_lowering"

    @property
    def lowering_class(self) -> Any:
        return _Lower


class _Compiler(CompilerBase):
    """Numba's pipeline, but for the wrapper."""

    def define_pipelines(self) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [(_Lowering if p is typed_passes.NativeLowering else p, why) for p, why in pipeline.passes]
        pipeline.finalize()
        return [pipeline]


def object_code(function: Callable) -> bytes:
    """Compile a kernel of three int64: an object whose function ENTRY is void (int64, int64, int64)."""
    return _library(function).serialize_using_object_code()[2][0]


def assembly(function: Callable) -> str:
    """What `object_code` makes, to be read."""
    return _library(function).get_asm_str()


def _library(function: Callable) -> Any:
    with _lock:
        options: dict[str, Any] = {**SETTINGS, "no_cpython_wrapper": True, "pipeline_class": _Compiler}
        made = numba.njit(**options)(_complete(function))
        made.compile("void(int64, int64, int64)")
        (result,) = made.overloads.values()
        return result.library


# -- functions that Python calls with arrays -----------------------------------------------------------------


def dispatcher(function: Callable, options: dict[str, Any]) -> Any:
    """Numba's function for calls from Python, kept in our folder."""
    # Numba reads its setting when the function is decorated. Setting it for that moment only leaves the
    # kernels of others in this process where they are.
    config: Any = numba.core.config
    with _lock:
        before = config.CACHE_DIR
        try:
            config.CACHE_DIR = str(CACHE_DIR or "")
            return _forgiving(numba.njit(cache=CACHE_DIR is not None, **SETTINGS, **options)(_complete(function)))
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


class _Listener(numba.core.event.Listener):
    """Hears of each function for Python that Numba's disk cache had not."""

    def on_start(self, event: numba.core.event.Event) -> None:
        found: Any = event.data.get("dispatcher") if isinstance(event.data, dict) else None
        module = getattr(getattr(found, "py_func", None), "__module__", "") or ""
        if module.startswith("ggufkit_kernels.") and not found.targetoptions.get("no_cpython_wrapper"):
            jit.compiling()

    def on_end(self, event: numba.core.event.Event) -> None:
        pass


numba.core.event.register("numba:compile", _Listener())
