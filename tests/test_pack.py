"""Packing: nothing is lost, nothing is much larger than the file, and any `Quants` finds a layout."""

from __future__ import annotations

import numpy as np
import pytest
from ggufkit_formats.blocks import TYPES, find
from ggufkit_formats.errors import UsageError
from ggufkit_kernels.cpu.pack import pack, pack_codes, unpack_codes
from ggufkit_kernels.cpu.simd import LANES
from memory_tensors import MadeUp, encoded, from_raw, random_blocks

SIZES = {"Q4_0": 1.0, "Q4_1": 1.0, "Q5_0": 1.0, "Q5_1": 1.0, "Q8_0": 1.0, "F32": 1.0, "F16": 1.0, "BF16": 1.0}
SIZES |= {"TQ1_0": 1.23, "TQ2_0": 1.0, "Q1_0": 1.05, "Q2_0": 1.0, "MXFP4": 1.05, "NVFP4": 1.05}  # tables: 192 bytes
SIZES |= {"Q4_K": 1.05, "Q5_K": 1.05, "Q6_K": 1.05, "Q3_K": 1.05, "Q2_K": 1.2}
SIZES |= {"IQ4_NL": 1.02, "IQ4_XS": 1.05, "IQ3_S": 1.3, "IQ3_XXS": 1.45, "IQ2_S": 1.45, "IQ2_XS": 1.6, "IQ2_XXS": 1.7}
SIZES |= {"IQ1_S": 2.2, "IQ1_M": 2.1}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(8, 32), (1, 64), (17, 48), (33, 256)])
def test_codes_come_back(bits: int, shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape, dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (-(-shape[0] // LANES), -(-shape[1] // 32), bits * 4 * LANES)
    assert np.array_equal(unpack_codes(packed, bits, shape), codes)


@pytest.mark.parametrize("name", SIZES)
def test_size_against_the_file(name: str) -> None:
    tensor = random_blocks(find(name), 64, 512, np.random.default_rng(0))
    assert pack(tensor).nbytes <= SIZES[name] * tensor.nbytes


@pytest.mark.parametrize("name", TYPES)
def test_reads_by_slabs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggufkit_kernels.cpu.pack.SLAB_NBYTES", 16 * 256 * 4)
    tensor = random_blocks(find(name), 41, 256, np.random.default_rng(1))
    whole = pack(tensor)
    assert tensor.source.largest <= 16 * tensor.row_nbytes  # type: ignore[attr-defined]
    monkeypatch.undo()
    other = pack(tensor)
    assert whole.layout == other.layout
    for field in ("codes", "d", "scale", "dmin", "minimum"):
        assert np.array_equal(getattr(whole, field), getattr(other, field)), field


def test_a_late_row_beyond_float16_widens_d() -> None:
    t = MadeUp(4, 32, 32, offset=8, d="<f4")
    blocks = np.zeros(20, t.fields)
    blocks["d"] = 0.5
    assert not pack(from_raw(t, blocks, (20, 32))).layout.wide
    blocks["d"][19] = 1e-30
    packed = pack(from_raw(t, blocks, (20, 32)))
    assert packed.layout.wide
    assert packed.d[19 // LANES, 0, 19 % LANES] == np.float32(1e-30)


def test_without_a_layout_weights_are_float32() -> None:
    rng = np.random.default_rng(2)
    for t in (MadeUp(4, 32, 8), MadeUp(8, 32, 32, offset=0), MadeUp(4, 32, 32, offset=1000)):
        packed = pack(random_blocks(t, 3, 64, rng))
        assert packed.layout.values == "f32", t


def test_empty_is_refused() -> None:
    with pytest.raises(UsageError, match="'t' is empty"):
        pack(encoded(find("F32"), np.zeros((0, 32), np.float32)))
