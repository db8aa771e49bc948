"""Tiles of vectors, one vector a token, and the dot products of packed codes with int8 inputs.

These are the operations that a matmul is made of. Names that end in `stride` are bytes from one token to the next.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba.core import types

from .build import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    VECTOR,
    call,
    const,
    fma,
    load,
    number,
    offset,
    pick,
    splat,
    store,
    token,
)
from .products import (
    dot_s8s8,
    dot_u8s8,
    flip,
    input_quad,
    lookup,
    madd_bytes,
    madd_words,
    magnitude,
    places,
    quad,
    times_sign,
)
from .target import FAMILY, LANES
from .values import Vector, address, f32, i32, intrinsic, pair, u8

# -- tiles: one vector a token ------------------------------------------------------------------------


def _tile(builder: Any, ty: Any, values: list[Any]) -> Any:
    out = ir.Constant(ty, ir.Undefined)
    for t, value in enumerate(values):
        out = builder.insert_value(out, value, t)
    return out


def _parts(builder: Any, tile: Any) -> list[Any]:
    return [builder.extract_value(tile, t) for t in range(tile.type.count)]


def _zeros(kind: str) -> Any:
    def typed(typingctx: Any, tokens: Any) -> Any:
        tile = Vector(kind, tokens.literal_value)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            ty = context.get_value_type(tile)
            return _tile(builder, ty, [ir.Constant(VECTOR[kind], None)] * tile.count)

        return tile(tokens), codegen

    typed.__name__ = typed.__qualname__ = f"zeros_{kind}"
    return intrinsic(prefer_literal=True)(typed)


zeros_i32 = _zeros("i32")
zeros_f32 = _zeros("f32")


def _pairs_unsigned(builder: Any, tile: list[Any], codes: Any, scale: Any, at: Any, form: Any) -> list[Any]:
    """tile[t] + scale * sum over the quads of (code - offset) * input, for codes below 8 bits.

    A span is as long as its int16 sums can hold. Sums in between may wrap: only the last value counts. The
    offset comes in through `starts`, which holds -offset times the sums of the span's inputs.
    """
    x, stride, starts, starts_stride = at
    first, quads, bits, span, started = form
    pairs = pair(builder, scale)
    for s in range(first, first + quads, span):
        sums: list[Any] = [None] * len(tile)
        if started:
            for t in range(len(tile)):
                one = offset(builder, token(builder, starts, starts_stride, t), 4 * (s // span))
                sums[t] = builder.bitcast(splat(builder, load(builder, one, I32), LANES), VECTOR["i16"])
        for q in range(s, s + span):
            code = quad(builder, codes, bits, q)
            for t in range(len(tile)):
                part = madd_bytes(builder, code, input_quad(builder, x, stride, t, q))
                sums[t] = part if sums[t] is None else builder.add(sums[t], part)
        tile = [builder.add(a, madd_words(builder, b, pairs)) for a, b in zip(tile, sums, strict=True)]
    return tile


def _pairs_signed(builder: Any, tokens: int, codes: Any, table: Any, at: Any, form: Any) -> list[Any]:
    """The sums over the quads of value * input, where the value is a signed byte: the code, or table[code].

    |value| <= 128 goes into the unsigned operand, its sign into the input (|input| <= 127): no sum saturates.
    """
    x, stride = at[:2]
    first, quads, bits = form[:3]
    tile = [ir.Constant(VECTOR["i32"], None)] * tokens
    for q in range(first, first + quads):
        value = quad(builder, codes, bits, q)
        if table is not None:
            value = lookup(builder, table, value)
        size = magnitude(builder, value)
        for t in range(tokens):
            signed = times_sign(builder, input_quad(builder, x, stride, t, q), value)
            part = madd_words(builder, madd_bytes(builder, size, signed), const(VECTOR["i16"], 1))
            tile[t] = builder.add(tile[t], part)
    return tile


@intrinsic(prefer_literal=True)
def dot_pairs(
    typingctx: Any,
    total: Any,  # i32 tile
    codes: Any,  # Codes of 32 inputs
    scale: Any,  # i32: the integer scales of the unit
    table: Any,  # u8: the codebook's int8 values, or their high parts
    low_table: Any,  # u8: their low parts
    inputs: Any,  # address of token 0's 32 int8 inputs, and bytes from token to token
    stride: Any,
    starts: Any,  # address of token 0's starts, and bytes from token to token
    starts_stride: Any,
    first: Any,  # constants: the unit's first quad and its number of quads
    quads: Any,
    values: Any,  # constant: 0 unsigned codes, 1 signed bytes, 2 a table of bytes, 3 one of 16-bit numbers
    span: Any,  # constants: quads a span, whether there are starts
    started: Any,
) -> Any:
    """total[t] + scale * sum over a unit's quads of value * input, in int32, by int16 sums of two products."""
    literals = (first, quads, values, span, started)
    q0, n, kind, length, has = (x.literal_value for x in literals)
    form = (q0, n, codes.bits, length, has)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile, at = _parts(builder, args[0]), args[5:9]
        if kind == 0:
            return _tile(builder, args[0].type, _pairs_unsigned(builder, tile, args[1], args[2], at, form))
        found = _pairs_signed(builder, len(tile), args[1], args[3] if kind > 1 else None, at, form)
        if kind == 3:
            low = _pairs_signed(builder, len(tile), args[1], args[4], at, form)
            by = const(VECTOR["i32"], 8)
            found = [builder.add(builder.shl(x, by), y) for x, y in zip(found, low, strict=True)]
        out = [builder.add(x, builder.mul(y, args[2])) for x, y in zip(tile, found, strict=True)]
        return _tile(builder, args[0].type, out)

    return total(total, codes, i32, u8, u8, address, address, address, address, *literals), codegen


