"""What a team of threads needs from the processor: atomic words, a pause, a call through an address."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils, types

from .values import intrinsic

I64 = ir.IntType(64)
address = types.int64


def _pointer(builder: Any, at: Any) -> Any:
    return builder.inttoptr(at, I64.as_pointer())


@intrinsic
def load_acquire(typingctx: Any, at: Any) -> Any:
    """The int64 at an address; what its writer released before is seen after."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.int64(address), codegen


@intrinsic
def store_release(typingctx: Any, at: Any, value: Any) -> Any:
    """Write an int64; what was written before is seen by who acquires it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(address, types.int64), codegen


@intrinsic
def add_atomic(typingctx: Any, at: Any, value: Any) -> Any:
    """Add to an int64, and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "acq_rel")

    return types.int64(address, types.int64), codegen


@intrinsic
def swap_if(typingctx: Any, at: Any, expected: Any, value: Any) -> Any:
    """Write `value` if the int64 there is `expected`; whether it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        both = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(both, 1)

    return types.boolean(address, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        triple = builder.module.triple
        if triple.startswith(("x86", "i386", "i686")):
            fnty = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, fnty, "llvm.x86.sse2.pause"), [])
        elif triple.startswith(("aarch64", "arm64")):
            fnty = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = cgutils.get_or_insert_function(builder.module, fnty, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def give_way(typingctx: Any) -> Any:
    """Let another thread have the processor, if one waits for it (nothing on Windows)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if "windows" not in builder.module.triple:
            fnty = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, fnty, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call(typingctx: Any, function: Any, args_at: Any, item: Any, worker: Any) -> Any:
    """Call the compiled kernel at an address with (args, item, worker)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fnty = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(builder.inttoptr(args[0], fnty.as_pointer()), list(args[1:]))
        return context.get_dummy_value()

    return types.void(address, address, types.int64, types.int64), codegen
