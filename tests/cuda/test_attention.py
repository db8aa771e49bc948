"""Attention of one token and of prompts against the definition, with rotation, norms, and any number of splits."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_kernels.cpu.tape import rotations
from ggufkit_kernels.cuda import launches
from ggufkit_kernels.cuda.loader import module
from ggufkit_kernels.cuda.weights import Inputs, quantize
from ggufkit_kernels.ops_ref import RefOps

pytestmark = pytest.mark.kernels
EPS = 1e-5
SHAPES = {  # head_dim, key heads, queries a key head
    "128, 4": (128, 2, 4),
    "64, 3": (64, 3, 3),
    "256, 16": (256, 1, 16),
    "34, 3": (34, 2, 3),
    "80, 1": (80, 2, 1),
    "8, 2": (8, 1, 2),
    "250, 2": (250, 1, 2),
    "2, 5": (2, 2, 5),
}


class Case:
    """Random queries, keys and values, and a cache that holds `before` positions of noise."""

    def __init__(self, device, shape, n, before, positions, seed=0):
        rng = np.random.default_rng(seed)
        self.device = device
        self.dim, self.kv_heads, self.group = shape
        self.n, self.start, self.positions = n, before, positions
        heads = self.kv_heads * self.group
        self.q, self.k, self.v = (
            rng.standard_normal((n, count, self.dim)).astype(np.float32)
            for count in (heads, self.kv_heads, self.kv_heads)
        )
        self.q_norm, self.k_norm = (rng.uniform(0.5, 1.5, self.dim).astype(np.float32) for _ in range(2))
        old = rng.standard_normal((2, before, self.kv_heads, self.dim)).astype(np.float16)
        ref = RefOps(np.float16)
        self.ref, self.cache = ref, ref.cache(1, self.kv_heads, self.dim, positions)
        self.cache.reserve(before + n)
        self.cache.k[0, :before], self.cache.v[0, :before] = old
        room = np.zeros((2, self.kv_heads, positions, self.dim), np.float16)
        room[:, :, :before] = old.transpose(0, 2, 1, 3)
        self.keys, self.values = device.upload(room[0]), device.upload(room[1])
        self.position = device.upload(np.array([before], np.int32))
        self.scale = self.dim**-0.5

    def rotation(self, pairs, factor=1.0):
        freqs = 10000.0 ** (-np.arange(pairs) / max(pairs, 1))
        return freqs, self.device.upload(rotations(np.arange(self.positions), freqs, factor))

    def expected(self, pairs=0, interleaved=False, norms=False, factor=1.0):
        q, k = self.q, self.k
        if norms:
            q, k = self.ref.rmsnorm(q, self.q_norm, EPS), self.ref.rmsnorm(k, self.k_norm, EPS)
        if pairs:
            freqs = self.rotation(pairs)[0]
            q, k = (self.ref.rope(x, self.start, freqs, interleaved, factor) for x in (q, k))
        return q, self.ref.attend(q, k, self.v, self.cache, 0, self.start, self.scale)

    def stored(self):
        """Keys and values of all positions so far, (2, positions, heads, dim)."""
        both = np.stack([self.device.download(self.keys), self.device.download(self.values)])
        return both[:, :, : self.start + self.n].transpose(0, 2, 1, 3)

    def check_cache(self):
        stop = self.start + self.n
        found = self.stored().astype(np.float32)
        wanted = np.stack([self.cache.k[0, :stop], self.cache.v[0, :stop]]).astype(np.float32)
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-3)
        assert np.array_equal(found[:, : self.start], wanted[:, : self.start])
        rest = np.stack([self.device.download(x)[:, stop:] for x in (self.keys, self.values)])
        assert not rest.any()  # nothing is written behind


def attend(case, splits, pairs=0, interleaved=False, norms=False, factor=1.0, tickets=None, shared=1):
    device, heads, group = case.device, case.kv_heads * shared, case.group // shared
    table = case.rotation(pairs, factor)[1] if pairs else None
    parts = device.empty((heads, splits, group * (case.dim + 2)), np.float32)
    tickets = device.zeros((heads,), np.int32) if tickets is None else tickets
    out = device.empty((heads * group * case.dim,), np.float32)
    whole = group * case.dim % 32 == 0
    to = Inputs(device, 1, heads * group * case.dim) if whole else None
    kernel = module("attention.cu", HEAD_DIM=case.dim, GROUP=group).kernel("attend")
    before = [device.upload(x) for x in (case.q[0], case.k[0], case.v[0])]
    before += map(device.upload, (case.q_norm, case.k_norm)) if norms else (None, None)
    before += [table, case.position, case.keys, case.values, parts, tickets]
    behind = case.positions, shared, pairs, int(interleaved), EPS, case.scale

    def launch(out, to):
        device.launch(kernel, (heads, splits), 256, *before, out, *((to.q, to.a) if to else (None, None)), *behind)
        assert not device.download(tickets).any()  # ready for the next launch

    launch(out, to)
    if to is not None:  # as `quantize` makes of the numbers, with these or alone
        wanted, alone = (Inputs(device, 1, to.cols) for _ in range(2))
        device.launch(*quantize(out, wanted, 1))
        launch(None, alone)
        for made in (to, alone):
            for name in ("q", "a"):
                bits = [device.download(getattr(each, name)).view(np.uint8) for each in (made, wanted)]
                assert np.array_equal(*bits), name
    return device.download(out)[None]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("before", [0, 127, 300])
def test_one_token(device, shape, before):
    case = Case(device, shape, 1, before, 320)
    pairs = shape[0] // 2
    _, expected = case.expected(pairs, interleaved=True, norms=True)
    found = attend(case, 3, pairs, interleaved=True, norms=True)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    case.check_cache()


@pytest.mark.parametrize("splits", [1, 2, 7, 128])
def test_splits(device, splits):
    """Any number of splits gives the same, up to rounding; rotated halves, some dimensions left alone."""
    case = Case(device, (64, 2, 4), 1, 700, 704)
    _, expected = case.expected(24, factor=1.25)
    np.testing.assert_allclose(attend(case, splits, 24, factor=1.25), expected, rtol=1e-3, atol=1e-3)
    case.check_cache()


def test_blocks_that_share_a_key_head(device):
    case = Case(device, (32, 2, 6), 1, 200, 256)
    _, expected = case.expected(16)
    np.testing.assert_allclose(attend(case, 2, 16, shared=2), expected, rtol=1e-3, atol=1e-3)
    case.check_cache()


def test_the_tickets_serve_again(device):
    tickets = device.zeros((2,), np.int32)
    for seed in range(2):
        case = Case(device, (64, 2, 2), 1, 400, 512, seed)
        np.testing.assert_allclose(attend(case, 4, tickets=tickets), case.expected()[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(device, bad):
    case = Case(device, (16, 2, 2), 1, 200, 256)
    case.q[0, 1, 3] = bad
    found = attend(case, 2).reshape(4, 16)
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2, 3]]).all()


def prompt(case, tile, pairs, interleaved, rotate_q=True):
    """Attention of a prompt as ops.py does it, by tiles of tokens."""
    device, dim, heads, group, n = case.device, case.dim, case.kv_heads, case.group, case.n
    kernels = module("prompt.cu")
    q, k, v = map(device.upload, (case.q, case.k, case.v))
    table = case.rotation(pairs)[1] if pairs else None
    device.launch(kernels.kernel("rope_append"), (n, heads * (group * rotate_q + 2)), 64, q if rotate_q else None, k, v,
                  table, case.position, case.keys, case.values, heads * group, heads, dim, pairs, int(interleaved),
                  case.positions)  # fmt: skip
    out = device.empty((n, heads * group * dim), np.float32)
    for first in range(0, n, tile):
        count = min(tile, n - first)
        rows, width = count * group, min(-(-(case.start + first + count) // 8) * 8, case.positions)
        gathered = device.empty((heads, rows, dim), np.float16)
        scores = device.empty((heads, rows, width), np.float32)
        weights = device.empty((heads, rows, width), np.float16)
        sums = device.empty((heads, rows), np.float32)
        result = device.empty((heads, rows, dim), np.float32)
        device.launch(kernels.kernel("gather"), (count, heads), 128, q[first : first + count], gathered, group, dim,
                      case.scale)  # fmt: skip
        device.gemm(gathered, case.keys[:, :width], scores)
        device.launch(kernels.kernel("softmax"), (rows, heads), 256, scores, weights, sums, case.position, first, group,
                      width)  # fmt: skip
        device.gemm(weights, case.values[:, :width], result, transposed=False)
        device.launch(
            kernels.kernel("scatter"), (count, heads), 128, result, sums, out[first : first + count], group, dim
        )
    return device.download(q), device.download(out)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("n", "before", "tile"), [(5, 0, 8), (13, 40, 4)])
def test_prompt(device, shape, n, before, tile):
    case = Case(device, shape, n, before, 64)
    pairs = shape[0] // 2
    rotated, expected = case.expected(pairs, interleaved=n == 5)
    q, found = prompt(case, tile, pairs, interleaved=n == 5)
    np.testing.assert_allclose(q, rotated, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3)
    case.check_cache()


def test_prompt_of_rotated_queries(device):
    case = Case(device, (32, 2, 3), 7, 3, 24)
    _, expected = case.expected()
    q, found = prompt(case, 3, 0, False, rotate_q=False)
    assert np.array_equal(q, case.q)
    np.testing.assert_allclose(found, expected, rtol=4e-3, atol=4e-3)
    case.check_cache()


def test_two_halves(device):
    """`low_halves` holds what rounding left: both together are the number to 22 bits, over the row's factor."""
    x = np.random.default_rng(1).standard_normal((3, 41)).astype(np.float32) * np.float32([[1], [1e6], [1e-3]])
    on_device, factors = device.upload(x), device.empty((3,), np.float32)
    high, low = device.empty(x.shape, np.float16), device.empty(x.shape, np.float16)
    launches.halves(device, on_device, high, factors)
    device.launch(module("prompt.cu").kernel("low_halves"), (1, 3), 256, on_device, high, factors, low, 41)
    both = device.download(high).astype(np.float64) + device.download(low)
    found = both * device.download(factors)[:, None]
    np.testing.assert_allclose(found, x, rtol=2.0**-21, atol=2.0**-25)
