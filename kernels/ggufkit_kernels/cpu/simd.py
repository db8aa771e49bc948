"""Vector values for Numba: the only file that knows LLVM, the width of a vector, and the processor's instructions.

A kernel written with these functions reads like arithmetic, and its values stay in registers:

    u8    32 bytes: four consecutive inputs (a *quad*) of each of LANES rows
    i16   16 int16: two partial sums a row
    i32   LANES int32, one a row
    f32   LANES float32, one a row

A *tile* is a fixed number of such vectors, one a token; `Codes` are the bit planes of 32 inputs x LANES rows, as
pack.py lays them out. Memory is addressed by int64 addresses; the callers check sizes before a kernel runs.
Where x86's AVX2 is missing, the same functions are made of LLVM's portable instructions.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core import cgutils, config, types
from numba.core.datamodel.models import PrimitiveModel
from numba.core.datamodel.registry import register_default
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # what it returns is called with values in kernels, without the context
LANES = 8  # rows that are packed side by side
QUAD = 4 * LANES  # bytes of a vector

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
FLOAT, HALF = ir.FloatType(), ir.HalfType()
VECTOR: dict[str, Any] = {
    "u8": ir.VectorType(I8, QUAD),
    "i16": ir.VectorType(I16, 2 * LANES),
    "i32": ir.VectorType(I32, LANES),
    "f32": ir.VectorType(FLOAT, LANES),
}


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

AVX2_NAMES = ("haswell", "broadwell", "skylake", "znver", "x86-64-v3", "x86-64-v4", "icelake", "sapphirerapids")


def compiled_features() -> frozenset[str]:
    """The instruction sets among avx2, f16c that Numba compiles for (not: that the processor has)."""
    context: Any = cpu_target.target_context
    text = context.codegen()._tm_features or ""
    found = {name for name in ("avx2", "f16c") if f"+{name}" in text.split(",")}
    if (getattr(config, "CPU_NAME", None) or "").startswith(AVX2_NAMES):
        found |= {"avx2", "f16c"}
    return frozenset(found)


def planes(bits: int) -> list[int]:
    """Widths of the bit planes that codes of `bits` are stored in, low bits first: 6 -> [4, 2]."""
    return [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]


# -- building blocks for the code generators below --------------------------------------------------


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    fnty = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, fnty, name), args)


def _load(builder: Any, at: Any, ty: Any) -> Any:
    return builder.load(builder.inttoptr(at, ty.as_pointer()), align=1)


def _store(builder: Any, at: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(at, value.type.as_pointer()), align=1)


def _splat(builder: Any, value: Any, count: int) -> Any:
    ty = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(ty, ir.Undefined), value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, count), [0] * count))


def _const(ty: Any, value: float) -> Any:
    return ir.Constant(ty, [value] * ty.count)


def _offset(builder: Any, at: Any, nbytes: int) -> Any:
    return builder.add(at, ir.Constant(I64, nbytes)) if nbytes else at


def _token(builder: Any, at: Any, stride: Any, t: int) -> Any:
    return builder.add(at, builder.mul(stride, ir.Constant(I64, t))) if t else at


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fmuladd.v{LANES}f32", VECTOR["f32"], a, b, c)


def _halves(builder: Any, value: Any, wide: Any, extend: str) -> tuple[Any, Any]:
    """The even and the odd elements of a vector, extended to the vector type `wide`."""
    count = value.type.count
    out = []
    for first in (0, 1):
        pick = ir.Constant(ir.VectorType(I32, count // 2), list(range(first, count, 2)))
        out.append(getattr(builder, extend)(builder.shuffle_vector(value, value, pick), wide))
    return out[0], out[1]


def _madd_bytes(builder: Any, u: Any, s: Any) -> Any:
    """u8 x s8 -> int16, neighbours added. The callers see to it that no sum leaves int16."""
    if "avx2" in compiled_features():
        return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", VECTOR["i16"], u, s)
    u0, u1 = _halves(builder, u, VECTOR["i16"], "zext")
    s0, s1 = _halves(builder, s, VECTOR["i16"], "sext")
    return builder.add(builder.mul(u0, s0), builder.mul(u1, s1))


def _madd_words(builder: Any, a: Any, b: Any) -> Any:
    """int16 x int16 -> int32, neighbours added."""
    if "avx2" in compiled_features():
        return _call(builder, "llvm.x86.avx2.pmadd.wd", VECTOR["i32"], a, b)
    a0, a1 = _halves(builder, a, VECTOR["i32"], "sext")
    b0, b1 = _halves(builder, b, VECTOR["i32"], "sext")
    return builder.add(builder.mul(a0, b0), builder.mul(a1, b1))


def _times_sign(builder: Any, value: Any, sign: Any) -> Any:
    """value, negated where `sign` < 0 (and anything where it is 0: its partner is 0 there)."""
    if "avx2" in compiled_features():
        return _call(builder, "llvm.x86.avx2.psign.b", VECTOR["u8"], value, sign)
    return builder.select(builder.icmp_signed("<", sign, _const(VECTOR["u8"], 0)), builder.neg(value), value)


def _lookup(builder: Any, table: Any, code: Any) -> Any:
    """table[code] bytewise, code < 16; the table's 16 bytes stand twice in its vector."""
    if "avx2" in compiled_features():
        return _call(builder, "llvm.x86.avx2.pshuf.b", VECTOR["u8"], table, code)
    out = _const(VECTOR["u8"], 0)
    for k in range(16):
        entry = _splat(builder, builder.extract_element(table, ir.Constant(I32, k)), QUAD)
        out = builder.select(builder.icmp_unsigned("==", code, _const(VECTOR["u8"], k)), entry, out)
    return out


