"""Encoding in NumPy: the bytes of ggml, and its refusals."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_formats import gguf
from ggufkit_formats.blocks import TYPES, find
from ggufkit_formats.errors import FormatError, UsageError
from nasty_weights import (
    COLS,
    finite_rows,
    importances,
    large_rows,
    midpoints,
    powers_of_two,
    with_scales,
)
from oracles.ggml import Ggml

NAMES = [
    t.name for t in TYPES.values() if t.is_quantized and t.id >= 0 and not t.name.startswith(("IQ1", "IQ2", "IQ3"))
]
BY_CHUNK = [name for name in NAMES if name not in ("Q8_1", "Q8_K")]  # those that ggml_quantize_chunk knows
IGNORING = [name for name in BY_CHUNK if not TYPES[name].uses_importance]
LARGE = ("Q8_K", "MXFP4", "NVFP4")  # take any weight: scales of float32, or of 8 bits that end at the largest
ROWS = {name: rows.astype(np.float32) for name, rows in finite_rows()}
ALL_ROWS = np.concatenate(list(ROWS.values()))
WEIGHTED = [name for name in NAMES if TYPES[name].uses_importance and not name.startswith("IQ")]


@pytest.fixture(scope="module")
def ggml():
    oracle = Ggml()
    yield oracle
    oracle.close()


def by_ggml(ggml: Ggml, t, x: np.ndarray) -> np.ndarray:
    if t in ("Q8_1", "Q8_K"):  # activations: ggml_quantize_chunk does not know them
        return ggml.quantize_row("q" + t.name[1:], x, t.row_nbytes(x.shape[-1]))
    return ggml.quantize(t.id, x)


def assert_same_bytes(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    rows = np.flatnonzero((ours != theirs).any(axis=1))
    if len(rows):
        at = np.flatnonzero(ours[rows[0]] != theirs[rows[0]])
        pytest.fail(f"{what}: {len(rows)} of {len(ours)} rows differ, the first at {rows[0]} in bytes {at[:10]}")


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_ggml(name, ggml):
    t = find(name)
    kinds = {what: with_scales(name, rows) for what, rows in ROWS.items()}
    every = np.concatenate(list(kinds.values()))
    theirs = by_ggml(ggml, t, every)
    ours = t.encode(every)
    start = 0
    for what, rows in kinds.items():
        assert_same_bytes(ours[start : start + len(rows)], theirs[start : start + len(rows)], f"{name}, {what}")
        start += len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_ggml_on_real_weights(name, ggml, default_model_path):
    t = find(name)
    with gguf.open(default_model_path) as f:
        for tensor in ("blk.0.attn_q.weight", "blk.7.ffn_down.weight", "blk.29.attn_v.weight"):
            x = f.tensors[tensor].dequantize().reshape(-1)[: 400 * COLS].reshape(-1, COLS)
            assert_same_bytes(t.encode(x), by_ggml(ggml, t, x), f"{name}, {tensor}")


@pytest.mark.parametrize("name", BY_CHUNK)
def test_bytes_of_ggml_with_importance(name, ggml):
    t = find(name)
    kinds = list(importances())
    for i, (what, importance) in enumerate(kinds):
        x = with_scales(name, ALL_ROWS)[i :: len(kinds)]  # some rows of every kind
        assert_same_bytes(t.encode(x, importance), ggml.quantize(t.id, x, importance), f"{name}, {what}")


@pytest.mark.parametrize("name", WEIGHTED)
def test_bytes_of_ggml_with_importance_on_real_weights(name, ggml, default_model_path):
    """Rows of 1536 weights, over which the older types take a mean."""
    t = find(name)
    with gguf.open(default_model_path) as f:
        x = f.tensors["blk.7.ffn_down.weight"].dequantize()[:100]
    importance = np.random.default_rng(3).standard_normal(x.shape[1]).astype(np.float32) ** 2
    assert_same_bytes(t.encode(x, importance), ggml.quantize(t.id, x, importance), name)


@pytest.mark.parametrize("name", WEIGHTED)
def test_importance_lessens_the_error_it_weighs(name):
    x = ROWS["heavy tails"]
    importance = np.where(np.arange(COLS) % 8 == 0, 100, 0.01).astype(np.float32)
    t = find(name)
    with_it, without = (np.mean(importance * (t.decode(t.encode(x, w)) - x) ** 2) for w in (importance, None))
    assert with_it < 0.9 * without, name


@pytest.mark.parametrize("name", [n for n in NAMES if n != "Q8_1"])
def test_refuses_what_ggml_would_not_load(name, ggml):
    """ggml writes infinite scales and refuses them when it validates a file; we refuse to write them.

    From about 1e12 its searches for Q3_K and Q6_K overflow to NaN, and it writes zeros for such a block: refused too.
    """
    t = find(name)
    refused = 0
    for x in large_rows():
        theirs = by_ggml(ggml, t, x)
        largest = np.abs(x).max()
        if ggml.validate(t.id, theirs) and (largest < 1e10 or name in LARGE):
            assert_same_bytes(t.encode(x), theirs, f"{name} at {largest:g}")
        else:
            refused += 1
            with pytest.raises(FormatError, match=f"weights are too large for {name}: scale not finite in float"):
                t.encode(x)
    assert (refused == 0) if name in LARGE else (200 < refused < 340)


def test_q8_1_refuses_large_weights():
    with pytest.raises(FormatError, match="scale not finite"):
        find("Q8_1").encode(np.full((1, 32), 3e5, np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", NAMES)
def test_refuses_weights_that_are_not_finite(name, bad):
    x = np.zeros((2, COLS), np.float32)
    x[1, 77] = bad
    with pytest.raises(FormatError, match=f"NaN or infinite weights cannot be quantized to {name}"):
        find(name).encode(x)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_wrong_arguments(name):
    t = find(name)
    x = ROWS["normal"][:6]
    flat = t.encode(x)
    assert flat.dtype == np.uint8 and flat.shape == (6, t.row_nbytes(COLS))
    np.testing.assert_array_equal(t.encode(x.reshape(2, 3, COLS)), flat.reshape(2, 3, -1))
    np.testing.assert_array_equal(t.encode(x.astype(np.float64)), flat)
    np.testing.assert_array_equal(t.encode(x[0]), flat[0])
    assert t.encode(x[:0]).shape == (0, t.row_nbytes(COLS))
    with pytest.raises(FormatError, match=f"{name} needs rows divisible by {t.block}"):
        t.encode(x[:, :-1])
    assert t.encode(x[:0], np.ones(COLS)).shape == (0, t.row_nbytes(COLS))
    with pytest.raises(UsageError, match=f"importance has shape .* is wanted, .{COLS}"):
        t.encode(x, importance=np.ones(COLS // 2, np.float32))
    for bad in (np.nan, np.inf, -1e-3):
        with pytest.raises(UsageError, match="importance holds NaN, infinity or negative numbers"):
            t.encode(x, importance=np.full(COLS, bad))


@pytest.mark.parametrize("name", IGNORING)
def test_importance_that_changes_nothing(name, ggml):
    t = find(name)
    x, importance = ROWS["weights"], np.random.default_rng(4).random(COLS).astype(np.float32)
    ours = t.encode(x, importance)
    assert_same_bytes(ours, ggml.quantize(t.id, x, importance), name)
    np.testing.assert_array_equal(ours, t.encode(x))
    with pytest.raises(UsageError, match=r"importance has shape \(255,\)"):
        t.encode(x, importance[:-1])


@pytest.mark.parametrize("name", IGNORING)
def test_ternary_rows(name, ggml):
    """Weights of three values: exact, but for the sign of Q1_0's zeros and what 4-bit floats round."""
    rng, t = np.random.default_rng(5), find(name)
    scale = rng.uniform(0.001, 3, (200, 1)).astype(np.float16).astype(np.float32)
    x = rng.integers(-1, 2, (200, COLS)).astype(np.float32) * scale
    ours = t.encode(x)
    assert_same_bytes(ours, ggml.quantize(t.id, x), name)
    if name in ("TQ1_0", "TQ2_0", "Q2_0"):
        np.testing.assert_array_equal(t.decode(ours), x)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_4_bit_floats_between_two_levels(name, ggml):
    t = find(name)
    x = midpoints()
    assert_same_bytes(t.encode(x), ggml.quantize(t.id, x), name)


