"""What inspect and bench call a file: file types that share a number, and those that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import ggufkit as command
from ggufkit_formats import gguf

from ggufkit.convert import convert
from ggufkit.quantize import named

SMALL = Path(__file__).parent / "data" / "small-model"


@pytest.mark.parametrize(
    ("asked", "name"),
    [("mxfp4", "MXFP4"), ("mxfp4_moe", "MXFP4_MOE"), ("nvfp4", "NVFP4"), ("nf4", "NF4"), ("nf4_dq", "NF4_DQ"),
     ("q4_k", "Q4_K_M"), ("q8_0", "Q8_0")],
)  # fmt: skip
def test_the_name_that_was_asked_for(asked: str, name: str, tmp_path: Path) -> None:
    convert(SMALL, asked, tmp_path / "a.gguf")
    with gguf.open(tmp_path / "a.gguf") as f:
        found = named.file_type(f)
    assert found is not None and found.name == name


def test_experts_alone_are_moe(tmp_path: Path) -> None:
    """llama.cpp's file type of that number: stacked experts in MXFP4, matrices in Q8_0."""
    tensors = [("blk.0.ffn_gate_exps.weight", "MXFP4", (4, 64, 64)), ("blk.0.attn_q.weight", "Q8_0", (64, 64))]
    keys = {"general.architecture": "gpt-oss", "general.file_type": 38, "gpt-oss.expert_count": 4}
    with gguf.Writer(tmp_path / "a.gguf", plan := gguf.Plan(keys, tensors)) as writer:
        for each in plan.tensors:
            writer.write(each.name, bytes(each.nbytes))
    with gguf.open(tmp_path / "a.gguf") as f:
        found = named.file_type(f)
    assert found is not None and found.name == "MXFP4_MOE"


def test_unknown_numbers(tmp_path: Path) -> None:
    for number in (5, 999, "Q8_0"):
        with gguf.Writer(tmp_path / "a.gguf", gguf.Plan({"general.file_type": number}, []), True):
            pass
        with gguf.open(tmp_path / "a.gguf") as f:
            assert named.file_type(f) is None


def test_commands(tmp_path: Path) -> None:
    convert(SMALL, "mxfp4", tmp_path / "a.gguf")
    convert(SMALL, "nf4", tmp_path / "b.gguf")
    for name, want in (("a", "MXFP4"), ("b", "NF4")):
        path = tmp_path / f"{name}.gguf"
        assert command("inspect", path, "--no-tensors").out.splitlines()[-1] == f"file type {want}"
        bench = command("bench", "-m", path, "-p", 8, "-n", 0, "-r", 1, "--json")
        assert bench.json["type"] == want
