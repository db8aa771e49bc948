"""Hugging Face tokenizer files to GGUF metadata."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_cases as cases
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError
from ggufkit_runtime import tokenizer
from ggufkit_runtime.tokenizer import hf, recognise

CONFIG = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": [2, 3]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
G = "tokenizer.ggml."


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def added(i: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, "special": special} | flags


LLAMA3 = sequence(split(recognise.LLAMA3), BYTE_LEVEL)


def byte_level(**changes: Any) -> dict[str, Any]:
    """A small byte-level tokenizer.json: 256 bytes, three merges, added tokens."""
    vocab = {c: i for i, c in enumerate(cases.byte_characters())}
    vocab |= {"he": 256, "llo": 257, "lo": 258}
    model = {"type": "BPE", "vocab": vocab, "merges": [["h", "e"], ["l", "o"], "l lo"], "ignore_merges": True}
    return {
        "added_tokens": [added(259, "<|begin_of_text|>"), added(260, "<|eot|>", False), added(262, "<x▁y>", False)],
        "normalizer": None,
        "pre_tokenizer": LLAMA3,
        "post_processor": None,
        "model": model,
        "decoder": {"type": "ByteLevel"},
    } | changes


def folder(path: Path, **files: Any) -> Path:
    for name, content in files.items():
        name = name.replace("__", ".")
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_byte_level(tmp_path: Path) -> None:
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot|>"}, "add_bos_token": True}
    source = folder(tmp_path, tokenizer__json=byte_level(), tokenizer_config__json=config, config__json=CONFIG)
    keys = hf.metadata(source, 265)
    assert keys[G + "model"] == "gpt2"
    assert keys[G + "pre"] == "llama-bpe"
    assert keys[G + "tokens"][256:261] == ["he", "llo", "lo", "<|begin_of_text|>", "<|eot|>"]
    assert keys[G + "tokens"][261:] == ["[PAD261]", "<x y>", "[PAD263]", "[PAD264]"]
    assert keys[G + "token_type"].tolist()[256:] == [1, 1, 1, 3, 3, 5, 4, 5, 5]
    assert keys[G + "token_type"].dtype == np.int32
    assert keys[G + "merges"] == ["h e", "l o", "l lo"]
    assert G + "scores" not in keys
    assert (keys[G + "bos_token_id"], keys[G + "eos_token_id"], keys[G + "add_bos_token"]) == (259, 260, True)
    t = tokenizer.from_metadata(keys)
    assert t.encode("hello<x y>") == [259, 256, 257, 262]
    assert t.decode(t.encode("hello<x y>", False)) == "hello<x y>"
    with pytest.raises(FormatError, match="id 262 does not fit a vocabulary of 262"):
        hf.metadata(source, 262)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (LLAMA3, "llama-bpe"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}), "smollm"),
        (BYTE_LEVEL | {"use_regex": True}, "gpt-2"),
        (sequence(split(recognise.QWEN2), BYTE_LEVEL), "qwen2"),
        (sequence(split(recognise.canonical(recognise.QWEN2)), BYTE_LEVEL), "qwen2"),
        (sequence(split(recognise.QWEN35), BYTE_LEVEL), "qwen35"),
        (sequence(split(recognise.CASED % {"tail": "", "digits": ""}), BYTE_LEVEL), "tekken"),
        (
            sequence(split(recognise.CASED % {"tail": recognise.ANY_CASE + "?", "digits": "{1,3}"}), BYTE_LEVEL),
            "gpt-4o",
        ),
    ],
)
def test_recognised(pre_tokenizer: Any, name: str, tmp_path: Path) -> None:
    source = folder(tmp_path, tokenizer__json=byte_level(pre_tokenizer=pre_tokenizer, normalizer={"type": "NFC"}))
    assert hf.metadata(source)[G + "pre"] == name


def test_not_recognised(tmp_path: Path) -> None:
    odd = sequence(split(recognise.QWEN2.replace("{N}", "{N}{1,2}")), BYTE_LEVEL)
    source = folder(tmp_path, tokenizer__json=byte_level(pre_tokenizer=odd))
    with pytest.raises(UnsupportedError, match=r"unknown pre-tokenizer.*nearest known:.*qwen2.*--pre-tokenizer"):
        hf.metadata(source)
    assert hf.metadata(source, pre="qwen2")[G + "pre"] == "qwen2"
    with pytest.raises(UnsupportedError, match="unknown pre-tokenizer 'qwenn2'"):
        hf.metadata(source, pre="qwenn2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "add_prefix_space"),
        ({"pre_tokenizer": None}, r"\(none\)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ],
)
def test_unsupported(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        hf.metadata(folder(tmp_path, tokenizer__json=byte_level(**changes)))


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[1]",
        '{"model": 5}',
        byte_level(model={"type": "BPE", "vocab": {"a": "b"}, "merges": []}),
        byte_level(model={"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}),
        byte_level(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        byte_level(model={"type": "BPE", "vocab": {"a": 10**9}, "merges": []}),
        byte_level(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}),
        byte_level(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}),
        byte_level(model={"type": "BPE", "vocab": {"a": 0}, "merges": {}}),
        byte_level(added_tokens=[{"id": "x", "content": "y"}]),
        byte_level(added_tokens=[{"id": 5}]),
        byte_level(added_tokens=[{"id": "9" * 5000, "content": "y"}]),
        byte_level(added_tokens=[added(259, "\ud800")]),
        "[" * 100_000,
    ],
    ids=range(15),
)
def test_bad_files(content: Any, tmp_path: Path) -> None:
    with pytest.raises(GgufkitError) as caught:
        hf.metadata(folder(tmp_path, tokenizer__json=content))
    assert "\n" not in str(caught.value)


def test_odd_values_in_companions(tmp_path: Path) -> None:
    """Lists that are none count as empty; what cannot be skipped is an error of ours."""
    plain = hf.metadata(folder(tmp_path, tokenizer__json=byte_level(added_tokens=[]), config__json={}))
    odd = hf.metadata(folder(tmp_path, tokenizer__json=byte_level(added_tokens=5), config__json={"architectures": 5}))
    assert odd[G + "tokens"] == plain[G + "tokens"]
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "a.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"a\.jinja: not UTF-8"):
        hf.metadata(tmp_path)
    (extra / "a.jinja").unlink()
    (extra / "b.jinja").mkdir()
    with pytest.raises(FormatError, match=r"b\.jinja: Is a directory"):
        hf.metadata(tmp_path)


def test_odd_values_beside_other_kinds(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    shutil.copy(cases.mistral_data("tokenizer.model.v1"), one / "tokenizer.model")
    for decoder in ({"5": "abc"}, {"9" * 5000: {"content": "x"}}):
        folder(one, config__json=CONFIG, tokenizer_config__json={"added_tokens_decoder": decoder})
        with pytest.raises(FormatError, match="is not a sound entry"):
            hf.metadata(one, 32000)
    folder(two, vocab__json={"a": 0}, merges__txt="", tokenizer_config__json={"tokenizer_class": []})
    with pytest.raises(UnsupportedError, match="--pre-tokenizer"):
        hf.metadata(two)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        hf.metadata(tmp_path)
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        hf.metadata(tmp_path / "missing")


def test_vocab_and_merges(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "ab": 2}
    folder(tmp_path, vocab__json=vocab, merges__txt="#version: 0.2\na b\n\n")
    with pytest.raises(UnsupportedError, match="--pre-tokenizer"):
        hf.metadata(tmp_path)
    folder(tmp_path, tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"})
    keys = hf.metadata(tmp_path)
    assert (keys[G + "pre"], keys[G + "merges"]) == ("qwen2", ["a b"])


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    shutil.copy(cases.mistral_data(name), tmp_path / "tokenizer.model")
    keys = hf.metadata(folder(tmp_path, config__json=CONFIG), 33000)
    theirs = cases.from_sentencepiece(cases.mistral_data(name))
    n = len(theirs[G + "tokens"])
    assert keys[G + "tokens"][:n] == theirs[G + "tokens"]
    assert keys[G + "tokens"][n] == f"[PAD{n}]"
    assert np.array_equal(keys[G + "scores"][:n], theirs[G + "scores"])
    assert keys[G + "scores"].dtype == np.float32
    assert keys[G + "scores"][n] == -10000
    assert np.array_equal(keys[G + "token_type"][:n], theirs[G + "token_type"])
    assert (keys[G + "model"], keys[G + "pre"], keys[G + "bos_token_id"]) == ("llama", "default", 1)
    assert G + "eos_token_id" not in keys  # a list in config.json says nothing
    assert tokenizer.from_metadata(keys).encode("Hello") == tokenizer.from_metadata(theirs).encode("Hello")


def test_sentencepiece_added_tokens(tmp_path: Path) -> None:
    shutil.copy(cases.mistral_data("tokenizer.model.v1"), tmp_path / "tokenizer.model")
    decoder = {"1": {"content": "<s>", "special": True}, "32001": {"content": "▁x", "special": False}}
    config = {"added_tokens_decoder": decoder, "add_prefix_space": False, "add_eos_token": True}
    folder(tmp_path, config__json=CONFIG, tokenizer_config__json=config, added_tokens__json={"<y>": 32000})
    keys = hf.metadata(tmp_path, 32002)
    assert keys[G + "tokens"][32000:] == ["<y>", " x"]
    assert keys[G + "token_type"].tolist()[32000:] == [4, 4]
    assert keys[G + "scores"].tolist()[32000:] == [-1000, -1000]
    assert (keys[G + "scores"][1], keys[G + "token_type"][1]) == (-1000, 3)
    assert (keys[G + "add_space_prefix"], keys[G + "add_eos_token"]) == (False, True)


def test_unigram_model_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text(cases.SENTENCES * 3)
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=400, model_type="unigram",
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="a unigram SentencePiece model"):
        hf.metadata(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x05hello")
    with pytest.raises(FormatError, match="not a SentencePiece model"):
        hf.metadata(tmp_path)


def llama2_json(prefix: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tokenizer.json as made from a SentencePiece model, and the `llama` keys of that model."""
    keys = cases.from_sentencepiece(cases.mistral_data("tokenizer.model.v1"))
    tokens, scores = keys[G + "tokens"], keys[G + "scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in vocab.items():
        pairs = [(token[:k], token[k:]) for k in range(1, len(token))]
        merges += [(scores[i], a, b) for a, b in pairs if a in vocab and b in vocab]
    merges.sort(key=lambda merge: -merge[0])
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    return {
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": vocab,
            "merges": [f"{a} {b}" for _, a, b in merges],
        },
    }, keys  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_llama2_json(prefix: bool, tmp_path: Path) -> None:
    """Scores made from the merges tokenize as the SentencePiece model and as `tokenizers` do."""
    import tokenizers

    source, theirs = llama2_json(prefix)
    folder(tmp_path, tokenizer__json=source, tokenizer_config__json={"bos_token": "<s>", "eos_token": "</s>"})
    keys = hf.metadata(tmp_path)
    assert (keys[G + "model"], keys[G + "tokens"]) == ("llama", theirs[G + "tokens"])
    assert keys.get(G + "add_space_prefix", True) is prefix
    assert keys[G + "token_type"].tolist()[:4] == [3, 3, 3, 6]
    assert keys[G + "add_bos_token"] is True
    ours = tokenizer.from_metadata(keys)
    reference = tokenizer.from_metadata(theirs | {G + "add_space_prefix": prefix})
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in cases.strings(200, 17):
        assert ours.encode(text) == reference.encode(text), text
        if text and not any(token in text for token in ("<s>", "</s>", "<unk>")):
            assert ours.encode(text) == library.encode(text).ids, text


