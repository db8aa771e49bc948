"""Raw words of LANES rows side by side: what packing needs, moves and bit operations alone, nothing of numbers.

words    GROUP times LANES int32: the same word of GROUP blocks of LANES rows
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils, types

from .build import I8, I16, I32, I64, VECTOR, load, offset, pick, splat, store
from .target import GROUP, LANES, QUAD
from .values import Vector, address, intrinsic

VECTOR["words"] = ir.VectorType(I32, GROUP * LANES)
words = Vector("words")


def _two(builder: Any, a: Any, b: Any, index: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(index)), index))


def _gathered(builder: Any, at: Any, stride: Any, first: int) -> Any:
    """Four words of each of the rows first, first + 4, … one after the other."""
    four = ir.VectorType(I32, 4)
    rows = [builder.add(at, builder.mul(stride, I64(row))) for row in range(first, LANES, 4)]
    parts = [load(builder, row, four) for row in rows]
    while len(parts) > 1:
        index = list(range(2 * parts[0].type.count))
        parts = [_two(builder, a, b, index) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _turned(builder: Any, at: Any, stride: Any) -> list[Any]:
    """Four vectors of LANES words, vector k holding word k of LANES rows.

    A register holds four words of rows r, r + 4, …: then the transpose of 4 x 4 squares, which needs no
    instruction that crosses 128 bits, leaves the rows in order.
    """
    a, b, c, d = (_gathered(builder, at, stride, first) for first in range(4))
    starts = range(0, LANES, 4)
    low = [i for s in starts for i in (s, LANES + s, s + 1, LANES + s + 1)]
    high = [i + 2 for i in low]
    first = [i for s in starts for i in (s, s + 1, LANES + s, LANES + s + 1)]
    second = [i + 2 for i in first]
    ab, cd = _two(builder, a, b, low), _two(builder, c, d, low)
    ab2, cd2 = _two(builder, a, b, high), _two(builder, c, d, high)
    return [_two(builder, x, y, i) for x, y in ((ab, cd), (ab2, cd2)) for i in (first, second)]


@intrinsic
def turn_words(typingctx: Any, at: Any, stride: Any, to: Any, step: Any) -> Any:
    """Four words of each of LANES rows, `stride` bytes apart -> four vectors of LANES words, `step` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to = args[2]
        for column in _turned(builder, args[0], args[1]):
            store(builder, to, column)
            to = builder.add(to, args[3])
        return context.get_dummy_value()

    return types.void(address, types.int64, address, types.int64), codegen


@intrinsic
def turn_halves(typingctx: Any, at: Any, stride: Any, to: Any) -> Any:
    """Eight 16-bit values of each of LANES rows, `stride` bytes apart -> eight vectors of LANES values at `to`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for k, words in enumerate(_turned(builder, args[0], args[1])):
            halves = builder.bitcast(words, ir.VectorType(I16, 2 * LANES))
            both = pick(builder, halves, [*range(0, 2 * LANES, 2), *range(1, 2 * LANES, 2)])
            store(builder, offset(builder, args[2], k * QUAD), both)
        return context.get_dummy_value()

    return types.void(address, types.int64, address), codegen


@intrinsic
def splat_words(typingctx: Any, x: Any) -> Any:
    """One word everywhere."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return splat(builder, builder.trunc(args[0], I32), GROUP * LANES)

    return words(types.int64), codegen


@intrinsic
def add_term(typingctx: Any, word: Any, gathered: Any, term: Any) -> Any:
    """word ^ (w << left >> right & mask).

    At `term` four int32: the byte that w begins at from `gathered` on, left, right (below 32), mask.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, *parts = (load(builder, offset(builder, args[2], 4 * k), I32) for k in range(4))
        left, right, mask = (splat(builder, part, GROUP * LANES) for part in parts)
        found = load(builder, builder.add(args[1], builder.zext(at, I64)), VECTOR["words"])
        found = builder.lshr(builder.shl(found, left), right)
        return builder.xor(args[0], builder.and_(found, mask))

    return words(words, address, address), codegen


@intrinsic(prefer_literal=True)
def store_low(typingctx: Any, at: Any, stride: Any, last: Any, word: Any, nbytes: Any) -> Any:
    """The low `nbytes` bytes (a constant: 1, 2 or 4) of each word: block k to at + min(k, last) * stride."""
    element = {1: I8, 2: I16, 4: I32}[nbytes.literal_value]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, stride, last, word, _ = args
        for k in reversed(range(GROUP)):
            block = pick(builder, word, list(range(k * LANES, (k + 1) * LANES)))
            if element is not I32:
                block = builder.trunc(block, ir.VectorType(element, LANES))
            least = builder.select(builder.icmp_signed("<", I64(k), last), I64(k), last)
            store(builder, builder.add(at, builder.mul(stride, least)), block)
        return context.get_dummy_value()

    return types.void(address, types.int64, types.int64, words, nbytes), codegen


@intrinsic
def get_i32(typingctx: Any, at: Any) -> Any:
    """The int32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(load(builder, args[0], I32), I64)

    return types.int64(address), codegen


@intrinsic
def put_i64(typingctx: Any, at: Any, x: Any) -> Any:
    """Write an int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(address, types.int64), codegen


@intrinsic
def copy_bytes(typingctx: Any, to: Any, at: Any, nbytes: Any) -> Any:
    """Copy bytes that do not overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = I8.as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(args[0], pointer), builder.inttoptr(args[1], pointer), args[2], 1)
        return context.get_dummy_value()

    return types.void(address, address, types.int64), codegen


@intrinsic
def read_at(typingctx: Any, descriptor: Any, to: Any, nbytes: Any, offset: Any) -> Any:
    """pread: the bytes that were read, at most `nbytes`; -1 for an error (and on Windows, which has no pread)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if "windows" in builder.module.triple:
            return ir.Constant(I64, -1)
        fnty = ir.FunctionType(I64, [I32, I64, I64, I64])
        function = cgutils.get_or_insert_function(builder.module, fnty, "pread")
        return builder.call(function, [builder.trunc(args[0], I32), *args[1:]])

    return types.int64(types.int64, address, types.int64, types.int64), codegen
