"""Matrices on the device, of every layout: products, unpacking and embedding against the definition in NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulated
import numpy as np
import pytest
from ggufkit_formats.blocks import TYPES, TensorType, find
from ggufkit_kernels.cpu import pack
from ggufkit_kernels.cpu.simd import LANES
from ggufkit_kernels.cuda import weights
from ggufkit_kernels.cuda.weights import CudaWeight, Inputs
from ggufkit_kernels.ops_ref import RefOps
from memory_tensors import decoded, from_raw, random_blocks
from test_ops import ALL, normal, rounded_inputs

SHAPES = [(1, 1), (3, 2), (LANES + 1, 1), (2 * LANES + 1, 3)]  # rows, blocks
KINDS = ["Q4_K", "Q6_K", "Q8_0", "Q2_K", "IQ2_XS", "NVFP4", "NF4", "TQ2_0", "F16", "F32"]  # one of each way to be read
# of these, the ones that are run again under the sanitizers
AGAIN = {"tiles": ["Q4_K", "IQ2_XS", "NF4", "F16"], "fused": ["Q6_K", "NVFP4"]}
ref = RefOps()


def kinds(names: list[str], what: str) -> list:
    """Types as parameters, some of them marked `kernels`."""
    return [pytest.param(name, marks=[pytest.mark.kernels] if name in AGAIN[what] else []) for name in names]


def inputs_of(device, x: np.ndarray) -> Inputs:
    """x (n, cols) as int8 on the device."""
    to = Inputs(device, *x.shape)
    device.launch(*weights.quantize(device.upload(x), to, len(x)))
    return to


def product(device, weight: CudaWeight, x: np.ndarray, bias=None, add=None) -> np.ndarray:
    """x @ weight.T (+ bias) (+ add), by the matvec."""
    out = device.empty((len(x), weight.shape[0]), np.float32)
    taken = inputs_of(device, x) if weight.takes_bytes else device.upload(x)
    bias = None if bias is None else device.upload(bias)
    if add is not None:  # in place, as a residual is added
        device.write(out, add)
    device.launch(*weight.matvec(taken, out, len(x), bias, None if add is None else out))
    return device.download(out)


def embedded(device, weight: CudaWeight, ids) -> np.ndarray:
    out = device.empty((len(ids), weight.shape[1]), np.float32)
    device.launch(*weight.embed(device.upload(np.asarray(ids, np.int32)), out, len(ids)))
    return device.download(out)


def unpacked(device, weight: CudaWeight, first: int, last: int) -> np.ndarray:
    out = device.empty((last - first, weight.shape[1]), weight.unpacked_dtype)
    device.launch(*weight.unpack(first, last, out))
    return device.download(out)


def check_product(got, weight: CudaWeight, values: np.ndarray, x: np.ndarray, extra: np.ndarray | float = 0.0) -> None:
    """As near as float32 sums of the rounded inputs allow."""
    exact = values.astype(np.float64)
    inputs = rounded_inputs(x) if weight.takes_bytes else x.astype(np.float64)
    want = inputs @ exact.T + extra
    size = np.abs(inputs) @ np.abs(exact).T + np.abs(extra) + 1e-30
    # a minimum is subtracted after the sums: rounding goes with the parts, not with the difference
    bound = 1e-5 * size + (1e-5 * np.abs(want).max() if weight.layout.minimum else 0)
    if weight.layout.values == "table16":
        bound = 1e-4 * size
    assert got.shape == want.shape and got.dtype == np.float32
    assert np.all(np.abs(got - want) <= bound + 1e-6), np.abs(got - want).max()


def check_weight(device, type: TensorType, rows: int, cols: int, seed: int, counts) -> None:
    """All that a matrix does, for inputs of `counts` tokens."""
    tensor = random_blocks(type, rows, cols, np.random.default_rng(seed))
    packed = pack.pack(tensor)
    weight, values, multiplied = (
        CudaWeight(device, packed),
        ref.weight(tensor).values,
        decoded(tensor),
    )
    ids = np.arange(rows)[::-1]
    assert np.array_equal(embedded(device, weight, ids).view(np.uint32), values[ids].view(np.uint32)), "embed"
    wanted = values if weight.layout.values == "f32" else np.clip(values, -65504, 65504)
    first = 0 if rows <= LANES else LANES
    got = unpacked(device, weight, first, rows)
    wanted = wanted.astype(got.dtype)[first:]
    assert np.array_equal(got.view(f"u{got.itemsize}"), wanted.view(f"u{got.itemsize}")), "unpack"
    for n in counts:
        x = normal(n, n, cols)
        bias, add = (normal(7, rows), normal(8, n, rows)) if n != 2 else (None, None)
        extra = 0.0 if bias is None else bias + add
        check_product(product(device, weight, x, bias, add), weight, multiplied, x, extra)


def cols_of(type: TensorType, blocks: int) -> int:
    return max(blocks * type.block, blocks * 20 if type.block == 1 else 0)


@pytest.mark.parametrize("name", ALL)
def test_all_layouts(device, name: str) -> None:
    type: TensorType = ALL[name]
    for seed, (rows, blocks) in enumerate(SHAPES):
        check_weight(device, type, rows, cols_of(type, blocks), seed, (1, 3))


@pytest.mark.parametrize("name", kinds(KINDS, "tiles"))
def test_all_tiles(device, name: str) -> None:
    type = find(name)
    rows, cols = LANES + 3, cols_of(type, 3)
    check_weight(device, type, rows, cols, 5, (1, 2, 4, 5, 8, 9))


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16", "TQ2_0"])
def test_long_rows(device, name: str) -> None:
    """Several steps a warp, all warps of a block, and a last step that not all lanes take."""
    type = find(name)
    for cols in (2048 + 256, 11008 - 256):
        check_weight(device, type, 3, cols, 6, (1, 8))


@pytest.mark.parametrize("name", KINDS)
def test_sums_do_not_depend_on_the_number_of_tokens(device, name: str) -> None:
    type = find(name)
    tensor = random_blocks(type, 5, 1024 if type.block > 1 else 1020, np.random.default_rng(3))
    weight = CudaWeight(device, pack.pack(tensor))
    x = normal(4, 8, tensor.cols)
    many = product(device, weight, x)
    for n in (1, 2, 3):
        assert np.array_equal(product(device, weight, x[:n]).view(np.uint32), many[:n].view(np.uint32)), n


@pytest.mark.parametrize("name", ["Q4_K", "NVFP4", "TQ2_0"])
def test_blocks_that_stay(device, name: str) -> None:
    """Fewer blocks than strips, each of which takes several: the same sums."""
    type = find(name)
    tensor = random_blocks(type, 6 * LANES + 3, 768, np.random.default_rng(4))
    weight = CudaWeight(device, pack.pack(tensor))
    for n in (1, 3):
        x, bias, add = normal(n, n, 768), normal(7, tensor.rows), normal(8, n, tensor.rows)
        weight.blocks = 0
        want = product(device, weight, x, bias, add)
        for blocks in (1, 2, 5):
            weight.blocks = blocks
            assert np.array_equal(product(device, weight, x, bias, add).view(np.uint32), want.view(np.uint32)), blocks


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "NF4"])
def test_codes_and_inputs_at_their_ends(device, name: str) -> None:
    """All codes, scales and inputs as large as they may be, of either sign: sums of bytes are exact integers."""
    type = find(name)
    rng = np.random.default_rng(9)
    raw = np.where(rng.random((4, type.row_nbytes(512))) < 0.5, 0, 255).astype(np.uint8)
    raw[0], raw[1] = 0, 255
    blocks = raw.reshape(-1).view(type.fields)
    for field in type.fields.names or ():
        if blocks[field].dtype.kind == "f":
            blocks[field] = 0.5
    tensor = from_raw(type, blocks, (4, 512))
    packed = pack.pack(tensor)
    weight, values = CudaWeight(device, packed), decoded(tensor)
    x = np.where(rng.random((3, 512)) < 0.5, -127, 127).astype(np.float32)
    x[1], x[2] = 127, -127
    check_product(product(device, weight, x), weight, values, x)


@pytest.mark.kernels
def test_prefetch_stays_inside(device) -> None:
    weight = CudaWeight(device, pack.pack(random_blocks(find("Q6_K"), 2 * LANES, 256, np.random.default_rng(3))))
    for nbytes in (1, 129, weight.codes.nbytes, 1 << 40):
        launch = weight.prefetch(nbytes, 2)
        device.launch(*launch)
        assert 128 * (launch[-1] - 1) < min(nbytes, weight.codes.nbytes) <= 128 * launch[-1]
    device.synchronize()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(device, bad: float) -> None:
    weight = CudaWeight(device, pack.pack(random_blocks(find("Q4_0"), 9, 64, np.random.default_rng(3))))
    x = normal(5, 6, 64)
    x[2, 40] = bad
    out = product(device, weight, x)
    assert np.isnan(out[2]).all()
    assert np.isfinite(np.delete(out, 2, axis=0)).all()


@pytest.mark.parametrize("name", ["BF16", "Q8_0"])
def test_weights_that_float16_does_not_hold(device, name: str) -> None:
    type = find(name)
    x = np.zeros((2, 32), np.float32)
    x[0, :6] = [65504, 65519, 65520, -65530, 1e6, -3e38 if name == "BF16" else -1e6]
    x[1, :4] = [6e-8, 2.9e-8, -6e-8, 1e-30]
    if name == "BF16":
        x[1, 4:7] = [np.inf, -np.inf, np.nan]
    tensor = from_raw(type, type.encode(x), x.shape)
    got = unpacked(device, CudaWeight(device, pack.pack(tensor)), 0, 2)
    values = ref.weight(tensor).values
    finite = np.isfinite(values)
    assert np.array_equal(got[finite], np.clip(values, -65504, 65504)[finite].astype(np.float16))
    assert np.array_equal(got[~finite], values[~finite].astype(np.float16), equal_nan=True)


# -- inputs -----------------------------------------------------------------------------------------------


def words(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `quantize` makes of x (n, cols): int8 (n, padded), scales, sums of the halves of each 32 (n, chunks, 2)."""
    parts = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    largest = np.abs(parts).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > 1e-30, np.float32(127) / largest, np.float32(0))
    q = np.rint(parts * inverse).astype(np.int8)
    return (
        q.reshape(len(x), -1),
        largest[..., 0] / np.float32(127),
        q.reshape(*q.shape[:2], 2, 16).sum(3, dtype=np.int32),
    )


