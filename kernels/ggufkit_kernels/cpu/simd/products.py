"""Products of bytes: codes out of their bit planes, and the instructions that multiply and sum them.

Every function takes vectors of any length that is a multiple of the instruction's, and does the same in LLVM's
portable instructions where the target has no instruction for it.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir

from .build import I1, I8, I16, I32, VECTOR, by_parts, call, const, load, offset, splat, strided, token
from .target import LANES, allow_dotprod, has, planes


def _like(x: Any, element: Any, shrink: int) -> Any:
    return ir.VectorType(element, x.type.count // shrink)


def madd_bytes(builder: Any, u: Any, s: Any) -> Any:
    """u8 x s8 -> int16, neighbours added. The callers see to it that no sum leaves int16."""
    if has("avx512bw") and u.type.count == 64:
        return call(builder, "llvm.x86.avx512.pmaddubs.w.512", _like(u, I16, 2), u, s)
    if has("avx2") and u.type.count >= 32:
        ty = ir.VectorType(I16, 16)
        return by_parts(builder, 32, lambda a, b: call(builder, "llvm.x86.avx2.pmadd.ub.sw", ty, a, b), u, s)
    wide = _like(u, I16, 2)
    (u0, u1), (s0, s1) = strided(builder, u, 2, wide, "zext"), strided(builder, s, 2, wide, "sext")
    return builder.add(builder.mul(u0, s0), builder.mul(u1, s1))


def madd_words(builder: Any, a: Any, b: Any) -> Any:
    """int16 x int16 -> int32, neighbours added."""
    if has("avx512bw") and a.type.count == 32:
        return call(builder, "llvm.x86.avx512.pmaddw.d.512", _like(a, I32, 2), a, b)
    if has("avx2") and a.type.count >= 16:
        ty = ir.VectorType(I32, 8)
        return by_parts(builder, 32, lambda x, y: call(builder, "llvm.x86.avx2.pmadd.wd", ty, x, y), a, b)
    wide = _like(a, I32, 2)
    (a0, a1), (b0, b1) = strided(builder, a, 2, wide, "sext"), strided(builder, b, 2, wide, "sext")
    return builder.add(builder.mul(a0, b0), builder.mul(a1, b1))


def dot_u8s8(builder: Any, total: Any, u: Any, s: Any) -> Any:
    """int32 total + the sums of four neighbouring products u8 x s8, exactly."""
    if has("avx512vnni") and u.type.count == 64:
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", total.type, total, u, s)
    if has("avx512vnni", "avx512vl") or has("avxvnni"):
        name, ty = "llvm.x86.avx512.vpdpbusd.256", ir.VectorType(I32, 8)
        return by_parts(builder, 32, lambda t, a, b: call(builder, name, ty, t, a, b), total, u, s)
    return _dot(builder, total, u, s, "zext")


def dot_s8s8(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """int32 total + the sums of four neighbouring products s8 x s8, exactly."""
    if has("dotprod"):
        allow_dotprod(builder)
        name, ty = "llvm.aarch64.neon.sdot.v4i32.v16i8", ir.VectorType(I32, 4)
        return by_parts(builder, 16, lambda t, x, y: call(builder, name, ty, t, x, y), total, a, b)
    return _dot(builder, total, a, b, "sext")


def _dot(builder: Any, total: Any, a: Any, b: Any, extend: str) -> Any:
    wide = total.type
    for x, y in zip(strided(builder, a, 4, wide, extend), strided(builder, b, 4, wide, "sext"), strict=True):
        total = builder.add(total, builder.mul(x, y))
    return total


def times_sign(builder: Any, value: Any, sign: Any) -> Any:
    """value, negated where `sign` < 0 (and anything where it is 0: its partner is 0 there)."""
    if has("avx2") and value.type.count == 32:
        return call(builder, "llvm.x86.avx2.psign.b", value.type, value, sign)
    return builder.select(builder.icmp_signed("<", sign, const(sign.type, 0)), builder.neg(value), value)


def lookup(builder: Any, table: Any, code: Any) -> Any:
    """table[code] bytewise, code < 16; the table's 16 bytes stand in it again and again."""
    if has("avx512bw") and code.type.count == 64:
        return call(builder, "llvm.x86.avx512.pshuf.b.512", code.type, table, code)
    if has("avx2"):
        ty = ir.VectorType(I8, 32)
        return by_parts(builder, 32, lambda t, c: call(builder, "llvm.x86.avx2.pshuf.b", ty, t, c), table, code)
    if has("neon"):
        name, ty = "llvm.aarch64.neon.tbl1.v16i8", ir.VectorType(I8, 16)
        return by_parts(builder, 16, lambda t, c: call(builder, name, ty, t, c), table, code)
    out = const(code.type, 0)
    for k in range(16):
        entry = splat(builder, builder.extract_element(table, ir.Constant(I32, k)), code.type.count)
        out = builder.select(builder.icmp_unsigned("==", code, const(code.type, k)), entry, out)
    return out


def magnitude(builder: Any, value: Any) -> Any:
    """The absolute values of signed bytes; that of -128 is 128, unsigned."""
    return call(builder, f"llvm.abs.v{value.type.count}i8", value.type, value, ir.Constant(I1, 0))


def flip(builder: Any, value: Any) -> Any:
    """Signed bytes + 128, as unsigned ones, and back."""
    return builder.xor(value, const(value.type, -128))


def places(bits: int) -> int:
    """How many quads share a vector of a layout's only plane, each some bits higher than the one before; else 1."""
    return 8 // bits if bits in (1, 2, 4) else 1


def quad(builder: Any, codes: Any, bits: int, q: int, shifted: bool = True) -> Any:
    """Quad q (0…7) out of the bit planes, one code a byte.

    Of a layout with a single plane it may stay at its place in the byte (`shifted` false): the code times a power of 2,
    whose exponent is `bits` times its place q // (8 // places(bits)).
    """
    if not shifted and places(bits) > 1:
        place, which = divmod(q, 8 // places(bits))
        return builder.and_(builder.extract_value(codes, which), const(VECTOR["u8"], ((1 << bits) - 1) << bits * place))
    out, first, low = None, 0, 0
    for width in planes(bits):
        per_vector = 8 // width  # quads that share a vector: one each `width` bits
        vectors = 8 // per_vector
        raw = builder.extract_value(codes, first + q % vectors)
        shift = width * (q // vectors) - low
        if shift:  # on 16-bit lanes: x86 shifts no bytes, and the mask clears what came from the neighbour
            words = builder.bitcast(raw, VECTOR["i16"])
            by = const(VECTOR["i16"], abs(shift))
            words = builder.lshr(words, by) if shift > 0 else builder.shl(words, by)
            raw = builder.bitcast(words, VECTOR["u8"])
        if width < 8:
            raw = builder.and_(raw, const(VECTOR["u8"], ((1 << width) - 1) << low))
        out = raw if out is None else builder.or_(out, raw)
        first, low = first + vectors, low + width
    return out


def input_quad(builder: Any, at: Any, stride: Any, t: int, q: int) -> Any:
    """Quad q of token t's int8 inputs, repeated for every row."""
    four = load(builder, offset(builder, token(builder, at, stride, t), 4 * q), I32)
    return builder.bitcast(splat(builder, four, LANES), VECTOR["u8"])
