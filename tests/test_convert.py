"""convert: bytes against ggml's encoders, metadata against llama.cpp's converter, both kinds of sources."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from ggufkit_formats import gguf
from ggufkit_formats.blocks import find
from oracles import ggml, llama

import ggufkit
from ggufkit.convert import convert
from ggufkit.quantize.file_types import FILE_TYPES

TYPES = [
    "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s",
    "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "tq1_0", "tq2_0", "q2_0", "mxfp4", "mxfp4_moe", "nvfp4",
    "iq4_nl", "iq4_xs", "iq3_s", "iq3_m",
]  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "even": {"dim": 256, "ffn": 512, "heads": 4, "kv": 2, "layers": 2},
    "odd": {"dim": 96, "ffn": 272, "heads": 3, "kv": 3, "layers": 2, "tied": True, "dtype": np.float32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = checkpoints.make(root / name, **SHAPES[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def oracle() -> Any:
    if not ggml.available():
        pytest.skip("xllamacpp is not installed")
    one = ggml.Ggml()
    yield one
    one.close()


def naive_permute(x: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows i and i + half of a head become neighbours."""
    head = len(x) // n_heads
    out = np.empty_like(x)
    for h in range(n_heads):
        for i in range(head // 2):
            out[h * head + 2 * i] = x[h * head + i]
            out[h * head + 2 * i + 1] = x[h * head + i + head // 2]
    return out


def expected(name: str, dim: int, ffn: int, heads: int, kv: int, layers: int, tied: bool = False,
             dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:  # fmt: skip
    """GGUF tensors of the checkpoint, float32."""
    theirs = checkpoints.weights("llama", dim, ffn, layers, heads, kv, dim // heads, 320, tied, 1)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    out = {}
    for key, x in theirs.items():
        x = x.astype(dtype).astype(np.float32)
        part = re.sub(r"^model\.layers\.\d+\.", "", key).removesuffix(".weight")
        at = re.match(r"model\.layers\.(\d+)\.", key)
        if part.endswith(("q_proj", "k_proj")):
            x = naive_permute(x, heads if part.endswith("q_proj") else kv)
        out[(f"blk.{at[1]}." if at else "") + names[part] + ".weight"] = x
    return out


_ENCODED: dict[Any, np.ndarray] = {}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("type", TYPES)
def test_bytes_are_ggmls(name: str, type: str, folder: Any, oracle: Any, tmp_path: Path) -> None:
    report = convert(folder(name), type, tmp_path / "out.gguf", threads=2)
    assert (tmp_path / "out.gguf").stat().st_size == report.n_bytes
    want = expected(name, **SHAPES[name])
    with gguf.open(tmp_path / "out.gguf") as f:
        assert f.metadata["general.file_type"] == FILE_TYPES[type.upper()].id
        assert set(f.tensors) == set(want)
        for entry in report.tensors:
            tensor, x = f.tensors[entry.name], want[entry.name]
            assert (tensor.type.name, tensor.shape, tensor.shape[::-1]) == (entry.type, x.shape, entry.shape)
            key = name, entry.name, entry.type
            if key not in _ENCODED:
                _ENCODED[key] = x.view(np.uint8) if entry.type == "F32" else oracle.quantize(tensor.type.id, x)
            assert np.array_equal(tensor.raw.reshape(-1), _ENCODED[key].reshape(-1)), entry


def test_bytes_of_q1_0(folder: Any, oracle: Any, tmp_path: Path) -> None:
    test_bytes_are_ggmls("even", "q1_0", folder, oracle, tmp_path)
    with pytest.raises(ggufkit.UnsupportedError, match="rows of 96 are not divisible by 128"):
        convert(folder("odd"), "q1_0", plan=True)


def test_metadata_is_that_of_llama_cpps_converter(folder: Any, tmp_path: Path) -> None:
    """Keys, types and order as its convert_hf_to_gguf.py wrote them for this checkpoint (the numbers are ours)."""
    convert(folder("even"), "f32", tmp_path / "out.gguf")
    with gguf.open(tmp_path / "out.gguf") as f:
        found = [(key, f.metadata.type_name(key), f.metadata[key]) for key in f.metadata]
    scalars = [each for each in found if not each[1].startswith("ARRAY")]
    assert [each for each in scalars if not each[0].startswith("tokenizer.")] == [
        ("general.architecture", "STRING", "llama"),
        ("general.type", "STRING", "model"),
        ("general.name", "STRING", "Even"),
        ("general.size_label", "STRING", "1.3M"),
        ("llama.block_count", "UINT32", 2),
        ("llama.context_length", "UINT32", 512),
        ("llama.embedding_length", "UINT32", 256),
        ("llama.feed_forward_length", "UINT32", 512),
        ("llama.attention.head_count", "UINT32", 4),
        ("llama.attention.head_count_kv", "UINT32", 2),
        ("llama.rope.freq_base", "FLOAT32", 10000.0),
        ("llama.attention.layer_norm_rms_epsilon", "FLOAT32", float(np.float32(1e-5))),
        ("llama.attention.key_length", "UINT32", 64),
        ("llama.attention.value_length", "UINT32", 64),
        ("general.file_type", "UINT32", 0),
        ("llama.vocab_size", "UINT32", 320),
        ("llama.rope.dimension_count", "UINT32", 64),
        ("general.quantization_version", "UINT32", 2),
    ]
    arrays = [(key, kind, len(value)) for key, kind, value in found if kind.startswith("ARRAY")]
    assert arrays == [
        ("tokenizer.ggml.tokens", "ARRAY[STRING]", 320),
        ("tokenizer.ggml.scores", "ARRAY[FLOAT32]", 320),
        ("tokenizer.ggml.token_type", "ARRAY[INT32]", 320),
    ]


def test_model_card_and_sampling_defaults(tmp_path: Path) -> None:
    source = checkpoints.make(tmp_path / "Tiny-Llama-1M-Instruct-v1.5", layers=1)
    (source / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en, no]\nbase_model: org/Some-Base-7B\n---\nText\n"
    )
    (source / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}')
    convert(source, "q8_0", tmp_path / "out.gguf")
    with gguf.open(tmp_path / "out.gguf") as f:
        said = {key: f.metadata[key] for key in f.metadata if key.startswith("general.")}
    assert said["general.name"] == "Tiny Llama 1M Instruct v1.5"
    assert (said["general.finetune"], said["general.version"]) == ("Instruct", "v1.5")
    assert (said["general.license"], list(said["general.languages"])) == ("mit", ["en", "no"])
    assert said["general.base_model.0.name"] == "Some Base 7B"
    assert said["general.base_model.0.repo_url"] == "https://huggingface.co/org/Some-Base-7B"
    if "general.sampling.top_k" in said:  # the installed gguf knows these keys
        assert (said["general.sampling.top_k"], said["general.sampling.temp"]) == (20, pytest.approx(0.6))
    (source / "README.md").write_text("---\nlicense: [mit\n---\n")
    assert any("README.md" in note for note in convert(source, "q8_0", plan=True).notes)


# -- sources ---------------------------------------------------------------------------------------


def raws(path: Path) -> dict[str, bytes]:
    with gguf.open(path) as f:
        return {name: tensor.raw.tobytes() for name, tensor in f.tensors.items()}


def test_shards_folders_and_files_are_the_same(tmp_path: Path) -> None:
    one = checkpoints.make(tmp_path / "one" / "model", layers=1)
    three = checkpoints.make(tmp_path / "three" / "model", layers=1, shards=3)
    sources = [one, three, one / "model.safetensors", three / "model.safetensors.index.json"]
    files = [tmp_path / f"{i}.gguf" for i in range(4)]
    for source, file in zip(sources, files, strict=True):
        convert(source, "q4_k", file)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_rows_stay_in_order(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(tmp_path / "m", arch, layers=1, head_dim=64, tied=True, dtype=np.float32)
    convert(source, "f32", tmp_path / "out.gguf")
    want = checkpoints.weights(arch, 256, 512, 1, 4, 2, 64, 320, True, 1)
    with gguf.open(tmp_path / "out.gguf") as f:
        q, k = (f.tensors[f"blk.0.attn_{p}.weight"].dequantize() for p in "qk")
        assert np.array_equal(q, want["model.layers.0.self_attn.q_proj.weight"])
        assert np.array_equal(k, want["model.layers.0.self_attn.k_proj.weight"])
        extra = {"qwen2": "blk.0.attn_k.bias", "qwen3": "blk.0.attn_k_norm.weight"}[arch]
        assert f.tensors[extra].type == "F32"


def test_permutation_does_not_depend_on_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ggufkit.convert import pipeline

    bias = {
        f"model.layers.0.self_attn.{p}_proj.bias": np.arange(n, dtype=np.float32) for p, n in (("q", 256), ("k", 128))
    }
    source = checkpoints.make(tmp_path / "m", layers=1, extra=bias)
    convert(source, "q5_k_m", tmp_path / "a.gguf")
    monkeypatch.setattr(pipeline, "slab_weights", lambda threads: 64)  # a head, or a row, at a time
    convert(source, "q5_k_m", tmp_path / "b.gguf", threads=3)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    with gguf.open(tmp_path / "a.gguf") as f:
        found = f.tensors["blk.0.attn_k.bias"].dequantize()
    assert np.array_equal(found, naive_permute(np.arange(128, dtype=np.float32)[:, None], 2)[:, 0])


def test_rope_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    source = checkpoints.make(tmp_path / "m", layers=1, config={"rope_scaling": scaling})
    report = convert(source, "q4_0", tmp_path / "out.gguf")
    assert ("rope_freqs.weight", (32,), "F32") in [(e.name, e.shape, e.type) for e in report.tensors]
    with gguf.open(tmp_path / "out.gguf") as f:
        values = f.tensors["rope_freqs.weight"].dequantize()
    assert values[0] == 1 and values[-1] == 32 and (np.diff(values) >= 0).all()


def test_from_gguf_equals_from_checkpoint(folder: Any, tmp_path: Path) -> None:
    convert(folder("even"), "f32", tmp_path / "f32.gguf")
    convert(folder("even"), "q4_k_m", tmp_path / "a.gguf")
    convert(tmp_path / "f32.gguf", "q4_k_m", tmp_path / "b.gguf")
    assert raws(tmp_path / "a.gguf") == raws(tmp_path / "b.gguf")
    with gguf.open(tmp_path / "a.gguf") as a, gguf.open(tmp_path / "b.gguf") as b:
        assert {key: a.metadata.type_name(key) for key in a.metadata} == {
            key: b.metadata.type_name(key) for key in b.metadata
        }
        assert list(b.metadata)[-2:] == ["general.quantization_version", "general.file_type"]  # as llama-quantize


def test_quantizing_again_must_be_asked_for(folder: Any, tmp_path: Path) -> None:
    convert(folder("even"), "q8_0", tmp_path / "q8.gguf")
    with pytest.raises(ggufkit.UnsupportedError, match=r"quantized already \(Q8_0\).*--allow-requantize"):
        convert(tmp_path / "q8.gguf", "q4_k", tmp_path / "out.gguf")
    report = convert(tmp_path / "q8.gguf", "q4_k", tmp_path / "out.gguf", allow_requantize=True)
    assert "quality suffers" in report.notes[0]
    report = convert(tmp_path / "q8.gguf", "q8_0", tmp_path / "same.gguf")  # nothing to do: copied
    assert (report.notes, raws(tmp_path / "q8.gguf")) == ([], raws(tmp_path / "same.gguf"))


def test_unknown_architectures_and_types_are_carried(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    metadata = {
        "general.architecture": "marvel", "marvel.block_count": np.uint16(1), "marvel.x": np.array([1, 2], np.int8),
        "general.alignment": np.uint32(64), "empty": gguf.StringArray.of([]),
    }  # fmt: skip
    tensors = [("blk.0.ffn_down.weight", "F16", (64, 512)), ("blk.0.norm.weight", "F16", (2, 512)),
               ("blk.0.ids.weight", "I32", (4, 8)), ("odd.weight", gguf.by_id(77), (3, 5), 21)]  # fmt: skip
    plan = gguf.Plan(metadata, tensors)
    with gguf.Writer(tmp_path / "in.gguf", plan) as w:
        w.write("blk.0.ffn_down.weight", x.astype(np.float16))
        w.write("blk.0.norm.weight", x[:2].astype(np.float16))
        w.write("blk.0.ids.weight", np.arange(32, dtype=np.int32))
        w.write("odd.weight", bytes(range(21)))
    report = convert(tmp_path / "in.gguf", "q4_k", tmp_path / "out.gguf")
    assert {e.name: e.type for e in report.tensors} == {
        "odd.weight": "77", "blk.0.ffn_down.weight": "Q6_K", "blk.0.ids.weight": "I32", "blk.0.norm.weight": "Q4_K",
    }  # fmt: skip
    with gguf.open(tmp_path / "out.gguf") as f:
        assert f.metadata.type_name("marvel.x") == "ARRAY[INT8]" and f.metadata.type_name("empty") == "ARRAY[STRING]"
        assert f.alignment == 64
        assert bytes(f.tensors["odd.weight"].raw[:21]) == bytes(range(21))  # read with its padding
        assert np.array_equal(f.tensors["blk.0.ffn_down.weight"].raw, find("q6_k").encode(x.astype(np.float16)))


# -- what a caller may ask for ---------------------------------------------------------------------


def test_plan_writes_nothing_and_is_exact(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planned = convert(folder("odd"), "Q4-K", plan=True)
    assert list(tmp_path.iterdir()) == []
    report = convert(folder("odd"), "Q4-K")
    assert planned == report and report.output == "odd-Q4_K_M.gguf"
    assert Path(report.output).stat().st_size == report.n_bytes
    entry = next(e for e in report.tensors if e.name == "token_embd.weight")
    assert (entry.type, entry.asked, entry.reason) == ("Q8_0", "Q6_K", "rows of 96 are not divisible by 256")
    entry = next(e for e in report.tensors if e.name == "blk.0.ffn_down.weight")
    assert (entry.shape, entry.type, entry.reason) == (
        (272, 96),
        "F16",
        "rows of 272 are not divisible by 256 nor by 32",
    )
    keys = {"file_type", "output", "n_bytes", "bits_per_weight", "tensors"}
    assert set(json.loads(json.dumps(report.as_json()))) == keys
    assert set(report.as_json()["tensors"][0]) == {"name", "shape", "type", "asked", "reason"}


def test_options(folder: Any, tmp_path: Path) -> None:
    report = convert(
        folder("even"), "q4_k", tmp_path, tensor_types=["attn_[qk]=q8_0"], output_tensor_type="f16",
        token_embedding_type="q5_1",
    )  # fmt: skip
    assert report.output == str(tmp_path / "even-Q4_K_M.gguf")
    types = {e.name: e.type for e in report.tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.1.attn_k.weight"] == "Q8_0"
    assert (types["output.weight"], types["token_embd.weight"]) == ("F16", "Q5_1")
    pure = convert(folder("even"), "q2_k", pure=True, plan=True)
    assert {e.type for e in pure.tensors if len(e.shape) > 1} == {"Q2_K"}
    with pytest.raises(ggufkit.UnsupportedError, match=r"'token_embd.weight' and .* more cannot be Q6_K: rows of 96"):
        convert(folder("odd"), "q6_k", plan=True, no_fallback=True)
    with pytest.raises(ggufkit.UnsupportedError, match="cannot be written as Q8_K"):
        convert(folder("even"), "q4_k", plan=True, output_tensor_type="q8_k")
    with pytest.raises(ggufkit.UsageError, match="should be PATTERN=TYPE"):
        convert(folder("even"), "q4_k", plan=True, tensor_types=["attn_q"])


@pytest.mark.skipif(not llama.available(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_runs_the_file(arch: str, tmp_path: Path) -> None:
    source = checkpoints.make(tmp_path / "m", arch, head_dim=64)
    convert(source, "f32", tmp_path / "f32.gguf")
    convert(source, "q8_0", tmp_path / "q8.gguf")
    with llama.Llama(tmp_path / "f32.gguf") as a, llama.Llama(tmp_path / "q8.gguf") as b:
        ids = a.tokenize(["the quick fox"])[0]
        assert ids == b.tokenize(["the quick fox"])[0]
        x, y = a.logits(ids), b.logits(ids)
    assert x.shape == (len(ids), 320) and np.isfinite(x).all()
    assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > 0.99
