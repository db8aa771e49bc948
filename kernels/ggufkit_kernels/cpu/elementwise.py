"""Kernels that touch each value once: rmsnorm, rope, swiglu, relu2, add, embed. An item is some rows, or some values.

`begin` is what a recorded token (tape.py) begins with: what Python would write.

Args are int64 words, by index, listed in each kernel's docstring. float32 throughout.
"""

from __future__ import annotations

import numpy as np

from .jit import kernel, lazy
from .simd import (
    LANES,
    QUAD,
    add_f32,
    div_f32,
    exp_f32,
    first_f32,
    fma_f32,
    get_f32,
    get_i8,
    get_i64,
    get_number,
    get_u8,
    load_f32,
    max_f32,
    mul_f32,
    neg_f32,
    put_f32,
    put_i64,
    splat_f32,
    store_f32,
    sum_f32,
)
from .words import CODES, DMIN, MINIMUM, SCALE, STRIP_NBYTES, WEIGHT_WORDS, D


@lazy
def rmsnorm(args, item, worker):
    """out = x / sqrt(mean(x²) + eps) * weight. Words: x, weight, out, rows, dim, eps (float bits), rows an item."""
    weight, dim = get_i64(args + 8), get_i64(args + 32)
    eps, per_item = get_f32(args + 40), get_i64(args + 48)
    whole = dim // LANES * LANES
    for row in range(item * per_item, min((item + 1) * per_item, get_i64(args + 24))):
        x, out = get_i64(args) + row * dim * 4, get_i64(args + 16) + row * dim * 4
        acc0, acc1 = splat_f32(0.0), splat_f32(0.0)
        for i in range(0, whole - LANES, 2 * LANES):
            v0, v1 = load_f32(x + 4 * i), load_f32(x + 4 * (i + LANES))
            acc0, acc1 = fma_f32(v0, v0, acc0), fma_f32(v1, v1, acc1)
        if whole % (2 * LANES):
            v0 = load_f32(x + 4 * (whole - LANES))
            acc0 = fma_f32(v0, v0, acc0)
        total = sum_f32(add_f32(acc0, acc1))
        for i in range(whole, dim):
            total += get_f32(x + 4 * i) * get_f32(x + 4 * i)
        # The mean and its root in double: two operations a row
        factor = splat_f32(1.0 / (total / dim + eps) ** 0.5)
        for i in range(0, whole, LANES):
            store_f32(out + 4 * i, mul_f32(mul_f32(load_f32(x + 4 * i), factor), load_f32(weight + 4 * i)))
        for i in range(whole, dim):
            put_f32(out + 4 * i, get_f32(x + 4 * i) * first_f32(factor) * get_f32(weight + 4 * i))


@kernel
def rotate(x, out, dim, cos, sin, pairs, interleaved):
    """out = x with its pairs rotated; `dim` floats each, at different addresses or the same."""
    if interleaved:
        for i in range(pairs):
            a, b = get_f32(x + 8 * i), get_f32(x + 8 * i + 4)
            c, s = get_f32(cos + 4 * i), get_f32(sin + 4 * i)
            put_f32(out + 8 * i, a * c - b * s)
            put_f32(out + 8 * i + 4, a * s + b * c)
    else:
        y, to = x + 4 * pairs, out + 4 * pairs
        whole = pairs // LANES * LANES
        for i in range(0, whole, LANES):
            va, vb = load_f32(x + 4 * i), load_f32(y + 4 * i)
            vc, vs = load_f32(cos + 4 * i), load_f32(sin + 4 * i)
            store_f32(out + 4 * i, fma_f32(va, vc, neg_f32(mul_f32(vb, vs))))
            store_f32(to + 4 * i, fma_f32(va, vs, mul_f32(vb, vc)))
        for i in range(whole, pairs):
            a, b = get_f32(x + 4 * i), get_f32(y + 4 * i)
            c, s = get_f32(cos + 4 * i), get_f32(sin + 4 * i)
            put_f32(out + 4 * i, a * c - b * s)
            put_f32(to + 4 * i, a * s + b * c)
    if out != x:
        for i in range(2 * pairs, dim):
            put_f32(out + 4 * i, get_f32(x + 4 * i))


@lazy
def rope(args, item, worker):
    """Rotate pairs in place. Words: x, cos, sin, n, heads, head_dim, pairs, interleaved, tokens an item."""
    heads, head_dim, pairs = get_i64(args + 32), get_i64(args + 40), get_i64(args + 48)
    interleaved, per_item = get_i64(args + 56), get_i64(args + 64)
    for t in range(item * per_item, min((item + 1) * per_item, get_i64(args + 24))):
        cos, sin = get_i64(args + 8) + 4 * t * pairs, get_i64(args + 16) + 4 * t * pairs
        for head in range(heads):
            x = get_i64(args) + 4 * (t * heads + head) * head_dim
            rotate(x, x, head_dim, cos, sin, pairs, interleaved)


