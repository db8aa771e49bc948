"""Building blocks of the code generators in this folder: a few lines of LLVM each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils

from .target import LANES, QUAD, has

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, HALF = ir.FloatType(), ir.HalfType()
ELEMENTS: dict[str, Any] = {"f32": FLOAT, "i32": I32, "i16": I16, "u8": I8, "mask": I1}


class Vectors(dict[str, Any]):
    """LLVM's vector type of a kind: one of those below, or a number and an element, as 16f32."""

    def __missing__(self, kind: str) -> Any:
        element = kind.lstrip("0123456789")
        return self.setdefault(kind, ir.VectorType(ELEMENTS[element], int(kind.removesuffix(element))))


VECTOR = Vectors(
    u8=ir.VectorType(I8, QUAD),
    i16=ir.VectorType(I16, 2 * LANES),
    i32=ir.VectorType(I32, LANES),
    f32=ir.VectorType(FLOAT, LANES),
)


def call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    """A call of an LLVM intrinsic or of a C function."""
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


def load(builder: Any, at: Any, ty: Any) -> Any:
    """A value of type `ty` from an address of any alignment."""
    return builder.load(builder.inttoptr(at, ty.as_pointer()), align=1)


class _OrderedLoad(ir.instructions.LoadInstr):
    """A load that LLVM does not move past another one of its kind (volatile, which llvmlite does not write)."""

    def descr(self, buf: list[str]) -> None:
        (pointer,) = self.operands
        buf.append(f"load volatile {self.type}, {pointer.type} {pointer.get_reference()}, align 1\n")


def load_ordered(builder: Any, at: Any, ty: Any) -> Any:
    """As `load`, in the order of the source: what prefetches in the processor follows rising addresses only."""
    instruction = _OrderedLoad(builder.block, builder.inttoptr(at, ty.as_pointer()))
    builder._insert(instruction)
    return instruction


def store(builder: Any, at: Any, value: Any) -> None:
    """Write a value to an address of any alignment."""
    builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=1)


def splat(builder: Any, value: Any, count: int) -> Any:
    """A vector of `count` times a scalar."""
    ty = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(ty, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, count), [0] * count))


def const(ty: Any, value: float) -> Any:
    """A vector constant with equal elements."""
    return ir.Constant(ty, [value] * ty.count)


def pick(builder: Any, x: Any, index: list[int]) -> Any:
    """The elements of a vector at `index`."""
    return builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, len(index)), index))


def offset(builder: Any, at: Any, nbytes: int) -> Any:
    """at + nbytes."""
    return builder.add(at, ir.Constant(I64, nbytes)) if nbytes else at


