"""Reading safetensors: against the `safetensors` package, and one file per broken rule."""

from __future__ import annotations

import json
import random
from pathlib import Path

import hostile
import ml_dtypes
import numpy as np
import pytest
from ggufkit_formats import safetensors
from ggufkit_formats.blocks import UnknownType
from ggufkit_formats.errors import FormatError, GgufkitError
from hostile import tensor
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

RNG = np.random.default_rng(1)


def arrays() -> dict[str, np.ndarray]:
    """One array of each dtype that NumPy and safetensors have."""
    x = 100 * RNG.standard_normal((3, 5))
    dtypes = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
    out = {f"t.{d}": x.astype(d) for d in dtypes}
    out["t.bf16"] = x.astype(ml_dtypes.bfloat16)
    out["scalar"] = np.array(3.5, dtype=np.float32)
    out["none"] = np.zeros((0, 4), dtype=np.float16)
    return out


def put(folder: Path, data: bytes, name: str = "t.safetensors") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def shards(folder: Path, index: object = None) -> dict[str, np.ndarray]:
    """A checkpoint of two files and an index."""
    x = arrays()
    first, second = dict(list(x.items())[:5]), dict(list(x.items())[5:])
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return x


def test_all_dtypes_against_the_safetensors_package(tmp_path):
    path, expected = tmp_path / "t.safetensors", arrays()
    save_file(expected, path, metadata={"format": "pt"})
    assert load_file(path).keys() == expected.keys()
    with safetensors.open(path) as f:
        assert f.metadata == {"format": "pt"} and f.paths == [path] and f.nbytes == path.stat().st_size
        assert f.tensors.keys() == expected.keys()
        for name, x in expected.items():
            t = f.tensors[name]
            assert t.shape == x.shape and t.nbytes == x.nbytes
            assert t.raw.tobytes() == x.tobytes()
            if isinstance(t.type, UnknownType):
                assert t.type.name in {"U8", "U16", "U32", "U64", "BOOL"} and t.type.id == -1
            else:
                assert np.array_equal(t.dequantize(), x.astype(np.float32))
                assert t.read_rows(0, t.rows).tobytes() == x.tobytes()
        kinds = {name: f.tensors[f"t.{name}"].type for name in ("f8", "f4", "f2", "bf16", "i8", "i4", "i2", "i1")}
        assert [str(t) for t in kinds.values()] == ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"]


def test_dtypes_that_numpy_lacks(tmp_path):
    header = {
        "f8": tensor("F8_E4M3", (3,), (0, 3)),
        "f4": tensor("F4", (2, 4), (3, 7)),
        "f6": tensor("F6_E2M3", (4,), (7, 10)),
        "new": tensor("Q7_NEW", (9, 9), (10, 13)),
    }
    with safetensors.open(put(tmp_path, hostile.safetensors(header, 13))) as f:
        found = [(t.name, t.type.name, t.nbytes) for t in f.tensors.values()]
        assert found == [("f8", "F8_E4M3", 3), ("f4", "F4", 4), ("f6", "F6_E2M3", 3), ("new", "Q7_NEW", 3)]
        assert all(t.raw.shape == (t.nbytes,) for t in f.tensors.values())


@pytest.mark.parametrize("how", ["folder", "index"])
def test_shards(how, tmp_path):
    expected = shards(tmp_path)
    with safetensors.open(tmp_path if how == "folder" else tmp_path / "model.safetensors.index.json") as f:
        assert f.tensors.keys() == expected.keys()
        assert [p.name for p in f.paths] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        assert all(f.tensors[name].raw.tobytes() == x.tobytes() for name, x in expected.items())