@lazy
def begin(args, item, worker):
    """Write a token's id, position and rotary angles to where they are read. Words: token, position, (out), where the
    id goes, (logits, values), how many places take the position, address of their addresses, how many tables of
    angles, (the largest logit), and for each table: its rows, where one goes, floats a row."""
    position = get_i64(args + 8)
    put_i64(get_i64(args + 24), get_i64(args))
    places = get_i64(args + 56)
    for k in range(get_i64(args + 48)):
        put_i64(get_i64(places + 8 * k), position)
    for k in range(get_i64(args + 64)):
        rows, out, floats = get_i64(args + 88 + 24 * k), get_i64(args + 96 + 24 * k), get_i64(args + 104 + 24 * k)
        for i in range(floats):
            put_f32(out + 4 * i, get_f32(rows + 4 * (position * floats + i)))


@lazy
def swiglu(args, item, worker):
    """out = x / (1 + exp(-x)) * y. Words: x, y, out, values, values an item (a multiple of LANES)."""
    first = item * get_i64(args + 32)
    last = min(first + get_i64(args + 32), get_i64(args + 24))
    x, y, out = get_i64(args), get_i64(args + 8), get_i64(args + 16)
    one = splat_f32(1.0)
    whole = first + (last - first) // LANES * LANES
    for i in range(4 * first, 4 * whole, 4 * LANES):
        v = load_f32(x + i)
        store_f32(out + i, mul_f32(div_f32(v, add_f32(one, exp_f32(neg_f32(v)))), load_f32(y + i)))
    for i in range(4 * whole, 4 * last, 4):
        v = splat_f32(get_f32(x + i))
        put_f32(out + i, first_f32(div_f32(v, add_f32(one, exp_f32(neg_f32(v))))) * get_f32(y + i))


@lazy
def relu2(args, item, worker):
    """out = max(x, 0)² * y. Words as in `swiglu`."""
    first = item * get_i64(args + 32)
    last = min(first + get_i64(args + 32), get_i64(args + 24))
    x, y, out = get_i64(args), get_i64(args + 8), get_i64(args + 16)
    zero = splat_f32(0.0)
    whole = first + (last - first) // LANES * LANES
    for i in range(4 * first, 4 * whole, 4 * LANES):
        v = max_f32(load_f32(x + i), zero)
        store_f32(out + i, mul_f32(mul_f32(v, v), load_f32(y + i)))
    for i in range(4 * whole, 4 * last, 4):
        s = max(get_f32(x + i), np.float32(0.0))
        put_f32(out + i, s * s * get_f32(y + i))


@lazy
def widen(args, item, worker):
    """out (n, padded) = x (n, cols) and zeros. Words: x, out, n, cols, padded."""
    cols, padded = get_i64(args + 24), get_i64(args + 32)
    for t in range(get_i64(args + 16)):
        x, out = get_i64(args) + 4 * t * cols, get_i64(args + 8) + 4 * t * padded
        for i in range(padded):
            put_f32(out + 4 * i, get_f32(x + 4 * i) if i < cols else np.float32(0.0))


@lazy
def add(args, item, worker):
    """out = x + y. Words as in `swiglu`."""
    first = item * get_i64(args + 32)
    last = min(first + get_i64(args + 32), get_i64(args + 24))
    x, y, out = get_i64(args), get_i64(args + 8), get_i64(args + 16)
    whole = first + (last - first) // LANES * LANES
    for i in range(4 * first, 4 * whole, 4 * LANES):
        store_f32(out + i, add_f32(load_f32(x + i), load_f32(y + i)))
    for i in range(4 * whole, 4 * last, 4):
        put_f32(out + i, get_f32(x + i) + get_f32(y + i))


# `embed` has the weight's words first (matmul.WEIGHT_WORDS), then these.
EMBED_WORDS = [
    "ids",
    "n",
    "out",
    "cols",
    "padded",
    "block",
    "group",
    "bits",
    "scaled",
    "minimum",
    "levels",
    "number",
    "per_item",
    "offset",
    "joined",
]
(IDS, N, OUT, COLS, PADDED, BLOCK, GROUP, BITS, SCALED, MINIMA, LEVELS, NUMBER, PER_ITEM, OFFSET, JOINED) = (
    8 * (len(WEIGHT_WORDS) + k) for k in range(len(EMBED_WORDS))
)


