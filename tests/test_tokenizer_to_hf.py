"""GGUF vocabularies to Hugging Face files: `tokenizers` and `sentencepiece` give our ids, convert reads them again."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_cases as cases
import tokenizers
from ggufkit_formats import gguf
from ggufkit_formats.errors import UnsupportedError
from ggufkit_runtime import tokenizer
from ggufkit_runtime.tokenizer import hf, pretokenizers, recognise, to_hf

V1, V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
G = "tokenizer.ggml."
SMALL = Path(__file__).parent / "data" / "small-model"


@functools.cache
def tekken() -> dict[str, Any]:
    return cases.tekken(12000)


def write(keys: Any, folder: Path) -> tokenizers.Tokenizer:
    """The files of a vocabulary, in `folder`; the tokenizer.json as `tokenizers` reads it."""
    folder.mkdir(exist_ok=True)
    for name, content in to_hf.files(keys).items():
        (folder / name).write_bytes(content)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def newer(text: str) -> bool:
    """Characters that Unicode 15.1 does not have, or that are marked in docs/tokenizers.md as seen differently."""
    return "\u017f" in text or any(unicodedata.category(c) == "Cn" for c in text)


def compare(keys: Any, library: tokenizers.Tokenizer, n: int, skip: Any = newer, least: float = 0.5) -> None:
    """Ids of `n` strings. Special tokens are parsed: `tokenizers` always finds them. Of a byte without a token
    llama.cpp remembers the place, and `tokenizers` does not. At least a share of `least` must be left to compare."""
    ours = tokenizer.from_metadata(keys)
    special = [ours.vocabulary.tokens[i] for i in ours.vocabulary.special[-10:]]
    missing = {
        b for b, c in enumerate(cases.byte_characters()) if ours.kind == "gpt2" and c not in ours.vocabulary.index
    }
    compared = 0
    for text in cases.strings(n, 23, special):
        if not text or skip(text) or missing & set(text.encode()):
            continue
        want = ours.encode(text, parse_special=True)
        assert library.encode(text).ids == want, repr(text)
        assert library.encode(text, add_special_tokens=False).ids == ours.encode(text, False, True), repr(text)
        compared += 1
    assert compared >= least * n


# -- SentencePiece -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", [V1, V3, "small"])
def test_sentencepiece(name: str, prefix: bool, tmp_path: Path) -> None:
    source = SMALL / "tokenizer.model" if name == "small" else cases.mistral_data(name)
    keys = cases.from_sentencepiece(source) | {G + "add_space_prefix": prefix}
    compare(keys, write(keys, tmp_path), 600)


@pytest.mark.parametrize("name", [V1, V3, "small"])
def test_sentencepiece_model_is_the_same_again(name: str, tmp_path: Path) -> None:
    source = SMALL / "tokenizer.model" if name == "small" else cases.mistral_data(name)
    keys = cases.from_sentencepiece(source)
    write(keys, tmp_path)
    again = cases.from_sentencepiece(tmp_path / "tokenizer.model")
    assert again.keys() == keys.keys()
    for key, value in keys.items():
        assert np.array_equal(again[key], value), key
    import sentencepiece

    theirs, ours = (
        sentencepiece.SentencePieceProcessor(model_file=str(p)) for p in (source, tmp_path / "tokenizer.model")
    )
    for text in cases.strings(300, 4):
        if unicodedata.normalize("NFKC", text) == text:  # which the first of them applies
            assert theirs.encode(text) == ours.encode(text), text


def test_sentencepiece_vocabulary_comes_back(tmp_path: Path) -> None:
    keys = cases.from_sentencepiece(cases.mistral_data(V1))
    tokens, scores = [*keys[G + "tokens"], "<|x y|>", "<z>", "[PAD32002]"], [*keys[G + "scores"], -1000, -1000, -10000]
    types = [*keys[G + "token_type"], 3, 4, 5]
    keys |= {
        G + "tokens": tokens, G + "scores": np.array(scores, np.float32), G + "token_type": np.array(types, np.int32),
        G + "add_space_prefix": False, G + "add_eos_token": True, G + "padding_token_id": 2,
        "tokenizer.chat_template": "T", "tokenizer.chat_templates": ["tool"], "tokenizer.chat_template.tool": "U",
    }  # fmt: skip
    library = write(keys, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    back = hf.metadata(tmp_path, len(tokens))
    for key, value in keys.items():
        assert np.array_equal(back[key], value), key
    ours = tokenizer.from_metadata(keys)
    ids = ours.encode("Hello <z> world")
    assert library.encode("Hello <z> world").ids == ids and 32001 in ids and ids[-1] == 2
    assert library.decode(ids, skip_special_tokens=True) == "Hello <z> world"


def test_vocabularies_without_a_sentencepiece_model(tmp_path: Path) -> None:
    """No unknown token, or two: tokenizer.json alone."""
    tokens = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab", "▁ab"]
    for types in ([3, 3], [2, 2]):
        keys = {
            G + "model": "llama", G + "tokens": tokens, G + "scores": np.arange(len(tokens), dtype=np.float32),
            G + "token_type": np.array([*types, *[6] * 256, *[1] * 5], np.int32), G + "bos_token_id": 0,
            G + "eos_token_id": 1,
        }  # fmt: skip
        assert sorted(to_hf.files(keys)) == ["tokenizer.json", "tokenizer_config.json"]
        compare(keys, write(keys, tmp_path), 200)


# -- byte-level BPE ------------------------------------------------------------------------------------


def test_default_model(default_model_path: Path, tmp_path: Path) -> None:
    with gguf.open(default_model_path) as file:
        keys = dict(file.metadata)
    compare(keys, write(keys, tmp_path), 1500)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["chat_template"] == keys["tokenizer.chat_template"]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    back = hf.metadata(tmp_path, len(keys[G + "tokens"]))
    for key in (key for key in keys if key.startswith("tokenizer.") and key != G + "add_space_prefix"):
        assert np.array_equal(back[key], keys[key]), key


MARKS = re.compile(r"[^\x00-\x7f]")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "smaug-bpe", "deepseek-v3", "falcon"])
def test_byte_level(pre: str, tmp_path: Path) -> None:
    keys = tekken() | {G + "pre": pre}
    library = write(keys, tmp_path)
    compare(keys, library, 600)
    assert hf.metadata(tmp_path)[G + "pre"] == pre


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "qwen35"])
def test_patterns_that_llama_cpp_sees_otherwise_outside_ascii(pre: str, tmp_path: Path) -> None:
    keys = tekken() | {G + "pre": pre}
    compare(keys, write(keys, tmp_path), 1500, lambda text: MARKS.search(text) is not None, 0.1)
    assert hf.metadata(tmp_path)[G + "pre"] == pre


def test_every_pre_tokenizer_is_written_and_recognised(tmp_path: Path) -> None:
    vocabulary = cases.tekken(600)
    for name, pre in pretokenizers.TABLE.items():
        keys = vocabulary | {G + "pre": name}
        library = write(keys, tmp_path)
        assert library.encode("Hello wörld, it's 12345!\n").ids
        found = hf.metadata(tmp_path)[G + "pre"]
        assert pretokenizers.TABLE[found].patterns == pre.patterns, (name, found)


def test_written_steps_are_those_of_the_checkpoints() -> None:
    for steps, name in recognise.STRUCTURES.items():
        written = recognise.written(pretokenizers.TABLE[name])
        again = tuple(s for part in recognise.flatten(written, "pretokenizers") for s in recognise.step(part, name))
        assert again == steps, name


def test_tokens_that_fill_up_and_special_ones(tmp_path: Path) -> None:
    alphabet = cases.byte_characters()
    tokens = [*alphabet, "he", "[PAD257]", "<|eot|>", "<x y>", "[PAD260]"]
    keys = {
        G + "model": "gpt2", G + "pre": "llama-bpe", G + "tokens": tokens, G + "merges": ["h e", "q q", "he llo"],
        G + "token_type": np.array([*[1] * 257, 5, 3, 4, 5], np.int32), G + "eos_token_id": 258,
        G + "bos_token_id": 258, G + "add_bos_token": True,
    }  # fmt: skip
    library = write(keys, tmp_path)
    assert library.encode("he<x y>").ids == [258, 256, 259]
    back = hf.metadata(tmp_path, 261)
    for key in (G + "tokens", G + "token_type", G + "eos_token_id", G + "bos_token_id", G + "add_bos_token"):
        assert np.array_equal(back[key], keys[key]), key
    assert back[G + "merges"] == ["h e"]
    keys[G + "tokens"] = [*tokens[:-1], "\udcff"]
    with pytest.raises(UnsupportedError, match="token 260 is not Unicode"):
        to_hf.files(keys)
