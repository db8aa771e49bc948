"""Vectors of any length with operators, for kernels that work on blocks of weights.

The length is said where a vector is loaded or broadcast, and follows from the operands after that; LLVM cuts what is
longer than a register into pieces, so a kernel handles two registers side by side by asking for twice the lanes.
`a + b`, `a < b`, `a & b` … take vectors of one type, or a vector and a number of the element's type. Every float
operation rounds by itself: nothing is contracted or reordered.
"""

from __future__ import annotations

import operator
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin, lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

from .build import (
    FLOAT,
    HALF,
    I8,
    I16,
    I32,
    I64,
    VECTOR,
    call,
    const,
    converts_halves,
    float_to_half,
    half_to_float,
    load,
    offset,
    pick,
    splat,
    store,
)
from .target import LANES, has
from .values import Vector, address, intrinsic


def vector(element: str, count: int) -> Vector:
    """The type of `count` elements."""
    return Vector(f"{count}{element}")


def _is_ours(ty: Any) -> bool:
    """Whether a type is a vector of this file."""
    return isinstance(ty, Vector) and not ty.count and ty.kind[0].isdigit()


def _common(args: tuple[Any, ...]) -> Vector | None:
    """The vector type that all arguments have or are broadcast to; None if there is none."""
    found = {ty.kind: ty for ty in args if _is_ours(ty)}
    if len(found) != 1:
        return None
    ((kind, ty),) = found.items()
    number = types.Float if kind.endswith("f32") else types.Integer
    for arg in args:
        if isinstance(arg, Vector):
            continue
        if not isinstance(arg, number) or (number is types.Float and arg != types.float32):
            return None
    return ty


@lower_cast(types.Float, Vector)
@lower_cast(types.Integer, Vector)
def _broadcast(context: Any, builder: Any, fromty: Any, toty: Any, value: Any) -> Any:
    ty = VECTOR[toty.kind]
    if isinstance(fromty, types.Integer):
        value = context.cast(builder, value, fromty, types.int64)
        value = builder.trunc(value, ty.element)
    return splat(builder, value, ty.count)


def _mask_of(ty: Vector) -> Vector:
    return vector("mask", VECTOR[ty.kind].count)


def _operator(function: Any, make: Any, compares: bool = False) -> None:
    """Define an operator on two vectors, or a vector and a number."""

    class Template(AbstractTemplate):
        key = function

        def generic(self, args: Any, kws: Any) -> Any:
            ty = _common(args)
            if ty is None:
                return None
            return signature(_mask_of(ty) if compares else ty, ty, ty)

    register: Any = infer_global(function)
    register(Template)

    @lower_builtin(function, Vector, Vector)
    def lowered(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return make(builder, VECTOR[sig.args[0].kind].element == FLOAT, *args)


for _name, _floats, _ints in (("add", "fadd", "add"), ("sub", "fsub", "sub"), ("mul", "fmul", "mul")):
    _operator(
        getattr(operator, _name),
        lambda b, is_float, x, y, names=(_ints, _floats): getattr(b, names[is_float])(x, y),
    )
_operator(operator.truediv, lambda b, is_float, x, y: b.fdiv(x, y))
_operator(operator.and_, lambda b, is_float, x, y: b.and_(x, y))
_operator(operator.or_, lambda b, is_float, x, y: b.or_(x, y))
_operator(operator.xor, lambda b, is_float, x, y: b.xor(x, y))
_operator(operator.lshift, lambda b, is_float, x, y: b.shl(x, y))
_operator(operator.rshift, lambda b, is_float, x, y: b.ashr(x, y))
for _name, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "==")):
    _operator(
        getattr(operator, _name),
        lambda b, is_float, x, y, sign=_sign: (b.fcmp_ordered if is_float else b.icmp_signed)(sign, x, y),
        compares=True,
    )
_operator(
    operator.ne,
    lambda b, is_float, x, y: b.fcmp_unordered("!=", x, y) if is_float else b.icmp_signed("!=", x, y),
    compares=True,
)


# -- functions on lanes ---------------------------------------------------------------------------------


