"""Vector values for Numba: their types, loads, stores, and arithmetic on one vector. See the package's docstring."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core import types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.datamodel.registry import register_default
from numba.extending import intrinsic as _intrinsic

from .build import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    VECTOR,
    call,
    const,
    float_to_half,
    fma,
    load,
    load_ordered,
    number,
    offset,
    pick,
    splat,
    store,
)
from .target import LANES, QUAD

intrinsic: Any = _intrinsic  # what it returns is called with values in kernels, without the context


class Vector(types.Type):
    """One vector (count 0) or a tile of `count` vectors."""

    def __init__(self, kind: str, count: int = 0):
        self.kind, self.count = kind, count
        super().__init__(name=f"simd_{kind}x{count}" if count else f"simd_{kind}")


@register_default(Vector)
class VectorModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector):
        one = VECTOR[fe_type.kind]
        super().__init__(dmm, fe_type, ir.ArrayType(one, fe_type.count) if fe_type.count else one)


class Codes(types.Type):
    """The bit planes of 32 inputs x LANES rows: `bits` vectors of bytes."""

    def __init__(self, bits: int):
        self.bits = bits
        super().__init__(name=f"simd_codes{bits}")


@register_default(Codes)
class CodesModel(PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Codes):
        super().__init__(dmm, fe_type, ir.ArrayType(VECTOR["u8"], fe_type.bits))


u8, i16, i32, f32 = (Vector(kind) for kind in ("u8", "i16", "i32", "f32"))
address = types.int64


def _loader(name: str, result: types.Type, make: Any) -> Any:
    """An intrinsic of one address."""

    def typed(typingctx: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return make(builder, args[0])

        return result(address), codegen

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


# -- loads --------------------------------------------------------------------------------------------

load_u8 = _loader("load_u8", u8, lambda b, at: load(b, at, VECTOR["u8"]))
load_f32 = _loader("load_f32", f32, lambda b, at: load(b, at, VECTOR["f32"]))


get_i64 = _loader("get_i64", types.int64, lambda b, at: load(b, at, I64))
get_i8 = _loader("get_i8", types.int64, lambda b, at: b.sext(load(b, at, I8), I64))
get_u8 = _loader("get_u8", types.int64, lambda b, at: b.zext(load(b, at, I8), I64))
get_f32 = _loader("get_f32", types.float32, lambda b, at: load(b, at, FLOAT))


@intrinsic(prefer_literal=True)
def load_number(typingctx: Any, at: Any, kind: Any) -> Any:
    """LANES numbers as float32; kind (a constant): 0 float32, 1 float16, 2 bfloat16, 3 e8m0, 4 e4m3 (both halved)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return number(builder, args[0], kind.literal_value, LANES)

    return f32(address, kind), codegen