def test_folders(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(GgufkitError, match=r"holds no \.safetensors file$"):
        safetensors.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(GgufkitError, match=r"pytorch_model\.bin is a PyTorch file, which ggufkit does not read"):
        safetensors.open(tmp_path)
    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    with safetensors.open(tmp_path) as f:
        assert list(f.tensors) == ["x"]
    save_file({"y": np.ones(3)}, tmp_path / "another.safetensors")
    with pytest.raises(FormatError, match=r"holds 2 \.safetensors files and no model\.safetensors\.index"):
        safetensors.open(tmp_path)
    save_file({"z": np.ones(3)}, tmp_path / "model.safetensors")
    with safetensors.open(tmp_path) as f:
        assert list(f.tensors) == ["z"]
    with pytest.raises(GgufkitError, match="no such file"):
        safetensors.open(tmp_path / "nope")


def test_links_as_in_the_hugging_face_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    expected = shards(blobs)
    for i, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / blob.name)
    with safetensors.open(snapshot) as f:
        assert f.tensors.keys() == expected.keys()


@pytest.mark.parametrize("case", hostile.SAFETENSORS, ids=lambda case: case.name)
def test_each_broken_rule_has_its_message(case, tmp_path):
    path = put(tmp_path, case.data)
    with pytest.raises(FormatError) as caught:
        safetensors.open(path)
    assert str(caught.value) == f"{path}: {case.message}"
    if case.name not in {"no brace", "name twice"}:  # in the format's rules, but not enforced by the package
        with pytest.raises(SafetensorError):
            load_file(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map of tensor names to file names"),
        ({"weight_map": []}, "has no weight_map of tensor names to file names"),
        ({"weight_map": {}}, "has no weight_map of tensor names to file names"),
        ([], "the index is not a JSON object"),
        ({"weight_map": {"a": 1}}, "weight_map has 1 for tensor 'a'; a file name is wanted"),
        ({"weight_map": {"a": "../a.safetensors"}}, "leads out of the folder for tensor 'a': '../a.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "leads out of the folder for tensor 'a': '/etc/passwd'"),
        ({"weight_map": {"a": "sub/a.safetensors"}}, "leads out of the folder for tensor 'a'"),
        ({"weight_map": {"a": ".."}}, "leads out of the folder for tensor 'a'"),
        ({"weight_map": {"a": ""}}, "leads out of the folder for tensor 'a'"),
        ({"weight_map": {"a": "..\\a"}}, "leads out of the folder for tensor 'a'"),
        ({"weight_map": {"a": "a\0"}}, "leads out of the folder for tensor 'a'"),
        ({"weight_map": {"a": "none.safetensors"}}, "no such file; model.safetensors.index.json says it holds 1"),
        ({"weight_map": {"a": "x" * 300}}, "no such file; model.safetensors.index.json says it holds 1"),
        (
            {"weight_map": {"a": "model-00001-of-00002.safetensors"}},
            "tensor 'a' is not in model-00001-of-00002.safetensors, where the index says it is",
        ),
        (
            {"weight_map": {"scalar": "model-00001-of-00002.safetensors"}},
            "tensor 'scalar' is not in model-00001-of-00002.safetensors, where the index says it is",
        ),
    ],
)  # fmt: skip
def test_broken_indexes(index, message, tmp_path):
    shards(tmp_path, index)
    with pytest.raises(GgufkitError) as caught:
        safetensors.open(tmp_path)
    assert message in str(caught.value)


def test_damaged_files_raise_only_our_errors(tmp_path):
    """Byte flips and truncations: what we read, the safetensors package reads, too, and the same."""
    whole, rng = bytearray(), random.Random(0)
    save_file(arrays(), tmp_path / "w.safetensors", metadata={"a": "b"})
    whole = (tmp_path / "w.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    cases = [whole[:n] for n in range(0, len(whole), 7)]
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 4])):
            damaged[rng.randrange(end)] = rng.choice(b'0123456789[]{}",:a \xff\0')
        cases.append(bytes(damaged))
    read = 0
    for data in cases:
        path = put(tmp_path, data, "d.safetensors")
        try:
            f = safetensors.open(path)
        except GgufkitError:
            continue
        with f:
            read += 1
            held = {name: (t.shape, t.raw.tobytes()) for name, t in f.tensors.items()}
            known = all(t.type.name in _PEER for t in f.tensors.values())
        if known:
            theirs = load_file(path)
            assert held == {name: (x.shape, x.tobytes()) for name, x in theirs.items()}
    assert 50 < read < len(cases) - 400


_PEER = {"BF16", "F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}