def token(builder: Any, at: Any, stride: Any, t: int) -> Any:
    """at + t * stride."""
    return builder.add(at, builder.mul(stride, ir.Constant(I64, t))) if t else at


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c on float32 lanes, rounded once where the target can."""
    return call(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR["f32"], a, b, c)


def by_parts(builder: Any, nbytes: int, make: Callable[..., Any], *vectors: Any) -> Any:
    """make(*parts) on pieces of `nbytes` bytes of all vectors, the results side by side again."""
    bits = vectors[0].type.element.width * vectors[0].type.count
    parts = bits // (8 * nbytes)
    if parts <= 1:
        return make(*vectors)
    out = []
    for k in range(parts):
        pieces = []
        for x in vectors:
            count = x.type.count // parts
            pieces.append(pick(builder, x, list(range(k * count, (k + 1) * count))))
        out.append(make(*pieces))
    while len(out) > 1:
        out = [_join(builder, a, b) for a, b in zip(out[::2], out[1::2], strict=True)]
    return out[0]


def _join(builder: Any, a: Any, b: Any) -> Any:
    index = list(range(2 * a.type.count))
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(index)), index))


def strided(builder: Any, value: Any, step: int, wide: Any, extend: str) -> list[Any]:
    """Elements k, k + step, … of a vector for k = 0 … step - 1, extended to the vector type `wide`."""
    count = value.type.count
    return [getattr(builder, extend)(pick(builder, value, list(range(k, count, step))), wide) for k in range(step)]


def converts_halves(builder: Any) -> bool:
    """Whether the processor has instructions for halves (without, LLVM would call functions that are not there)."""
    return has("f16c") or builder.module.triple.startswith(("aarch64", "arm64"))


def half_to_float(builder: Any, bits: Any) -> Any:
    """int16 scalar or vector of IEEE halves -> float32, exactly, in one instruction or in integer steps."""
    vector = isinstance(bits.type, ir.VectorType)
    of = (lambda ty: ir.VectorType(ty, bits.type.count)) if vector else (lambda ty: ty)
    if converts_halves(builder):
        return builder.fpext(builder.bitcast(bits, of(HALF)), of(FLOAT))
    same = (lambda x: const(of(I32), x)) if vector else (lambda x: ir.Constant(I32, x))
    wide = builder.zext(bits, of(I32))
    magnitude = builder.shl(builder.and_(wide, same(0x7FFF)), same(13))
    sign = builder.shl(builder.and_(wide, same(0x8000)), same(16))
    scale = same(0x77800000)  # 2**112 moves the exponent's bias, and makes denormals normal
    scaled = builder.fmul(builder.bitcast(magnitude, of(FLOAT)), builder.bitcast(scale, of(FLOAT)))
    special = builder.or_(magnitude, same(0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, same(0x0F800000))
    value = builder.select(is_special, special, builder.bitcast(scaled, of(I32)))
    return builder.bitcast(builder.or_(value, sign), of(FLOAT))


def float_to_half(builder: Any, x: Any) -> Any:
    """float32 scalar -> the bits of the nearest IEEE half (ties to even), in one instruction or in integer steps."""
    if converts_halves(builder):
        return builder.fptrunc(x, HALF)

    def same(value: int) -> Any:
        return ir.Constant(I32, value)

    bits = builder.bitcast(x, I32)
    sign = builder.and_(builder.lshr(bits, same(16)), same(0x8000))
    size = builder.and_(bits, same(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, same(13)), same(1))
    # Bias 127 to 15, then half a unit less one, plus one where the last bit that stays is odd
    normal = builder.lshr(builder.add(builder.add(size, same(0xC8000FFF)), odd), same(13))
    # Below 2**-14: adding 0.5 leaves the float unit with the bits to keep, rounded
    shifted = builder.fadd(builder.bitcast(size, FLOAT), ir.Constant(FLOAT, 0.5))
    small = builder.sub(builder.bitcast(shifted, I32), same(0x3F000000))
    nan = builder.icmp_unsigned(">", size, same(0x7F800000))
    large = builder.select(nan, same(0x7E00), same(0x7C00))
    out = builder.select(builder.icmp_unsigned("<", size, same(0x38800000)), small, normal)
    out = builder.select(builder.icmp_unsigned(">=", size, same(0x47800000)), large, out)
    return builder.trunc(builder.or_(out, sign), I16)


def small_number(builder: Any, code: Any, kind: int) -> Any:
    """Bytes -> float32, exactly: 2**(code - 128) (kind 3), or half of an e4m3 below 128, none of them NaN (kind 4)."""
    vector = isinstance(code.type, ir.VectorType)
    of = (lambda ty: ir.VectorType(ty, code.type.count)) if vector else (lambda ty: ty)

    def same(ty: Any, value: float) -> Any:
        return const(of(ty), value) if vector else ir.Constant(ty, value)

    if kind == 4:  # shifted, it is a half with another bias: 2**-7 of the number
        halves = builder.shl(builder.zext(code, of(I16)), same(I16, 7))
        return builder.fmul(half_to_float(builder, halves), same(FLOAT, 128.0))
    wide = builder.zext(code, of(I32))
    # The exponent is code - 1; of 0 and 1 the numbers are denormal, and what is larger here.
    normal = builder.shl(builder.sub(wide, same(I32, 1)), same(I32, 23))
    denormal = builder.shl(builder.add(wide, same(I32, 1)), same(I32, 21))
    bits = builder.select(builder.icmp_signed(">", normal, denormal), normal, denormal)
    return builder.bitcast(bits, of(FLOAT))


def number(builder: Any, at: Any, kind: int, count: int) -> Any:
    """A float32 or `count` of them, from float32 (kind 0), float16 (1), bfloat16 (2), or bytes: see `small_number`."""

    def of(ty: Any) -> Any:
        return ir.VectorType(ty, count) if count > 1 else ty

    if kind == 0:
        return load(builder, at, of(FLOAT))
    if kind > 2:
        return small_number(builder, load(builder, at, of(I8)), kind)
    bits = load(builder, at, of(I16))
    if kind == 1:
        return half_to_float(builder, bits)
    wide = builder.zext(bits, of(I32))
    by = const(of(I32), 16) if count > 1 else ir.Constant(I32, 16)
    return builder.bitcast(builder.shl(wide, by), of(FLOAT))
