"""The fused attention of prompts (flash.cu) against a softmax in float64, against `ops_ref`, and against the way by
products with the scores in memory; scores of any size, and what is not finite."""

from __future__ import annotations

import emulated
import numpy as np
import pytest
from emulated import EmulatedDevice
from ggufkit_formats.errors import DeviceError
from ggufkit_kernels.cuda import attention, loader
from ggufkit_kernels.cuda.modules import PROMPT_DIMS
from ggufkit_kernels.cuda.ops import CudaOps
from ggufkit_kernels.ops_ref import RefOps

emulation = pytest.mark.skipif(emulated.COMPILER is None, reason="the kernels are not run: there is no g++")


class Scratch:
    """`CudaOps.scratch` without keeping."""

    def __init__(self, device):
        self.device, self.names = device, []

    def __call__(self, name, shape, dtype):
        self.names.append(name)
        return self.device.empty(shape, dtype)


class Cache:
    """Keys and values of one layer, NaN in all positions behind `stop`, as `CudaCache` has them."""

    def __init__(self, device, k, v, positions):
        heads, stop, dim = k.shape
        both = np.full((2, 1, heads, positions, dim), np.nan, np.float16)
        both[:, 0, :, :stop] = k, v
        self.keys, self.values = device.upload(both[0]), device.upload(both[1])
        self.n_kv_heads, self.head_dim, self.positions = heads, dim, positions


