"""The encoder of NF4: the largest magnitude of each block, then how many midpoints of levels are below each weight.

The same codes and maxima as `ggufkit_formats.blocks.nf4.encode_4bit`, by the same operations: x * (1 / maximum), cut to
-1…1, compared with all fifteen midpoints. One thread of a Zen 4: 1430 million weights a second, NumPy 86 (a pass for
each midpoint); the maxima of double quantization, one for 64 weights, stay with NumPy, at 62 million a second.
"""

from __future__ import annotations

import numpy as np
from ggufkit_formats.blocks import nf4 as definition

from ..jit import kernel
from ..simd import (
    as_bytes,
    bits_of,
    choose,
    even_lanes,
    get_f32,
    get_i64,
    greatest,
    highest_word,
    least,
    load_floats,
    magnitude,
    odd_lanes,
    put_f32,
    repeat,
    store_vector,
)
from .layout import NOT_FINITE

F32, I32 = np.float32, np.int32
ONE, SMALLEST = F32(1), definition.SMALLEST
BLOCK = definition.BLOCK
UNIT = 32  # weights that are looked at at a time: divides every block
N_BOUNDS = 15


def midpoints(levels: np.ndarray) -> np.ndarray:
    """float32 (15,): those of sorted levels (16,)."""
    return (levels[:-1] + levels[1:]) / F32(2)


BOUNDS = midpoints(definition.NF4_LEVELS)


@kernel
def whole_blocks(x, n, block, bounds, maxima, maximum_step, codes, codes_step):
    """n blocks of float32 -> a float32 maximum and block / 2 bytes of codes each, at addresses so many bytes apart."""
    most = I32(0)
    for _ in range(n):
        size = bits_of(magnitude(load_floats(x, UNIT)))
        for j in range(UNIT, block, UNIT):
            size = greatest(size, bits_of(magnitude(load_floats(x + 4 * j, UNIT))))
        largest = highest_word(size)
        most = max(most, largest)
        d = I32(largest).view(F32)
        put_f32(maxima, d)
        inverse = ONE / max(d, SMALLEST)
        for j in range(0, block, UNIT):
            v = least(greatest(load_floats(x + 4 * j, UNIT) * inverse, -ONE), ONE)
            one, none = repeat(1, UNIT), repeat(0, UNIT)
            code = none
            for k in range(N_BOUNDS):
                code = code + choose(v > get_f32(bounds + 4 * k), one, none)
            store_vector(codes + j // 2, as_bytes((even_lanes(code) << 4) | odd_lanes(code)))
        x += 4 * block
        maxima += maximum_step
        codes += codes_step
    return most >= NOT_FINITE


@kernel
def nf4(x, out, n, s):
    """n blocks -> 36 bytes each. The scratch begins with the address of BOUNDS."""
    return whole_blocks(x, n, BLOCK, get_i64(s), out, 36, out + 4, 36)


def tables() -> np.ndarray:
    """What `nf4` wants to find in its scratch."""
    return np.array([BOUNDS.ctypes.data])


def encode_4bit(x: np.ndarray, levels: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Float32 (n,) -> packed codes uint8 (ceil(n / 2),), maxima float32 (ceil(n / block),): what
    `ggufkit_formats.blocks.nf4.encode_4bit` gives, on one thread. x must be finite.
    """
    count = len(x) // block
    if block % UNIT or len(levels) != N_BOUNDS + 1 or not (levels[:-1] <= levels[1:]).all():
        return definition.encode_4bit(x, levels, block)
    x = np.ascontiguousarray(x, np.float32)
    bounds = midpoints(np.ascontiguousarray(levels, np.float32))
    packed, maxima = np.empty(count * block // 2, np.uint8), np.empty(count, np.float32)
    addresses = (maxima.ctypes.data, 4, packed.ctypes.data, block // 2)
    if count:
        whole_blocks(x.ctypes.data, count, block, bounds.ctypes.data, *addresses)
    if len(x) > count * block:
        last, maximum = definition.encode_4bit(x[count * block :], levels, block)
        packed, maxima = np.concatenate([packed, last]), np.concatenate([maxima, maximum])
    return packed, maxima