def _quad(builder: Any, codes: Any, bits: int, q: int) -> Any:
    """Quad q (0…7) out of the bit planes, one code a byte."""
    out, first, low = None, 0, 0
    for width in planes(bits):
        per_vector = 8 // width  # quads that share a vector: one each `width` bits
        vectors = 8 // per_vector
        raw = builder.extract_value(codes, first + q % vectors)
        shift = width * (q // vectors) - low
        if shift:  # on 16-bit lanes: x86 shifts no bytes, and the mask clears what came from the neighbour
            words = builder.bitcast(raw, VECTOR["i16"])
            by = _const(VECTOR["i16"], abs(shift))
            words = builder.lshr(words, by) if shift > 0 else builder.shl(words, by)
            raw = builder.bitcast(words, VECTOR["u8"])
        if width < 8:
            raw = builder.and_(raw, _const(VECTOR["u8"], ((1 << width) - 1) << low))
        out = raw if out is None else builder.or_(out, raw)
        first, low = first + vectors, low + width
    return out


def _inputs(builder: Any, at: Any, stride: Any, t: int, q: int) -> Any:
    """Quad q of token t's int8 inputs, repeated for every row."""
    four = _load(builder, _offset(builder, _token(builder, at, stride, t), 4 * q), I32)
    return builder.bitcast(_splat(builder, four, LANES), VECTOR["u8"])


def _converts_halves(builder: Any) -> bool:
    """Whether the processor has instructions for halves (without, LLVM would call functions that are not there)."""
    return "f16c" in compiled_features() or builder.module.triple.startswith(("aarch64", "arm64"))


def _half_to_float(builder: Any, bits: Any) -> Any:
    """int16 scalar or vector of IEEE halves -> float32, exactly, in one instruction or in integer steps."""
    vector = isinstance(bits.type, ir.VectorType)
    of = (lambda ty: ir.VectorType(ty, bits.type.count)) if vector else (lambda ty: ty)
    if _converts_halves(builder):
        return builder.fpext(builder.bitcast(bits, of(HALF)), of(FLOAT))
    const = (lambda x: _const(of(I32), x)) if vector else (lambda x: ir.Constant(I32, x))
    wide = builder.zext(bits, of(I32))
    magnitude = builder.shl(builder.and_(wide, const(0x7FFF)), const(13))
    sign = builder.shl(builder.and_(wide, const(0x8000)), const(16))
    scale = const(0x77800000)  # 2**112 moves the exponent's bias, and makes denormals normal
    scaled = builder.fmul(builder.bitcast(magnitude, of(FLOAT)), builder.bitcast(scale, of(FLOAT)))
    special = builder.or_(magnitude, const(0x7F800000))
    is_special = builder.icmp_unsigned(">=", magnitude, const(0x0F800000))
    value = builder.select(is_special, special, builder.bitcast(scaled, of(I32)))
    return builder.bitcast(builder.or_(value, sign), of(FLOAT))


def _float_to_half(builder: Any, x: Any) -> Any:
    """float32 scalar -> the bits of the nearest IEEE half (ties to even), in one instruction or in integer steps."""
    if _converts_halves(builder):
        return builder.fptrunc(x, HALF)

    def const(value: int) -> Any:
        return ir.Constant(I32, value)

    bits = builder.bitcast(x, I32)
    sign = builder.and_(builder.lshr(bits, const(16)), const(0x8000))
    size = builder.and_(bits, const(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, const(13)), const(1))
    # Bias 127 to 15, then half a unit less one, plus one where the last bit that stays is odd
    normal = builder.lshr(builder.add(builder.add(size, const(0xC8000FFF)), odd), const(13))
    # Below 2**-14: adding 0.5 leaves the float unit with the bits to keep, rounded
    shifted = builder.fadd(builder.bitcast(size, FLOAT), ir.Constant(FLOAT, 0.5))
    small = builder.sub(builder.bitcast(shifted, I32), const(0x3F000000))
    nan = builder.icmp_unsigned(">", size, const(0x7F800000))
    large = builder.select(nan, const(0x7E00), const(0x7C00))
    out = builder.select(builder.icmp_unsigned("<", size, const(0x38800000)), small, normal)
    out = builder.select(builder.icmp_unsigned(">=", size, const(0x47800000)), large, out)
    return builder.trunc(builder.or_(out, sign), I16)


def _loader(name: str, result: types.Type, make: Any) -> Any:
    """An intrinsic of one address."""

    def typed(typingctx: Any, at: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return make(builder, args[0])

        return result(address), codegen

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


# -- loads --------------------------------------------------------------------------------------------

load_u8 = _loader("load_u8", u8, lambda b, at: _load(b, at, VECTOR["u8"]))
load_f32 = _loader("load_f32", f32, lambda b, at: _load(b, at, VECTOR["f32"]))


get_i64 = _loader("get_i64", types.int64, lambda b, at: _load(b, at, I64))
get_i8 = _loader("get_i8", types.int64, lambda b, at: b.sext(_load(b, at, I8), I64))
get_u8 = _loader("get_u8", types.int64, lambda b, at: b.zext(_load(b, at, I8), I64))
get_f32 = _loader("get_f32", types.float32, lambda b, at: _load(b, at, FLOAT))


def _number(builder: Any, at: Any, kind: int, count: int) -> Any:
    """A float32 or `count` of them, from float32 (kind 0), float16 (1) or bfloat16 (2)."""

    def of(ty: Any) -> Any:
        return ir.VectorType(ty, count) if count > 1 else ty

    if kind == 0:
        return _load(builder, at, of(FLOAT))
    bits = _load(builder, at, of(I16))
    if kind == 1:
        return _half_to_float(builder, bits)
    wide = builder.zext(bits, of(I32))
    by = _const(of(I32), 16) if count > 1 else ir.Constant(I32, 16)
    return builder.bitcast(builder.shl(wide, by), of(FLOAT))


@intrinsic(prefer_literal=True)
def load_number(typingctx: Any, at: Any, kind: Any) -> Any:
    """LANES numbers as float32; kind (a constant): 0 float32, 1 float16, 2 bfloat16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _number(builder, args[0], kind.literal_value, LANES)

    return f32(address, kind), codegen


@intrinsic(prefer_literal=True)
def get_number(typingctx: Any, at: Any, kind: Any) -> Any:
    """One number as float32; kind as in `load_number`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _number(builder, args[0], kind.literal_value, 1)

    return types.float32(address, kind), codegen


@intrinsic(prefer_literal=True)
def load_bytes(typingctx: Any, at: Any, kind: Any) -> Any:
    """LANES bytes as int32; kind (a constant): 1 signed, 2 unsigned."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        raw = _load(builder, args[0], ir.VectorType(I8, LANES))
        extend = builder.zext if kind.literal_value == 2 else builder.sext
        return extend(raw, VECTOR["i32"])

    return i32(address, kind), codegen


@intrinsic(prefer_literal=True)
def load_codes(typingctx: Any, at: Any, bits: Any) -> Any:
    """The bit planes of 32 inputs x LANES rows, `bits` (a constant) vectors."""
    codes = Codes(bits.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = ir.Constant(ir.ArrayType(VECTOR["u8"], codes.bits), ir.Undefined)
        for k in range(codes.bits):
            out = builder.insert_value(out, _load(builder, _offset(builder, args[0], k * QUAD), VECTOR["u8"]), k)
        return out

    return codes(address, bits), codegen


# -- stores -------------------------------------------------------------------------------------------


def _scalar_store(name: str, value: types.Type, make: Any) -> Any:
    def typed(typingctx: Any, at: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _store(builder, args[0], make(builder, args[1]))
            return context.get_dummy_value()

        return types.void(address, value), codegen

    typed.__name__ = typed.__qualname__ = name
    return intrinsic(typed)


put_f32 = _scalar_store("put_f32", types.float32, lambda b, x: x)
put_f16 = _scalar_store("put_f16", types.float32, _float_to_half)
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
    low, high = _const(ty, -87.33654), _const(ty, 88.72283)
    bounded = _call(builder, f"llvm.minnum.{name}", ty, _call(builder, f"llvm.maxnum.{name}", ty, x, low), high)
    k = _call(builder, f"llvm.rint.{name}", ty, builder.fmul(bounded, _const(ty, 1.4426950408889634)))
    # ln 2 in two parts, the first with few bits, so that k times it is exact
    r = _fma(builder, k, _const(ty, -0.693359375), bounded)
    r = _fma(builder, k, _const(ty, 2.12194440e-4), r)
    poly = _const(ty, 1 / 720)
    for term in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        poly = _fma(builder, poly, r, _const(ty, term))
    # 2**k in two factors: k reaches 128, which no exponent holds
    half = builder.ashr(builder.fptosi(k, whole), _const(whole, 1))
    rest = builder.sub(builder.fptosi(k, whole), half)
    for part in (half, rest):
        power = builder.shl(builder.add(part, _const(whole, 127)), _const(whole, 23))
        poly = builder.fmul(poly, builder.bitcast(power, ty))
    poly = builder.select(builder.fcmp_ordered("<", x, low), _const(ty, 0.0), poly)
    poly = builder.select(builder.fcmp_ordered(">", x, high), _const(ty, float("inf")), poly)
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


def _round(builder: Any, x: Any) -> Any:
    whole = _call(builder, f"llvm.rint.v{LANES}f32", VECTOR["f32"], x)
    return _call(builder, f"llvm.fptosi.sat.v{LANES}i32.v{LANES}f32", VECTOR["i32"], whole)


def _pair(builder: Any, x: Any) -> Any:
    """Each small int32 as two equal int16."""
    low = builder.and_(x, _const(VECTOR["i32"], 0xFFFF))
    high = builder.shl(x, _const(VECTOR["i32"], 16))
    return builder.bitcast(builder.or_(low, high), VECTOR["i16"])


splat_f32 = _pointwise("splat_f32", f32, (types.float32,), lambda b, x: _splat(b, x, LANES))
splat_i32 = _pointwise("splat_i32", i32, (types.int64,), lambda b, x: _splat(b, b.trunc(x, I32), LANES))
add_f32 = _pointwise("add_f32", f32, (f32, f32), lambda b, x, y: b.fadd(x, y))
mul_f32 = _pointwise("mul_f32", f32, (f32, f32), lambda b, x, y: b.fmul(x, y))
div_f32 = _pointwise("div_f32", f32, (f32, f32), lambda b, x, y: b.fdiv(x, y))
neg_f32 = _pointwise("neg_f32", f32, (f32,), lambda b, x: b.fneg(x))
fma_f32 = _pointwise("fma_f32", f32, (f32, f32, f32), _fma)
abs_f32 = _pointwise("abs_f32", f32, (f32,), lambda b, x: _call(b, f"llvm.fabs.v{LANES}f32", VECTOR["f32"], x))
max_f32 = _pointwise(
    "max_f32", f32, (f32, f32), lambda b, x, y: b.select(b.fcmp_unordered(">", x, y), x, y)
)  # NaN in x stays
exp_f32 = _pointwise("exp_f32", f32, (f32,), _exp)
sum_f32 = _pointwise("sum_f32", types.float32, (f32,), _sum)
largest_f32 = _pointwise(
    "largest_f32",
    types.float32,
    (f32,),
    lambda b, x: _call(b, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, x),
)
first_f32 = _pointwise("first_f32", types.float32, (f32,), lambda b, x: b.extract_element(x, ir.Constant(I32, 0)))
float_i32 = _pointwise("float_i32", f32, (i32,), lambda b, x: b.sitofp(x, VECTOR["f32"]))
round_f32 = _pointwise("round_f32", i32, (f32,), _round)  # to nearest, ties to even; NaN becomes 0
