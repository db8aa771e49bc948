"""encode.cu gives the bytes of `TensorType.encode`, which other tests hold against ggml, on every hard row there is."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent.parent))

import checkpoints
from encode_cases import ROWS
from ggufkit_formats.blocks import TYPES, find
from ggufkit_formats.errors import DeviceError, FormatError, UsageError
from ggufkit_kernels.cuda import encode
from ggufkit_kernels.cuda.encode import ENCODERS, CudaEncoder
from nasty_weights import large_rows, with_scales

from ggufkit.convert import convert

NAMES = list(ENCODERS)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_the_definition(device, name):
    encoder, t = CudaEncoder(device), find(name)
    for what, rows in ROWS.items():
        x = with_scales(name, rows)
        different = np.flatnonzero((encoder.encode(t, x) != t.encode(x)).any(axis=1))
        assert not len(different), (what, different[:5], len(x))


@pytest.mark.kernels
@pytest.mark.parametrize("name", NAMES)
def test_few_blocks(device, name):
    """Numbers of blocks that fill no warp, in any shape; threads take turns."""
    encoder, t = CudaEncoder(device), find(name)
    x = np.random.default_rng(1).standard_normal((13, 512)).astype(np.float32)
    whole = t.encode(x)
    with ThreadPoolExecutor(3) as threads:
        parts = threads.map(lambda rows: encoder.encode(t, x[:rows]), (0, 1, 2, 3, 5, 13))
        for rows, part in zip((0, 1, 2, 3, 5, 13), parts, strict=True):
            np.testing.assert_array_equal(part, whole[:rows])
    np.testing.assert_array_equal(encoder.encode(t, x[:12].reshape(2, 6, 512)), whole[:12].reshape(2, 6, -1))
    np.testing.assert_array_equal(encoder.encode(t, np.asfortranarray(x[:3]).astype(np.float64)), whole[:3])
    with pytest.raises(FormatError):
        encoder.encode(t, x[:, :33])


@pytest.mark.parametrize("name", NAMES)
def test_pieces(device, name, monkeypatch):
    encoder, t = CudaEncoder(device), find(name)
    monkeypatch.setattr(encode, "PIECE", 1024)
    x = np.random.default_rng(2).standard_normal((7, 768)).astype(np.float32)
    np.testing.assert_array_equal(encoder.encode(t, x), t.encode(x))


@pytest.mark.parametrize("name", NAMES)
def test_refuses_exactly_what_the_definition_refuses(device, name):
    encoder, t = CudaEncoder(device), find(name)
    spoiled = ROWS["normal"][:3].copy()
    spoiled[1, 100] = np.nan
    infinite = ROWS["normal"][:3].copy()
    infinite[2, 5] = -np.inf
    refused = 0
    for x in [spoiled, infinite, *list(large_rows())[::3]]:
        rows = np.concatenate([ROWS["normal"][:2], x])
        try:
            definition = t.encode(rows)
        except FormatError as error:
            refused += 1
            with pytest.raises(FormatError, match=str(error)):
                encoder.encode(t, rows)
        else:
            np.testing.assert_array_equal(encoder.encode(t, rows), definition)
    assert refused >= 2


def test_which_types():
    importance = np.ones(256, np.float32)
    assert {name for name, t in TYPES.items() if encode.encodes(t, None)} == set(NAMES)
    assert {name for name, t in TYPES.items() if encode.encodes(t, importance)} == {"Q8_0"}


def test_convert_on_a_device(device, monkeypatch, tmp_path):
    """The same file, and the device did the types that it can."""
    from ggufkit_kernels.cuda import cupy_device

    done = []

    class Watched(CudaEncoder):
        def encode(self, type, x):
            done.append(type.name)
            return super().encode(type, x)

    monkeypatch.setattr(cupy_device, "CupyDevice", lambda: device)
    monkeypatch.setattr(encode, "CudaEncoder", Watched)
    source = checkpoints.make(tmp_path / "checkpoint", dim=256, ffn=512)
    for file_type, names in (("q4_k_m", {"Q4_K", "Q6_K"}), ("q3_k_m", set()), ("q8_0", {"Q8_0"})):
        done.clear()
        made = [tmp_path / f"{file_type}-{where}.gguf" for where in ("cpu", "cuda")]
        convert(source, file_type, made[0], device="cpu")
        assert not done
        convert(source, file_type, made[1], device="cuda")
        assert made[0].read_bytes() == made[1].read_bytes()
        assert set(done) >= names
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        convert(source, "q8_0", tmp_path / "x.gguf", device="tpu")


def test_convert_without_a_device(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"^--device cuda needs CuPy: pip install 'ggufkit\[cuda13\]'"):
        convert(checkpoints.make(tmp_path / "checkpoint", dim=256, ffn=512), "q8_0", tmp_path / "x.gguf", device="cuda")
    assert not (tmp_path / "x.gguf").exists()
