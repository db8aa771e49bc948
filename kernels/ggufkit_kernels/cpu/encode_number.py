"""What the encoders share: roundings as ggml has them, half precision, and weights laid out by group."""

from __future__ import annotations

import numpy as np

from .jit import kernel

F32, I32, U32 = np.float32, np.int32, np.uint32

LANES = 64  # groups searched together, one a column
MAGIC = F32(12582912)  # 1.5 * 2**23: the sum's low bits hold the integer
ZERO, HALF = F32(0), F32(0.5)


@kernel
def nearest(x):
    """int32 nearest to float32, halves to even, for |x| < 2**22; else what the bits give, as in ggml."""
    # Numba widens int32 arithmetic to 64 bits; the casts let LLVM narrow it again.
    return I32(I32(F32(x + MAGIC).view(I32) & I32(0x7FFFFF)) - I32(0x400000))


@kernel
def clipped(x, low, high):
    """nearest(x) between two int32, as float32."""
    q = nearest(x)
    q = low if q < low else q
    return F32(high if q > high else q)


@kernel
def half_bits(x):
    """float32 -> the bits of the nearest float16, ties to even, uint32 below 2**16; NaN becomes 0x7E00."""
    bits = F32(x).view(U32)
    sign = U32((bits >> U32(16)) & U32(0x8000))
    a = U32(bits & U32(0x7FFFFFFF))
    if a > U32(0x7F800000):
        return U32(sign | U32(0x7E00))
    if a >= U32(0x47800000):  # 65536 and more
        return U32(sign | U32(0x7C00))
    if a < U32(0x38800000):  # denormal halves: adding 0.5 rounds at 2**-24
        shifted = F32(F32(a.view(F32)) + HALF).view(U32)
        return U32(sign | U32(shifted - U32(0x3F000000)))
    odd = U32((a >> U32(13)) & U32(1))
    return U32(sign | U32(U32(a + U32(0xFFF) + odd - U32(0x38000000)) >> U32(13)))


@kernel
def half_value(h):
    """The bits of a float16 (uint32) -> float32, exactly. Infinity and NaN stay so."""
    sign = U32((h & U32(0x8000)) << U32(16))
    a = U32(h & U32(0x7FFF))
    if a >= U32(0x7C00):
        return U32(sign | U32(a << U32(13)) | U32(0x7F800000)).view(F32)
    if a < U32(0x400):
        value = F32(F32(a) * F32(2.0**-24))
        return F32(-value) if sign else value
    return U32(sign | U32(U32(a << U32(13)) + U32(0x38000000))).view(F32)


@kernel
def store_half(out, at, x):
    """Write float32 x as a float16 to bytes at, at + 1 of out; returns the value it then has."""
    h = half_bits(x)
    out[at] = np.uint8(h & U32(255))
    out[at + 1] = np.uint8(h >> U32(8))
    return half_value(h)


@kernel
def load_columns(x, k, columns):
    """Blocks x (n, 256) -> columns (k, LANES), flat: row i the weights i of groups of k. Columns left over become 0."""
    for g in range(LANES):
        b, start = g * k // 256, g * k % 256
        for i in range(k):
            columns[i * LANES + g] = x[b, start + i] if b < x.shape[0] else ZERO
