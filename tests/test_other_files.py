"""Big-endian, version 2, oddly aligned and split files: they run, tokenize and convert like the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import tiny_models
from ggufkit_formats import gguf
from ggufkit_formats.gguf_metadata import ValueType
from ggufkit_formats.tensor import Tensor
from ggufkit_runtime import generate

import ggufkit

IDS = [1, 300, 301, 17, 40]


@pytest.fixture(scope="module", params=["F16", "Q5_0", "Q4_K"])
def plain(request, tmp_path_factory) -> Path:
    return tiny_models.write(tmp_path_factory.mktemp("plain") / "plain.gguf", type=request.param)


def entry(key: str, value: Any, order: str) -> bytes:
    """A metadata entry of a little- or big-endian file, by a writer that shares nothing with ours."""
    if isinstance(value, str):
        return hostile.entry(key, ValueType.STRING, hostile.string(value, order), order)
    if isinstance(value, gguf.StringArray):
        items = b"".join(hostile.string(each, order) for each in value)
        return hostile.entry(key, ValueType.ARRAY, hostile.array(ValueType.STRING, len(value), items, order), order)
    kinds = {"u4": ValueType.UINT32, "i4": ValueType.INT32, "f4": ValueType.FLOAT32}
    swapped = np.asarray(value).astype(np.asarray(value).dtype.newbyteorder(order))
    kind = kinds[swapped.dtype.str[1:]]
    if swapped.ndim:
        raw = hostile.array(kind, len(swapped), swapped.tobytes(), order)
        return hostile.entry(key, ValueType.ARRAY, raw, order)
    return hostile.entry(key, kind, swapped.tobytes(), order)


def write(
    path: Path, metadata: dict[str, Any], tensors: list[Tensor], order: str, version: int, alignment: int
) -> Path:
    infos, data = [], b""
    for t in tensors:
        infos.append(hostile.info(t.name, list(reversed(t.shape)), t.type.id, len(data), order))
        raw = t.raw.reshape(-1).view(t.type.fields).astype(t.type.fields.newbyteorder(order)).tobytes()
        data += raw + bytes(-len(raw) % alignment)
    entries = [entry(key, value, order) for key, value in metadata.items()]
    path.write_bytes(hostile.gguf(entries, infos, data, version=version, alignment=alignment, order=order))
    return path


@pytest.mark.parametrize(("order", "version", "alignment"), [("<", 2, 32), (">", 3, 32), (">", 2, 1024), ("<", 3, 8)])
def test_order_version_and_alignment(plain, tmp_path, order, version, alignment):
    with gguf.open(plain) as file:
        metadata = file.metadata.copy() | {"general.alignment": np.uint32(alignment)}
        path = write(tmp_path / "other.gguf", metadata, list(file.tensors.values()), order, version, alignment)
    same(plain, path, tmp_path)


def test_split_files(plain, tmp_path):
    with gguf.open(plain) as file:
        tensors = list(file.tensors.values())
        for i in range(3):
            keys = file.metadata.copy() if i == 0 else {}
            keys |= {
                "split.no": np.uint32(i),
                "split.count": np.uint32(3),
                "split.tensors.count": np.int32(len(tensors)),
            }
            write(tmp_path / f"part-{i + 1:05d}-of-00003.gguf", keys, tensors[i::3], "<", 3, 32)
    same(plain, tmp_path / "part-00002-of-00003.gguf", tmp_path)


def same(plain: Path, other: Path, folder: Path) -> None:
    """Logits on both backends, token ids and converted tensors are equal."""
    for device in ("reference", "cpu"):
        a, b = (generate.load(path, device=device) for path in (plain, other))
        assert np.array_equal(a.logits(IDS), b.logits(IDS))
        assert a.tokenizer.encode("w1 é") == b.tokenizer.encode("w1 é")
    outputs = []
    for name, path in (("a", plain), ("b", other)):
        ggufkit.convert(path, "q8_0", folder / f"{name}.gguf", allow_requantize=True)
        with gguf.open(folder / f"{name}.gguf") as file:
            assert "split.no" not in file.metadata and file.byte_order == "little"
            outputs.append({tensor.name: tensor.raw.tobytes() for tensor in file.tensors.values()})
    assert outputs[0] == outputs[1]
