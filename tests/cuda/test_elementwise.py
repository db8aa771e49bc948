"""elementwise.cu against `ops_ref`, on ragged sizes."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_kernels.cuda import launches
from ggufkit_kernels.ops_ref import RefOps

REF = RefOps()
small = pytest.mark.kernels


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "dim"),
    [
        pytest.param(3, 70, marks=small), pytest.param(2, 600, marks=small),
        (1, 1), (9, 128), (4, 512), (5, 513), (2, 4096), (1, 5001),
    ],
)  # fmt: skip
def test_rmsnorm(device, rows, dim):
    x, weight = numbers(rows, dim), numbers(dim, seed=1)
    x[0] *= 1e-3  # where eps counts
    out = device.empty(x.shape, np.float32)
    launches.rmsnorm(device, device.upload(x), device.upload(weight), out, 1e-5)
    wanted = REF.rmsnorm(x, weight, 1e-5)
    assert np.allclose(device.download(out), wanted, rtol=1e-5, atol=1e-6)
    same = device.upload(x.reshape(rows, 1, dim))  # in place, more dimensions
    launches.rmsnorm(device, same, device.upload(weight), same, 1e-5)
    assert np.array_equal(device.download(same)[:, 0], device.download(out))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("n", "heads", "head_dim", "pairs", "start"),
    [pytest.param(3, 3, 10, 4, 5, marks=small), (1, 9, 64, 32, 0), (2, 5, 128, 64, 7), (4, 2, 80, 10, 100)],
)
def test_rope(device, n, heads, head_dim, pairs, start, interleaved):
    x, freqs = numbers(n, heads, head_dim), 10000.0 ** -(np.arange(pairs) / pairs)
    angles = np.arange(start + n)[:, None] * freqs
    table = np.concatenate([1.5 * np.cos(angles), 1.5 * np.sin(angles)], axis=1).astype(np.float32)
    on_device = device.upload(x)
    launches.rope(device, on_device, device.upload(table), device.upload(np.int32([start])), pairs, interleaved)
    wanted = REF.rope(x, start, freqs, interleaved, 1.5)
    assert np.allclose(device.download(on_device), wanted, rtol=1e-6, atol=1e-6)
    assert np.array_equal(device.download(on_device)[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("name", ["swiglu", "relu2", "add"])
@pytest.mark.parametrize("n", [pytest.param(1031, marks=small), 1, 4, 5000, 30_011])
def test_number_by_number(device, name, n):
    a, b = 3 * numbers(n), numbers(n, seed=1)
    a[: min(n, 4)] = np.float32([200, -200, 0, np.nan])[: min(n, 4)]
    wanted = getattr(REF, name)(a, b)
    out = device.empty(a.shape, np.float32)
    launches.map2(device, name, device.upload(a), device.upload(b), out)
    assert np.allclose(device.download(out), wanted, rtol=2e-6, atol=1e-30, equal_nan=True)
    same = device.upload(a)
    launches.map2(device, name, same, device.upload(b), same)
    assert np.array_equal(device.download(same), device.download(out), equal_nan=True)
    if n > 1:  # addresses that take no loads of four
        one, other = device.upload(a)[1:], device.upload(np.append(b[1:], np.float32(0)))[:-1]
        launches.map2(device, name, one, other, one)
        assert np.array_equal(device.download(one), device.download(out)[1:], equal_nan=True)


@pytest.mark.parametrize(
    ("n", "cols", "wide"), [pytest.param(9, 70, 72, marks=small), (2, 4096, 4096), (1, 3001, 3008)]
)
def test_halves_and_back(device, n, cols, wide):
    x = numbers(n, cols)
    scales = np.float32([1, 1e-3, 2**14, 1e5, 1e30, 3e38 / np.abs(x[5 % n]).max(), 0, 1, 1])[:n]
    x *= scales[:, None]
    if n > 8:
        x[7, 3], x[8, 4], x[8, 5] = np.inf, np.nan, 1e6
    out, factors = device.empty((n, wide), np.float16), device.empty((n,), np.float32)
    launches.halves(device, device.upload(x), out, factors)
    h, f = device.download(out), device.download(factors)
    with np.errstate(over="ignore"):
        largest = np.abs(np.nan_to_num(x, nan=0.0, posinf=np.inf)).max(axis=1)
    for k in range(n):
        exponent = np.frexp(largest[k])[1]
        divided = np.isfinite(largest[k]) and largest[k] >= 2**14
        assert f[k] == (2.0 ** (int(exponent) - 14) if divided else 1.0)
        if divided:
            assert 2**13 <= np.abs(h[k][np.isfinite(h[k])].astype(np.float64)).max() <= 2**14
    with np.errstate(over="ignore"):
        wanted = (x / f[:, None]).astype(np.float16)
    assert np.array_equal(h[:, :cols], wanted, equal_nan=True)
    assert not h[:, cols:].any()

    y, bias = numbers(n, cols, seed=2), numbers(cols, seed=3)
    back = device.upload(y)
    launches.undo_halves(device, back, factors, None)
    with np.errstate(over="ignore"):
        assert np.array_equal(device.download(back), y * f[:, None])
        back = device.upload(y)
        launches.undo_halves(device, back, factors, device.upload(bias))
        assert np.allclose(device.download(back), y * f[:, None] + bias, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n", "rows"), [pytest.param(3, 1050, marks=small), (1, 1), (5, 4096)])
def test_bias_and_residual(device, n, rows):
    x, bias, residual = numbers(n, rows), numbers(rows, seed=1), numbers(n, rows, seed=2)
    for with_bias in (True, False):
        for with_residual in (True, False):
            out = device.upload(x)
            launches.add_rows(
                device,
                out,
                device.upload(bias) if with_bias else None,
                device.upload(residual) if with_residual else None,
            )
            wanted = x + (bias if with_bias else np.float32(0)) + (residual if with_residual else np.float32(0))
            assert np.array_equal(device.download(out), wanted)
