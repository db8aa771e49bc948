"""quantize/rescale.py: other weights, the same network."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from ggufkit_formats import gguf
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError
from ggufkit_runtime import generate

from ggufkit.convert import convert
from ggufkit.quantize import rescale

IDS = [1, 30, 77, 200, 5, 99, 310, 311]
NETWORKS = {
    "llama": {},
    "llama-biases": {"optional": True, "scales": True},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3", "head_dim": 64},
    "bitnet": {"arch": "bitnet", "hidden_act": "relu2"},
}


def logits(path):
    return generate.load(path, device="reference").logits(IDS)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_stay_what_they_were(tmp_path, name, tied):
    settings = {"optional": not tied} | NETWORKS[name]
    source = tiny_models.write(tmp_path / "a.gguf", **settings)
    rescale.write(source, tmp_path / "b.gguf", seed=7)
    before, after = logits(source), logits(tmp_path / "b.gguf")
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()
    with gguf.open(source) as a, gguf.open(tmp_path / "b.gguf") as b:
        assert list(a.tensors) == list(b.tensors) and list(b.metadata) == [*a.metadata, "general.file_type"]
        differ = [n for n, t in a.tensors.items() if not np.array_equal(t.raw, b.tensors[n].raw)]
        changed = {n.split(".")[-2] for n in differ}
        matrices = {"attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"}
        assert matrices <= changed and "token_embd" not in changed
        assert ("output" in changed) == ("output_norm" in changed) == ("output.weight" in a.tensors)
        assert ("attn_output" in changed) == ("attn_sub_norm" in changed) == (name == "bitnet")
        down = b.tensors["blk.1.ffn_down.weight"].dequantize() / a.tensors["blk.1.ffn_down.weight"].dequantize()
    assert 0.8 * 0.999 < down.min() < 0.85 and 1.2 < down.max() < 1.25 * 1.001  # reciprocals have the same bounds
    assert np.ptp(down, axis=0).max() < 1e-5 and np.unique(down[0].round(4)).size > 100  # one factor a column


def test_quantized_weights_leave_their_grid(tmp_path):
    """Converted to the type that it had, a rescaled model loses as much as any; without that, nothing."""
    source = tiny_models.write(tmp_path / "q4.gguf", type="Q4_1")
    rescale.write(source, tmp_path / "r.gguf", seed=1)
    convert(source, "f32", tmp_path / "f.gguf", allow_requantize=True)
    errors = []
    for name in ("f", "r"):
        path = tmp_path / f"{name}.gguf"
        convert(path, "q4_1", tmp_path / f"{name}-q.gguf", pure=True)
        with gguf.open(path) as a, gguf.open(tmp_path / f"{name}-q.gguf") as b:
            x, y = (f.tensors["blk.0.ffn_up.weight"].dequantize() for f in (a, b))
        errors.append(float(np.sqrt(np.square(x - y).sum() / np.square(x).sum())))
    assert errors[0] < 0.01 < 0.04 < errors[1]


@pytest.mark.parametrize("type", ["q4_k", "nf4_dq"])
def test_any_type_is_dequantized(tmp_path, type):
    convert(tiny_models.write(tmp_path / "a.gguf"), type, tmp_path / "b.gguf")
    told = []
    plan = rescale.write(tmp_path / "b.gguf", tmp_path / "c.gguf", progress=lambda *n: told.append(n))
    assert {t.type.name for t in plan.tensors} == {"F32"} and told[-1][0] == told[-1][1] > 0
    with gguf.open(tmp_path / "c.gguf") as f:
        assert not [key for key in f.metadata if "nf4" in key] and f.metadata["general.file_type"] == 0
    convert(tmp_path / "b.gguf", "f32", tmp_path / "d.gguf", allow_requantize=True)
    before, after = logits(tmp_path / "d.gguf"), logits(tmp_path / "c.gguf")
    assert np.abs(after - before).max() < 2e-5 * np.abs(before).max()


def test_the_seed_decides_and_slabs_do_not(tmp_path, monkeypatch):
    source = tiny_models.write(tmp_path / "a.gguf")
    for name, seed in (("b", 1), ("c", 1), ("d", 2)):
        rescale.write(source, tmp_path / f"{name}.gguf", seed)
        monkeypatch.setattr(rescale, "SLAB_NBYTES", 5000)
    b, c, d = ((tmp_path / f"{name}.gguf").read_bytes() for name in "bcd")
    assert b == c != d


def test_what_is_refused(tmp_path):
    source = tiny_models.write(tmp_path / "a.gguf")
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with pytest.raises(GgufkitError, match="exists"):
        rescale.write(source, tmp_path / "there.gguf")
    with gguf.open(source) as f:
        kept = {name: t for name, t in f.tensors.items() if "attn_k" not in name}
        values = {name: t.dequantize() for name, t in kept.items()}
        keys = f.metadata.copy()
    for arch, pattern, error in (("llama", "attn_k.weight' is missing", FormatError), ("x", "'x'", UnsupportedError)):
        plan = gguf.Plan(keys | {"general.architecture": arch}, [(name, "F32", x.shape) for name, x in values.items()])
        with gguf.Writer(tmp_path / "b.gguf", plan, overwrite=True) as writer:
            for name, x in values.items():
                writer.write(name, x)
        with pytest.raises(error, match=pattern):
            rescale.write(tmp_path / "b.gguf", tmp_path / "c.gguf")
    broken = tiny_models.write(tmp_path / "nan.gguf")
    with gguf.open(broken) as f:
        at = f.tensors["blk.1.ffn_up.weight"].offset
    data = bytearray(broken.read_bytes())
    data[at : at + 4] = np.float32(np.nan).tobytes()
    broken.write_bytes(data)
    with pytest.raises(FormatError, match=r"blk.1.ffn_up.weight': NaN"):
        rescale.write(broken, tmp_path / "c.gguf")
    assert not (tmp_path / "c.gguf").exists()
