"""The shim that runs kernels on the CPU: its instructions against plain Python and NumPy, and that it sees mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import numpy as np
import pytest
from emulated import EmulatedDevice
from ggufkit_formats.errors import DeviceError, DeviceMemoryError
from ggufkit_kernels.cuda import loader

PROBE = loader.module(str(Path(__file__).with_name("probe.cu")))
pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="the shim is not tested: there is no g++")


@pytest.fixture(params=[False, True], ids=["forward", "reversed"])
def both(request):
    """An emulated device of either order."""
    return EmulatedDevice(reverse=request.param)


def run(device, name, grid, block, *args):
    """Launch a kernel of probe.cu; arrays are uploaded, all of them come back."""
    arrays = [device.upload(a) if isinstance(a, np.ndarray) else a for a in args]
    device.launch(PROBE.kernel(name), (grid,) if isinstance(grid, int) else grid, block, *arrays)
    return [device.download(a) for a in arrays if isinstance(a, emulated.EmulatedArray)]


def test_all_halves(device):
    h = np.arange(1 << 16, dtype=np.uint16)
    _, f, back = run_any(
        device, "halves", 256, 256, h, np.zeros(1 << 16, np.float32), np.zeros(1 << 16, np.uint16), 1 << 16
    )
    wanted = h.view(np.float16).astype(np.float32)
    nan = np.isnan(wanted)
    assert np.array_equal(np.isnan(f), nan)
    assert np.array_equal(f[~nan].view(np.uint32), wanted[~nan].view(np.uint32))
    assert np.array_equal(back[~nan], h[~nan])
    assert np.isnan(back[nan].view(np.float16)).all()


def test_rounding_to_half(device):
    """All halves' neighbours, the middles between them and their neighbours, and numbers of all magnitudes."""
    h = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (h[1:] + h[:-1]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(1)
    wild = rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    edges = np.array([65504, 65519.996, 65520, 65536, 1e30, np.inf, 2**-25, 2**-24, 1e-40], np.float32)
    f = np.concatenate([h, middles, *near, wild, edges])
    f = np.concatenate([f, -f])
    f = np.concatenate([f, np.zeros(-len(f) % 256, np.float32)])
    _, got = run_any(device, "to_half", len(f) // 256, 256, f, np.zeros(len(f), np.uint16), len(f))
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = f.astype(np.float16)
    nan = np.isnan(f)
    assert np.array_equal(got[~nan], wanted.view(np.uint16)[~nan])
    assert np.isnan(got.view(np.float16)[nan]).all()


def run_any(device, name, grid, block, *args):
    """As `run`, on any device."""
    arrays = [device.upload(a) if isinstance(a, np.ndarray) else a for a in args]
    device.launch(PROBE.kernel(name), (grid,), block, *arrays)
    return [device.download(a) for a, was in zip(arrays, args, strict=True) if isinstance(was, np.ndarray)]


@pytest.mark.parametrize("block", [32, 96, 256])
def test_sum_over_a_block(device, block):
    x = np.random.default_rng(2).integers(-1000, 1000, 3 * block).astype(np.float32)
    _, out = run_any(device, "sums", 3, block, x, np.zeros_like(x))
    assert np.array_equal(out.reshape(3, block), np.repeat(x.reshape(3, block).sum(1)[:, None], block, axis=1))


def test_warp_instructions(device):
    rng = np.random.default_rng(3)
    x = rng.integers(0, 100, 64).astype(np.int32)
    _, out = run_any(device, "warp", 1, 64, x, np.zeros(640, np.int32))
    out = out.reshape(64, 10)
    for k in range(64):
        own, warp = k % 32, x[k // 32 * 32 :][:32]
        ballot = sum(1 << lane for lane in range(32) if warp[lane] & 1)
        wanted = [
            warp[x[k] % 32],
            warp[own ^ 5],
            warp[own - 3] if own >= 3 else x[k],
            warp[own + 3] if own + 3 < 32 else x[k],
            warp[own + 3] if own % 8 + 3 < 8 else x[k],
            ballot - (1 << 32) if ballot >> 31 else ballot,
            int(77 in warp),
            1,
            int((x & 1).sum()),
            warp[own ^ 1],
        ]
        assert out[k].tolist() == [int(v) for v in wanted], k


def bytes_of(v: int) -> list[int]:
    return [v >> 8 * i & 255 for i in range(4)]


def signed(v: int) -> list[int]:
    return [(u ^ 128) - 128 for u in bytes_of(v)]


def join(values) -> int:
    return sum((v & 255) << 8 * i for i, v in enumerate(values))


def test_integer_instructions(device):
    rng = np.random.default_rng(4)
    n = 512
    a, b, c = (rng.integers(0, 1 << 32, n, dtype=np.uint32) for _ in range(3))
    a[:4], b[:2] = [0, 0x80808080, 0xFFFFFFFF, 1], 0x80808080
    *_, out = run_any(device, "integers", 2, 256, a, b, c, np.zeros(10 * n, np.uint32), n)
    out = out.reshape(10, n)
    for k in range(n):
        x, y, z = int(a[k]), int(b[k]), int(c[k])
        both = y << 32 | x
        chosen = [both >> 8 * (z >> 4 * i & 7) & 255 for i in range(4)]
        wanted = [
            join(chosen),
            (z + sum(p * q for p, q in zip(signed(x), signed(y), strict=True))) & 0xFFFFFFFF,
            join(p - q for p, q in zip(bytes_of(x), bytes_of(y), strict=True)),
            join(p + q for p, q in zip(bytes_of(x), bytes_of(y), strict=True)),
            both >> (z & 31) & 0xFFFFFFFF,
            both << (z & 31) >> 32 & 0xFFFFFFFF,
            int(f"{x:032b}"[::-1], 2),
            32 - x.bit_length(),
            x.bit_count(),
            x * y >> 32,
        ]
        assert out[:, k].tolist() == wanted, k


def layout(threads, values):
    """Where each lane's values lie: offsets (32, number of values) of (count, stride) pairs, the first running fastest,
    in the notation of CuTe (NVIDIA/cutlass, include/cute/atom: mma_traits_sm80.hpp, copy_traits_sm75.hpp)."""

    def offsets(pairs):
        found = np.zeros(1, np.int64)
        for count, stride in pairs:
            found = (np.arange(count)[:, None] * stride + found).reshape(-1)
        return found

    return offsets(threads)[:, None] + offsets(values)


LANES_4_8 = [(4, 32), (8, 1)]  # of A and D, 16 rows, the rows running fastest
ROWS_OF_D = layout(LANES_4_8, [(2, 16), (2, 8)])
FRAGMENTS = {  # eighths: where A (16 rows) and B (8 columns, running fastest) are held
    1: (layout(LANES_4_8, [(2, 16), (2, 8)]), layout([(4, 16), (8, 1)], [(2, 8)])),
    2: (layout(LANES_4_8, [(2, 16), (2, 8), (2, 128)]), layout([(4, 16), (8, 1)], [(2, 8), (2, 64)])),
}


@pytest.mark.parametrize("eights", FRAGMENTS)
def test_matrix_products(device, eights):
    """Every number of A and B is where the layouts say, and every product arrives."""
    rng = np.random.default_rng(6)
    in_a, in_b = FRAGMENTS[eights]
    a, b = rng.integers(-9, 10, (16, 8 * eights)), rng.integers(-9, 10, (8 * eights, 8))
    before = rng.integers(-99, 100, (16, 8))
    held_a, held_b = np.zeros((32, 8), np.float16), np.zeros((32, 4), np.float16)
    held_a[:, : in_a.shape[1]] = a.reshape(-1, order="F")[in_a]
    held_b[:, : in_b.shape[1]] = b.reshape(-1)[in_b]
    held_d = before.reshape(-1, order="F")[ROWS_OF_D].astype(np.float32)
    *_, out = run_any(device, "products", 1, 32, held_a.view(np.uint32), held_b.view(np.uint32), held_d, eights)
    assert np.array_equal(out, (a @ b + before).reshape(-1, order="F")[ROWS_OF_D])


def test_products_of_any_halves(device):
    """Subnormal halves count; NaN and infinity stay in their row and column."""
    in_a, in_b = FRAGMENTS[2]
    a, b = np.full((16, 16), 2.0**-24), np.ones((16, 8))
    a[3, 5], a[7, 1], b[2, 6] = np.nan, np.inf, -np.inf
    held_a, held_b = a.reshape(-1, order="F")[in_a].astype(np.float16), b.reshape(-1)[in_b].astype(np.float16)
    *_, out = run_any(
        device, "products", 1, 32, held_a.view(np.uint32), held_b.view(np.uint32), np.zeros((32, 4), np.float32), 2
    )
    d = np.zeros(128)
    d[ROWS_OF_D] = out
    with np.errstate(invalid="ignore"):
        assert np.array_equal(d.reshape((16, 8), order="F"), a @ b, equal_nan=True)


def test_matrices_from_shared_memory(device):
    rng = np.random.default_rng(7)
    x, rows = rng.permutation(320).astype(np.uint16), rng.permutation(40)[:32].astype(np.int32)
    outs = np.zeros((2, 32, 4), np.uint32)
    *_, plain, transposed = run_any(device, "matrices", 1, 32, x.view(np.uint32), rows, *outs, 1)
    chosen = x.reshape(40, 8)[rows].reshape(-1)  # four matrices of 8 x 8, in halves
    assert np.array_equal(plain.view(np.uint16), chosen[layout([(32, 2)], [(2, 1), (4, 64)])])
    assert np.array_equal(transposed.view(np.uint16), chosen[layout([(4, 16), (8, 1)], [(2, 8), (4, 64)])])


def test_bank_conflicts_of_matrices_are_named(both):
    x, outs = np.zeros(160, np.uint32), np.zeros((2, 32, 4), np.uint32)
    rows = np.arange(32, dtype=np.int32).reshape(4, 8)
    rows[2] = rows[2, ::-1]
    rows[3, 1] = 35  # the banks of 27, which goes
    rows[3, 3] = 25
    run(both, "matrices", 1, 32, x, rows.reshape(-1), *outs, 0)
    rows[3, 3] = 34
    with pytest.raises(DeviceError, match="bank conflicts"):
        run(both, "matrices", 1, 32, x, rows.reshape(-1), *outs, 0)


@pytest.mark.parametrize("absent", [0, 5])
def test_copies(device, absent):
    x = np.arange(512, dtype=np.uint32)
    if getattr(device, "arch", 80) < 80:
        pytest.skip("this device has no cp.async")
    _, out = run_any(device, "copies", 1, 64, x, np.zeros(256, np.uint32), 0, absent)
    wanted = x.reshape(2, 64, 4)[1].copy()
    wanted[64 - absent :] = 0
    assert np.array_equal(out.reshape(64, 4), np.roll(wanted, -1, 0))


@pytest.mark.parametrize("kind", [1, 2, 3])
def test_copies_that_are_not_waited_for_show(kind):
    """What was not waited for is not there, and what others wait for only behind a barrier, in one order at least."""
    x, seen = np.arange(512, dtype=np.uint32), []
    for reverse in (False, True):
        device = EmulatedDevice(reverse=reverse)
        seen.append(run(device, "copies", 1, 64, x, np.zeros(256, np.uint32), kind, 0)[1].reshape(64, 4))
    wanted = np.roll(x.reshape(2, 64, 4)[1], -1, 0)
    assert any((out[:-1] == 0x7FD57FD5).any() or (out != wanted).any() for out in seen)


def test_copies_under_way_at_the_end(both):
    with pytest.raises(DeviceError, match="ends while copies of its are under way"):
        run(both, "copies", 1, 64, np.arange(512, dtype=np.uint32), np.zeros(256, np.uint32), 4, 0)


def test_floats_to_integers(device):
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e20, -1e20, np.nan, np.inf, -np.inf, 126.5, -127.49], np.float32)
    _, rn, rz = run_any(device, "to_int", 1, 32, x, np.zeros(12, np.int32), np.zeros(12, np.int32), 12)
    top, low = 2**31 - 1, -(2**31)
    assert rn.tolist() == [0, 2, 2, 0, -2, top, low, 0, top, low, 126, -127]
    assert rz.tolist() == [0, 1, 2, 0, -1, top, low, 0, top, low, 126, -127]


def test_atomics(device):
    ticket, order, best, total = run_any(
        device, "tickets", 7, 64,
        np.zeros(1, np.uint32), np.full(7, -1, np.int32), np.zeros(1, np.uint64), np.zeros(1, np.float32),
    )  # fmt: skip
    assert ticket[0] == 0 and sorted(order.tolist()) == list(range(7))
    assert best[0] == 6063 and total[0] == 7 * 64


def test_order_of_blocks(both):
    _, order, *_ = run(
        both, "tickets", 3, 32,
        np.zeros(1, np.uint32), np.full(3, -1, np.int32), np.zeros(1, np.uint64), np.zeros(1, np.float32),
    )  # fmt: skip
    assert order.tolist() == ([2, 1, 0] if both.reversed else [0, 1, 2])


def test_barrier(both):
    (out,) = run(both, "neighbours", 1, 96, np.zeros(96, np.int32), 1)
    assert out.tolist() == [*range(1, 96), 0]


def test_missing_barrier_shows():
    """In at least one of the orders, the neighbour's number is not there yet."""
    right = [*range(1, 96), 0]
    got = [run(EmulatedDevice(reverse=r), "neighbours", 1, 96, np.zeros(96, np.int32), 0)[0] for r in (False, True)]
    assert any(out.tolist() != right for out in got)


def test_unwritten_shared_memory_is_nan(both):
    (out,) = run(both, "unwritten", 3, 64, np.zeros(64, np.float32))
    assert np.isnan(out).all()


def test_new_memory_is_nan(both):
    for dtype in (np.float32, np.float16):
        assert np.isnan(both.download(both.empty((3, 5), dtype))).all()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (0, r"thread 0 waits at __syncthreads in line \d+, but thread 40 has ended"),
        (1, r"waits at __syncthreads in line \d+, but thread \d+ waits at __syncthreads in line"),
        (2, r"thread 32 waits at __shfl_xor_sync in line \d+, but thread 40 has ended"),
        (3, r"a lane that its own mask does not name"),
        (4, r"__trap .*thread 40"),
    ],
)
def test_who_does_not_come_is_named(both, kind, said):
    with pytest.raises(DeviceError, match=said):
        run(both, "lonely_barrier", 1, 64, kind, 40)
    run(both, "lonely_barrier", 1, 64, 5, 40)  # and the next launch is none the worse


