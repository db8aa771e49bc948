"""The library as a program uses it: what `ggufkit` promises in its docstrings, on a small random model."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

import ggufkit

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return tiny_models.write(folder / "tiny.gguf", type="Q4_K", metadata={"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def model(path):
    return ggufkit.load(path, device="cpu")


def test_open_tensors_and_tokenizer(path):
    with ggufkit.open(str(path)) as f:
        assert f.metadata["general.architecture"] == "llama"
        t = f.tensors["blk.0.attn_q.weight"]
        assert t.type == "q4_k" and t.shape == (256, 256) and t.nbytes == 256 * 144
        assert t.raw.shape == (256, 144) and t.raw.dtype == np.uint8 and t.raw.base is not None
        values = t.dequantize()
        assert values.shape == (256, 256) and values.dtype == np.float32
        assert np.array_equal(values, ggufkit.dequantize(t.raw, "Q4_K"))
        assert np.array_equal(values[3:5], ggufkit.dequantize(t.read_rows(3, 5), "q4-k"))
        norm = f.tensors["output_norm.weight"]
        assert norm.raw.shape == (1024,) and norm.dequantize().shape == (256,)
        ids = f.tokenizer.encode("text")
        assert ids[0] == 1 and f.tokenizer.decode(ids).endswith("text")


def test_a_vocabulary_without_weights(tmp_path):
    from ggufkit_formats import gguf

    with gguf.Writer(tmp_path / "vocabulary.gguf", gguf.Plan(tiny_models.vocabulary(320), [])):
        pass
    with ggufkit.open(tmp_path / "vocabulary.gguf") as f:
        assert f.tensors == {} and f.tokenizer.encode("a")[0] == 1


@pytest.mark.parametrize("shape", [(256,), (2, 256), (2, 3, 512), (0, 256), (3, 0), (0,)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_quantize_and_dequantize_shapes(shape, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    q = ggufkit.quantize(x, "q4_k", importance=None)
    assert q.dtype == np.uint8 and q.shape == (*shape[:-1], shape[-1] // 256 * 144)
    back = ggufkit.dequantize(q, "q4_k")
    assert back.dtype == np.float32 and back.shape == shape
    assert x.size == 0 or np.abs(back - x).max() < 0.3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type", ["q4_0", "q4_k"])
def test_quantize_with_importance(type):
    x = np.random.default_rng(0).standard_normal((2, 3, 512))
    weights = np.where(np.arange(512) % 4, 0.01, 1.0)
    q = ggufkit.quantize(x, type, importance=weights)
    error = (ggufkit.dequantize(q, type) - x) ** 2
    plain = (ggufkit.dequantize(ggufkit.quantize(x, type), type) - x) ** 2
    assert error[..., ::4].mean() < 0.9 * plain[..., ::4].mean()
    assert np.array_equal(ggufkit.quantize(x, type, list(weights), threads=1), q)
    assert ggufkit.quantize(x[:, :0], type, weights).shape == (2, 0, q.shape[-1])
    with pytest.raises(ggufkit.FormatError, match="infinite"):
        ggufkit.quantize(np.full((1, 512), np.inf), type, weights)
    with pytest.raises(ggufkit.UsageError, match="negative"):
        ggufkit.quantize(x, type, -weights)


def test_quantize_takes_any_layout_of_numbers():
    import ml_dtypes

    x = np.random.default_rng(1).standard_normal((512, 4)).astype(np.float32)
    expected = ggufkit.quantize(np.ascontiguousarray(x.T), "q4_k")
    assert np.array_equal(ggufkit.quantize(x.T, "q4_k"), expected)
    assert np.array_equal(ggufkit.quantize(x.T.astype(">f4"), "q4_k"), expected)
    assert np.array_equal(ggufkit.quantize(x.T.tolist(), "Q4-K"), expected)
    assert ggufkit.quantize(x.T.astype(ml_dtypes.bfloat16), "bf16").shape == (4, 1024)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("type", ["q8_0", "q4_k", "iq4_nl", "f32"])
def test_quantize_refuses_in_one_line(type):
    if type == "iq4_nl":
        with pytest.raises(ggufkit.UnsupportedError, match="did you mean"):
            ggufkit.quantize(np.ones((1, 256)), "q4_kk")
        return
    for wrong in (np.ones((1, 256), complex), np.array(["a"] * 256), np.array([None] * 256)):
        with pytest.raises(ggufkit.UsageError, match="numbers are wanted"):
            ggufkit.quantize(wrong, type)
    for weights in (np.ones(7), np.ones((2, 128)), np.float32(1)):
        with pytest.raises(ggufkit.UsageError, match=r"importance .* one weight per column"):
            ggufkit.quantize(np.ones((1, 256)), type, importance=weights)
    if type != "f32":
        with pytest.raises(ggufkit.FormatError, match="infinite"):
            ggufkit.quantize(np.full((1, 256), 1e300), type)
        with pytest.raises(ggufkit.FormatError, match="divisible"):
            ggufkit.quantize(np.ones((1, 100)), type)


def test_dequantize_takes_bytes_only():
    for wrong in (np.ones((2, 144)), np.ones((2, 144), np.int32), bytes(144)):
        with pytest.raises(ggufkit.UsageError, match="uint8"):
            ggufkit.dequantize(wrong, "q4_k")
    with pytest.raises(ggufkit.FormatError, match="multiples of 144"):
        ggufkit.dequantize(np.ones((2, 143), np.uint8), "q4_k")


def test_generate_and_chat(model):
    pieces = list(model.generate("Once upon a time", max_tokens=8, temperature=0))
    assert all(isinstance(piece, str) for piece in pieces)
    assert "".join(pieces) == "".join(model.generate("Once upon a time", max_tokens=8, temperature=0))
    messages = [{"role": "user", "content": "Hi"}]
    assert model.tokenizer.apply_chat_template(messages) == "[user]Hi[assistant]"
    answer = "".join(model.chat(messages, max_tokens=8, temperature=0))
    assert answer == "".join(model.generate("[user]Hi[assistant]", max_tokens=8, temperature=0))


def test_logits_and_tokens(model):
    ids = model.tokenizer.encode("text <s>", add_special=True, parse_special=False)
    assert ids.count(1) == 1
    assert model.tokenizer.encode("text <s>", add_special=False, parse_special=True).count(1) == 1
    assert isinstance(model.tokenizer.decode(ids), str)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), 320) and logits.dtype == np.float32
    assert np.array_equal(logits, model.logits(np.array(ids)))


def test_convert(path, tmp_path):
    with pytest.raises(ggufkit.GgufkitError, match="requantize"):
        ggufkit.convert(path, "q8_0", tmp_path / "out.gguf")
    report = ggufkit.convert(path, "q8_0", tmp_path / "out.gguf", allow_requantize=True)
    assert report.output == str(tmp_path / "out.gguf") or report.output == tmp_path / "out.gguf"
    with ggufkit.open(tmp_path / "out.gguf") as f:
        assert f.tensors["blk.0.attn_q.weight"].type == "Q8_0"


def test_the_default_model(default_model_path, monkeypatch):
    monkeypatch.setenv("GGUFKIT_MODEL", str(default_model_path))
    m = ggufkit.load()
    assert "".join(m.generate("The capital of France is", max_tokens=3, temperature=0)).startswith(" Paris")
