"""Against bitsandbytes: vectors and layers that tools/nf4_golden.py made with it, and checkpoints that lie."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized_checkpoints
import safetensors.numpy
from ggufkit_formats import bitsandbytes
from ggufkit_formats import safetensors as ours
from ggufkit_formats.blocks.nf4 import (
    FP4_LEVELS,
    NF4_LEVELS,
    dynamic_map,
    encode_4bit,
    encode_distances,
    encode_maxima,
    unpack_4bit,
)
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError
from ggufkit_kernels.cpu.encode import four_bit

DATA = Path(__file__).parent / "data"
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
with np.load(DATA / "bitsandbytes.npz") as loaded:
    GOLDEN = dict(loaded)
NAMES = sorted({name.split("/")[0] for name in GOLDEN if name.endswith("/x")})
LAYERS = sorted(name.removeprefix("layers/") for name in GOLDEN if name.startswith("layers/"))


def matrix(name: str) -> np.ndarray:
    x = GOLDEN[f"{name}/x"]
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()


def decoded(x: np.ndarray, kind: str, packed: np.ndarray, maxima: np.ndarray) -> np.ndarray:
    codes = unpack_4bit(packed)[: x.size]
    return (LEVELS[kind][codes] * np.repeat(maxima, 64)[: x.size]).reshape(x.shape)


def test_levels_and_map():
    for kind, levels in LEVELS.items():
        assert np.array_equal(levels.view(np.uint32), GOLDEN[f"{kind}/levels"].view(np.uint32))
    assert np.array_equal(dynamic_map().view(np.uint32), GOLDEN["map"].view(np.uint32))


@pytest.mark.parametrize("encode", [encode_4bit, four_bit.encode_4bit], ids=["definition", "compiled"])
@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_maxima(name, kind, encode):
    x = matrix(name)
    packed, maxima = encode(x.reshape(-1), LEVELS[kind])
    assert np.array_equal(packed, GOLDEN[f"{name}/{kind}/packed"])
    assert np.array_equal(maxima, GOLDEN[f"{name}/{kind}/absmax"])
    assert digest(decoded(x, kind, packed, maxima)) == str(GOLDEN[f"{name}/{kind}/sha256"])


@pytest.mark.parametrize("name", NAMES)
def test_maxima_quantized_again(name):
    """bitsandbytes' offset is torch's mean, whose last bit depends on the machine: given it, all else is equal."""
    _, maxima = encode_4bit(matrix(name).reshape(-1), NF4_LEVELS)
    at = f"{name}/nf4/nested"
    theirs = GOLDEN[f"{at}/offset"]
    codes, second = encode_distances(maxima - theirs, dynamic_map())
    assert np.array_equal(codes, GOLDEN[f"{at}/absmax"]) and np.array_equal(second, GOLDEN[f"{at}/second"])
    mine, second, offset = encode_maxima(maxima)
    np.testing.assert_array_max_ulp(offset, theirs, 2)
    if offset == theirs:
        assert np.array_equal(mine, codes) and np.array_equal(second, GOLDEN[f"{at}/second"])


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_that_it_saved(layer):
    with ours.open(DATA / "bitsandbytes.safetensors") as f:
        t = f.tensors[f"{layer}.weight"]
        assert t.type == {"nf4": "NF4", "fp4": "FP4", "int8": "LLM.int8"}[layer.split("_")[0]]
        assert t.shape == (24, 128)
        x = t.dequantize()
        assert digest(x) == str(GOLDEN[f"layers/{layer}"])
        assert np.array_equal(t.type.decode(t.read_rows(5, 9)), x[5:9])
        assert [name for name in f.tensors if name.startswith(f"{layer}.")] == [f"{layer}.weight"]
        assert f"{layer}.weight" in f.stored and len(f.stored) > 3 * len(f.tensors)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer in ("nf4", "nf4_nested", "fp4", "fp4_nested")])
def test_layers_are_written_as_it_writes_them(layer):
    """From weights that are levels times maxima already, all that it saved comes back."""
    name, (kind, *nested) = f"{layer}.weight", layer.split("_")
    with ours.open(DATA / "bitsandbytes.safetensors") as f:
        mine = bitsandbytes.encode(name, f.tensors[name].dequantize(), kind, bool(nested), dtype="float32")
        stored = {key: t for key, t in f.stored.items() if key.startswith(f"{name}.") or key == name}
        assert mine.keys() == stored.keys()
        for key, value in mine.items():
            theirs = stored[key].source.read(stored[key].offset, stored[key].nbytes)
            assert value.shape == stored[key].shape or ".quant_state." in key
            if ".quant_state." in key:
                ours_, said = json.loads(value.tobytes()), json.loads(theirs.tobytes())
                np.testing.assert_allclose(ours_.pop("nested_offset", 0), said.pop("nested_offset", 0), rtol=1e-3)
                assert ours_ == said
            elif key == name:
                codes = [
                    np.where(code == 8, 0, code) if kind == "fp4" else code
                    for code in map(unpack_4bit, (value.reshape(-1), theirs))
                ]  # FP4 has two zeros
                assert np.array_equal(*codes)
            elif not nested or key.endswith("map"):  # maxima that went through 8 bits would change a second time
                assert np.array_equal(value.reshape(-1).view(np.uint8), theirs), key


def test_what_cannot_be_written():
    with pytest.raises(FormatError, match="NaN or infinite weights cannot be quantized to NF4"):
        bitsandbytes.encode(NAME, np.full((2, 64), np.nan))
    with pytest.raises(UnsupportedError, match="'int4'"):
        bitsandbytes.encode(NAME, np.ones((2, 64)), "int4")


# -- checkpoints that lie --------------------------------------------------------------------------------

NAME = "a.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Any:
    def change(parts: dict[str, np.ndarray]) -> None:
        said = json.loads(parts[STATE].tobytes()) | changes
        parts[STATE] = np.frombuffer(json.dumps(said).encode(), np.uint8)

    return change


def drop(name: str) -> Any:
    return lambda parts: parts.pop(name)


def put(name: str, value: Any) -> Any:
    return lambda parts: parts.__setitem__(name, value)


def nan(parts: dict[str, np.ndarray]) -> None:
    parts[f"{NAME}.quant_map"][3] = np.nan


LIES = {
    "no maxima": (drop(f"{NAME}.absmax"), FormatError, "'a.weight.absmax' is missing"),
    "no levels": (drop(f"{NAME}.quant_map"), FormatError, "'a.weight.quant_map' is missing"),
    "no codes": (drop(NAME), FormatError, "'a.weight' is missing"),
    "a maximum too few": (put(f"{NAME}.absmax", np.ones(15, np.uint8)), FormatError, "U8 of 15; U8 of 16 is needed"),
    "maxima of another type": (put(f"{NAME}.absmax", np.ones(16, np.float32)), FormatError, "F32 of 16; U8"),
    "codes too short": (put(NAME, np.ones((511, 1), np.uint8)), FormatError, "needs 512 bytes of codes, not 511"),
    "a NaN among the levels": (nan, FormatError, "'a.weight.quant_map' holds levels that are not finite"),
    "a short map": (put(f"{NAME}.nested_quant_map", np.ones(255, np.float32)), FormatError, "F32 of 256 is needed"),
    "second level too long": (put(f"{NAME}.nested_absmax", np.ones(2, np.float32)), FormatError, "F32 of 1 is needed"),
    "another shape": (state(shape=[16, 128]), FormatError, "needs 1024 bytes of codes"),
    "no shape": (state(shape=None), FormatError, "has shape None"),
    "negative shape": (state(shape=[-8, -128]), FormatError, "has shape"),
    "an odd block": (state(blocksize=48), FormatError, "blocks of 48"),
    "no block": (state(blocksize=None), FormatError, "blocksize None"),
    "offset not finite": (state(nested_offset=float("inf")), FormatError, "nested_offset inf"),
    "another second-level block": (state(nested_blocksize=64), UnsupportedError, "256 can be read"),
    "no JSON": (put(STATE, np.frombuffer(b"{", np.uint8)), FormatError, "quant_state is not JSON"),
    "a list": (put(STATE, np.frombuffer(b"[]", np.uint8)), FormatError, "quant_state is not a JSON object"),
}


@pytest.mark.parametrize("lie", LIES)
def test_checkpoints_that_lie(tmp_path, lie):
    change, error, message = LIES[lie]
    x = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    parts = bitsandbytes.encode(NAME, x, nested=True)
    change(parts)
    safetensors.numpy.save_file(parts, tmp_path / "model.safetensors")
    with pytest.raises(GgufkitError, match=message) as caught:
        ours.open(tmp_path / "model.safetensors")
    assert type(caught.value) is error and str(caught.value).startswith(str(tmp_path))


def test_int8_stored_for_a_gpu(tmp_path):
    x = np.random.default_rng(0).standard_normal((8, 128)).astype(np.float32)
    good = quantized_checkpoints.int8_parts(NAME, x)
    cases = [
        ({"a.weight_format": np.array(2, np.uint8)}, "only rows can be read"),
        ({"a.SCB": np.ones(7, np.float32)}, "F32 of 8 is needed"),
        ({NAME: np.ones((8, 128), np.float32)}, "an I8 matrix is needed"),
    ]
    for change, message in cases:
        safetensors.numpy.save_file(good | change, tmp_path / "model.safetensors")
        with pytest.raises(GgufkitError, match=message):
            ours.open(tmp_path / "model.safetensors")