@intrinsic(prefer_literal=True)
def get_number(typingctx: Any, at: Any, kind: Any) -> Any:
    """One number as float32; kind as in `load_number`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return number(builder, args[0], kind.literal_value, 1)

    return types.float32(address, kind), codegen


def _bytes(builder: Any, at: Any, group: Any, signed: bool) -> Any:
    """LANES bytes of a group as int32."""
    raw = load(builder, builder.add(at, builder.mul(group, ir.Constant(I64, LANES))), ir.VectorType(I8, LANES))
    return builder.sext(raw, VECTOR["i32"]) if signed else builder.zext(raw, VECTOR["i32"])


def _joined(builder: Any, at: Any, high_at: Any, group: Any, bits: int, minimum: int) -> Any:
    """Scales or minima that share bytes: see pack.py. All on bytes, a quarter of a vector; x86 shifts them as words."""
    words, lanes = ir.VectorType(I16, LANES // 2), ir.VectorType(I8, LANES)

    def masked(x: Any, mask: int) -> Any:
        return builder.and_(builder.bitcast(x, lanes), const(lanes, mask))

    low = load(builder, builder.add(at, builder.mul(group, ir.Constant(I64, LANES))), words)
    out = masked(builder.lshr(low, const(words, 4)) if minimum else low, 15)
    if bits == 6:
        one = ir.Constant(I64, 1)
        where = builder.mul(builder.lshr(group, one), ir.Constant(I64, LANES))
        odd = builder.trunc(builder.shl(builder.and_(group, one), ir.Constant(I64, 2)), I16)
        high = builder.lshr(load(builder, builder.add(high_at, where), words), splat(builder, odd, LANES // 2))
        out = builder.or_(out, masked(builder.shl(high, const(words, 2 if minimum else 4)), 0x30))
    return builder.zext(out, VECTOR["i32"])


@intrinsic(prefer_literal=True)
def load_scale(typingctx: Any, at: Any, minimum_at: Any, group: Any, kind: Any, joined: Any) -> Any:
    """LANES scales of a group as int32. Constants: kind 1 signed, 2 unsigned; joined as in `Layout`."""
    bits, signed = joined.literal_value, kind.literal_value == 1

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if bits:
            return _joined(builder, args[0], args[1], args[2], bits, 0)
        return _bytes(builder, args[0], args[2], signed)

    return i32(address, address, types.int64, kind, joined), codegen


@intrinsic(prefer_literal=True)
def load_minimum(typingctx: Any, scale_at: Any, at: Any, group: Any, joined: Any) -> Any:
    """LANES minima of a group as int32; joined (a constant) as in `Layout`."""
    bits = joined.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if bits:
            return _joined(builder, args[0], args[1], args[2], bits, 1)
        return _bytes(builder, args[1], args[2], False)

    return i32(address, address, types.int64, joined), codegen


@intrinsic(prefer_literal=True)
def load_codes(typingctx: Any, at: Any, bits: Any, streamed: Any) -> Any:
    """The bit planes of 32 inputs x LANES rows, `bits` vectors; `streamed` (both constants): read by rising address."""
    codes, read = Codes(bits.literal_value), load_ordered if streamed.literal_value else load

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = ir.Constant(ir.ArrayType(VECTOR["u8"], codes.bits), ir.Undefined)
        for k in range(codes.bits):
            out = builder.insert_value(out, read(builder, offset(builder, args[0], k * QUAD), VECTOR["u8"]), k)
        return out

    return codes(address, bits, streamed), codegen


# -- stores -------------------------------------------------------------------------------------------


def _scalar_store(name: str, value: types.Type, make: Any) -> Any:
    def typed(typingctx: Any, at: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            store(builder, args[0], make(builder, args[1]))
            return context.get_dummy_value()

        return types.void(address, value), codegen

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


put_f32 = _scalar_store("put_f32", types.float32, lambda b, x: x)
put_f16 = _scalar_store("put_f16", types.float32, float_to_half)
store_f32 = _scalar_store("store_f32", f32, lambda b, x: x)
store_i8 = _scalar_store("store_i8", i32, lambda b, x: b.trunc(x, ir.VectorType(I8, LANES)))


# -- arithmetic on one vector -------------------------------------------------------------------------


def _pointwise(name: str, result: types.Type, operands: tuple[types.Type, ...], make: Any) -> Any:
    """An intrinsic over fixed operand types, of one to three operands."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return make(builder, *args)

    def typed(typingctx: Any, a: Any) -> Any:
        return result(*operands), codegen

    def typed2(typingctx: Any, a: Any, b: Any) -> Any:
        return result(*operands), codegen

    def typed3(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
        return result(*operands), codegen

    function = (typed, typed2, typed3)[len(operands) - 1]
    function.__name__ = function.__qualname__ = name
    return intrinsic(function)


def _exp(builder: Any, x: Any) -> Any:
    """e**x to 2 ulp: x = k ln 2 + r, a polynomial in r, k into the exponent. 0 below -87.3, inf above 88.7."""
    ty, whole = VECTOR["f32"], VECTOR["i32"]
    name = f"v{LANES}f32"
    low, high = const(ty, -87.33654), const(ty, 88.72283)
    bounded = call(builder, f"llvm.minnum.{name}", ty, call(builder, f"llvm.maxnum.{name}", ty, x, low), high)
    k = call(builder, f"llvm.rint.{name}", ty, builder.fmul(bounded, const(ty, 1.4426950408889634)))
    # ln 2 in two parts, the first with few bits, so that k times it is exact
    r = fma(builder, k, const(ty, -0.693359375), bounded)
    r = fma(builder, k, const(ty, 2.12194440e-4), r)
    poly = const(ty, 1 / 720)
    for term in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        poly = fma(builder, poly, r, const(ty, term))
    # 2**k in two factors: k reaches 128, which no exponent holds
    half = builder.ashr(builder.fptosi(k, whole), const(whole, 1))
    rest = builder.sub(builder.fptosi(k, whole), half)
    for part in (half, rest):
        power = builder.shl(builder.add(part, const(whole, 127)), const(whole, 23))
        poly = builder.fmul(poly, builder.bitcast(power, ty))
    poly = builder.select(builder.fcmp_ordered("<", x, low), const(ty, 0.0), poly)
    poly = builder.select(builder.fcmp_ordered(">", x, high), const(ty, float("inf")), poly)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, poly)