def test_post_processor_and_templates(tmp_path: Path) -> None:
    bos, eos = {"SpecialToken": {"id": "<|begin_of_text|>"}}, {"SpecialToken": {"id": "<|eot|>"}}
    a, b = {"Sequence": {"id": "A"}}, {"Sequence": {"id": "B"}}
    processor = {"type": "TemplateProcessing", "single": [bos, a, eos], "pair": [bos, a, eos, b, eos]}
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<x▁y>", "add_eos_token": False, "chat_template": [
        {"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}, {"name": 3}]}  # fmt: skip
    folder(tmp_path, tokenizer__json=byte_level(post_processor=processor), tokenizer_config__json=config)
    keys = hf.metadata(tmp_path)
    assert (keys[G + "add_bos_token"], keys[G + "add_eos_token"], keys[G + "add_sep_token"]) == (True, True, False)
    assert (keys[G + "eos_token_id"], keys[G + "eot_token_id"]) == (260, 262)  # the template's EOS; the other is EOT
    assert keys["tokenizer.chat_template"] == "D"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    assert keys["tokenizer.chat_template.tool_use"] == "T"
    folder(tmp_path, tokenizer_config__json={"bos_token": "<|begin_of_text|>"}, chat_template__jinja="J")
    assert hf.metadata(tmp_path)["tokenizer.chat_template"] == "J"
    assert hf.metadata(tmp_path / "config.json")["tokenizer.chat_template"] == "J"
    assert hf.metadata(list(tmp_path.iterdir()))["tokenizer.chat_template"] == "J"
