"""`ggufkit types` and `ggufkit diff`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import ggufkit
from ggufkit_formats import gguf
from ggufkit_formats.blocks import TYPES, find

from ggufkit import compare
from ggufkit.quantize.file_types import FILE_TYPES


def test_types():
    found = ggufkit("types", "--json").json
    tensor_types = {t["name"]: t for t in found["tensor_types"]}
    assert set(tensor_types) == set(TYPES) and [t["name"] for t in found["file_types"]] == list(FILE_TYPES)
    for name, t in tensor_types.items():
        kind = TYPES[name]
        assert t["block"] == kind.block and t["bits_per_weight"] == kind.bits_per_weight and t["read"] and t["cpu"]
        if t["error"] is not None and kind.is_quantized:
            assert 0.001 < t["error"] < 1.2 * 2 ** -(t["bits_per_weight"] - 2), name
    assert tensor_types["NF4"]["id"] is None and tensor_types["Q4_K"]["id"] == 12
    assert tensor_types["F32"]["error"] == 0 and tensor_types["I8"]["error"] is None
    errors = [tensor_types[name]["error"] for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "NF4", "Q3_K", "Q2_K")]
    assert errors == sorted(errors)
    file_types = {t["name"]: t for t in found["file_types"]}
    assert file_types["Q4_K_M"] == {
        "name": "Q4_K_M", "id": 15, "type": "Q4_K", "write": True, "bits_per_weight": 4.5,
    }  # fmt: skip
    assert file_types["NF4"]["write"] and file_types["NF4"]["id"] is None
    assert round(file_types["NF4_DQ"]["bits_per_weight"], 3) == 4.127


def test_types_as_text():
    done = ggufkit("types")
    lines = done.out.splitlines()
    assert lines[0].split() == ["tensor", "type", "id", "block", "bits/weight", "read", "write", "CPU", "CUDA", "error"]
    (q4_k,) = [line.split() for line in lines if line.startswith("Q4_K ")]
    assert q4_k[:8] == ["Q4_K", "12", "256", "4.5", "yes", "yes", "yes", "yes"] and q4_k[-1] == "%"
    assert max(map(len, lines)) < 120


def write(path, tensors, metadata=None):
    """Float32 arrays by name, with the type that each is to have."""
    keys = {"general.architecture": "x", "x.list": np.arange(3, dtype=np.int32)} | (metadata or {})
    with gguf.Writer(path, gguf.Plan(keys, [(name, kind, x.shape) for name, (kind, x) in tensors.items()])) as w:
        for name, (kind, x) in tensors.items():
            w.write(name, find(kind).encode(x))
    return path


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)


def test_no_difference(tmp_path, x):
    a, b = (write(tmp_path / f"{name}.gguf", {"t": ("Q8_0", x), "u": ("F32", x)}) for name in "ab")
    done = ggufkit("diff", a, b)
    assert done.status == 0 and done.out == "no difference: 2 tensors, and all metadata\n"
    found = ggufkit("diff", a, b, "--json").json
    assert found["equal"] and found["metadata"] == {"only_a": [], "only_b": [], "differ": []}
    assert [t["relative_rmse"] for t in found["tensors"]["both"]] == [0, 0]


def test_all_kinds_of_difference(tmp_path, x):
    a = write(tmp_path / "a.gguf", {"t": ("Q8_0", x), "mine": ("F32", x), "shape": ("F32", x[:2])}, {
        "x.mine": 1, "x.value": np.uint32(1), "x.list": np.arange(4, dtype=np.int32),
    })  # fmt: skip
    b = write(tmp_path / "b.gguf", {"t": ("F32", x), "theirs": ("F32", x), "shape": ("F32", x)}, {
        "x.value": np.int32(1), "x.theirs": "text",
    })  # fmt: skip
    done = ggufkit("diff", a, b, "--json")
    assert done.status == 1 and done.err == ""
    found = json.loads(done.out)
    assert not found["equal"] and found["metadata"]["only_a"] == ["x.mine"]
    assert found["metadata"]["only_b"] == ["x.theirs"]
    assert {"key": "x.list", "a": {"length": 4}, "b": {"length": 3}} in found["metadata"]["differ"]
    assert {"key": "x.value", "a": 1, "b": 1} in found["metadata"]["differ"]  # of another type
    assert found["tensors"]["only_a"] == ["mine"] and found["tensors"]["only_b"] == ["theirs"]
    t, shape = found["tensors"]["both"]
    off = find("Q8_0").decode(find("Q8_0").encode(x)) - x
    assert t["a"] == {"type": "Q8_0", "shape": [64, 6]} and t["b"]["type"] == "F32" and not t["equal"]
    assert t["max_difference"] == np.abs(off).max()
    np.testing.assert_allclose(t["relative_rmse"], np.sqrt((off**2).sum() / (x**2).sum()), rtol=1e-5)
    assert shape["relative_rmse"] is None and shape["b"]["shape"] == [64, 6]
    text = ggufkit("diff", a, b)
    assert text.status == 1
    for part in ("metadata only in", "x.mine", "tensors only in", "theirs", "3 items", "F32 64 × 2", "0 of 2 tensors"):
        assert part in text.out, part


def test_files_that_cannot_be_read(tmp_path, x):
    a = write(tmp_path / "a.gguf", {"t": ("F32", x)})
    assert ggufkit("diff", a, tmp_path / "none.gguf").error.endswith("none.gguf: no such file")
    (tmp_path / "b.gguf").write_bytes(b"text")
    assert ggufkit("diff", tmp_path / "b.gguf", a).status == 1
    assert ggufkit("diff", a).status == 2


def test_distances_of_what_is_no_number(tmp_path, x, monkeypatch):
    monkeypatch.setattr(compare, "SLAB_NBYTES", 4 * 64)
    y, z = x.copy(), x.copy()
    x[0, 0] = y[0, 0] = np.nan
    x[1, 1] = y[1, 1] = np.inf
    z[2] = 0
    a, b, c, d = (
        gguf.open(write(tmp_path / f"{i}.gguf", {"t": ("F32", each)})).tensors["t"]
        for i, each in enumerate((x, y, z, np.zeros_like(z)))
    )
    assert compare.distance(a, b) == compare.Distance(0, 0)
    assert compare.distance(d, d) == compare.Distance(0, 0)
    assert np.isnan(compare.distance(a, c).max_difference)
    assert compare.distance(c, d).relative_rmse == np.inf
    assert compare.distance(d, c).relative_rmse == 1