def _sum(builder: Any, x: Any) -> Any:
    """The lanes' sum, pairwise."""
    count = LANES
    while count > 1:
        count //= 2
        low = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        high = ir.Constant(ir.VectorType(I32, count), list(range(count, 2 * count)))
        x = builder.fadd(builder.shuffle_vector(x, x, low), builder.shuffle_vector(x, x, high))
    return builder.extract_element(x, ir.Constant(I32, 0))


def _largest(builder: Any, x: Any) -> Any:
    """The largest lane, pairwise; lanes that are NaN may be passed over."""
    while x.type.count > 1:
        half = x.type.count // 2
        low, high = pick(builder, x, list(range(half))), pick(builder, x, list(range(half, 2 * half)))
        x = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(x, ir.Constant(I32, 0))


def _largest_magnitude(builder: Any, x: Any) -> Any:
    """The float whose bits, without sign, are the largest: NaN where there is one, else infinity where there is one."""
    while x.type.count > 1:
        half = x.type.count // 2
        low, high = pick(builder, x, list(range(half))), pick(builder, x, list(range(half, 2 * half)))
        x = builder.select(builder.icmp_signed(">", low, high), low, high)
    return builder.bitcast(builder.extract_element(x, ir.Constant(I32, 0)), FLOAT)


def _magnitude(builder: Any, x: Any) -> Any:
    return builder.and_(builder.bitcast(x, VECTOR["i32"]), const(VECTOR["i32"], 0x7FFFFFFF))


def _round(builder: Any, x: Any) -> Any:
    """Adding 1.5 * 2**23 leaves the float unit with whole numbers, in the lowest bits of the sum."""
    shift = const(VECTOR["f32"], 12582912.0)
    return builder.sub(builder.bitcast(builder.fadd(x, shift), VECTOR["i32"]), const(VECTOR["i32"], 0x4B400000))


def pair(builder: Any, x: Any) -> Any:
    """Each small int32 as two equal int16."""
    low = builder.and_(x, const(VECTOR["i32"], 0xFFFF))
    high = builder.shl(x, const(VECTOR["i32"], 16))
    return builder.bitcast(builder.or_(low, high), VECTOR["i16"])


splat_f32 = _pointwise("splat_f32", f32, (types.float32,), lambda b, x: splat(b, x, LANES))
splat_i32 = _pointwise("splat_i32", i32, (types.int64,), lambda b, x: splat(b, b.trunc(x, I32), LANES))
add_f32 = _pointwise("add_f32", f32, (f32, f32), lambda b, x, y: b.fadd(x, y))
mul_f32 = _pointwise("mul_f32", f32, (f32, f32), lambda b, x, y: b.fmul(x, y))
div_f32 = _pointwise("div_f32", f32, (f32, f32), lambda b, x, y: b.fdiv(x, y))
neg_f32 = _pointwise("neg_f32", f32, (f32,), lambda b, x: b.fneg(x))
fma_f32 = _pointwise("fma_f32", f32, (f32, f32, f32), fma)
max_f32 = _pointwise(
    "max_f32", f32, (f32, f32), lambda b, x, y: b.select(b.fcmp_unordered(">", x, y), x, y)
)  # NaN in x stays
bits_f32 = _pointwise("bits_f32", i32, (f32,), _magnitude)  # a float's bits without the sign: they order as it does
max_i32 = _pointwise("max_i32", i32, (i32, i32), lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
largest_magnitude = _pointwise("largest_magnitude", types.float32, (i32,), _largest_magnitude)
exp_f32 = _pointwise("exp_f32", f32, (f32,), _exp)
sum_f32 = _pointwise("sum_f32", types.float32, (f32,), _sum)
largest_f32 = _pointwise("largest_f32", types.float32, (f32,), _largest)
first_f32 = _pointwise("first_f32", types.float32, (f32,), lambda b, x: b.extract_element(x, ir.Constant(I32, 0)))
float_i32 = _pointwise("float_i32", f32, (i32,), lambda b, x: b.sitofp(x, VECTOR["f32"]))
round_f32 = _pointwise("round_f32", i32, (f32,), _round)  # to nearest, ties to even; right for |x| < 2**22
