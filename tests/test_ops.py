"""The CPU backend against the definition in NumPy, for every type and many shapes."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from ggufkit_formats.blocks import TYPES, TensorType, find
from ggufkit_formats.blocks.fp4 import e4m3, e8m0
from ggufkit_formats.errors import UsageError
from ggufkit_kernels.cpu import ops as cpu_ops
from ggufkit_kernels.cpu.jit import kernel
from ggufkit_kernels.cpu.ops import CpuOps
from ggufkit_kernels.cpu.simd import get_number, put_f16
from ggufkit_kernels.cpu.team import default_threads
from ggufkit_kernels.ops_ref import RefOps
from memory_tensors import MadeUp, decoded, from_raw, random_blocks

SHAPES = [(1, 1), (3, 2), (17, 1), (33, 3)]  # rows, blocks
LEVELS = np.linspace(-1, 1, 16).astype(np.float32) ** 3  # no integers
MADE_UP = {
    "1 bit": MadeUp(1, 128, 128),
    "1 bit, offset, scales": MadeUp(1, 64, 16, offset=1, scale="i1"),
    "2 bits in 48": MadeUp(2, 48, 48, offset=1),
    "3 bits of 96 by 32": MadeUp(3, 96, 32, offset=4, scale="u1", dmin=True),
    "4 bits of 80 by 16": MadeUp(4, 80, 16, scale="i1", dmin=True, minimum=True),
    "5 bits of 64 by 64": MadeUp(5, 64, 64, offset=16, scale="u1"),
    "6 bits, minima": MadeUp(6, 32, 32, dmin=True),
    "7 bits, offset": MadeUp(7, 32, 32, offset=64),
    "7 bits": MadeUp(7, 64, 16, scale="i1"),
    "8 bits, scales": MadeUp(8, 64, 32, offset=128, scale="i1"),
    "8 bits in 16": MadeUp(8, 16, 16, offset=128, d="<f4"),
    "8 bits from 0": MadeUp(8, 32, 32),
    "table": MadeUp(4, 32, 32, codebook=np.arange(-120, 120, 15).astype(np.int8)),
    "table of 16 by 16": MadeUp(4, 64, 16, scale="i1", codebook=np.arange(-120, 120, 15).astype(np.float32)),
    "float table": MadeUp(4, 64, 64, d="<f4", codebook=LEVELS),
    "float table, 3 bits, 16": MadeUp(3, 16, 16, codebook=LEVELS[:8]),
    "float table near bytes, 3 bits, 16": MadeUp(3, 16, 16, codebook=np.linspace(-1.1, 1, 8).astype(np.float32)),
    "large table": MadeUp(6, 32, 32, codebook=np.arange(-64, 64, 2).astype(np.int8)),
    "large float table": MadeUp(5, 32, 32, codebook=np.linspace(-1, 1, 32).astype(np.float32) ** 3),
    "groups of 8": MadeUp(4, 32, 8, offset=8, scale="u1"),
}
ALL = TYPES | MADE_UP
ops = CpuOps(2)
ref = RefOps()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded_inputs(x: np.ndarray) -> np.ndarray:
    """What the kernels make of inputs: int8 per 32 with a float32 scale."""
    n, cols = x.shape
    parts = np.pad(x, ((0, 0), (0, -cols % 32))).reshape(n, -1, 32)
    largest = np.abs(parts).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 1e-30, 127.0 / largest.astype(np.float64), 0).astype(np.float32)
    scale = (largest.astype(np.float64) / 127).astype(np.float32)
    q = np.rint(parts * inverse)
    return (q * scale.astype(np.float64)).reshape(n, -1)[:, :cols]


@pytest.mark.parametrize("name", ALL)
def test_matmul_and_embed(name: str) -> None:
    t: TensorType = ALL[name]
    for seed, (rows, blocks) in enumerate(SHAPES):
        cols = max(blocks * t.block, blocks * 20 if t.block == 1 else 0)
        tensor = random_blocks(t, rows, cols, np.random.default_rng(seed))
        weight, values = ops.weight(tensor), ref.weight(tensor)
        assert weight.shape == (rows, cols)
        ids = np.arange(rows)[::-1]
        exact = ref.embed(values, ids)
        assert np.array_equal(ops.embed(weight, ids).view(np.uint32), exact.view(np.uint32)), "embed"
        for n in (1, 2, 5, 33):
            x = normal(n, n, cols)
            bias = normal(7, rows) if n == 5 else None
            got = ops.matmul(weight, x, bias)
            plain = weight.packed.layout.is_plain
            inputs = x.astype(np.float64) if plain else rounded_inputs(x)
            want = inputs @ decoded(tensor).T + (0 if bias is None else bias)
            size = np.abs(inputs) @ np.abs(values.values.astype(np.float64)).T + 1e-30
            # a minimum is subtracted after the sums: rounding goes with the parts, not with the difference
            low = weight.packed.layout.minimum
            bound = 1e-5 * size + (1e-5 * np.abs(want).max() if low else 0)
            if weight.packed.layout.values == "table16":
                bound = 1e-4 * size
            assert got.shape == want.shape and got.dtype == np.float32
            assert np.all(np.abs(got - want) <= bound + 1e-6), (rows, cols, n, np.abs(got - want).max())


@pytest.mark.parametrize("name", ["Q4_1", "Q4_0", "Q6_K", "Q8_0", "NF4", "F16"])
def test_one_token_and_many_round_alike(name: str) -> None:
    tensor = random_blocks(find(name), 40, 512, np.random.default_rng(3))
    weight = ops.weight(tensor)
    x = normal(4, 37, 512)
    many = ops.matmul(weight, x)
    one = np.concatenate([ops.matmul(weight, x[i : i + 1]) for i in range(37)])
    if weight.packed.layout.is_plain:  # float32 sums in another order
        assert np.allclose(many, one, rtol=1e-5, atol=1e-4)
    else:
        assert np.array_equal(many, one)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    weight = ops.weight(random_blocks(find("Q4_0"), 9, 64, np.random.default_rng(3)))
    x = normal(5, 6, 64)
    x[2, 40] = bad
    out = ops.matmul(weight, x)
    assert not np.isfinite(out[2]).any()
    assert np.isfinite(np.delete(out, 2, axis=0)).all()


def test_large_matmul_is_shared_out() -> None:
    """Several token blocks and many items, with a last tile that overlaps the one before."""
    weight = ops.weight(random_blocks(find("Q4_0"), 203, 1024, np.random.default_rng(6)))
    x = normal(6, 391, 1024)
    want = rounded_inputs(x) @ ops.embed(weight, np.arange(203)).astype(np.float64).T
    for threads in (1, 2, 3):
        got = CpuOps(threads).matmul(weight, x)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("dim", [1, 5, 8, 24, 64, 577])
def test_rmsnorm(dim: int) -> None:
    for shape in ((1, dim), (3, 2, dim), (70, dim)):
        x, weight = normal(1, *shape), normal(2, dim)
        got, want = ops.rmsnorm(x, weight, 1e-5), ref.rmsnorm(x, weight, 1e-5)
        assert np.allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("head_dim, pairs", [(64, 32), (20, 9), (6, 3)])
def test_rope(interleaved: bool, n: int, head_dim: int, pairs: int) -> None:
    freqs = 1 / 10000 ** (np.arange(pairs) / pairs)
    x = normal(n, n, 3, head_dim)
    want = ref.rope(x, 4000, freqs, interleaved, 1.2)
    for _ in range(2):  # the second time, the angles come from the table that is kept
        got = ops.rope(x.copy(), 4000, freqs, interleaved, 1.2)
        assert np.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.allclose(ops.rope(x.copy(), 1, freqs, interleaved), ref.rope(x, 1, freqs, interleaved), atol=1e-6)


def test_rope_angles_are_exact_far_out() -> None:
    x = np.zeros((1, 1, 2), np.float32)
    x[..., 0] = 1
    got = ops.rope(x, 1_000_003, np.array([0.1]), True)
    assert np.allclose(got[0, 0], [np.cos(100000.3), np.sin(100000.3)], atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 8, 100, 40003])
def test_swiglu_and_add(size: int) -> None:
    gate, up = 20 * normal(1, 1, size), normal(2, 1, size)
    assert np.allclose(ops.swiglu(gate.copy(), up), ref.swiglu(gate, up), rtol=1e-6, atol=1e-6)
    assert np.array_equal(ops.add(gate.copy(), up), gate + up)


@pytest.mark.parametrize("size", [1, 7, 16, 100, 40003])
def test_relu2(size: int) -> None:
    gate, up = 20 * normal(1, 1, size), normal(2, 1, size)
    got = ops.relu2(gate.copy(), up)
    assert np.array_equal(got, ref.relu2(gate, up)) and np.array_equal(got, np.where(gate > 0, gate * gate, 0) * up)


def test_swiglu_at_the_ends() -> None:
    gate = np.array([-np.inf, -200, -88, -1e-30, 0, 1e-30, 88, 200, 3e38], np.float32)
    got = ops.swiglu(gate.copy(), np.ones(9, np.float32))
    assert np.isnan(got[0]) or got[0] == 0
    assert np.allclose(got[1:], gate[1:] * np.array([0, 0, 0.5, 0.5, 0.5, 1, 1, 1]), rtol=1e-6, atol=1e-35)


def attend_plainly(q, k, v, scale, start):
    """Causal attention in plain loops, float64: q (n, heads, dim), k and v from position 0 on."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros((n, heads, dim))
    for i in range(n):
        for h in range(heads):
            scores = np.array([scale * q[i, h] @ k[p, h // group] for p in range(start + i + 1)])
            weights = np.exp(scores - scores.max())
            for p in range(start + i + 1):
                out[i, h] += weights[p] / weights.sum() * v[p, h // group]
    return out.reshape(n, heads * dim)


@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 8), (9, 3, 20), (7, 1, 64)])
def test_attend_against_loops(heads: int, kv_heads: int, dim: int) -> None:
    cache = ops.cache(2, kv_heads, dim, 100)
    keys, values = (normal(s, 2, 40, kv_heads, dim).astype(np.float16).astype(np.float64) for s in (1, 2))
    start = 0
    for n in (1, 6, 1, 17, 9):
        for layer in range(2):
            q = normal(n, n, heads, dim)
            here = slice(start, start + n)
            k, v = (x[layer, here].astype(np.float32) for x in (keys, values))
            got = ops.attend(q, k, v, cache, layer, start, 0.3)
            want = attend_plainly(q.astype(np.float64), keys[layer], values[layer], 0.3, start)
            assert np.allclose(got, want, atol=3e-6), (n, layer)
        start += n
        cache.length = start


def test_attend_long_and_after_a_cut() -> None:
    """Growth by doubling, a cut back, and stale positions that must not be seen."""
    other = RefOps(np.float16)
    mine, theirs = ops.cache(1, 2, 32, 3000), other.cache(1, 2, 32, 3000)
    sizes = [mine.nbytes]
    start = 0
    for step, (n, back) in enumerate([(1, 0), (700, 0), (40, 500), (300, 0), (1000, 0), (1, 0)]):
        start -= back
        for cache in (mine, theirs):
            cache.truncate(start)
        q, k, v = normal(step, n, 6, 32), normal(step + 50, n, 2, 32), normal(step + 90, n, 2, 32)
        got = ops.attend(q, k, v, mine, 0, start, 0.2)
        want = other.attend(q, k, v, theirs, 0, start, 0.2)
        assert np.allclose(got, want, atol=1e-5), step
        start += n
        mine.length = theirs.length = start
        sizes.append(mine.nbytes)
    assert sizes[0] == 0 and sizes[1] == 256 * 2 * 32 * 2 * 2
    assert sizes == sorted(sizes) and sizes[-1] < 3000 * 2 * 32 * 2 * 2
    with pytest.raises(UsageError, match="context of 3000"):
        k = normal(1, 2000, 2, 32)
        ops.attend(normal(1, 2000, 6, 32), k, k, mine, 0, start, 1.0)
    with pytest.raises(UsageError, match="cannot be cut"):
        mine.truncate(start + 1)


def test_softmax_of_large_scores() -> None:
    cache = ops.cache(1, 1, 8, 64)
    q, k = np.full((20, 1, 8), 30, np.float32), 30 * normal(3, 20, 1, 8)
    v = normal(4, 20, 1, 8)
    want = ref.attend(q, k.astype(np.float16), v.astype(np.float16), ref.cache(1, 1, 8, 64), 0, 0, 1.0)
    assert np.allclose(ops.attend(q, k, v, cache, 0, 0, 1.0), want, atol=1e-4)


@kernel
def widen(source, target, count):
    for i in range(count):
        target[i] = get_number(source + 2 * i, 1)


@kernel
def widen_bytes(source, target, count):
    for i in range(count):
        target[i] = get_number(source + i, 3)
        target[count + i] = get_number(source + i, 4)


@kernel
def narrow(values, target, count):
    for i in range(count):
        put_f16(target + 2 * i, values[i])


def test_scales_of_8_bits() -> None:
    codes = np.arange(256, dtype=np.uint8)
    got = np.empty((2, 256), np.float32)
    widen_bytes(codes.ctypes.data, got.reshape(-1), 256)
    assert np.array_equal(got[0].view(np.uint32), e8m0(codes).view(np.uint32))
    assert np.array_equal(got[1, :128], e4m3(codes[:128]))


def test_half_conversion_of_all_values() -> None:
    halves = np.arange(65536, dtype=np.uint16)
    got = np.empty(65536, np.float32)
    widen(halves.ctypes.data, got, 65536)
    want = halves.view(np.float16).astype(np.float32)
    finite = ~np.isnan(want)
    assert np.array_equal(got[finite].view(np.uint32), want[finite].view(np.uint32))
    assert np.isnan(got[~finite]).all()
    back = np.empty(65536, np.uint16)
    narrow(got, back.ctypes.data, 65536)
    assert np.array_equal(back[finite], halves[finite])
    between = (want[1000:20000] + want[1001:20001]) / 2  # ties
    ties = np.empty(19000, np.uint16)
    narrow(between, ties.ctypes.data, 19000)
    assert np.array_equal(ties, between.astype(np.float16).view(np.uint16))


def test_python_threads_may_call_at_once() -> None:
    weight = ops.weight(random_blocks(find("Q4_0"), 256, 512, np.random.default_rng(8)))
    inputs = [normal(s, 9, 512) for s in range(4)]
    want = [ops.matmul(weight, x) for x in inputs]
    wrong: list[int] = []

    def work(which: int) -> None:
        mine = CpuOps(2 + which % 2)
        same = [np.array_equal(mine.matmul(weight, inputs[which]), want[which]) for _ in range(100)]
        if not all(same):
            wrong.append(which)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_works_on() -> None:
    weight = ops.weight(random_blocks(find("Q4_0"), 256, 512, np.random.default_rng(9)))
    x = normal(1, 40, 512)
    want = ops.matmul(weight, x)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(ops.matmul(weight, x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_mistakes_are_named() -> None:
    weight = ops.weight(random_blocks(find("Q4_0"), 8, 64, np.random.default_rng(0)))
    x = normal(1, 2, 64)
    with pytest.raises(UsageError, match="do not fit a weight"):
        ops.matmul(weight, x[:, :32])
    with pytest.raises(UsageError, match="bias"):
        ops.matmul(weight, x, np.zeros(7, np.float32))
    with pytest.raises(UsageError, match="outside 0…7"):
        ops.embed(weight, np.array([3, 8]))
    with pytest.raises(UsageError, match="norm of"):
        ops.rmsnorm(x, np.ones(63, np.float32), 1e-5)
    with pytest.raises(UsageError, match="pairs"):
        ops.rope(normal(1, 1, 1, 8), 0, np.ones(5), True)
    with pytest.raises(UsageError, match="do not fit"):
        ops.attend(normal(1, 1, 4, 8), normal(1, 1, 3, 8), normal(1, 1, 3, 8), ops.cache(1, 3, 8, 8), 0, 0, 1.0)
    with pytest.raises(UsageError, match="differ"):
        ops.add(x, x[:1])
    with pytest.raises(UsageError, match="0 threads"):
        CpuOps(0)


def test_nothing_in_nothing_out() -> None:
    weight = ops.weight(random_blocks(find("Q4_0"), 8, 64, np.random.default_rng(0)))
    assert ops.matmul(weight, np.empty((0, 64), np.float32)).shape == (0, 8)
    assert ops.embed(weight, np.empty(0, np.int64)).shape == (0, 64)


def test_vector_and_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = from_raw(find("F16"), np.arange(6, dtype=np.float16), (6,))
    assert np.array_equal(ops.vector(tensor), np.arange(6, dtype=np.float32))
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
    monkeypatch.setattr("ggufkit_kernels.cpu.team._cgroup_quota", lambda: 0.5)
    assert default_threads() == 1
    assert cpu_ops.default_threads is default_threads


@pytest.mark.parametrize("name", TYPES)
def test_a_matrix_times_a_number(name: str) -> None:
    t, factor = TYPES[name], 0.3
    tensor = random_blocks(t, 35, max(t.block, 64), np.random.default_rng(3))
    mine, theirs = ops.weight(tensor, factor), ref.weight(tensor, factor)
    assert np.array_equal(theirs.values, ref.weight(tensor).values * np.float32(factor))
    exact = theirs.values
    got = ops.embed(mine, np.arange(35))
    assert np.allclose(got, exact, rtol=1e-6, atol=1e-6 * np.abs(exact[np.isfinite(exact)]).max(initial=0))
    x = normal(5, 3, exact.shape[1])
    inputs = x if mine.packed.layout.is_plain else rounded_inputs(x)
    want = inputs @ (factor * decoded(tensor)).T
    assert np.allclose(ops.matmul(mine, x), want, rtol=1e-4, atol=2e-3 * np.abs(want).max())