def _function(name: str, doc: str, make: Any, n_args: int = 1, element: str | None = None, to: Any = None) -> Any:
    """An intrinsic on vectors of one type; `element`: which ones, `to`: the result's element, or a scalar type."""

    def typed(args: tuple[Any, ...]) -> Any:
        ty = _common(args)
        if ty is None or (element and not ty.kind.endswith(element)):
            return None
        count = VECTOR[ty.kind].count
        result = ty if to is None else vector(to, count) if isinstance(to, str) else to

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return make(builder, *values)

        return result(*[ty] * n_args), codegen

    def one(typingctx: Any, a: Any) -> Any:
        return typed((a,))

    def two(typingctx: Any, a: Any, b: Any) -> Any:
        return typed((a, b))

    function = (one, two)[n_args - 1]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return intrinsic(function)


def _compare(builder: Any, sign: str, x: Any, y: Any) -> Any:
    return (builder.fcmp_ordered if x.type.element == FLOAT else builder.icmp_signed)(sign, x, y)


def _lanewise(name: str) -> Any:
    """A call of an LLVM function on float32 vectors."""
    return lambda b, x: call(b, f"llvm.{name}.v{x.type.count}f32", x.type, x)


def _like(x: Any, element: Any) -> Any:
    return ir.VectorType(element, x.type.count)


def _whole(builder: Any, x: Any) -> Any:
    if has("avx2"):
        return call(builder, f"llvm.nearbyint.v{x.type.count}f32", x.type, x)
    magic = const(x.type, 12582912.0)  # 1.5 * 2**23
    return builder.fsub(builder.fadd(x, magic), magic)


def _any(builder: Any, x: Any) -> Any:
    return builder.icmp_unsigned("!=", builder.bitcast(x, ir.IntType(x.type.count)), ir.IntType(x.type.count)(0))


def _all(builder: Any, x: Any) -> Any:
    bits = ir.IntType(x.type.count)
    return builder.icmp_unsigned("==", builder.bitcast(x, bits), bits(-1))


def _halves(builder: Any, x: Any) -> Any:
    if converts_halves(builder):
        return builder.bitcast(builder.fptrunc(x, _like(x, HALF)), _like(x, I16))
    out = ir.Constant(_like(x, I16), ir.Undefined)
    for k in range(x.type.count):
        out = builder.insert_element(out, float_to_half(builder, builder.extract_element(x, I32(k))), I32(k))
    return out


def _reduce(name: str) -> Any:
    """One number of all lanes; of floats, none of them NaN."""

    def make(builder: Any, x: Any) -> Any:
        kind, flags = ("f", ("nnan", "nsz")) if x.type.element == FLOAT else ("s", ())
        fnty = ir.FunctionType(x.type.element, [x.type])
        of = f"v{x.type.count}{'f' if kind == 'f' else 'i'}32"
        callee = cgutils.get_or_insert_function(builder.module, fnty, f"llvm.vector.reduce.{kind}{name}.{of}")
        return builder.call(callee, [x], fastmath=flags)

    return make


def _mask_bits(builder: Any, x: Any) -> Any:
    return builder.zext(builder.bitcast(x, ir.IntType(x.type.count)), I64)


