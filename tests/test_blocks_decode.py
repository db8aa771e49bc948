"""Decoding: equal bit for bit to ggml, to plain loops over the published layout, and to the `gguf` package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import naive
import naive_iq
import numpy as np
import pytest
from ggufkit_formats.blocks import TYPES, by_id, find
from ggufkit_formats.errors import FormatError
from oracles.ggml import Ggml

DECODERS = naive.DECODERS | naive_iq.DECODERS
BLOCKS = [t for t in TYPES.values() if t.name in DECODERS]
# Sizes as ggml-common.h asserts them.
NBYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q8_1": 36}
NBYTES |= {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "Q8_K": 292}
NBYTES |= {"TQ1_0": 54, "TQ2_0": 66, "Q1_0": 18, "Q2_0": 18, "MXFP4": 17, "NVFP4": 36}
NBYTES |= {"IQ4_NL": 18, "IQ4_XS": 136, "IQ3_S": 110, "IQ3_XXS": 98, "IQ2_S": 82, "IQ2_XS": 74, "IQ2_XXS": 66}
NBYTES |= {"IQ1_S": 50, "IQ1_M": 56}
# ggml decodes no Q8_1, and gguf lacks some more: the plain loops cover them.
BY_GGML = [t for t in BLOCKS if t != "Q8_1"]
BY_GGUF = [t for t in BLOCKS if t not in ("Q8_1", "Q8_K", "Q1_0", "Q2_0")]


def ggml_name(name: str) -> str:
    return name.lower().removesuffix("_k") + ("_K" if name.endswith("_K") else "")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal as bit patterns, except that any NaN equals any NaN."""
    return bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def random_blocks(t, n: int, seed: int = 0) -> np.ndarray:
    """All bit patterns, with scales that are NaN, infinite, zero or denormal in some blocks."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (n, t.block_nbytes), dtype=np.uint8)
    blocks = raw.view(t.fields)[:, 0]
    special = np.array(
        [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFE00], "<u2"
    )
    if t == "IQ1_M":  # its d is in pieces
        pieces = rng.choice(special, n // 4)[:, None] >> np.arange(0, 16, 4, dtype=np.uint16)
        blocks["scales"][: n // 4] = blocks["scales"][: n // 4] & 0xFFF | pieces << 12
    for name, (dtype, *_) in t.fields.fields.items():
        if dtype == np.float16:
            blocks[name][: n // 4] = rng.choice(special, n // 4).view("<f2")
    return raw


@pytest.fixture(scope="module")
def ggml():
    oracle = Ggml()
    yield oracle
    oracle.close()


def test_sizes_ids_and_diagrams():
    assert set(NBYTES) == set(DECODERS)
    for name, nbytes in NBYTES.items():
        t = find(name)
        assert t.block_nbytes == nbytes
        assert by_id(t.id) is t
        assert t.is_quantized
        assert name == "Q2_0" or gguf.GGMLQuantizationType[name].value == t.id  # gguf does not know it yet
        assert t.__class__.__doc__ and "w = " in t.__class__.__doc__


@pytest.mark.parametrize("t", BY_GGML, ids=str)
def test_random_bytes_decode_as_ggml_does(t, ggml):
    raw = random_blocks(t, 4000)
    assert same_bits(t.decode(raw), ggml.dequantize(ggml_name(t.name), raw, t.block))


@pytest.mark.slow
@pytest.mark.parametrize("t", BY_GGML, ids=str)
def test_a_million_random_blocks_decode_as_ggml_does(t, ggml):
    for seed in range(50):
        raw = random_blocks(t, 20_000, 100 + seed)
        assert same_bits(t.decode(raw), ggml.dequantize(ggml_name(t.name), raw, t.block)), seed


@pytest.mark.slow
def test_a_million_random_blocks_of_q8_1_by_its_formula():
    """ggml has no decoder for it: w = d * q, whatever s says."""
    t = find("Q8_1")
    for seed in range(50):
        raw = random_blocks(t, 20_000, 100 + seed)
        d, q = raw[:, :2].copy().view("<f2").astype(np.float32), raw[:, 4:].view(np.int8).astype(np.float32)
        with np.errstate(all="ignore"):
            assert same_bits(t.decode(raw), d * q), seed


@pytest.mark.slow
def test_a_million_random_blocks_of_nf4_by_its_formula():
    """GGUF has no NF4, and so ggml has no decoder: w = d * levels[code], the first code in the high half of a byte."""
    t = find("NF4")
    levels = np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                       0.7229568362236023, 1.0], np.float32)  # fmt: skip
    for seed in range(50):
        raw = np.random.default_rng(seed).integers(0, 256, (20_000, 36), dtype=np.uint8)
        want = np.empty((len(raw), 64), np.float32)
        with np.errstate(all="ignore"):
            d = raw[:, :4].copy().view("<f4")
            want[:, ::2], want[:, 1::2] = d * levels[raw[:, 4:] >> 4], d * levels[raw[:, 4:] & 15]
            assert same_bits(t.decode(raw), want), seed


@pytest.mark.parametrize("t", BLOCKS, ids=str)
def test_random_bytes_decode_as_plain_loops_do(t):
    raw = random_blocks(t, 60, seed=1)
    with np.errstate(all="ignore"):
        naive = np.array([DECODERS[t.name](block.tobytes()) for block in raw], np.float32)
    assert same_bits(t.decode(raw), naive)


@pytest.mark.parametrize("t", BY_GGUF, ids=str)
def test_random_bytes_decode_as_the_gguf_package_does(t):
    raw = random_blocks(t, 500, seed=2)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType(t.id))
    np.testing.assert_array_equal(t.decode(raw), theirs)


@pytest.mark.parametrize("t", BLOCKS, ids=str)
def test_quants_take_blocks_apart_without_rounding(t):
    q = t.quants(random_blocks(t, 200).view(t.fields)[:, 0])
    n, groups = 200 * t.block // q.codes.shape[1], q.codes.shape[1] // q.group
    assert q.codes.dtype == np.uint8 and q.codes.size == 200 * t.block
    assert q.codes.max() < 2**q.bits
    assert q.codebook is None or (len(q.codebook) == 2**q.bits and q.codebook.dtype == np.int8)
    assert q.d.shape == (n,) and q.d.dtype == np.float32
    assert not q.wide or t.name.startswith("IQ")
    if q.d_code is not None:
        assert q.d_code.shape == (n,) and q.d_code.dtype == np.uint8 and q.d_format in ("e8m0", "e4m3")
    elif t.name != "Q8_K" and not q.wide:
        with np.errstate(invalid="ignore"):
            assert same_bits(q.d.astype(np.float16).astype(np.float32), q.d)
    for part in (q.scale, q.minimum):
        assert part is None or (part.shape == (n, groups) and part.dtype in (np.uint8, np.int8))


@pytest.mark.parametrize("t", BLOCKS, ids=str)
def test_shapes(t):
    raw = np.zeros((2, 3, 2 * t.block_nbytes), np.uint8)
    assert t.decode(raw).shape == (2, 3, 2 * t.block)
    assert t.decode(raw[0, 0]).shape == (2 * t.block,)
    assert t.decode(raw[:0]).shape == (0, 3, 2 * t.block)
    with pytest.raises(FormatError, match=f"{t.name} rows are multiples of {t.block_nbytes} bytes"):
        t.decode(raw[..., :-1])


def test_the_documentation_is_made_from_the_classes():
    tool = Path(__file__).parents[1] / "tools/block_docs.py"
    done = subprocess.run([sys.executable, tool, "--check"], check=False)
    assert done.returncode == 0, "python tools/block_docs.py was not run after a change"
