"""The vectors with operators that encoders are written with, against NumPy, number by number."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_kernels.cpu.jit import kernel
from ggufkit_kernels.cpu.simd import (
    LANES,
    all_of,
    any_of,
    as_bytes,
    as_float,
    at_least,
    at_least_zero,
    at_most,
    bits_of,
    choose,
    extended,
    first_half,
    float_of,
    get_f32,
    greatest,
    half_floats,
    halves,
    highest,
    highest_word,
    lanes_to_rows,
    least,
    load_floats,
    load_words,
    lowest,
    lowest_bit,
    magnitude,
    mask_bits,
    prefetch,
    repeat,
    root,
    rows_to_lanes,
    scatter,
    second_half,
    store_vector,
    truncated,
    whole,
)

F32, I32 = np.float32, np.int32
SPECIAL = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3e38, 0.5, -0.5, 2.5, 7, -7, 31], F32)
PAIRS = np.stack(np.meshgrid(SPECIAL, SPECIAL)).reshape(2, -1)  # (2, 256)


@kernel
def on_pairs(a, b, n, out, out_mask):
    for i in range(0, 4 * n, 64):
        x, y = load_floats(a + i, 16), load_floats(b + i, 16)
        at = out + 10 * i
        store_vector(at, x + y)
        store_vector(at + 64, x - y)
        store_vector(at + 128, x * y)
        store_vector(at + 192, x / y)
        store_vector(at + 256, least(x, y))
        store_vector(at + 320, greatest(x, y))
        store_vector(at + 384, magnitude(x) - F32(1.5) * y)
        store_vector(at + 448, root(x))
        store_vector(at + 512, choose((x < y) | (x >= y), x, F32(5)))
        store_vector(at + 576, float_of(bits_of(x) ^ bits_of(y)))
        masks = out_mask + i // 64 * 56
        store_vector(masks, repeat(mask_bits(x < y), 2))
        store_vector(masks + 8, repeat(mask_bits(x <= y), 2))
        store_vector(masks + 16, repeat(mask_bits(x > y), 2))
        store_vector(masks + 24, repeat(mask_bits(x >= y), 2))
        store_vector(masks + 32, repeat(mask_bits(x == y), 2))
        store_vector(masks + 40, repeat(mask_bits(x != y), 2))
        store_vector(masks + 48, repeat(np.int64(any_of(x < y)) + 2 * np.int64(all_of(x != y)), 2))


def test_float_operators_round_once_and_treat_nan_and_zeros_as_c_does():
    a, b = np.ascontiguousarray(PAIRS[0]), np.ascontiguousarray(PAIRS[1])
    out, masks = np.zeros((16, 10, 16), F32), np.zeros((16, 7, 2), I32)
    on_pairs(a.ctypes.data, b.ctypes.data, a.size, out.ctypes.data, masks.ctypes.data)
    with np.errstate(all="ignore"):
        expected = [
            a + b,
            a - b,
            a * b,
            a / b,
            np.where(a < b, a, b),
            np.where(a > b, a, b),
            np.abs(a) - F32(1.5) * b,
            np.sqrt(a),
            np.where((a < b) | (a >= b), a, F32(5)),
            (a.view(I32) ^ b.view(I32)).view(F32),
        ]
    for k, want in enumerate(expected):
        got = np.ascontiguousarray(out[:, k]).reshape(-1)
        same = (got.view(I32) == want.view(I32)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), (k, a[~same][:4], b[~same][:4], got[~same][:4], want[~same][:4])
    compared = [a < b, a <= b, a > b, a >= b, a == b, a != b]
    for k, want in enumerate(compared):
        np.testing.assert_array_equal(masks[:, k, 0], np.packbits(want, bitorder="little").view(np.uint16))
    less, unequal = (a < b).reshape(16, 16), (a != b).reshape(16, 16)
    np.testing.assert_array_equal(masks[:, 6, 0], less.any(axis=1) + 2 * unequal.all(axis=1))


@kernel
def on_words(a, b, n, out):
    for i in range(0, 4 * n, 32):
        x, y = load_words(a + i, 8), load_words(b + i, 8)
        at = out + 8 * i
        store_vector(at, x + y)
        store_vector(at + 32, x - 3 * y)
        store_vector(at + 64, (x << 5) | (y & 31))
        store_vector(at + 96, x >> 7)
        store_vector(at + 128, least(x, y))
        store_vector(at + 160, greatest(x, 1000))
        store_vector(at + 192, bits_of(as_float(x)))
        store_vector(at + 224, repeat(highest_word(y), 8))


def test_int_operators():
    rng = np.random.default_rng(1)
    a, b = rng.integers(-(2**31), 2**31, (2, 800)).astype(I32)
    out = np.zeros((100, 8, 8), I32)
    on_words(a.ctypes.data, b.ctypes.data, a.size, out.ctypes.data)
    expected = [a + b, a - I32(3) * b, a << 5 | b & 31, a >> 7, np.minimum(a, b), np.maximum(a, 1000)]
    expected += [a.astype(F32).view(I32), np.repeat(b.reshape(-1, 8).max(axis=1), 8)]
    for k, want in enumerate(expected):
        np.testing.assert_array_equal(out[:, k].reshape(-1), want)


@kernel
def on_codes(a, n, out):
    for i in range(0, 4 * n, 32):
        x = load_floats(a + i, 8)
        at = out + 6 * i
        store_vector(at, whole(x))
        store_vector(at + 32, at_most(x, F32(31)))
        store_vector(at + 64, at_least_zero(x))
        store_vector(at + 96, at_least(x, F32(-32)))
        store_vector(at + 128, as_float(truncated(x)))
        store_vector(at + 160, repeat(highest(x) - lowest(x), 8))


def test_rounding_and_bounds_of_codes():
    rng = np.random.default_rng(2)
    x = np.concatenate([np.arange(-140, 140) / 4, rng.uniform(-(2**21), 2**21, 1000), rng.uniform(-40, 40, 1000)])
    x = x.astype(F32)
    out = np.zeros((x.size // 8, 6, 8), F32)
    on_codes(x.ctypes.data, x.size, out.ctypes.data)
    by_eight = x.reshape(-1, 8)
    expected = [np.rint(x), np.minimum(x, 31), np.maximum(x, 0), np.maximum(x, -32), np.trunc(x)]
    expected += [np.repeat(by_eight.max(axis=1) - by_eight.min(axis=1), 8)]
    for k, want in enumerate(expected):
        np.testing.assert_array_equal(out[:, k].reshape(-1), want.astype(F32))


@kernel
def through_half(a, n, out, out_bits):
    for i in range(n // 16):
        bits = halves(load_floats(a + 64 * i, 16))
        store_vector(out + 64 * i, half_floats(bits))
        store_vector(out_bits + 64 * i, extended(bits))


def test_halves_all_of_them_and_what_lies_between():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(F32)
    finite = np.sort(values[np.isfinite(values)])
    rng = np.random.default_rng(4)
    x = np.concatenate([values, np.nextafter(finite, F32(9e9)), np.nextafter(finite, F32(-9e9))])
    x = np.concatenate([x, (finite[1:] + finite[:-1]) / 2, rng.integers(0, 1 << 32, 20000, np.uint32).view(F32)])
    x = np.ascontiguousarray(x[: x.size // 16 * 16], F32)
    out, bits = np.zeros(x.size, F32), np.zeros(x.size, I32)
    through_half(x.ctypes.data, x.size, out.ctypes.data, bits.ctypes.data)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(out, expected.astype(F32))  # NaN equals NaN here
    number = ~np.isnan(x)
    np.testing.assert_array_equal(bits[number], expected.view(np.int16)[number])


@kernel
def move(a, stride, turned, words, back, back_stride, spread, small):
    prefetch(a + 1000000)
    rows_to_lanes(a, stride, turned, 4 * LANES + 4)
    lanes_to_rows(words, back, back_stride)
    scatter(spread, 12, load_floats(a, LANES))
    eight = load_words(words, 8)
    store_vector(small, as_bytes(first_half(eight)))
    store_vector(small + 4, as_bytes(second_half(eight)))


def test_turning_scattering_and_bytes():
    rng = np.random.default_rng(5)
    a = rng.standard_normal((LANES, LANES + 3)).astype(F32)
    turned, spread = np.zeros((LANES, LANES + 1), F32), np.zeros((LANES, 3), F32)
    words = rng.integers(-(2**31), 2**31, (8, LANES)).astype(I32)
    back, small = np.zeros((LANES, 9), I32), np.zeros(8, np.uint8)
    targets = (turned.ctypes.data, words.ctypes.data, back.ctypes.data, 36, spread.ctypes.data, small.ctypes.data)
    move(a.ctypes.data, a.strides[0], *targets)
    np.testing.assert_array_equal(turned[:, :LANES], a[:, :LANES].T)
    np.testing.assert_array_equal(back[:, :8], words.T)
    np.testing.assert_array_equal(spread[:, 0], a[0, :LANES])
    np.testing.assert_array_equal(small, words.reshape(-1)[:8].astype(np.uint8))
    assert not turned[:, LANES:].any() and not back[:, 8:].any() and not spread[:, 1:].any()


@kernel
def lowest_of(bits):
    return lowest_bit(bits)


@kernel
def mixed(a):
    return load_floats(a, 8) + 0.5


@kernel
def lengths(a):
    return load_floats(a, 8) + load_floats(a, 16)


@kernel
def first(a):
    return get_f32(a)


def test_lowest_bit_and_wrong_types():
    assert [lowest_of(v) for v in (1, 12, 1 << 31, 0)] == [0, 2, 31, 64]
    a = np.arange(16, dtype=F32)
    assert first(a.ctypes.data) == 0
    for wrong in (mixed, lengths):  # a float64 that would widen everything, vectors of two lengths
        with pytest.raises(Exception, match="No implementation of function Function"):
            wrong(a.ctypes.data)