def _half(name: str, lanes: Any) -> Any:
    """Half of a vector's lanes: `lanes` makes their numbers from how many there are."""

    def typed(typingctx: Any, x: Any) -> Any:
        count = VECTOR[x.kind].count
        result = vector(x.kind.lstrip("0123456789"), count // 2)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return pick(builder, args[0], list(lanes(count)))

        return result(x), codegen

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


first_half = _half("first_half", lambda n: range(n // 2))
second_half = _half("second_half", lambda n: range(n // 2, n))
even_lanes = _half("even_lanes", lambda n: range(0, n, 2))
odd_lanes = _half("odd_lanes", lambda n: range(1, n, 2))
least = _function(
    "least", "The smaller; the second of equals, or where one is NaN.",
    lambda b, x, y: b.select(_compare(b, "<", x, y), x, y), 2,
)  # fmt: skip
greatest = _function(
    "greatest", "The larger; the second of equals, or where one is NaN.",
    lambda b, x, y: b.select(_compare(b, ">", x, y), x, y), 2,
)  # fmt: skip
magnitude = _function("magnitude", "|x|.", _lanewise("fabs"), 1, "f32")
root = _function("root", "The square root, correctly rounded.", _lanewise("sqrt"), 1, "f32")
whole = _function("whole", "The nearest integer, halves to even, as a float; |x| < 2**22.", _whole, 1, "f32")
truncated = _function(
    "truncated", "The integer part, as int32; |x| < 2**31.", lambda b, x: b.fptosi(x, _like(x, I32)), 1, "f32", "i32"
)
as_float = _function("as_float", "float32 of int32.", lambda b, x: b.sitofp(x, _like(x, FLOAT)), 1, "i32", "f32")
bits_of = _function("bits_of", "A float's bits.", lambda b, x: b.bitcast(x, _like(x, I32)), 1, "f32", "i32")
float_of = _function(
    "float_of", "The float of these bits.", lambda b, x: b.bitcast(x, _like(x, FLOAT)), 1, "i32", "f32"
)
highest = _function("highest", "The largest lane; of floats none is NaN.", _reduce("max"), 1, "f32", types.float32)
lowest = _function("lowest", "The smallest lane; of floats none is NaN.", _reduce("min"), 1, "f32", types.float32)
highest_word = _function("highest_word", "The largest lane.", _reduce("max"), 1, "i32", types.int32)
mask_bits = _function(
    "mask_bits", "A mask as an integer, lane k its bit k; below 64 lanes.", _mask_bits, 1, "mask", types.int64
)
as_bytes = _function("as_bytes", "The low bytes.", lambda b, x: b.trunc(x, _like(x, I8)), 1, "i32", "u8")
any_of = _function("any_of", "Whether a mask has a lane that is true.", _any, 1, "mask", types.boolean)
all_of = _function("all_of", "Whether a mask is true in all lanes.", _all, 1, "mask", types.boolean)
halves = _function("halves", "The bits of the nearest float16, ties to even.", _halves, 1, "f32", "i16")
half_floats = _function("half_floats", "float32 of the bits of float16.", half_to_float, 1, "i16", "f32")
extended = _function("extended", "int32 of int16.", lambda b, x: b.sext(x, _like(x, I32)), 1, "i16", "i32")


def _as_words(make: Any) -> Any:
    """A function of int32 vectors, done on the bits of float32 vectors."""

    def codegen(builder: Any, x: Any, y: Any) -> Any:
        bits = _like(x, I32)
        return builder.bitcast(make(builder, builder.bitcast(x, bits), builder.bitcast(y, bits)), x.type)

    return codegen


# Bits of floats of one sign are ordered as integers are. Integer instructions have more pipes to run in than float ones
# (Zen: four, where maximum and minimum share two with additions).
_smaller = _as_words(lambda b, x, y: b.select(b.icmp_signed("<", x, y), x, y))
_larger = _as_words(lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
_nearer_zero = _as_words(lambda b, x, y: b.select(b.icmp_unsigned("<", x, y), x, y))
at_most = _function("at_most", "The smaller of a number and a positive bound.", _smaller, 2, "f32")
at_least = _function("at_least", "The larger of a number and a negative bound.", _nearer_zero, 2, "f32")
at_least_zero = _function(
    "at_least_zero", "The number, 0 for negative ones.", lambda b, x: _larger(b, x, const(x.type, 0.0)), 1, "f32"
)


@intrinsic
def choose(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is true, else b."""
    ty = _common((a, b))
    if ty is None or mask != _mask_of(ty):
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(*args)

    return ty(mask, ty, ty), codegen


# -- memory ------------------------------------------------------------------------------------------------


def _loader(name: str, element: str) -> Any:
    def typed(typingctx: Any, at: Any, count: Any) -> Any:
        ty = vector(element, count.literal_value)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return load(builder, args[0], VECTOR[ty.kind])

        return ty(address, count), codegen

    typed.__name__ = typed.__qualname__ = name
    typed.__doc__ = "`count` (a constant) elements from an address."
    return intrinsic(prefer_literal=True)(typed)


load_floats = _loader("load_floats", "f32")
load_words = _loader("load_words", "i32")


@intrinsic(prefer_literal=True)
def load_bytes(typingctx: Any, at: Any, count: Any) -> Any:
    """`count` (a constant) unsigned bytes from an address, as int32."""
    ty = vector("i32", count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_ = load(builder, args[0], ir.VectorType(I8, VECTOR[ty.kind].count))
        return builder.zext(bytes_, VECTOR[ty.kind])

    return ty(address, count), codegen


@intrinsic(prefer_literal=True)
def repeat(typingctx: Any, value: Any, count: Any) -> Any:
    """A vector of `count` (a constant) times a float32 or an int."""
    is_float = isinstance(value, types.Float)
    ty = vector("f32" if is_float else "i32", count.literal_value)
    scalar = types.float32 if is_float else types.int64

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(context, builder, scalar, ty, args[0])

    return ty(scalar, count), codegen


@intrinsic
def store_vector(typingctx: Any, at: Any, value: Any) -> Any:
    """Write a vector to an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        store(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(address, value), codegen


@intrinsic
def scatter(typingctx: Any, at: Any, stride: Any, value: Any) -> Any:
    """Write lane k's element to at + k * stride."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, stride, x = args
        for k in range(x.type.count):
            store(builder, builder.add(at, builder.mul(stride, I64(k))), builder.extract_element(x, I32(k)))
        return context.get_dummy_value()

    return types.void(address, types.int64, value), codegen


def _prefetch(builder: Any, at: Any, locality: int) -> None:
    """The line at an address into the cache of a level: 3 the first, 2 the second."""
    pointer = builder.inttoptr(at, I8.as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(locality), I32(1))


@intrinsic
def prefetch(typingctx: Any, at: Any) -> Any:
    """Have the 64 bytes at an address, which may be any, come into the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0], 2)
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic(prefer_literal=True)
def prefetch_ahead(typingctx: Any, at: Any, distance: Any, nbytes: Any) -> Any:
    """Have `nbytes` bytes at `at + distance` (constants), which may be anywhere, come into the first-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for k in range(0, nbytes.literal_value, 64):
            _prefetch(builder, offset(builder, args[0], distance.literal_value + k), 3)
        return context.get_dummy_value()

    return types.void(address, distance, nbytes), codegen


@intrinsic
def lowest_bit(typingctx: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set; 64 if none is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(0))

    return types.int64(types.int64), codegen


def _two(builder: Any, a: Any, b: Any, index: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(index)), index))


def _turn_fours(builder: Any, rows: list[Any]) -> list[Any]:
    """Transpose each 4 x 4 square: rows and lanes in fours, as the unpack instructions do within 128 bits."""
    n = rows[0].type.count
    starts = range(0, n, 4)
    low = [i for s in starts for i in (s, n + s, s + 1, n + s + 1)]
    high = [i + 2 for i in low]
    first = [i for s in starts for i in (s, s + 1, n + s, n + s + 1)]
    second = [i + 2 for i in first]
    out = []
    for a, b, c, d in zip(*[iter(rows)] * 4, strict=True):
        ab, cd = _two(builder, a, b, low), _two(builder, c, d, low)
        ab2, cd2 = _two(builder, a, b, high), _two(builder, c, d, high)
        out += [_two(builder, x, y, i) for x, y in ((ab, cd), (ab2, cd2)) for i in (first, second)]
    return out


def _turn(builder: Any, rows: list[Any]) -> list[Any]:
    """Transpose n vectors of n lanes, n a power of two from 4 on."""
    n = len(rows)
    rows = _turn_fours(builder, rows)
    step = 4
    while step < n:  # swap bit `step` of the row's number with that of the lane's
        keep = [i if not i & step else n + i - step for i in range(n)]
        swap = [i + step if not i & step else n + i for i in range(n)]
        for i in range(n):
            if not i & step:
                a, b = rows[i], rows[i + step]
                rows[i], rows[i + step] = _two(builder, a, b, keep), _two(builder, a, b, swap)
        step *= 2
    return rows


@intrinsic
def rows_to_lanes(typingctx: Any, at: Any, stride: Any, to: Any, to_stride: Any) -> Any:
    """LANES float32 of each of LANES rows, `stride` bytes apart -> LANES vectors, `to_stride` apart; lane k: row k."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, stride, to, to_stride = args
        ty = ir.VectorType(I32, LANES)
        rows = [load(builder, builder.add(at, builder.mul(stride, I64(k))), ty) for k in range(LANES)]
        for k, row in enumerate(_turn(builder, rows)):
            store(builder, builder.add(to, builder.mul(to_stride, I64(k))), row)
        return context.get_dummy_value()

    return types.void(address, types.int64, address, types.int64), codegen


@intrinsic
def lanes_to_rows(typingctx: Any, at: Any, to: Any, stride: Any) -> Any:
    """Eight vectors of LANES words, one after the other -> eight words to each of LANES rows, `stride` bytes apart."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at, to, stride = args
        ty = ir.VectorType(I32, LANES)
        rows = [load(builder, offset(builder, at, 4 * LANES * k), ty) for k in range(8)]
        for part in range(0, LANES, 8):
            square = [pick(builder, row, list(range(part, part + 8))) for row in rows]
            for k, row in enumerate(_turn(builder, square)):
                store(builder, builder.add(to, builder.mul(stride, I64(part + k))), row)
        return context.get_dummy_value()

    return types.void(address, address, types.int64), codegen
