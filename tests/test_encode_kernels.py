"""The compiled encoders give the bytes of the NumPy definition, which test_blocks_encode.py holds against ggml."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from encode_cases import ROWS, differences, needed, nf4_rows, weighted_differences
from ggufkit_formats.blocks import TYPES, find
from ggufkit_formats.blocks.nf4 import FP4_LEVELS, NF4_LEVELS, encode_4bit
from ggufkit_formats.errors import FormatError, UnsupportedError, UsageError
from ggufkit_kernels.cpu.encode import ENCODERS, PIECE, WEIGHTED, encode, four_bit
from ggufkit_kernels.cpu.simd import LANES, SETTING
from nasty_weights import COLS, large_rows

NAMES = list(ENCODERS)


def test_every_type_with_scales_has_a_kernel():
    activations = {"Q8_1", "Q8_K"}
    assert set(NAMES) == {name for name, t in TYPES.items() if t.is_quantized} - activations


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_the_definition(name):
    assert differences(name) == []


@pytest.mark.parametrize("levels", [NF4_LEVELS, NF4_LEVELS * np.float32(3), FP4_LEVELS], ids=["NF4", "wide", "FP4"])
@pytest.mark.parametrize("block", [32, 64, 256])
def test_codes_and_maxima_of_the_definition(levels, block):
    """Any levels and any length: a last block that is short, none that is whole, an odd number of weights."""
    rows = np.concatenate([ROWS["normal"].reshape(-1), np.zeros(block, np.float32), nf4_rows().reshape(-1)])
    for n in (0, 1, 2 * block, 2 * block + 7, len(rows)):
        for mine, theirs in zip(four_bit.encode_4bit(rows[:n], levels, block), encode_4bit(rows[:n], levels, block),
                                strict=True):  # fmt: skip
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", WEIGHTED)
def test_bytes_of_the_definition_with_importance(name):
    assert weighted_differences(name) == []


@pytest.mark.parametrize("name", [name for name in NAMES if ENCODERS[name].weights == "row"])
def test_bytes_of_the_definition_with_a_row_s_importance(name):
    """In rows of any length, and beyond a piece: importance goes by the column."""
    t, rng = find(name), np.random.default_rng(12)
    x = np.concatenate([rows[20:50] for rows in ROWS.values()])
    x = np.resize(x, (3 * PIECE // 2 // x.size + 1, *x.shape)).reshape(-1)
    size = PIECE + 20 * t.block if name.startswith("IQ4") else PIECE // 30  # a slow definition
    for cols in (t.block, 3 * t.block, 2 * COLS, 5 * COLS):
        importance = (rng.chisquare(1, cols) * (rng.random(cols) < 0.9)).astype(np.float32)
        rows = x[: size // cols * cols].reshape(-1, cols)
        np.testing.assert_array_equal(encode(t, rows, importance, threads=2), t.encode(rows, importance))
    with pytest.raises(UsageError, match="one weight per column is wanted"):
        encode(t, rows, importance[1:])


def run_cases(*names, **environment):
    """The cases in a process of its own, for another processor: (family, lanes)."""
    base = {key: value for key, value in os.environ.items() if key != SETTING and not key.startswith("NUMBA_CPU")}
    done = subprocess.run(
        [sys.executable, "encode_cases.py", *names],
        env=base | environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    family, lanes = done.stdout.split()[:2]
    return family, int(lanes)


def test_bytes_with_vectors_of_the_other_length():
    family = "avx2" if LANES == 16 else "avx512vnni"
    assert run_cases("Q4_K", "Q3_K", "NF4", **{SETTING: family}) == (family, 24 - LANES)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["avx512vnni", "avx2"])
def test_bytes_of_all_types_in_both_lengths(family):
    assert run_cases(*NAMES, **{SETTING: family})[0] == family


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="a processor of another kind")
def test_bytes_without_avx():
    assert run_cases(*NAMES, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="") == ("plain", 8)


@pytest.mark.parametrize("name", NAMES)
def test_refuses_exactly_what_the_definition_refuses(name):
    t, importance = find(name), needed(name, COLS)
    for x in list(large_rows())[::7]:
        rows = np.concatenate([ROWS["normal"][:3], x])
        try:
            definition = t.encode(rows, importance)
        except FormatError as error:
            with pytest.raises(FormatError, match=str(error)):
                encode(t, rows, importance)
        else:
            np.testing.assert_array_equal(encode(t, rows, importance), definition)


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_rows_and_any_shape(name):
    t = find(name)
    x, w = ROWS["every magnitude"][:40], needed(name, COLS)
    whole = t.encode(x, w)
    for rows in (0, 1, 2, 3, 5, 7, 9, 17):
        np.testing.assert_array_equal(encode(t, x[:rows], w, threads=3), whole[:rows])
    np.testing.assert_array_equal(encode(t, x[:6].reshape(2, 3, COLS), w), whole[:6].reshape(2, 3, -1))
    np.testing.assert_array_equal(encode(t, x[5].astype(np.float64), w), whole[5])
    np.testing.assert_array_equal(encode(t, np.asfortranarray(x), w), whole)
    wide, w = x[:12].reshape(3, 4 * COLS), needed(name, 4 * COLS)
    np.testing.assert_array_equal(encode(t, wide, w), t.encode(wide, w))
    blocks, w = x.reshape(-1, t.block)[1:], needed(name, t.block)
    np.testing.assert_array_equal(encode(t, blocks, w), t.encode(blocks, w))


@pytest.mark.parametrize("name", WEIGHTED)
def test_importance_goes_round_with_every_row(name):
    """Rows of several blocks, more than a piece, any number of threads."""
    t = find(name)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((PIECE // (6 * COLS) + 3, 6 * COLS)).astype(np.float32)
    importance = (rng.standard_normal(6 * COLS) ** 2).astype(np.float32)
    whole = encode(t, x, importance, threads=3)
    at = np.array([0, 1, 7, len(x) // 2, len(x) - 1])
    np.testing.assert_array_equal(whole[at], t.encode(x[at], importance))
    np.testing.assert_array_equal(encode(t, x[:5], importance, threads=1), whole[:5])
    np.testing.assert_array_equal(encode(t, x[:6].reshape(2, 3, -1), importance), whole[:6].reshape(2, 3, -1))
    np.testing.assert_array_equal(
        encode(t, x[0, : t.block], importance[: t.block]), t.encode(x[0, : t.block], importance[: t.block])
    )
    assert encode(t, x[:0], importance).shape == (0, t.row_nbytes(6 * COLS))


@pytest.mark.parametrize("name", WEIGHTED)
def test_refuses_exactly_what_the_definition_refuses_with_importance(name):
    t = find(name)
    for x in list(large_rows())[::7]:
        rows = np.concatenate([ROWS["normal"][:3], x])
        importance = np.linspace(0.1, 3, COLS).astype(np.float32)
        try:
            definition = t.encode(rows, importance)
        except FormatError as error:
            with pytest.raises(FormatError, match=str(error)):
                encode(t, rows, importance)
        else:
            np.testing.assert_array_equal(encode(t, rows, importance), definition)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_found_wherever_it_stands(name, bad):
    rng = np.random.default_rng(8)
    for at in (0, 31, 32, 255, 256, 2047, 2048, 17 * COLS - 1, *rng.integers(0, 17 * COLS, 20)):
        x = rng.standard_normal((17, COLS)).astype(np.float32)
        x.reshape(-1)[at] = bad
        with pytest.raises(FormatError, match=f"NaN or infinite weights cannot be quantized to {name}"):
            encode(name, x, needed(name, COLS), threads=1)


def test_many_callers_with_many_threads():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3 * PIECE // COLS + 5, COLS)).astype(np.float32)
    one = {name: encode(name, x, threads=1) for name in ("Q4_K", "Q6_K", "Q8_0")}
    with ThreadPoolExecutor(4) as pool:
        jobs = [(name, pool.submit(encode, name, x, None, threads)) for threads in (2, 3) for name in one]
        for name, job in jobs:
            np.testing.assert_array_equal(job.result(), one[name])


@pytest.mark.parametrize("threads", [1, 3])
def test_one_bad_weight_far_behind_is_found(threads):
    x = np.ones((3 * PIECE // COLS, COLS), np.float32)
    x[-1, -1] = np.nan
    with pytest.raises(FormatError, match="NaN or infinite weights cannot be quantized to Q4_K"):
        encode("q4_k", x, threads=threads)
    x[-1, -1] = 1e30
    with pytest.raises(FormatError, match="weights are too large for Q4_K: scale not finite in float16"):
        encode("q4_k", x, threads=threads)


@pytest.mark.parametrize("name", [name for name in NAMES if not find(name).uses_importance])
def test_importance_that_changes_nothing(name):
    x = ROWS["weights"]
    importance = np.linspace(0, 1, COLS, dtype=np.float32)
    np.testing.assert_array_equal(encode(name, x, importance), find(name).encode(x))
    with pytest.raises(UsageError, match=r"importance has shape \(255,\)"):
        encode(name, x, importance[:-1])


def test_types_without_a_kernel_and_wrong_arguments():
    x = ROWS["normal"]
    for name in ("F16", "BF16", "Q8_1", "Q8_K"):
        np.testing.assert_array_equal(encode(name, x), find(name).encode(x))
    with pytest.raises(FormatError, match="Q4_K needs rows divisible by 256, not 255"):
        encode("q4_k", x[:, :-1])
    for name in ("F16", "Q8_0", "Q8_K", "Q4_K"):
        with pytest.raises(UsageError, match="importance has shape"):
            encode(name, x, importance=np.ones(COLS + 1, np.float32))
    np.testing.assert_array_equal(encode("q8_0", x, np.ones(COLS)), encode("q8_0", x))
    with pytest.raises(UnsupportedError, match="did you mean"):
        encode("q4_q", x)
