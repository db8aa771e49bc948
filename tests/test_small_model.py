"""The small model in tests/data/small-model: its files, shapes, tokenizer and what its README says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from safetensors import safe_open

DATA = Path(__file__).parent / "data"
FOLDER = DATA / "small-model"
HELD_OUT = DATA / "small-model-heldout.txt"


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    with safe_open(FOLDER / "model.safetensors", framework="numpy") as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def test_folder_is_small_and_whole():
    names = {p.name for p in FOLDER.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.model", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) <= 8_000_000
    assert HELD_OUT.stat().st_size <= 120_000


def test_config(config, tokenizer):
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == tokenizer.vocab_size() and config["vocab_size"] % 256 == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]


def test_weights(config, weights):
    """Every tensor is there, bf16, finite, none constant but a norm, and every row can take every block type."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = config["head_dim"] * config["num_key_value_heads"]
    expected = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    expected["model.norm.weight"] = (hidden,)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        expected |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (hidden, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, hidden),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
        }
    assert {name: w.shape for name, w in weights.items()} == expected
    for name, w in weights.items():
        assert w.dtype == ml_dtypes.bfloat16, name
        assert np.isfinite(w.astype(np.float32)).all(), name
        assert w.astype(np.float32).std() > 1e-4, name
        assert w.shape[-1] % 256 == 0, name


def test_tokenizer(tokenizer):
    ids = tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()
    assert ids == (0, 1, 2, -1)
    assert [tokenizer.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert [tokenizer.id_to_piece(3 + b) for b in range(256)] == [f"<0x{b:02X}>" for b in range(256)]
    assert all(tokenizer.is_byte(3 + b) for b in range(256))
    for text in ["Hello world", "  two blanks\n\tand a tab ", "naïve – “quotes” 東京 🎉", "1234567890", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(tokenizer.id_to_piece(i) in "0123456789▁" for i in tokenizer.encode("20 26"))


def test_readme_says_what_matters():
    """How it was made, under which licence, and figures with the baseline above the network."""
    text = (FOLDER / "README.md").read_text()
    assert "tools.small_model.train" in text
    assert re.search(r"(?i)licen[cs]e", text) and "MIT" in text
    row = re.search(r"\|\s*held-out[^|]*\|\s*([\d.]+)\s*\|\s*([\d.]+)\s*\|", text)
    assert row is not None
    assert float(row[1]) < float(row[2])