def check_inputs(device, to: Inputs, x: np.ndarray) -> None:
    q, scales, sums = words(x)
    assert np.array_equal(device.download(to.q)[: len(x)], q)
    a = device.download(to.a)[: len(x)]
    assert np.array_equal(a[..., 0], scales)
    both = np.ascontiguousarray(a[..., 1]).view(np.int32)
    assert np.array_equal(both >> 16, sums.sum(2)) and np.array_equal(both.astype(np.int16), sums[..., 0])


@pytest.mark.kernels
@pytest.mark.parametrize("cols", [1, 31, 32, 100, 1056, 2100])
def test_quantize(device, cols: int) -> None:
    for n in (1, 3):
        x = normal(cols, n, cols) * np.float32(10.0) ** normal(2, n, cols)
        x[0, : cols // 2] = 0
        check_inputs(device, inputs_of(device, x), x)


def test_quantize_at_the_ends(device) -> None:
    x = np.zeros((1, 160), np.float32)
    x[0, 3], x[0, 40], x[0, 70], x[0, 100], x[0, 140] = 3e38, -1e-38, 1e-45, np.nan, -np.inf
    a = device.download(inputs_of(device, x).a)[0, :, 0]
    assert np.isfinite(a[:3]).all() and np.isnan(a[3:]).all()
    check_inputs(device, inputs_of(device, x[:, :96]), x[:, :96])


@pytest.mark.kernels
@pytest.mark.parametrize("cols", [1, 45, 64, 576, 4132])
def test_norm_quantize(device, cols: int) -> None:
    for n in (1, 2):
        x, weight = normal(1, n, cols), normal(2, cols)
        want = ref.rmsnorm(x, weight, 1e-5)
        to, y = Inputs(device, n, cols), device.empty((n, cols), np.float32)
        device.launch(*weights.norm_quantize(device.upload(x), device.upload(weight), 1e-5, to, n, y))
        got = device.download(y)
        assert np.allclose(got, want, rtol=2e-6, atol=1e-6)
        check_inputs(device, to, got)
        device.launch(*weights.norm_quantize(device.upload(x), device.upload(weight), 1e-5, to, n))
        check_inputs(device, to, got)


@pytest.mark.kernels
@pytest.mark.parametrize("squared", [False, True])
def test_gate_quantize(device, squared: bool) -> None:
    for n, cols in ((1, 7), (3, 100), (2, 2080)):
        gate, up = 20 * normal(1, n, cols), normal(2, n, cols)
        gate[0, :5] = [-200, -88, 0, 88, 200]
        want = ref.relu2(gate, up) if squared else ref.swiglu(gate, up)
        to, y = Inputs(device, n, cols), device.empty((n, cols), np.float32)
        device.launch(*weights.gate_quantize(device.upload(gate), device.upload(up), squared, to, n, y))
        got = device.download(y)
        assert np.allclose(got, want, rtol=1e-6, atol=1e-35)
        check_inputs(device, to, got)


# -- products with what follows them ------------------------------------------------------------------------

CODED = [name for name in KINDS if name not in ("F16", "F32")]


@pytest.mark.parametrize("name", kinds(CODED, "fused"))
def test_matvec_norm(device, name: str) -> None:
    """A product, a residual and a norm in one launch, and the next product, which does the rest of the norm."""
    type = find(name)
    cols = cols_of(type, 2)
    for rows in (5, LANES, 33, 64):
        tensor = random_blocks(type, rows, cols, np.random.default_rng(rows))
        following = random_blocks(find("Q4_0"), 9, weights.padded_cols(rows), np.random.default_rng(1))
        packed = pack.pack(tensor)
        weight, then = CudaWeight(device, packed), CudaWeight(device, pack.pack(following))
        x, bias, add, times = normal(1, 1, cols), normal(2, rows), normal(3, 1, rows), normal(4, rows)
        out, to = device.upload(add), Inputs(device, 1, rows, normed=True)
        args = inputs_of(device, x), out, device.upload(times), 1e-5, to, device.upload(bias), out
        device.launch(*weight.matvec_norm(*args))
        got = device.download(out)
        check_product(got, weight, decoded(tensor), x, bias + add)
        check_inputs(device, to, got * times)
        padded = np.pad(got.astype(np.float64), ((0, 0), (0, -rows % 32)))
        squares = np.square(padded).reshape(-1, 32).sum(1)
        assert np.allclose(device.download(to.squares), squares, rtol=1e-6, atol=1e-9)
        to.cols = then.shape[1]  # rows that are no multiple of 32 have zeros behind them
        product = device.empty((1, 9), np.float32)
        device.launch(*then.matvec(to, product, 1))
        norm = 1 / np.sqrt(squares.sum() / then.shape[1] + 1e-5)
        inputs = rounded_inputs(np.pad(got * times, ((0, 0), (0, -rows % 32)))) * norm
        want = inputs @ ref.weight(following).values.astype(np.float64).T
        assert np.allclose(device.download(product), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", kinds(CODED, "fused"))
def test_products_of_one_input(device, name: str) -> None:
    """Two or three matrices in one launch, with and without biases: bit for bit what each makes alone; and inputs whose
    norm is left to the product."""
    type = find(name)
    cols = cols_of(type, 2)
    for heights in ((2 * LANES + 3, 5, LANES), (1, 33), (LANES, 1, 2)):
        tensors = [random_blocks(type, rows, cols, np.random.default_rng(k)) for k, rows in enumerate(heights)]
        several = [CudaWeight(device, pack.pack(tensor)) for tensor in tensors]
        x = inputs_of(device, normal(1, 1, cols))
        biases = [device.upload(normal(k, rows)) if k != 1 else None for k, rows in enumerate(heights)]
        outs = [device.empty((1, rows), np.float32) for rows in heights]
        for squares in (None, device.upload(np.abs(normal(9, -(-cols // 32))))):
            x.squares, x.eps = squares, 1e-5
            device.launch(*weights.matvecs(several, x, outs, biases))
            for weight, out, bias in zip(several, outs, biases, strict=True):
                alone = device.empty(out.shape, np.float32)
                device.launch(*weight.matvec(x, alone, 1, bias))
                assert np.array_equal(device.download(out), device.download(alone))


@pytest.mark.parametrize("name", kinds(CODED, "fused"))
def test_matvec_gated(device, name: str) -> None:
    type = find(name)
    cols = cols_of(type, 2)
    for rows, squared in ((5, False), (LANES, True), (33, False), (64, True)):
        tensors = [random_blocks(type, rows, cols, np.random.default_rng(rows + k)) for k in range(2)]
        gate, up = (CudaWeight(device, pack.pack(tensor)) for tensor in tensors)
        x = inputs_of(device, normal(1, 1, cols) / 8)
        out, to = device.empty((1, rows), np.float32), Inputs(device, 1, rows)
        device.launch(*gate.matvec_gated(up, x, to, squared, out))
        got, parts = device.download(out), []
        for weight in (gate, up):
            part = device.empty((1, rows), np.float32)
            device.launch(*weight.matvec(x, part, 1))
            parts.append(device.download(part))
        want = (ref.relu2 if squared else ref.swiglu)(*parts)
        assert np.allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
        check_inputs(device, to, got)
        device.launch(*gate.matvec_gated(up, x, to, squared))
        check_inputs(device, to, got)


def test_gates_of_different_types_do_not_go_together(device) -> None:
    def weight(name: str) -> CudaWeight:
        return CudaWeight(device, pack.pack(random_blocks(find(name), 32, 256, np.random.default_rng(1))))

    assert weight("Q4_K").goes_with(weight("Q4_K"))
    assert not weight("Q4_K").goes_with(weight("Q6_K"))
    assert not weight("IQ2_XXS").goes_with(weight("IQ1_S"))  # one layout, two codebooks
    assert not weight("F16").goes_with(weight("F16"))


# -- what is compiled ---------------------------------------------------------------------------------------


def test_modules_are_those_of_all_types() -> None:
    listed = list(weights.modules())
    assert len(listed) == len(set(listed))
    for type in TYPES.values():
        packed = pack.pack(random_blocks(type, 2, cols_of(type, 1), np.random.default_rng(1)))
        assert weights.layout_of_type(type) == packed.layout, type
        assert weights.unpack_module(packed.layout) in listed
        assert all(weights.matvec_module(packed.layout, tokens) in listed for tokens in weights.TILES)


def test_warps_share_evenly() -> None:
    for steps in range(1, 500):
        for stages in (1, 2):
            for most in (8, 12, 16):
                warps = weights.warps_of(steps, stages, most)
                assert 1 <= warps <= most
                if steps > most * stages:
                    assert warps > most // 2 and -(-steps // warps) * warps < 1.2 * steps


@pytest.mark.parametrize("family", ["plain", "avx512"])
def test_other_lanes(family: str) -> None:
    """Strips of 8 rows where the host packs 16, and the other way round."""
    if emulated.COMPILER is None:
        pytest.skip("the kernels are not run: there is no g++")
    if {"plain": 8, "avx512": 16}[family] == LANES:
        pytest.skip("the other tests have these strips")
    kinds = [f"test_all_layouts and {name}" for name in ("Q3_K", "IQ4_XS")]
    kinds += [
        f"{test} and {name}"
        for test in ("matvec_norm", "matvec_gated", "products_of_one")
        for name in ("Q4_K", "NVFP4")
    ]
    names = " or ".join(["test_all_tiles", "test_long_rows", *kinds])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    done = subprocess.run(
        command,
        env=os.environ | {"GGUFKIT_SIMD": family},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout
