"""NF4 in memory and in GGUF: levels, codes and maxima by plain loops, sizes to the byte, and files that lie."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
from ggufkit_formats import gguf, nf4_tensors
from ggufkit_formats.blocks import find
from ggufkit_formats.blocks.nf4 import FP4_LEVELS, NF4_LEVELS, dynamic_map, encode_4bit, encode_maxima
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError

F32 = np.float32
NF4 = find("nf4")


def naive_encode(x: np.ndarray, levels: np.ndarray, block: int) -> tuple[list[int], list[np.float32]]:
    """One weight after the other: the nearest level, of two equally near ones the lower; 0 for a block of zeros."""
    codes, maxima = [], []
    by_value = sorted(range(16), key=lambda i: levels[i])
    for start in range(0, len(x), block):
        part = x[start : start + block]
        largest = max(F32(abs(v)) for v in part)
        short = len(part) < block
        divisor = max(largest, F32(1e-38))
        maxima.append(divisor if short else largest)
        for v in part:
            scaled = v / divisor if short else v * (F32(1) / divisor)
            scaled = min(max(scaled, F32(-1)), F32(1))
            code = by_value[0]
            for low, high in itertools.pairwise(by_value):
                if scaled > (levels[low] + levels[high]) / F32(2):
                    code = high
            codes.append(code)
    return codes, maxima


def weights(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(F32) * F32(0.05)
    x.reshape(-1)[::97] *= 30
    return x


def write(path: Path, tensors: dict[str, np.ndarray], nested: bool, metadata: dict[str, Any] | None = None,
          change: Any = None) -> Path:  # fmt: skip
    """An NF4 file; `change` gets {name: (type, shape, bytes)} of the stored tensors before they are written."""
    parts = {}
    for name, x in tensors.items():
        rows = nf4_tensors.rows(name, x.shape, nested)
        for (part, kind, shape), raw in zip(rows, nf4_tensors.encode(x, nested), strict=True):
            parts[part] = (kind, shape, raw)
    parts["norm.weight"] = ("F32", (4,), np.ones(4, F32).view(np.uint8))
    if change:
        change(parts)
    keys = {"general.architecture": "llama"} | nf4_tensors.metadata(nested_levels=dynamic_map() if nested else None)
    keys = {key: value for key, value in (keys | (metadata or {})).items() if value is not None}
    plan = gguf.Plan(keys, [(name, kind, shape) for name, (kind, shape, _) in parts.items()])
    with gguf.Writer(path, plan, overwrite=True) as writer:
        for name, (_, _, raw) in parts.items():
            writer.write(name, raw)
    return path


def test_levels_are_quantiles_of_the_normal_distribution():
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    made = np.sort(np.array([*positive, 0, *negative]))
    np.testing.assert_allclose(NF4_LEVELS, made / made.max(), rtol=0, atol=2e-7)
    assert sorted(set(FP4_LEVELS * 12)) == [-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12]


@pytest.mark.parametrize("levels", [NF4_LEVELS, FP4_LEVELS], ids=["NF4", "FP4"])
@pytest.mark.parametrize(("n", "block"), [(64, 64), (640, 64), (130, 64), (77, 32), (256, 128), (1, 64)])
def test_codes_and_maxima_by_plain_loops(levels, n, block):
    x = weights((n,), seed=n)
    x[: min(n, 64)] *= 0 if n == 640 else 1  # a block of zeros
    packed, maxima = encode_4bit(x, levels, block)
    codes, largest = naive_encode(x, levels, block)
    assert [code for byte in packed for code in (byte >> 4, byte & 15)][:n] == codes
    assert maxima.tolist() == largest


def test_halfway_between_two_levels_the_lower_one_is_taken():
    bounds = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / F32(2)
    x = np.zeros(64, F32)
    x[0] = 1
    x[1:16] = bounds
    x[16:31] = np.nextafter(bounds, F32(2))
    packed, _ = encode_4bit(x, NF4_LEVELS)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    assert codes[1:16].tolist() == list(range(15)) and codes[16:31].tolist() == list(range(1, 16))


def test_the_dynamic_map():
    levels = dynamic_map()
    assert levels.dtype == F32 and len(set(levels.tolist())) == 256 and (np.diff(levels) > 0).all()
    assert levels[[0, 127, 255]].tolist() == [F32(-0.99296874), 0, 1]
    assert set(-levels[levels < 0]) == set(levels[(levels > 0) & (levels < 1)])


def test_maxima_quantized_again_are_near():
    maxima = np.abs(weights((1000,))) + F32(0.1)
    codes, second, offset = encode_maxima(maxima)
    assert codes.shape == (1000,) and second.shape == (4,) and abs(offset - maxima.mean()) < 1e-6
    levels = dynamic_map()
    distance = (maxima - offset) / np.repeat(second, 256)[:1000]
    best = np.abs(levels[:, None] - distance).min(axis=0)
    assert (np.abs(levels[codes] - distance) <= best + 2 / 65535).all()
    assert encode_maxima(np.full(3, 0.5, F32))[1].tolist() == [0]


def test_blocks_in_memory():
    x = weights((3, 128))
    raw = NF4.encode(x)
    assert raw.shape == (3, 72) and NF4.bits_per_weight == 4.5
    packed, maxima = encode_4bit(x.reshape(-1), NF4_LEVELS)
    back = NF4.decode(raw)
    assert np.array_equal(raw.view(NF4.fields)["d"].reshape(-1), maxima)
    assert np.array_equal(raw.view(NF4.fields)["qs"].reshape(-1), packed)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    assert np.array_equal(back.reshape(-1), NF4_LEVELS[codes] * np.repeat(maxima, 64))
    for bad in (np.nan, np.inf):
        with pytest.raises(FormatError, match="NaN or infinite weights cannot be quantized to NF4"):
            NF4.encode(np.full((1, 64), bad, F32))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(8, 128), (130, 640), (5, 10), (3, 96), (2, 3, 64), (64,)])
def test_one_logical_tensor(tmp_path, nested, shape):
    x = weights(shape)
    with gguf.open(write(tmp_path / "a.gguf", {"blk.0.attn_q.weight": x}, nested)) as f:
        assert list(f.tensors) == ["blk.0.attn_q.weight", "norm.weight"]
        t = f.tensors["blk.0.attn_q.weight"]
        assert t.type == "NF4" and t.shape == shape and t.n_elements == x.size
        back = t.dequantize()
        assert back.shape == shape and back.dtype == F32
        packed, maxima = encode_4bit(x.reshape(-1), NF4_LEVELS)
        if nested:
            codes, second, offset = encode_maxima(maxima)
            maxima = dynamic_map()[codes] * np.repeat(second, 256)[: len(codes)] + offset
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        expected = NF4_LEVELS[codes] * np.repeat(maxima, 64)[: x.size]
        assert np.array_equal(back.reshape(-1), expected)
        for start, stop in ((0, 1), (t.rows // 2, t.rows), (t.rows, t.rows)):
            rows = t.type.decode(t.read_rows(start, stop))
            assert np.array_equal(rows, back.reshape(t.rows, t.cols)[start:stop])
        assert t.raw.shape[:-1] == shape[:-1]
        assert np.array_equal(f.stored["blk.0.attn_q.weight.nf4"].raw.reshape(-1), packed)
        assert sum(part.nbytes for name, part in f.stored.items() if name.startswith("blk")) == t.nbytes


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_sizes_to_the_byte(tmp_path, nested):
    x = weights((512, 1024))
    blocks = x.size // 64
    with gguf.open(write(tmp_path / "a.gguf", {"x.weight": x}, nested)) as f:
        t = f.tensors["x.weight"]
        if nested:
            assert t.nbytes == x.size // 2 + blocks + 4 * (blocks // 256) + 4
            assert abs(8 * t.nbytes / x.size - 4.127) < 1e-3
        else:
            assert t.nbytes == x.size // 2 + 4 * blocks and 8 * t.nbytes == 4.5 * x.size


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_other_readers_open_and_list_the_file(tmp_path, nested):
    path = write(tmp_path / "a.gguf", {"x.weight": weights((8, 128))}, nested)
    reader = gguf_package.GGUFReader(path)
    listed = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    assert listed["x.weight.nf4"] == ("I8", [64, 8])
    assert listed["x.weight.nf4_absmax"] == ("I8" if nested else "F32", [16])
    assert ("x.weight.nf4_nested" in listed) == nested
    assert reader.fields["ggufkit.nf4.block_size"].contents() == 64
    np.testing.assert_array_equal(np.array(reader.fields["ggufkit.nf4.levels"].contents(), F32), NF4_LEVELS)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_big_endian_file(tmp_path, nested):
    x = weights((6, 96))
    with gguf.open(write(tmp_path / "little.gguf", {"x.weight": x}, nested)) as little:
        writer = gguf_package.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf_package.GGUFEndian.BIG)
        for key in (nf4_tensors.VERSION, nf4_tensors.BLOCK_SIZE, *[nf4_tensors.NESTED_BLOCK_SIZE] * nested):
            writer.add_uint32(key, little.metadata[key])
        for key in (nf4_tensors.LEVELS, *[nf4_tensors.NESTED_LEVELS] * nested):
            writer.add_array(key, little.metadata[key].tolist())
        for name, part in little.stored.items():
            writer.add_tensor(name, part.raw.reshape(-1).view(part.type.fields).reshape(part.shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with gguf.open(tmp_path / "big.gguf") as big:
            assert big.byte_order == "big" and big.tensors["x.weight"].type == "NF4"
            assert np.array_equal(big.tensors["x.weight"].dequantize(), little.tensors["x.weight"].dequantize())


# -- files that lie ------------------------------------------------------------------------------------


def resize(name: str, n: int) -> Any:
    def change(parts: dict[str, Any]) -> None:
        kind, _, raw = parts[name]
        parts[name] = (kind, (n,), np.zeros(n * (4 if kind == "F32" else 1), np.uint8) + raw[:1])

    return change


def rename(old: str, new: str) -> Any:
    return lambda parts: parts.__setitem__(new, parts.pop(old))


def retype(name: str, kind: str) -> Any:
    def change(parts: dict[str, Any]) -> None:
        shape, size = parts[name][1], {"F32": 4, "F16": 2, "I8": 1, "I16": 2}[kind]
        parts[name] = (kind, shape, np.zeros(math.prod(shape) * size, np.uint8))

    return change


LIES = {
    "a maximum too few": (resize("x.weight.nf4_absmax", 15), {}, FormatError, r"\(15,\).*needs \(16,\)"),
    "a maximum too many": (resize("x.weight.nf4_absmax", 17), {}, FormatError, r"\(17,\).*needs \(16,\)"),
    "no maxima": (rename("x.weight.nf4_absmax", "y"), {}, FormatError, "'x.weight.nf4_absmax' is missing"),
    "no codes": (rename("x.weight.nf4", "y"), {}, FormatError, "belongs to 'x.weight.nf4', which is missing"),
    "no second level": (rename("x.weight.nf4_nested", "y"), {}, FormatError, "'x.weight.nf4_nested' is missing"),
    "second level too short": (resize("x.weight.nf4_nested", 1), {}, FormatError, r"needs \(2,\)"),
    "codes of another type": (retype("x.weight.nf4", "I16"), {}, FormatError, "must be I8, not I16"),
    "maxima of another type": (retype("x.weight.nf4_absmax", "F16"), {}, FormatError, "must be F32 or I8"),
    "twice": (rename("norm.weight", "x.weight"), {}, FormatError, "both whole and as 'x.weight.nf4'"),
    "no levels": (None, {nf4_tensors.LEVELS: None}, FormatError, "nf4.levels' is missing"),
    "a NaN among the levels": (
        None,
        {nf4_tensors.LEVELS: np.array([np.nan, *NF4_LEVELS[1:]], F32)},
        FormatError,
        "levels of NF4 are not all finite",
    ),
    "too few levels": (None, {nf4_tensors.LEVELS: NF4_LEVELS[:15].copy()}, FormatError, "15 numbers; 16 are needed"),
    "levels that are text": (None, {nf4_tensors.LEVELS: "abc"}, FormatError, "must be numbers"),
    "an odd block": (None, {nf4_tensors.BLOCK_SIZE: np.uint32(48)}, FormatError, "blocks of 48"),
    "a block of 128": (None, {nf4_tensors.BLOCK_SIZE: np.uint32(128)}, FormatError, r"needs \(8,\)"),
    "no map": (None, {nf4_tensors.NESTED_LEVELS: None}, FormatError, "no metadata 'ggufkit.nf4.nested_levels'"),
    "a short map": (
        None,
        {nf4_tensors.NESTED_LEVELS: dynamic_map()[:99].copy()},
        FormatError,
        "must be 256 finite numbers",
    ),
    "another second-level block": (
        None, {nf4_tensors.NESTED_BLOCK_SIZE: np.uint32(128)}, UnsupportedError, "256 can be read",
    ),
    "another version": (None, {nf4_tensors.VERSION: np.uint32(2)}, UnsupportedError, "version 1 of NF4 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(tmp_path, lie):
    change, metadata, error, message = LIES[lie]
    path = write(tmp_path / "lie.gguf", {"x.weight": weights((8, 128))}, True, metadata, change)
    with pytest.raises(GgufkitError, match=message) as caught:
        gguf.open(path)
    assert type(caught.value) is error and str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_truncated_file(tmp_path):
    path = write(tmp_path / "a.gguf", {"x.weight": weights((8, 128))}, False)
    with gguf.open(path) as f:
        end = f.stored["x.weight.nf4_absmax"].offset + 60
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(FormatError, match=r"'x.weight.nf4_absmax' needs 64 bytes at"):
        gguf.open(path)


def test_without_the_version_the_parts_are_tensors_like_any_other(tmp_path):
    path = write(tmp_path / "a.gguf", {"x.weight": weights((8, 128))}, False, {nf4_tensors.VERSION: None})
    with gguf.open(path) as f:
        assert list(f.tensors) == ["x.weight.nf4", "x.weight.nf4_absmax", "norm.weight"] == list(f.stored)


def test_it_has_no_number_in_gguf():
    with pytest.raises(UsageError, match="NF4 has no number in GGUF"):
        gguf.Plan({}, [("x.weight", "NF4", (4, 64))])
    with pytest.raises(UsageError, match="rows of an even length"):
        nf4_tensors.rows("x.weight", (4, 63))
    assert -1 not in [t.id for t in map(gguf.by_id, range(64))]