def test_exponents_of_mxfp4(ggml):
    """What rounds to a power of two in log2f gets its exponent; those of denormals wrap around."""
    t, x = find("MXFP4"), powers_of_two()
    assert_same_bytes(t.encode(x), ggml.quantize(t.id, x), "MXFP4")


@pytest.mark.parametrize("largest", [1.18e-38, 2.3e-38])
def test_mxfp4_refuses_the_exponent_that_is_nan(largest, ggml):
    t = find("MXFP4")
    x = np.full((1, 32), -largest, np.float32)
    theirs = ggml.quantize(t.id, x)
    assert theirs[0, 0] == 255 and not ggml.validate(t.id, theirs)
    with pytest.raises(FormatError, match="too small for MXFP4: scale not finite in e8m0"):
        t.encode(x)
    with pytest.raises(FormatError, match="too small for MXFP4"):
        t.check_scales(theirs.reshape(-1).view(t.fields))


def test_encoding_what_was_decoded_keeps_the_error_small():
    x = ROWS["normal"]
    most = {"TQ1_0": 0.82, "TQ2_0": 0.82, "Q2_0": 0.82, "Q1_0": 0.65, "MXFP4": 0.13, "NVFP4": 0.11}
    most |= {"Q2_K": 0.35, "Q3_K": 0.2, "Q4_0": 0.12, "Q4_K": 0.09, "Q5_0": 0.06, "Q5_K": 0.05, "Q6_K": 0.03}
    for name in NAMES:
        t = TYPES[name]
        error = np.sqrt(np.mean((t.decode(t.encode(x)) - x) ** 2))
        assert error < most.get(name, 0.11 if "4" in name else 0.06), (name, error)