def softmax_attention(q, k, v, start, scale):
    """q (n, heads, dim), k and v (kv_heads, start + n, dim): (n, heads * dim) in float64."""
    n, n_heads, dim = q.shape
    out = np.empty((n, n_heads, dim))
    for head in range(n_heads):
        key, value = (x[head * len(k) // n_heads].astype(np.float64) for x in (k, v))
        with np.errstate(all="ignore"):
            scores = q[:, head].astype(np.float64) @ key.T * scale
            scores[np.arange(start + n) > start + np.arange(n)[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            out[:, head] = np.where(weights[:, :, None] == 0, 0, weights[:, :, None] * value).sum(1)
    return out.reshape(n, -1)


def numbers(n, kv_heads, group, dim, start, seed=0):
    """Random q float32, k and v float16."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n, kv_heads * group, dim)).astype(np.float32) * 2
    return q, *rng.standard_normal((2, kv_heads, start + n, dim)).astype(np.float16)


def flash(device, q, k, v, start, scale, count=None, shape=None, room=8, **macros):
    """The kernels as `attention.prompt` launches them; `count` spans, or as many as it takes."""
    n, n_heads, dim = q.shape
    cache, scratch = Cache(device, k, v, start + n + room), Scratch(device)
    out, position = device.empty((n, n_heads * dim), np.float32), device.upload(np.array([start], np.int32))
    shape = shape or attention.tiles(dim)
    with pytest.MonkeyPatch.context() as patch:
        if count is not None:
            patch.setattr(attention, "spans", lambda *args: count)
        if macros:
            kernels = attention.flash_module(dim, shape)
            patch.setattr(
                attention, "flash_module", lambda *args: loader.module(kernels.file, **dict(kernels.defines), **macros)
            )
        attention.prompt(device, scratch, device.upload(q), cache, 0, position, start, scale, out)
    assert set(scratch.names) <= {"spans"}  # not the other way
    return device.download(out)


def near(found, wanted, v):
    """Within what the halves of queries and weights may cost."""
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * float(np.abs(v.astype(np.float32)).max()))


CASES = [  # tokens, key heads, queries a key head, start
    (9, 2, 3, 0), (33, 1, 4, 100), (200, 1, 1, 0), (150, 1, 8, 37), (2, 3, 1, 127), (17, 1, 5, 300),
]  # fmt: skip


@pytest.mark.parametrize("dim", PROMPT_DIMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(device, dim, case):
    n, kv_heads, group, start = case
    q, k, v = numbers(n, kv_heads, group, dim, start)
    scale = dim**-0.5
    near(flash(device, q, k, v, start, scale), softmax_attention(q, k, v, start, scale), v)


@pytest.mark.kernels
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("count", [1, 3])
def test_small(device, dim, count):
    """Both sorts of rows in shared memory, with and without spans; a warp without rows, a tile of one position."""
    q, k, v = numbers(13, 2, 3, dim, 52)
    found = flash(device, q, k, v, 52, 0.2, count, room=0)
    near(found, softmax_attention(q, k, v, 52, 0.2), v)


@emulation
@pytest.mark.kernels
def test_the_way_of_turing():
    """What sm_75 does instead of copies without waiting and of mma.m16n8k16."""
    q, k, v = numbers(20, 1, 4, 80, 70)
    for reverse in (False, True):
        found = flash(EmulatedDevice(reverse=reverse), q, k, v, 70, 0.1, TURING=1)
        near(found, softmax_attention(q, k, v, 70, 0.1), v)


@emulation
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_either_order_of_threads(dim):
    q, k, v = numbers(70, 1, 3, dim, 90)
    found = [flash(EmulatedDevice(reverse=reverse), q, k, v, 90, 0.1, 2) for reverse in (False, True)]
    assert np.array_equal(*found)


@pytest.mark.parametrize("count", [None, 2, 7, 40])
def test_long_contexts(device, count):
    """Any number of spans, more than there are tiles too, the last tokens before and behind a tile's edge."""
    for start in (1500, 1529, 1530):
        q, k, v = numbers(7, 1, 4, 64, start)
        near(flash(device, q, k, v, start, 0.125, count), softmax_attention(q, k, v, start, 0.125), v)


def test_how_many_spans():
    shape = attention.tiles(128)
    assert attention.spans(132, 8, 2048 * 4, 2048, 128, shape) == 1  # blocks enough
    assert attention.spans(132, 8, 30 * 4, 8192, 128, shape) == 33  # 8 blocks, 248 positions each
    assert attention.spans(132, 8, 30 * 4, 200, 128, shape) == 1  # too short to be shared
    assert attention.spans(132, 8, 8 * 128, 1 << 17, 128, shape) == 4
    assert [attention.spans(132, 8, rows, 1 << 17, 128, shape) for rows in (16 * 128, 17 * 128, 99 * 128)] == [2, 1, 1]
    shape = attention.tiles(256)
    for rows in range(1, 2000, 13):  # their memory is bounded
        assert attention.spans(1000, 1, rows, 1 << 20, 256, shape) * rows * 4 * 258 <= attention.SPANS_NBYTES


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4, 1e15, 1e30])
def test_queries_of_any_size(device, size):
    """A row of queries has a power of two of its own: nothing overflows, and small ones keep their digits."""
    q, k, v = numbers(12, 1, 2, 64, 60)
    q[3] *= np.float32(size)
    wanted = softmax_attention(q, k, v, 60, 0.3)
    found = flash(device, q, k, v, 60, 0.3)
    if size <= 1:
        near(found, wanted, v)
    else:  # one position has all the weight, unless two are as near as halves of a query tell apart
        rest = [t for t in range(12) if t != 3]
        near(found[rest], wanted[rest], v)
        q[3] /= np.float32(size)
        scores = q[3].reshape(2, 64) @ k[0].T.astype(np.float32)
        best = np.where(np.arange(72) <= 63, scores, -np.inf).argmax(1)
        assert np.array_equal(found[3].reshape(2, 64), v[0, best].astype(np.float32))


@pytest.mark.parametrize("count", [1, 2])
def test_large_scores(device, count):
    """Scores of thousands, of either sign, and rising: weights underflow to zero, maxima change in every tile."""
    rng = np.random.default_rng(3)
    q, k, v = numbers(40, 1, 2, 64, 160)
    q[:] = np.abs(q) * 30
    k[0] = (np.linspace(-6, 6, 200)[:, None] + rng.standard_normal((200, 64)) * 0.01).astype(np.float16)
    for keys in (k, k[:, ::-1], -np.abs(k)):
        near(flash(device, q, keys, v, 160, 1.0, count), softmax_attention(q, keys, v, 160, 1.0), v)


@pytest.mark.parametrize("count", [1, 2])
def test_minus_infinity_has_no_weight(device, count):
    """A key of minus infinity is one that no query sees: a tile's first position, a whole tile, the own one."""
    q, k, v = numbers(30, 1, 3, 64, 170)
    q[..., 5] = np.abs(q[..., 5]) + 0.1
    gone = [64, 199, *range(128, 192), 3]
    k[0, gone, 5] = -np.inf
    found = flash(device, q, k, v, 170, 0.1, count)
    near(found, softmax_attention(q, k, v, 170, 0.1), v)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_not_finite_stays_in_its_row(device, bad, count):
    q, k, v = numbers(21, 1, 3, 64, 170)
    wanted = softmax_attention(q, k, v, 170, 0.1)
    q[8, 1, 17] = bad
    found = flash(device, q, k, v, 170, 0.1, count).reshape(21, 3, 64)
    assert np.isnan(found[8, 1]).all()
    found[8, 1] = wanted.reshape(21, 3, 64)[8, 1]
    near(found.reshape(21, -1), wanted, v)
    q, k, v = numbers(21, 1, 3, 64, 170)
    k[0, 180] = np.nan  # a key that the tokens from position 180 on see
    found = flash(device, q, k, v, 170, 0.1, count)
    near(found[:10], wanted[:10], v)
    assert np.isnan(found[10:]).all()


def test_nothing_but_minus_infinity(device):
    """As ops_ref has it: not a number."""
    q, k, v = numbers(3, 1, 1, 64, 0)
    q[...], k[...] = 1.0, -np.inf
    assert np.isnan(flash(device, q, k, v, 0, 1.0)).all()


def test_zeros(device):
    """Queries of zeros: the mean of what is seen."""
    q, k, v = numbers(10, 1, 2, 64, 5)
    q[...] = 0
    near(flash(device, q, k, v, 5, 1.0), softmax_attention(q, k, v, 5, 1.0), v)


@pytest.mark.parametrize("dim", [64, 48, 34])
def test_the_switch(device, dim):
    """`attend` by either way, beside ops_ref; heads that are no multiple of 16 have one way."""
    rng = np.random.default_rng(4)
    found, launches = {}, {}
    for fused in (True, False):
        ops, ref = CudaOps(device, 1), RefOps(np.float16)
        ops.fused_prompt = fused
        cache, other = (each.cache(1, 2, dim, 300) for each in (ops, ref))
        for n, start in ((21, 0), (40, 21)):
            q, k, v = (rng.standard_normal((n, heads, dim)).astype(np.float32) for heads in (6, 2, 2))
            wanted = ref.attend(q, k, v, other, 0, start, 0.2)
            before = getattr(device, "launches", 0)
            found[fused] = ops.to_numpy(ops.attend(*map(device.upload, (q, k, v)), cache, 0, start, 0.2))
            launches[fused] = getattr(device, "launches", 0) - before
            cache.length = other.length = start + n
            np.testing.assert_allclose(found[fused], wanted, rtol=4e-3, atol=4e-3)
    if isinstance(device, EmulatedDevice):
        assert launches == {True: 2 if dim != 34 else 4, False: 4}


def test_heads_that_have_no_kernel():
    assert [dim for dim in range(2, 257, 2) if attention.tiles(dim)] == list(range(16, 257, 16))
    assert attention.prompt_nbytes(2048, 32, 128) < attention.prompt_nbytes(2048, 32, 120)


@pytest.mark.parametrize(
    "shape", [attention.Tiles(1, 1, 16), attention.Tiles(2, 2, 32), attention.Tiles(3, 1, 48)], ids=str
)
def test_other_tiles(device, shape, monkeypatch):
    monkeypatch.setattr(attention, "TILES", {64: shape})
    q, k, v = numbers(25, 1, 4, 64, 30)
    near(flash(device, q, k, v, 30, 0.1, 2, shape), softmax_attention(q, k, v, 30, 0.1), v)


@emulation
@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("copies_wait<0>();", "copies_wait<1>();"),
        ("copies_wait<0>();\n#endif\n    __syncthreads();", "copies_wait<0>();\n#endif\n"),
        ("tile.begin(room, there, keys", "tile.begin(room, here, keys"),
        ("if (more && !BY_REGISTERS) tile.begin(room, there +", "if (more && !BY_REGISTERS) tile.begin(room, here +"),
        ("here = there, there = done;", "there = done;"),
        ("    copies_commit();\n", ""),
    ],
)
def test_a_wrong_order_of_copies_would_show(text, other, tmp_path, monkeypatch):
    """The emulator sees a wait, a barrier or a slot that is wrong: it says so, or other numbers come out."""
    source = (loader.FOLDER / "flash.cu").read_text(encoding="utf-8")
    assert text in source
    wrong = tmp_path / "wrong.cu"
    wrong.write_text(source.replace(text, other), encoding="utf-8")
    monkeypatch.setattr(
        attention,
        "flash_module",
        lambda dim, shape: loader.module(str(wrong), HEAD_DIM=dim, WARPS=4, M_TILES=2, KEYS=64),
    )
    q, k, v = numbers(20, 1, 3, 64, 300)
    wanted, seen = softmax_attention(q, k, v, 300, 0.2), []
    for reverse in (False, True):
        try:
            found = flash(EmulatedDevice(reverse=reverse), q, k, v, 300, 0.2, 1)
        except DeviceError as error:
            assert "copies of its are under way" in str(error)
            return
        seen.append(bool(np.abs(found - wanted).max() < 0.01))
    assert not all(seen)


def test_the_file_is_known():
    assert "flash.cu" in loader.files() and loader.kernel_names("flash.cu") == ["flash", "join_spans"]