def test_too_much_stack(both):
    if emulated.SANITIZED:
        pytest.skip("the sanitizer's business")
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_shim as t, numpy as np\n"
    code += "t.run(t.EmulatedDevice(), 'deep', 1, 64, np.zeros(64, np.int32), 3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and (done.returncode < 0 or "bytes of stack" in done.stderr)


def test_arguments(both):
    x, y, z = np.float32([1]), np.uint32([0, 0, 0, 2]), np.float16([0.5])
    *_, out = run(both, "arguments", 1, 32, x, y, z, 4, 8.0, None, np.zeros(2, np.float32))
    assert out.tolist() == [15.5, 1.0]


@pytest.mark.parametrize(
    ("position", "wrong", "said"),
    [
        (0, np.zeros(1, np.int32), "is passed for f4"),
        (2, np.zeros(1, np.float32), "is passed for i2"),
        (3, 1.0, "an int of 32 bits is wanted"),
        (3, 1 << 31, "an int of 32 bits is wanted"),
        (4, 1, "a float is wanted"),
        (5, "text", "an array of this device is wanted"),
    ],
)
def test_wrong_arguments(both, position, wrong, said):
    args = [
        np.zeros(1, np.float32),
        np.zeros(4, np.uint32),
        np.zeros(1, np.float16),
        1,
        1.0,
        None,
        np.zeros(2, np.float32),
    ]
    args[position] = wrong
    with pytest.raises(TypeError, match=said):
        run(both, "arguments", 1, 32, *args)


def test_wrong_launches(both):
    with pytest.raises(TypeError, match="takes 7 arguments"):
        run(both, "arguments", 1, 32, 1)
    with pytest.raises(ValueError, match="threads a block"):
        run(both, "sums", 1, 288, np.zeros(288, np.float32), np.zeros(288, np.float32))
    with pytest.raises(ValueError, match="grid"):
        run(both, "sums", (1, 65536), 32, np.zeros(32, np.float32), np.zeros(32, np.float32))
    with pytest.raises(ValueError, match="not a multiple of 16"):
        both.launch(
            PROBE.kernel("arguments"), (1,), 32, None, both.upload(np.zeros(8, np.uint8))[4:], None, 1, 1.0, None, None
        )
    with pytest.raises(DeviceError, match="no kernel"):
        run(both, "absent", 1, 32)


def test_memory_is_counted_and_given_back():
    device = EmulatedDevice(total=1000)
    array = device.empty((100,), np.float32)
    assert device.memory() == (600, 1000)
    with pytest.raises(DeviceMemoryError, match="700 bytes do not fit"):
        device.zeros((700,), np.uint8)
    part = array[50:].reshape(5, 10)
    assert part.strides == (40, 4) and part[1:].shape == (4, 10)
    del array
    assert device.memory() == (600, 1000)
    del part
    assert device.memory() == (1000, 1000)


def test_arrays_are_not_numpys():
    array = EmulatedDevice().zeros((3,), np.float32)
    with pytest.raises(TypeError):
        np.asarray(array)
    with pytest.raises(TypeError):
        array + 1  # type: ignore


def test_captured_launches_of_a_level_are_not_in_order(both):
    """What is said to run side by side runs in either order; levels are kept."""
    out = both.zeros((2,), np.int32)
    one = both.upload(np.int32([1, 2]))
    sums, same = PROBE.kernel("neighbours"), both.zeros((64,), np.int32)
    graph = both.capture([[(sums, (1,), 32, same, 1), (sums, (1,), 64, same, 2)], [(sums, (1,), 32, same[32:], 1)]])
    for _ in range(2):
        graph.launch()
        first = same.host[:32].tolist()
        assert first == ([*range(1, 32), 0] if both.reversed else [63, *range(31)])
        assert same.host[32:].tolist() == [*range(1, 32), 0]
    both.copy(out, one)
    assert both.download(out).tolist() == [1, 2]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_gemm(device, lead, transposed):
    rng = np.random.default_rng(5)
    x, w = (
        rng.standard_normal((*lead, 5, 16)).astype(np.float16),
        rng.standard_normal((*lead, 8, 16)).astype(np.float16),
    )
    wanted = np.einsum("...mk,...nk->...mn", x.astype(np.float64), w.astype(np.float64))
    right = device.upload(w if transposed else np.ascontiguousarray(np.swapaxes(w, -1, -2)))
    out = device.upload(np.ones((*lead, 5, 8), np.float32))
    device.gemm(device.upload(x), right, out, transposed=transposed)
    assert np.allclose(device.download(out), wanted, atol=1e-4)
    device.gemm(device.upload(x), right, out, beta=1.0, transposed=transposed)
    assert np.allclose(device.download(out), 2 * wanted, atol=1e-4)


def test_other_switch_of_fibers():
    """With the C library's contexts, as where there is no x86-64, barriers do the same."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_shim as t, numpy as np\n"
    code += "print(t.run(t.EmulatedDevice(), 'neighbours', 1, 96, np.zeros(96, np.int32), 1)[0].tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "GGUFKIT_EMULATED": "ucontext"},
    )  # fmt: skip
    assert done.stdout.strip() == str([*range(1, 96), 0])