@lazy
def embed_plain(args, item, worker):
    """Rows of plain numbers, as float32."""
    cols, padded, number = get_i64(args + COLS), get_i64(args + PADDED), get_i64(args + NUMBER)
    for t in range(item * get_i64(args + PER_ITEM), min((item + 1) * get_i64(args + PER_ITEM), get_i64(args + N))):
        row = get_i64(get_i64(args + IDS) + 8 * t)
        out = get_i64(args + OUT) + 4 * t * cols
        first = row // LANES * padded * LANES + row % LANES
        for i in range(cols):
            at = first + i * LANES
            if number == 0:
                put_f32(out + 4 * i, get_number(get_i64(args + CODES) + 4 * at, 0))
            elif number == 1:
                put_f32(out + 4 * i, get_number(get_i64(args + CODES) + 2 * at, 1))
            else:
                put_f32(out + 4 * i, get_number(get_i64(args + CODES) + 2 * at, 2))


@kernel
def number_at(base, index, number):
    """One d or dmin."""
    if number == 0:
        return get_number(base + 4 * index, 0)
    if number == 3:
        return get_number(base + index, 3)
    if number == 4:
        return get_number(base + index, 4)
    return get_number(base + 2 * index, 1)


@kernel
def code_at(base, q, bits):
    """The code at quad q whose byte is at `base` in its vector: see pack.py."""
    if bits == 8:
        return get_i8(base + q * QUAD) + 128
    code, first, low = 0, 0, 0
    for width in (4, 2, 1):
        if bits & width:
            byte = get_u8(base + (first + q % width) * QUAD)
            code |= (byte >> (width * (q // width)) & ((1 << width) - 1)) << low
            first, low = first + width, low + width
    return code


@kernel
def joined_at(args, at, group, lane, minimum, bits):
    """A scale (minimum 0) or minimum (1) that shares bytes; `group` counts through all strips. See pack.py."""
    value = get_u8(get_i64(args + SCALE) + at) >> (4 * minimum) & 15
    if bits == 6:
        high = get_u8(get_i64(args + MINIMUM) + group // 2 * LANES + lane)
        value |= (high >> (group % 2 * 4 + 2 * minimum) & 3) << 4
    return value


@lazy
def embed_codes(args, item, worker):
    """Rows of codes of any layout, decoded by the formula of `Quants`, in its order: bit for bit."""
    cols, bits, number = get_i64(args + COLS), get_i64(args + BITS), get_i64(args + NUMBER)
    block, group, offset = get_i64(args + BLOCK), get_i64(args + GROUP), get_i64(args + OFFSET)
    blocks, groups = get_i64(args + PADDED) // block, get_i64(args + PADDED) // group
    scaled, minima, levels = get_i64(args + SCALED), get_i64(args + MINIMA), get_i64(args + LEVELS)
    joined = get_i64(args + JOINED)
    for t in range(item * get_i64(args + PER_ITEM), min((item + 1) * get_i64(args + PER_ITEM), get_i64(args + N))):
        row = get_i64(get_i64(args + IDS) + 8 * t)
        strip, lane = row // LANES, row % LANES
        out = get_i64(args + OUT) + 4 * t * cols
        codes = get_i64(args + CODES) + strip * get_i64(args + STRIP_NBYTES) + 4 * lane
        for g in range(cols // group):
            at_d = (strip * blocks + g * group // block) * LANES + lane
            at_g = (strip * groups + g) * LANES + lane
            d, low = number_at(get_i64(args + D), at_d, number), np.float32(0.0)
            if joined:
                d = d * np.float32(joined_at(args, at_g, strip * groups + g, lane, 0, joined))
            elif scaled == 1:
                d = d * np.float32(get_i8(get_i64(args + SCALE) + at_g))
            elif scaled == 2:
                d = d * np.float32(get_u8(get_i64(args + SCALE) + at_g))
            if minima:
                low = number_at(get_i64(args + DMIN), at_d, number)
                if joined:
                    low = low * np.float32(joined_at(args, at_g, strip * groups + g, lane, 1, joined))
                elif minima == 2:
                    low = low * np.float32(get_u8(get_i64(args + MINIMUM) + at_g))
            for i in range(g * group, (g + 1) * group):
                code = code_at(codes + i // 32 * bits * QUAD + i % 4, i % 32 // 4, bits)
                x = np.float32(code - offset)
                if levels:
                    x = get_f32(levels + 4 * code)
                w = d * x
                if minima:
                    w = w - low
                put_f32(out + 4 * i, w)
