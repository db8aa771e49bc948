"""Packed BitNet checkpoints: every weight arrives as it was, scales of both polarities, and what is unclear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from ggufkit_formats import gguf
from ggufkit_formats.blocks import UnknownType
from ggufkit_runtime import generate
from oracles import llama

import ggufkit
from ggufkit.convert import convert

BITLINEAR = {"quant_method": "bitnet", "modules_to_not_convert": None}
AUTO = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def pack(codes: np.ndarray) -> np.ndarray:
    """-1, 0, 1 (rows, cols) -> uint8 (rows / 4, cols), in plain loops: band by band of rows."""
    n = len(codes) // 4
    out = np.zeros((n, codes.shape[1]), np.uint8)
    for row in range(len(codes)):
        out[row % n] |= ((codes[row] + 1) << (2 * (row // n))).astype(np.uint8)
    return out


def make(folder: Path, arch: str, said: dict[str, Any], scale: float, dtype: Any = ml_dtypes.bfloat16,
         change: Any = None, **config: Any) -> tuple[Path, dict[str, np.ndarray]]:  # fmt: skip
    """A packed checkpoint of one layer, and the codes of its matrices by GGUF name."""
    rng = np.random.default_rng(7)
    shapes = checkpoints.weights(arch, 256, 512, 1, 4, 2, 64, 320, True, 1)
    extra, codes = {}, {}
    for name, x in shapes.items():
        part = name.removeprefix("model.layers.0.").removesuffix(".weight")
        if part in NAMES:
            codes[f"blk.0.{NAMES[part]}.weight"] = found = rng.integers(-1, 2, x.shape).astype(np.int8)
            extra |= {name: pack(found), f"{name}_scale": np.array([scale], dtype)}
    if change:
        change(extra)
    settings = {"quantization_config": said, "hidden_act": "relu2" if arch == "bitnet" else "silu", **config}
    path = checkpoints.make(folder, arch, layers=1, tied=True, config=settings, extra=extra)
    return path, codes


def naive_permute(codes: np.ndarray, heads: int) -> np.ndarray:
    half = len(codes) // heads // 2
    return np.stack([codes[h * 2 * half + i + half * p] for h in range(heads) for i in range(half) for p in (0, 1)])


@pytest.mark.parametrize("type", ["tq2_0", "tq1_0", "q2_0", "f16"])
@pytest.mark.parametrize(
    ("arch", "said", "scale", "s"),
    [("bitnet", AUTO, 1.21875, 1.21875), ("llama", BITLINEAR, 64.0, 1 / 64)],
    ids=["multiplies", "divides"],
)  # fmt: skip
def test_every_weight_arrives(arch: str, said: Any, scale: float, s: float, type: str, tmp_path: Path) -> None:
    folder, codes = make(tmp_path / "m", arch, said, scale)
    convert(folder, type, tmp_path / "out.gguf", ternary="search")
    with gguf.open(tmp_path / "out.gguf") as f:
        assert f.metadata["general.architecture"] == arch
        for name, want in codes.items():
            if arch == "llama" and name.split(".")[2] in ("attn_q", "attn_k"):
                want = naive_permute(want, 4 if "attn_q" in name else 2)
            got = f.tensors[name]
            assert got.type == type.upper()
            assert np.array_equal(got.dequantize(), want * np.float32(s)), name
    logits = generate.load(tmp_path / "out.gguf", device="cpu").logits([1, 5, 9])
    assert np.isfinite(logits).all() and logits.std() > 0


def test_metadata_are_llama_cpps(tmp_path: Path) -> None:
    """Its converter (conversion/bitnet.py) writes a rope scaling that changes nothing, behind the file type."""
    folder, _ = make(tmp_path / "m", "bitnet", AUTO, 1.0, hidden_act="silu")
    convert(folder, "f16", tmp_path / "out.gguf")
    with gguf.open(tmp_path / "out.gguf") as f:
        keys = [key for key in f.metadata if not key.startswith("tokenizer.")]
        at = keys.index("general.file_type")
        assert keys[at + 1 : at + 3] == ["bitnet.rope.scaling.type", "bitnet.rope.scaling.factor"]
        assert f.metadata["bitnet.rope.scaling.type"] == "linear" and f.metadata["bitnet.rope.scaling.factor"] == 1
        assert f.metadata.type_name("bitnet.rope.scaling.factor") == "FLOAT32"


def test_weights_that_are_not_rounded_yet_are_rounded_as_the_network_does(tmp_path: Path) -> None:
    config = {"hidden_act": "silu"}
    folder = checkpoints.make(tmp_path / "m", "bitnet", layers=1, tied=True, config=config)
    report = convert(folder, "f32", tmp_path / "out.gguf")
    assert any("7 matrices are rounded to three levels" in note for note in report.notes)
    theirs = checkpoints.weights("bitnet", 256, 512, 1, 4, 2, 64, 320, True, 1)
    x = theirs["model.layers.0.mlp.up_proj.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    gamma = np.float32(np.abs(x.astype(np.float64)).mean())
    with gguf.open(tmp_path / "out.gguf") as f:
        assert np.array_equal(f.tensors["blk.0.ffn_up.weight"].dequantize(), np.clip(np.rint(x / gamma), -1, 1) * gamma)
        embedding = theirs["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(f.tensors["token_embd.weight"].dequantize(), embedding)
        assert np.isfinite(f.tensors["blk.0.attn_sub_norm.weight"].dequantize()).all()


def drop_scale(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]


def three(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][5, 7] |= 3


def two_scales(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = np.ones(2, np.float32)


def short(tensors: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"][:-1]


@pytest.mark.parametrize(
    ("said", "scale", "change", "message"),
    [
        (AUTO, 50.0, None, "is 50, but config.json says that it multiplies"),
        (BITLINEAR, 1.25, None, "is 1.25, but config.json says that it divides"),
        ({**AUTO, "quantization_mode": "online"}, 1.25, None, "divides or multiplies is unclear"),
        ({**AUTO, "linear_class": "other"}, 1.25, None, "divides or multiplies is unclear"),
        ({**AUTO, "use_rms_norm": True}, 1.25, None, "use_rms_norm is not supported"),
        (None, 1.25, None, "not known to this architecture|cannot be converted|has shape"),
        (AUTO, 0.0, None, "is 0, which is no scale"),
        (AUTO, float("nan"), None, "is nan, which is no scale"),
        (AUTO, 1.25, drop_scale, "up_proj.weight' is packed, and there is no"),
        (AUTO, 1.25, two_scales, "has 2 numbers; one is wanted"),
        (AUTO, 1.25, short, r"has shape \[508, 256\]"),
        (AUTO, 1.25, three, "up_proj.weight'.*: a code of packed ternary weights is 3"),
    ],
)
def test_what_is_unclear_is_refused(said: Any, scale: float, change: Any, message: str, tmp_path: Path) -> None:
    folder, _ = make(tmp_path / "m", "bitnet", said, scale, change=change)
    with pytest.raises(ggufkit.GgufkitError, match=message):
        convert(folder, "tq2_0", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("type", ["tq1_0", "tq2_0", "q2_0"])
@pytest.mark.parametrize("arch", ["llama", "bitnet"])
def test_a_scale_that_float16_does_not_hold_stays_exact(arch: str, type: str, tmp_path: Path) -> None:
    s = np.float32(1) / np.float32(73)
    folder, codes = make(tmp_path / "m", arch, BITLINEAR, 73.0, hidden_act="silu")
    report = convert(folder, type, tmp_path / "out.gguf", ternary="absmean")
    assert {e.type for e in report.tensors if e.name.endswith(".scale")} == {"F32"}
    convert(folder, "f32", tmp_path / "wide.gguf")
    with gguf.open(tmp_path / "out.gguf") as f, gguf.open(tmp_path / "wide.gguf") as wide:
        for name in codes:
            scale = f.tensors[name.replace(".weight", ".scale")].dequantize()
            assert f.tensors[name].type == type.upper() and np.array_equal(scale, [s])
            whole = wide.tensors[name].dequantize()
            assert (
                np.array_equal(f.tensors[name].dequantize() * scale, whole)
                and name.replace(".weight", ".scale") not in wide.tensors
            )
            assert np.array_equal(np.unique(whole), [-s, 0, s])
        assert sum(name.endswith(".scale") for name in f.tensors) == 7
    ids = [1, 5, 9, 40, 77, 12]
    want = generate.load(tmp_path / "out.gguf", device="reference").logits(ids)
    got = generate.load(tmp_path / "out.gguf", device="cpu").logits(ids)
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.999  # inputs are rounded to 8 bits
    if llama.available():
        with llama.Llama(tmp_path / "out.gguf", n_ctx=64, n_threads=1) as oracle:
            theirs = oracle.logits(ids)
        assert np.corrcoef(theirs.ravel(), want.ravel())[0, 1] > 0.998
    # again from the GGUF file: nothing is lost, and the scales go with it
    convert(tmp_path / "wide.gguf", type, tmp_path / "again.gguf")
    with gguf.open(tmp_path / "again.gguf") as again, gguf.open(tmp_path / "out.gguf") as f:
        for name in f.tensors:
            if name.startswith("blk."):
                assert np.array_equal(again.tensors[name].raw, f.tensors[name].raw), name


def test_i2_s_of_bitnet_cpp_is_imported(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    codes, s = rng.integers(-1, 2, (12, 256)), np.float32(1.37)
    flat, raw = codes.reshape(-1), np.zeros(12 * 256 // 4 + 32, np.uint8)
    for i, value in enumerate(flat):
        raw[i // 128 * 32 + i % 32] |= (value + 1) << (6 - 2 * (i % 128 // 32))
    raw[-32:-28] = np.array([s], "<f4").view(np.uint8)
    name = "blk.0.ffn_up.weight"
    for fault in ("", "size", "code", "scale"):
        written = raw.copy()
        if fault == "code":
            written[100] |= 3
        if fault == "scale":
            written[-32:-28] = 0
        if fault == "size":
            written = np.concatenate([written, written[:32]])
        plan = gguf.Plan({"general.architecture": "bitnet-x"}, [(name, UnknownType(36), (12, 256), len(written))])
        with gguf.Writer(tmp_path / "in.gguf", plan, True) as writer:
            writer.write(name, written)
        if fault == "code":
            with pytest.raises(ggufkit.FormatError, match="a code of I2_S is 3"):
                convert(tmp_path / "in.gguf", "tq2_0", tmp_path / "out.gguf", overwrite=True)
            continue
        convert(tmp_path / "in.gguf", "f32", tmp_path / "out.gguf", overwrite=True)
        with gguf.open(tmp_path / "out.gguf") as f:
            if fault:  # nobody knows what it is, and it is copied
                assert f.tensors[name].type.id == 36 and np.array_equal(f.tensors[name].raw, written)
            else:
                assert np.array_equal(f.tensors[name].dequantize(), codes * s)


def test_the_forks_network_runs_under_ggufs_name(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "ours.gguf", "bitnet", hidden_act="relu2", optional=False)
    with gguf.open(tmp_path / "ours.gguf") as f:
        metadata = {key.replace("bitnet.", "bitnet-b1.58."): value for key, value in f.metadata.copy().items()}
        metadata["general.architecture"] = "bitnet-b1.58"
        del metadata["bitnet-b1.58.hidden_activation"]
        plan = gguf.Plan(metadata, [(t.name, t.type, t.shape) for t in f.tensors.values()])
        with gguf.Writer(tmp_path / "theirs.gguf", plan) as writer:
            for t in f.tensors.values():
                writer.write(t.name, t.raw.reshape(-1))
    convert(tmp_path / "theirs.gguf", "f32", tmp_path / "again.gguf")
    first, again = (generate.load(tmp_path / f"{name}.gguf", device="reference") for name in ("ours", "again"))
    assert np.array_equal(first.logits([1, 7, 9]), again.logits([1, 7, 9]))
