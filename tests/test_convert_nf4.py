"""Converting to NF4, from checkpoints that bitsandbytes quantized, and running the result."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import quantized_checkpoints
import safetensors.numpy as safetensors_numpy
from command_line import ggufkit as run_command
from ggufkit_formats import gguf, nf4_tensors, safetensors
from ggufkit_formats.blocks.nf4 import NF4_LEVELS, dynamic_map, encode_4bit
from ggufkit_formats.errors import FormatError, UnsupportedError
from ggufkit_runtime.models import permuted_rows

import ggufkit
from ggufkit.convert import convert

Q, K, V, DOWN = (f"blk.1.{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "ffn_down"))
THEIRS = {Q: "self_attn.q_proj", K: "self_attn.k_proj", V: "self_attn.v_proj", DOWN: "mlp.down_proj"}
HEADS = {Q: 4, K: 2}


def stored(f: gguf.GgufFile, name: str, part: str = "") -> np.ndarray:
    return f.stored[f"{name}.nf4{part}"].raw.reshape(-1)


def reordered(name: str, x: np.ndarray) -> np.ndarray:
    """Rows of a checkpoint's matrix in GGUF's order."""
    return x[permuted_rows(len(x), HEADS[name])] if name in HEADS else x


def theirs(folder, name: str) -> np.ndarray:
    with safetensors.open(folder) as checkpoint:
        x = checkpoint.tensors[f"model.layers.1.{THEIRS[name]}.weight"].dequantize()
    return reordered(name, x)


def logits(path) -> np.ndarray:
    return ggufkit.load(path, device="cpu", threads=1).logits([1, 7, 30, 200, 5, 99])


def kl(a: np.ndarray, b: np.ndarray) -> float:
    """Mean KL divergence of b's distributions from a's."""
    p, q = (x.astype(np.float64) - x.max(axis=1, keepdims=True) for x in (a, b))
    p, q = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.make(tmp_path_factory.mktemp("nf4") / "plain")


@pytest.mark.parametrize("type", ["nf4", "nf4_dq"])
def test_every_matrix_of_the_blocks(folder, tmp_path, type):
    planned = convert(folder, type, tmp_path / "a.gguf", plan=True)
    report = convert(folder, type, tmp_path / "a.gguf", threads=2)
    assert report == planned and report.n_bytes == (tmp_path / "a.gguf").stat().st_size
    with gguf.open(tmp_path / "a.gguf") as f:
        assert [e.name for e in report.tensors] == list(f.tensors)
        for name, t in f.tensors.items():
            kind = "F32" if "norm" in name else "F16" if name in ("token_embd.weight", "output.weight") else "NF4"
            assert t.type == kind, name
        assert "general.file_type" not in f.metadata and f.metadata[nf4_tensors.BLOCK_SIZE] == 64
        for name in THEIRS:
            x = theirs(folder, name)
            codes, maxima = encode_4bit(x.reshape(-1), NF4_LEVELS)
            assert np.array_equal(stored(f, name).view(np.uint8), codes)
            assert np.array_equal(
                np.concatenate(nf4_tensors.encode_absmax(maxima, type == "nf4_dq")),
                np.concatenate([stored(f, name, part) for part in ("_absmax", "_nested")[: 1 + (type == "nf4_dq")]]),
            )
        matrices = [t for t in f.tensors.values() if t.type == "NF4"]
        bits = 8 * sum(t.nbytes for t in matrices) / sum(t.n_elements for t in matrices)
        assert bits == 4.5 if type == "nf4" else 4.127 < bits < 4.129


def test_slabs_and_threads_change_nothing(folder, tmp_path, monkeypatch):
    convert(folder, "nf4_dq", tmp_path / "a.gguf", threads=1)
    from ggufkit.convert import pipeline

    monkeypatch.setattr(pipeline, "slab_weights", lambda threads: 1 << 12)
    convert(folder, "nf4_dq", tmp_path / "b.gguf", threads=4)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_blocks_across_rows(tmp_path):
    folder = checkpoints.make(tmp_path / "odd", dim=96, ffn=168, heads=4, kv=2)
    convert(folder, "nf4", tmp_path / "a.gguf")
    with gguf.open(tmp_path / "a.gguf") as f:
        t = f.tensors[DOWN]
        assert t.type == "NF4" and t.shape == (96, 168)
        codes, _ = encode_4bit(theirs(folder, DOWN).reshape(-1), NF4_LEVELS)
        assert np.array_equal(stored(f, DOWN).view(np.uint8), codes)
    convert(tmp_path / "a.gguf", "f32", tmp_path / "b.gguf", allow_requantize=True)
    assert kl(logits(tmp_path / "b.gguf"), logits(tmp_path / "a.gguf")) < 1e-6  # held as float32


@pytest.mark.parametrize("type", ["nf4", "nf4_dq"])
def test_it_runs(folder, tmp_path, type):
    convert(folder, type, tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", "f32", tmp_path / "b.gguf", allow_requantize=True)
    reference = logits(tmp_path / "b.gguf")
    assert 0 < kl(reference, logits(tmp_path / "a.gguf")) < 5e-3
    done = run_command("run", "-m", str(tmp_path / "a.gguf"), "--raw", "-n", "4", "--temp", "0", "--json", "the quick")
    assert len(done.json["tokens"]) == 4
    assert ggufkit.load(tmp_path / "a.gguf", threads=1).info.main_type == "NF4"  # there is no file type to tell it


# -- from bitsandbytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("type", ["nf4", "nf4_dq"])
def test_not_one_code_is_changed(tmp_path, type, nested):
    folder = quantized_checkpoints.quantize(checkpoints.make(tmp_path / "checkpoint"), nested=nested)
    report = convert(folder, type, tmp_path / "a.gguf")
    double = type == "nf4_dq"
    with gguf.open(tmp_path / "a.gguf") as f, safetensors.open(folder) as checkpoint:
        for name in THEIRS:
            source = checkpoint.tensors[f"model.layers.1.{THEIRS[name]}.weight"]
            packed = reordered(name, source.codes.raw.reshape(len(source.dequantize()), -1))
            assert np.array_equal(stored(f, name).view(np.uint8), packed.reshape(-1)), name
            t = f.tensors[name]
            same = np.array_equal(t.dequantize(), reordered(name, source.dequantize()))
            assert same == (nested or not double), name
            # maxima in groups of 256 cannot follow their rows
            assert t.maxima.is_nested == (double and not (nested and name in HEADS)), name
        if nested and double:
            assert np.array_equal(stored(f, V, "_absmax").view(np.uint8), checkpoint.stored[
                "model.layers.1.self_attn.v_proj.weight.absmax"].raw)  # fmt: skip
    assert any("as F32, unchanged" in note for note in report.notes) == (nested and double)
    assert not any("quantized again" in note for note in report.notes)


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True),
                                              ("int8", False)])  # fmt: skip
@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_to_any_type(tmp_path, kind, nested, type):
    folder = quantized_checkpoints.quantize(checkpoints.make(tmp_path / "checkpoint"), kind, nested)
    report = convert(folder, type, tmp_path / "a.gguf")
    assert any("quantized already" in note for note in report.notes)
    with gguf.open(tmp_path / "a.gguf") as f:
        for name in THEIRS:
            t, x = f.tensors[name], theirs(folder, name)
            assert t.type == type and np.array_equal(t.raw, t.type.encode(x))


def test_fp4_to_nf4_is_quantized_anew(tmp_path):
    folder = quantized_checkpoints.quantize(checkpoints.make(tmp_path / "checkpoint"), "fp4")
    report = convert(folder, "nf4", tmp_path / "a.gguf")
    assert any("are quantized again" in note for note in report.notes)
    with gguf.open(tmp_path / "a.gguf") as f:
        codes, _ = encode_4bit(theirs(folder, V).reshape(-1), NF4_LEVELS)
        assert np.array_equal(stored(f, V).view(np.uint8), codes)


def test_blocks_of_128_stay(tmp_path):
    folder = quantized_checkpoints.quantize(checkpoints.make(tmp_path / "checkpoint"), block=128)
    convert(folder, "nf4", tmp_path / "a.gguf")
    with gguf.open(tmp_path / "a.gguf") as f:
        assert f.metadata[nf4_tensors.BLOCK_SIZE] == 128
        assert np.array_equal(f.tensors[Q].dequantize(), theirs(folder, Q))
    assert np.isfinite(logits(tmp_path / "a.gguf")).all()


def test_rows_that_cannot_be_reordered_become_f16(tmp_path):
    folder = quantized_checkpoints.quantize(checkpoints.make(tmp_path / "checkpoint", dim=96, ffn=168))
    report = convert(folder, "nf4", tmp_path / "a.gguf")
    fallen = {e.name: (e.type, e.reason) for e in report.fallbacks if e.name.startswith("blk.1")}
    reason = "rows of 96 hold no whole blocks of 64, and have to be reordered"
    assert fallen == {Q: ("F16", reason), K: ("F16", reason)}
    with gguf.open(tmp_path / "a.gguf") as f:
        assert np.array_equal(f.tensors[DOWN].dequantize(), theirs(folder, DOWN))
    with pytest.raises(UnsupportedError, match="no-fallback"):
        convert(folder, "nf4", tmp_path / "b.gguf", no_fallback=True)


# -- from NF4 in GGUF, and errors ----------------------------------------------------------------------


def test_from_gguf(folder, tmp_path):
    convert(folder, "nf4", tmp_path / "a.gguf")
    with pytest.raises(UnsupportedError, match=r"14 tensors are quantized already \(NF4\)"):
        convert(tmp_path / "a.gguf", "q4_0", tmp_path / "b.gguf")
    convert(tmp_path / "a.gguf", "q4_0", tmp_path / "b.gguf", allow_requantize=True)
    convert(tmp_path / "a.gguf", "nf4", tmp_path / "same.gguf")
    convert(tmp_path / "a.gguf", "nf4_dq", tmp_path / "dq.gguf")
    with gguf.open(tmp_path / "a.gguf") as a, gguf.open(tmp_path / "same.gguf") as b:
        assert set(a.metadata) == set(b.metadata) and list(a.stored) == list(b.stored)
        assert all(np.array_equal(t.raw, b.stored[name].raw) for name, t in a.stored.items())
    with gguf.open(tmp_path / "a.gguf") as a, gguf.open(tmp_path / "b.gguf") as b, gguf.open(tmp_path / "dq.gguf") as c:
        assert b.tensors[V].type == "Q4_0" and nf4_tensors.VERSION not in b.metadata
        assert np.array_equal(stored(c, V), stored(a, V))
        assert np.array_equal(c.metadata[nf4_tensors.NESTED_LEVELS], dynamic_map())


def test_nf4_beside_other_types(folder, tmp_path):
    convert(folder, "q4_0", tmp_path / "a.gguf", tensor_types=["ffn_down=nf4"])
    with gguf.open(tmp_path / "a.gguf") as f:
        assert f.tensors[DOWN].type == "NF4" and f.tensors[V].type == "Q4_0" and f.metadata["general.file_type"] == 2
    convert(folder, "nf4_dq", tmp_path / "b.gguf", tensor_types=["attn_v=q8_0"], output_tensor_type="q6_k")
    with gguf.open(tmp_path / "b.gguf") as f:
        assert f.tensors[V].type == "Q8_0" and f.tensors["output.weight"].type == "Q6_K"
        assert f.tensors[DOWN].maxima.is_nested
    convert(folder, "nf4", tmp_path / "c.gguf", pure=True)
    with gguf.open(tmp_path / "c.gguf") as f:
        assert f.tensors["token_embd.weight"].type == f.tensors["output.weight"].type == "NF4"
    for name in "abc":
        assert np.isfinite(logits(tmp_path / f"{name}.gguf")).all()


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_maxima_that_are_not_finite(tmp_path, nested):
    folder = quantized_checkpoints.quantize(checkpoints.make(tmp_path / "checkpoint"), nested=nested)
    path = folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    tensors[f"model.layers.1.mlp.down_proj.weight.{'nested_' * nested}absmax"][0] = np.nan
    safetensors_numpy.save_file(tensors, path, metadata={"format": "pt"})
    for type in ("nf4", "nf4_dq", "q8_0"):
        with pytest.raises(FormatError, match=r"down_proj.*NaN or infinite"):
            convert(folder, type, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_inspect(folder, tmp_path):
    convert(folder, "nf4_dq", tmp_path / "a.gguf")
    document = run_command("inspect", str(tmp_path / "a.gguf"), "--json").json
    listed = {t["name"]: t for t in document["tensors"]}
    t = listed[DOWN]
    assert t["type"] == "NF4" and t["shape"] == [512, 256] and t["nbytes"] == sum(p["nbytes"] for p in t["parts"])
    assert [p["type"] for p in t["parts"]] == ["I8", "I8", "F32"]
    assert document["summary"]["types"]["NF4"] == 14 and document["summary"]["n_tensors"] == len(listed)
    text = run_command("inspect", str(tmp_path / "a.gguf")).out
    assert "NF4 × 14" in text and "NF4 tensors are stored in parts: the file lists 49 tensors." in text


def test_what_is_not_finite_is_refused(tmp_path):
    bad = np.zeros((256, 512), np.float32)
    bad[200, 3] = np.nan
    folder = checkpoints.make(tmp_path / "bad", extra={"model.layers.1.mlp.down_proj.weight": bad})
    with pytest.raises(FormatError, match=r"down_proj.*NaN or infinite weights cannot be quantized to NF4"):
        convert(folder, "nf4_dq", tmp_path / "a.gguf", threads=2)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