def _fours(builder: Any, tokens: int, codes: Any, table: Any, at: Any, form: Any) -> list[Any]:
    """int32 sums over a unit's quads of operand * input; the unit's start takes back what the operand has too much."""
    x, stride, starts, starts_stride = at
    first, quads, bits, kind, started = form
    unsigned = FAMILY.dot == "u8s8"
    if table is not None and unsigned:
        table = flip(builder, table)
    # One token's sum would wait for itself at every step, so several take turns; best one for each place that codes
    # have in their bytes: then the sums are shifted, which is exact, and not the codes.
    stay = tokens == 1 and kind == 0 and unsigned and places(bits) > 1
    per_place = 8 // places(bits)
    order = range(first, first + quads)
    ways = [(q - first) // per_place if stay else q % 2 if tokens == 1 else 0 for q in order]
    sums = [ir.Constant(VECTOR["i32"], None)] * ((1 + max(ways)) * tokens)
    if started:
        for t in range(tokens):
            one = offset(builder, token(builder, starts, starts_stride, t), 4 * (first // quads))
            start = splat(builder, load(builder, one, I32), LANES)
            sums[t] = builder.shl(start, const(start.type, bits * (first // per_place))) if stay else start
    dot = dot_u8s8 if unsigned else dot_s8s8
    for q, way in zip(order, ways, strict=True):
        value = quad(builder, codes, bits, q, shifted=not stay)
        if table is not None:
            value = lookup(builder, table, value)
        elif kind == 1 and unsigned:
            value = flip(builder, value)
        for t in range(tokens):
            k = way * tokens + t
            sums[k] = dot(builder, sums[k], value, input_quad(builder, x, stride, t, q))
    if stay:
        by = [bits * (first // per_place + way) for way in range(len(sums))]
        sums = [builder.ashr(x, const(x.type, n)) if n else x for x, n in zip(sums, by, strict=True)]
    while len(sums) > tokens:
        sums = [builder.add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=True)]
    return sums


@intrinsic(prefer_literal=True)
def add_dots(
    typingctx: Any,
    acc: Any,  # f32 tile
    codes: Any,  # Codes of 32 inputs
    d: Any,  # f32: the unit's scales
    table: Any,  # u8: as in dot_pairs
    low_table: Any,
    inputs: Any,  # address of token 0's 32 int8 inputs, and bytes from token to token
    stride: Any,
    starts: Any,  # address of token 0's starts, one int32 a unit, and bytes from token to token
    starts_stride: Any,
    scales: Any,  # address of token 0's input scale, and bytes from token to token
    scales_stride: Any,
    first: Any,  # constants: the unit's first quad and its number of quads
    quads: Any,
    values: Any,  # constant: as in dot_pairs
    started: Any,  # constant: whether there are starts
) -> Any:
    """acc[t] + d * input scale * (sum over a unit's quads of value * input), products summed straight into int32."""
    literals = (first, quads, values, started)
    q0, n, kind, has = (x.literal_value for x in literals)
    form = (q0, n, codes.bits, kind, has)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        acc, at, out = _parts(builder, args[0]), args[5:9], []
        found = _fours(builder, len(acc), args[1], args[3] if kind > 1 else None, at, form)
        if kind == 3:
            low = _fours(builder, len(acc), args[1], args[4], at, form)
            by = const(VECTOR["i32"], 8)
            found = [builder.add(builder.shl(x, by), y) for x, y in zip(found, low, strict=True)]
        for t, (a, n) in enumerate(zip(acc, found, strict=True)):
            scale = splat(builder, load(builder, token(builder, args[9], args[10], t), FLOAT), LANES)
            out.append(fma(builder, builder.sitofp(n, VECTOR["f32"]), builder.fmul(args[2], scale), a))
        return _tile(builder, args[0].type, out)

    return acc(acc, codes, f32, u8, u8, *[address] * 6, *literals), codegen


@intrinsic
def add_floats(typingctx: Any, acc: Any, total: Any, d: Any, scales: Any, stride: Any) -> Any:
    """acc[t] + float(total[t]) * (d * the float at scales + t * stride)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = []
        for t, (a, n) in enumerate(zip(_parts(builder, args[0]), _parts(builder, args[1]), strict=True)):
            scale = splat(builder, load(builder, token(builder, args[3], args[4], t), FLOAT), LANES)
            out.append(fma(builder, builder.sitofp(n, VECTOR["f32"]), builder.fmul(args[2], scale), a))
        return _tile(builder, args[0].type, out)

    return acc(acc, total, f32, address, address), codegen


@intrinsic
def add_products(typingctx: Any, acc: Any, w: Any, x: Any, stride: Any) -> Any:
    """acc[t] + w * the float at x + t * stride."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = []
        for t, a in enumerate(_parts(builder, args[0])):
            value = splat(builder, load(builder, token(builder, args[2], args[3], t), FLOAT), LANES)
            out.append(fma(builder, args[1], value, a))
        return _tile(builder, args[0].type, out)

    return acc(acc, f32, address, address), codegen


@intrinsic(prefer_literal=True)
def add_columns(typingctx: Any, acc: Any, w: Any, x: Any, kind: Any) -> Any:
    """acc[j] + (LANES numbers of column j at w) * (float j at x); kind as in `load_number`."""
    width = kind.literal_value
    step = LANES * (4 if width == 0 else 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out = []
        for j, a in enumerate(_parts(builder, args[0])):
            column = number(builder, offset(builder, args[1], j * step), width, LANES)
            value = splat(builder, load(builder, offset(builder, args[2], 4 * j), FLOAT), LANES)
            out.append(fma(builder, column, value, a))
        return _tile(builder, args[0].type, out)

    return acc(acc, address, address, kind), codegen


@intrinsic
def store_tile(typingctx: Any, acc: Any, added: Any, at: Any, stride: Any, rows: Any, skip: Any) -> Any:
    """Store acc[t] + added (one vector) at `at + t * stride`, the first `rows` lanes only, from t = `skip` on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ty = VECTOR["f32"]
        full = builder.icmp_signed(">=", args[4], ir.Constant(I64, LANES))
        full = builder.and_(full, builder.icmp_signed("==", args[5], ir.Constant(I64, 0)))
        lanes = ir.Constant(VECTOR["i32"], list(range(LANES)))
        values = [builder.fadd(a, args[1]) for a in _parts(builder, args[0])]
        with builder.if_else(full) as (whole, ragged):
            with whole:
                for t, value in enumerate(values):
                    store(builder, token(builder, args[2], args[3], t), value)
            with ragged:
                for t, value in enumerate(values):
                    kept = builder.icmp_signed("<=", args[5], ir.Constant(I64, t))
                    count = splat(builder, builder.trunc(builder.select(kept, args[4], I64(0)), I32), LANES)
                    mask = builder.icmp_signed("<", lanes, count)
                    to = builder.inttoptr(token(builder, args[2], args[3], t), ty.as_pointer())
                    name = f"llvm.masked.store.v{LANES}f32.p0"
                    call(builder, name, ir.VoidType(), value, to, ir.Constant(I32, 1), mask)
        return context.get_dummy_value()

    return types.void(acc, f32, address, address, types.int64, types.int64), codegen


@intrinsic
def load_tile(typingctx: Any, like: Any, at: Any, stride: Any, rows: Any) -> Any:
    """A tile like `like` from `at + t * stride`, 0 beyond the first `rows` lanes: what `store_tile` stored."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        ty = VECTOR["f32"]
        lanes = ir.Constant(VECTOR["i32"], list(range(LANES)))
        mask = builder.icmp_signed("<", lanes, splat(builder, builder.trunc(args[3], I32), LANES))
        out = []
        for t in range(like.count):
            place = builder.inttoptr(token(builder, args[1], args[2], t), ty.as_pointer())
            name = f"llvm.masked.load.v{LANES}f32.p0"
            out.append(call(builder, name, ty, place, ir.Constant(I32, 1), mask, ir.Constant(ty, None)))
        return _tile(builder, args[0].type, out)

    return like(like, address, address, types.int64), codegen


@intrinsic(prefer_literal=True)
def add_outer(typingctx: Any, acc: Any, w: Any, w_stride: Any, x: Any, stride: Any, columns: Any) -> Any:
    """acc[c][t] + (LANES float16 at w + c * w_stride) * (the float at x + t * stride), for `columns` (a constant)
    columns c; the tile's vectors are ordered (c, t). A column serves all t, and a float all columns."""
    n = columns.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = _parts(builder, args[0])
        tokens = len(parts) // n
        columns = [number(builder, token(builder, args[1], args[2], c), 1, LANES) for c in range(n)]
        for t in range(tokens):
            value = splat(builder, load(builder, token(builder, args[3], args[4], t), FLOAT), LANES)
            for c in range(n):
                parts[c * tokens + t] = fma(builder, columns[c], value, parts[c * tokens + t])
        return _tile(builder, args[0].type, parts)

    return acc(acc, address, address, address, address, columns), codegen


@intrinsic(prefer_literal=True)
def store_outer(typingctx: Any, acc: Any, at: Any, stride: Any, columns: Any) -> Any:
    """Store acc[c][t] of `add_outer` at `at + t * stride`, columns side by side."""
    n = columns.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = _parts(builder, args[0])
        tokens = len(parts) // n
        for k, value in enumerate(parts):
            to = token(builder, args[1], args[2], k % tokens)
            store(builder, offset(builder, to, k // tokens * 4 * LANES), value)
        return context.get_dummy_value()

    return types.void(acc, address, address, columns), codegen


@intrinsic
def sum_tile(typingctx: Any, acc: Any) -> Any:
    """The sum of the tile's vectors, as a tile of one."""
    one = Vector("f32", 1)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        parts = _parts(builder, args[0])
        while len(parts) > 1:
            parts = [builder.fadd(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return _tile(builder, context.get_value_type(one), parts)

    return one(acc), codegen


# -- sums of the inputs -------------------------------------------------------------------------------


def _fold(builder: Any, x: Any, width: int, groups: int) -> Any:
    """Add neighbouring groups of `width` elements until `groups` groups are left."""
    while x.type.count > groups * width:
        half = x.type.count // 2
        picks = []
        for odd in (0, 1):
            index = [2 * (k // width) * width + odd * width + k % width for k in range(half)]
            picks.append(pick(builder, x, index))
        x = builder.add(*picks)
    return x


def _pair_sums(builder: Any, at: Any) -> Any:
    """16 int16: the sums of neighbours among the 32 int8 inputs at an address."""
    inputs = load(builder, at, ir.VectorType(I8, 32))
    return madd_bytes(builder, const(inputs.type, 1), inputs)


def _sums(builder: Any, at: Any, length: int) -> Any:
    """int32: the sums of each `length` of the 32 int8 inputs at an address."""
    words = _pair_sums(builder, at)
    return _fold(builder, madd_words(builder, words, const(words.type, 1)), 1, 32 // length)


@intrinsic(prefer_literal=True)
def store_starts(typingctx: Any, inputs: Any, factor: Any, at: Any, span: Any) -> Any:
    """factor times the sums of each span of 32 inputs: pairs of wrapped int16 for `dot_pairs`, int32 for `add_dots`."""
    length = span.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if FAMILY.dot == "pairs":
            sums = _pair_sums(builder, args[0])
            sums = builder.mul(sums, splat(builder, builder.trunc(args[1], I16), sums.type.count))
            sums = _fold(builder, sums, 2, 32 // length)
        else:
            sums = _sums(builder, args[0], length)
            sums = builder.mul(sums, splat(builder, builder.trunc(args[1], I32), sums.type.count))
        store(builder, args[2], sums)
        return context.get_dummy_value()

    return types.void(address, types.int64, address, span), codegen


@intrinsic(prefer_literal=True)
def store_sums(typingctx: Any, inputs: Any, scale: Any, at: Any, unit: Any) -> Any:
    """scale times the sum of each unit (32 or 16) of 32 inputs, as floats."""
    length = unit.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = _sums(builder, args[0], length)
        floats = builder.sitofp(sums, ir.VectorType(FLOAT, sums.type.count))
        store(builder, args[2], builder.fmul(floats, splat(builder, args[1], sums.type.count)))
        return context.get_dummy_value()

    return types.void(address, types.float32, address, unit), codegen
