"""Writing safetensors: read by the `safetensors` package, aligned, sharded, and gone after an error."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from ggufkit_formats import safetensors as ours
from ggufkit_formats.errors import GgufkitError, UsageError
from ggufkit_formats.safetensors_writer import NBYTES, Planned, Writer, shards

VALUES = {
    "b": np.arange(7, dtype=np.uint8),
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "h": np.arange(5, dtype=np.float16),
    "bf": np.arange(5).astype(ml_dtypes.bfloat16),
    "d": np.arange(3, dtype=np.float64),
    "empty": np.zeros((0, 4), np.float32),
    "ünï": np.array(3, np.int64),
}
DTYPES = {"uint8": "U8", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64"}


def planned() -> list[Planned]:
    return [Planned(name, DTYPES[x.dtype.name], x.shape) for name, x in VALUES.items()]


def test_the_reference_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": 1}).encode()
    with Writer(path, [*planned(), Planned("text", "U8", (100,), is_open=True)], {"format": "pt"}) as writer:
        writer.write("text", text[:3])
        for name, x in reversed(VALUES.items()):  # in any order, in pieces
            raw = x.reshape(-1).view(np.uint8)
            writer.write(name, raw[:3])
            writer.write(name, raw[3:].tobytes())
        writer.write("text", text[3:])
    got = safetensors.numpy.load_file(path)
    assert got.pop("text").tobytes() == text
    assert got.keys() == VALUES.keys()
    for name, x in VALUES.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape and got[name].tobytes() == x.tobytes()
    with safetensors.safe_open(path, "np") as f:
        assert f.metadata() == {"format": "pt"}
    with ours.open(path) as f:
        for name, tensor in f.stored.items():
            assert tensor.offset % NBYTES[tensor.type.name] == 0, name
        assert f.stored["text"].shape == (len(text),)


def test_what_was_not_planned_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    one = [Planned("a", "F32", (2,))]
    for name, data, message in (("b", b"", "'b' was not planned"), ("a", b"123456789", "8 bytes; more were given"),
                                ("a", b"1234", "'a' got 4 of its 8 bytes")):  # fmt: skip
        with pytest.raises(UsageError, match=message), Writer(path, one, {}) as writer:
            writer.write(name, data)
        assert not path.exists()
    with pytest.raises(UsageError, match="planned twice"):
        Writer(path, one * 2, {})
    with pytest.raises(KeyboardInterrupt), Writer(path, one, {}):
        raise KeyboardInterrupt
    assert not path.exists()
    path.write_bytes(b"mine")
    with pytest.raises(GgufkitError, match="file exists"), Writer(path, one, {}):
        pass
    assert path.read_bytes() == b"mine"


def test_shards() -> None:
    groups = [[Planned(f"{i}", "U8", (n,))] for i, n in enumerate((4, 4, 3, 12, 1, 1))]
    groups.append([Planned("x", "U8", (5,)), Planned("y", "U8", (4,))])  # these stay together
    found = [[t.name for t in file] for file in shards(groups, 10)]
    assert found == [["0", "1"], ["2"], ["3"], ["4", "5"], ["x", "y"]]
    assert shards([], 10) == []
