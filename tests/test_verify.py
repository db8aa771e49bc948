"""verify: sound files, each thing that may be wrong, and distances from the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import tiny_models
from command_line import ggufkit as command
from ggufkit_formats import gguf

import ggufkit
from ggufkit import compare
from ggufkit.convert import convert
from ggufkit.verify import verify

SMALL = Path(__file__).parent / "data" / "small-model"


@pytest.mark.parametrize("type", ["f16", "q4_k", "tq2_0", "nf4_dq", "mxfp4"])
def test_sound_files_and_their_distance(type: str, tmp_path: Path) -> None:
    convert(SMALL, type, tmp_path / "a.gguf")
    convert(SMALL, "f32", tmp_path / "b.gguf")
    found = verify(tmp_path / "a.gguf", SMALL)
    assert found.problems == [] and found.notes == []
    with gguf.open(tmp_path / "a.gguf") as a, gguf.open(tmp_path / "b.gguf") as b:
        assert list(found.errors) == list(a.tensors)
        for name, (kind, distance) in found.errors.items():
            assert kind == a.tensors[name].type.name
            assert distance == compare.distance(a.tensors[name], b.tensors[name]), name


def test_a_scale_beside_is_part_of_the_matrix(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    name = "model.layers.0.mlp.up_proj.weight"
    made = {name: (rng.integers(-1, 2, (512, 256)) / 73).astype(np.float32)}
    checkpoints.make(tmp_path / "m", dtype=np.float32, extra=made)
    convert(tmp_path / "m", "tq2_0", tmp_path / "a.gguf")
    found = verify(tmp_path / "a.gguf", tmp_path / "m")
    assert found.problems == [] and found.errors["blk.0.ffn_up.weight"][1].max_difference == 0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "a.gguf", "llama", "Q8_0", optional=False)


def rewritten(file: Path, change: dict[str, Any], drop: str = "") -> Path:
    out = file.with_name("changed.gguf")
    with gguf.open(file) as f:
        left = [t for t in f.tensors.values() if t.name != drop]
        with gguf.Writer(out, gguf.Plan(f.metadata.copy() | change, left), True) as writer:
            for t in left:
                writer.write(t.name, t.raw)
    return out


def test_what_may_be_wrong(file: Path) -> None:
    def problems(path: Path) -> list[tuple[str, str]]:
        return [(each.where, each.what) for each in verify(path).problems]

    assert problems(file) == []
    assert problems(rewritten(file, {}, "blk.1.ffn_up.weight")) == [
        ("network", "the network: tensor 'blk.1.ffn_up.weight' is missing")
    ]
    wrong = rewritten(file, {"tokenizer.ggml.eos_token_id": np.uint32(400)})
    assert problems(wrong) == [("tokenizer", "tokenizer.ggml.eos_token_id is 400; there are 320 tokens")]
    with gguf.open(file) as f:
        offset, other = f.tensors["blk.0.attn_v.weight"].offset, f.tensors["blk.1.ffn_norm.weight"]
        place, n = other.offset, other.nbytes
    with file.open("r+b") as raw:
        raw.seek(offset + 34 * 8 * 5)  # row 5 of 256 weights: its first scale
        raw.write(b"\x00\x7c")
        raw.seek(place)
        raw.write(bytes(n))
    assert problems(file) == [
        ("blk.0.attn_v.weight", "NaN or infinite weights of type Q8_0, the first in row 5"),
        ("blk.1.ffn_norm.weight", "all weights are 0"),
    ]
    with file.open("r+b") as raw:
        raw.truncate(place)
    ((where, what),) = problems(file)
    assert where == "structure" and "but the file ends at" in what


def test_another_source(file: Path, tmp_path: Path) -> None:
    other = tiny_models.write(tmp_path / "b.gguf", "llama", "F32", optional=False, intermediate_size=768)
    found = verify(file, other)
    assert {p.what.split(" in ")[0] for p in found.problems} == {
        "has shape [512, 256], and [768, 256]", "has shape [256, 512], and [256, 768]"
    }  # fmt: skip
    with pytest.raises(ggufkit.GgufkitError, match="no such file"):
        verify(tmp_path / "none.gguf")
    with pytest.raises(ggufkit.GgufkitError, match="is a folder, not a file"):
        verify(tmp_path)


def test_command(file: Path, tmp_path: Path) -> None:
    done = command("verify", file)
    assert (done.status, done.out) == (0, "no problems\n")
    document = command("verify", file, "--against", file, "--json").json
    assert document["sound"] is True and document["problems"] == []
    assert {each["max_difference"] for each in document["tensors"]} == {0.0}
    bad = command("verify", rewritten(file, {}, "output_norm.weight"))
    assert bad.status == 1 and bad.out == "network: the network: tensor 'output_norm.weight' is missing\n1 problem\n"
