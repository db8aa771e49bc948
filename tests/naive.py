"""Each block type decoded by plain loops from its published bit layout. Nobody optimises this file.

`DECODERS[name](block)` takes one block's bytes and returns its weights as a list of np.float32. Numbers are
float32 throughout, one rounding an operation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np

F = np.float32


def half(data: bytes, at: int) -> np.float32:
    return F(struct.unpack_from("<e", data, at)[0])


def signed_byte(value: int) -> int:
    return value - 256 if value > 127 else value


def q4_0(b: bytes) -> list[np.float32]:
    d = half(b, 0)
    return [F((b[2 + i % 16] >> 4 * (i // 16) & 15) - 8) * d for i in range(32)]


def q4_1(b: bytes) -> list[np.float32]:
    d, m = half(b, 0), half(b, 2)
    return [F(b[4 + i % 16] >> 4 * (i // 16) & 15) * d + m for i in range(32)]


def q5_0(b: bytes) -> list[np.float32]:
    d, high = half(b, 0), int.from_bytes(b[2:6], "little")
    out = []
    for i in range(32):
        q = (b[6 + i % 16] >> 4 * (i // 16) & 15) + 16 * (high >> i & 1)
        out.append(F(q - 16) * d)
    return out


def q5_1(b: bytes) -> list[np.float32]:
    d, m, high = half(b, 0), half(b, 2), int.from_bytes(b[4:8], "little")
    out = []
    for i in range(32):
        q = (b[8 + i % 16] >> 4 * (i // 16) & 15) + 16 * (high >> i & 1)
        out.append(F(q) * d + m)
    return out


def q8_0(b: bytes) -> list[np.float32]:
    d = half(b, 0)
    return [F(signed_byte(b[2 + i])) * d for i in range(32)]


def q8_1(b: bytes) -> list[np.float32]:
    d = half(b, 0)
    return [F(signed_byte(b[4 + i])) * d for i in range(32)]


def two_bits(qs: bytes, i: int) -> int:
    """Weight i of the 2-bit fields that Q2_K, Q3_K and Q6_K share: halves of 128, four planes of 32."""
    half_, plane, j = i // 128, i % 128 // 32, i % 32
    return qs[32 * half_ + j] >> 2 * plane & 3


def q2_k(b: bytes) -> list[np.float32]:
    scales, qs, d, dmin = b[:16], b[16:80], half(b, 80), half(b, 82)
    out = []
    for i in range(256):
        s = scales[i // 16]
        out.append((d * F(s & 15)) * F(two_bits(qs, i)) - dmin * F(s >> 4))
    return out


def q3_k(b: bytes) -> list[np.float32]:
    hmask, qs, s, d = b[:32], b[32:96], b[96:108], half(b, 108)
    out = []
    for i in range(256):
        g = i // 16
        low = s[g] & 15 if g < 8 else s[g - 8] >> 4
        scale = low + 16 * (s[8 + g % 4] >> 2 * (g // 4) & 3) - 32
        q = two_bits(qs, i) + 4 * (hmask[i % 32] >> i // 32 & 1)
        out.append((d * F(scale)) * F(q - 4))
    return out


def six_bit_scales(s: bytes, g: int) -> tuple[int, int]:
    if g < 4:
        return s[g] & 63, s[g + 4] & 63
    return (s[g + 4] & 15) + 16 * (s[g - 4] >> 6), (s[g + 4] >> 4) + 16 * (s[g] >> 6)


def q4_k(b: bytes) -> list[np.float32]:
    d, dmin, s, qs = half(b, 0), half(b, 2), b[4:16], b[16:144]
    out = []
    for i in range(256):
        scale, minimum = six_bit_scales(s, i // 32)
        q = qs[32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        out.append((d * F(scale)) * F(q) - dmin * F(minimum))
    return out


def q5_k(b: bytes) -> list[np.float32]:
    d, dmin, s, qh, qs = half(b, 0), half(b, 2), b[4:16], b[16:48], b[48:176]
    out = []
    for i in range(256):
        scale, minimum = six_bit_scales(s, i // 32)
        q = qs[32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        q += 16 * (qh[i % 32] >> i // 32 & 1)
        out.append((d * F(scale)) * F(q) - dmin * F(minimum))
    return out


def q6_k(b: bytes) -> list[np.float32]:
    ql, qh, scales, d = b[:128], b[128:192], b[192:208], half(b, 208)
    out = []
    for i in range(256):
        low = ql[64 * (i // 128) + i % 64] >> 4 * (i % 128 // 64) & 15
        out.append((d * F(signed_byte(scales[i // 16]))) * F(low + 16 * two_bits(qh, i) - 32))
    return out


def q8_k(b: bytes) -> list[np.float32]:
    d = F(struct.unpack_from("<f", b)[0])
    return [d * F(signed_byte(b[4 + i])) for i in range(256)]


def trit(byte: int, digit: int) -> int:
    return (byte * 3**digit % 256) * 3 >> 8


def tq1_0(b: bytes) -> list[np.float32]:
    d = half(b, 52)
    out = [F(trit(b[i % 32], i // 32) - 1) * d for i in range(160)]
    out += [F(trit(b[32 + i % 16], i // 16) - 1) * d for i in range(80)]
    return out + [F(trit(b[48 + i % 4], i // 4) - 1) * d for i in range(16)]


def tq2_0(b: bytes) -> list[np.float32]:
    d = half(b, 64)
    return [F(two_bits(b, i) - 1) * d for i in range(256)]


def q1_0(b: bytes) -> list[np.float32]:
    d = half(b, 0)
    return [d if b[2 + i // 8] >> i % 8 & 1 else -d for i in range(128)]


def q2_0(b: bytes) -> list[np.float32]:
    d = half(b, 0)
    return [F((b[2 + i // 4] >> 2 * (i % 4) & 3) - 1) * d for i in range(64)]


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def e2m1(code: int) -> np.float32:
    """Doubled; there is no negative zero."""
    return F(2 * E2M1[code & 7] * (-1 if code > 8 else 1))


def mxfp4(b: bytes) -> list[np.float32]:
    d = F(2.0 ** (b[0] - 128))
    return [e2m1(b[1 + i % 16] >> 4 * (i // 16) & 15) * d for i in range(32)]


def e4m3(byte: int) -> float:
    if byte == 0x7F:
        return 0.0
    exponent, mantissa = byte >> 3 & 15, byte & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def nvfp4(b: bytes) -> list[np.float32]:
    out = []
    for i in range(64):
        g, j = i // 16, i % 16
        out.append(e2m1(b[4 + 8 * g + j % 8] >> 4 * (j // 8) & 15) * F(e4m3(b[g]) / 2))
    return out


DECODERS: dict[str, Callable[[bytes], list[np.float32]]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q8_1": q8_1,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "Q8_K": q8_k,
    "TQ1_0": tq1_0,
    "TQ2_0": tq2_0,
    "Q1_0": q1_0,
    "Q2_0": q2_0,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
}
