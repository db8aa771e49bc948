"""Tokenizers against llama.cpp, sentencepiece and tokenizers, and on metadata that do not hold together."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_cases as cases
from ggufkit_formats import gguf
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError
from ggufkit_runtime import tokenizer
from ggufkit_runtime.tokenizer import bpe, pretokenizers, unicode15, vocabulary
from oracles import llama

needs_llama = pytest.mark.skipif(not llama.available(), reason="xllamacpp is not installed")

V1, V3 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"
DISTINCT = list({pre: name for name, pre in reversed(pretokenizers.TABLE.items())}.values())


@functools.cache
def tekken() -> dict[str, Any]:
    return cases.tekken(12000)


@functools.cache
def small() -> dict[str, Any]:
    return cases.tekken(3000)


@functools.cache
def spm() -> dict[str, Any]:
    return cases.from_sentencepiece(cases.mistral_data(V1))


def bpe_keys(tokens: list[str], merges: list[str], **more: Any) -> dict[str, Any]:
    """A byte-level vocabulary by hand, with further tokenizer.ggml.* keys."""
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges} | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def spm_keys(tokens: list[str], scores: list[float], **more: Any) -> dict[str, Any]:
    keys = {"model": "llama", "tokens": tokens, "scores": np.array(scores, np.float32)} | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def compare(keys: dict[str, Any], folder: Path, n: int, seed: int = 3) -> None:
    compare_with(cases.write_gguf(folder / "vocabulary.gguf", keys), keys, n, seed)


def compare_with(path: Path, keys: Any, n: int, seed: int = 3) -> None:
    ours = tokenizer.from_metadata(keys)
    special = [ours.vocabulary.tokens[i] for i in ours.vocabulary.special[-40:]]
    with llama.Llama(path, vocab_only=True) as oracle:
        found = cases.differences(ours, oracle, list(cases.strings(n, seed, special)))
        assert not found, f"{len(found)} differ, the first: {found[0]}"
        if isinstance(ours._engine, bpe.ByteLevelBPE):
            _ = ours._engine.engine  # short texts were merged in Python; from now on it is asked
            found = cases.differences(ours, oracle, list(cases.strings(n, seed + 100, special)))
            assert not found, f"{len(found)} differ, the first: {found[0]}"
        assert [ours.piece(i) for i in range(ours.n_vocab)] == oracle.token_to_piece()
        theirs = oracle.vocab()
    assert sorted(ours.eog_ids) == theirs["eog"]
    assert (ours.add_bos, ours.add_eos) == (theirs["add_bos"], theirs["add_eos"])
    assert (ours.bos_id, ours.eos_id) == tuple(None if i < 0 else i for i in (theirs["bos"], theirs["eos"]))
    assert np.array_equal(ours.vocabulary.attributes, theirs["attr"])


def test_strings_that_share_a_character() -> None:
    """Decoded all at once, they would be sound."""
    found = vocabulary.decode_all(gguf.StringArray.of([b"a\xc3", b"\xa9b", "é", "", "日本"]))
    assert found == ["a\udcc3", "\udca9b", "é", "", "日本"]
    assert vocabulary.decode_all(gguf.StringArray.of(["é", "", "日本"])) == ["é", "", "日本"]
    assert vocabulary.decode_all(gguf.StringArray.of(["", ""])) == ["", ""]
    assert vocabulary.decode_all(gguf.StringArray.of([])) == []


def test_a_text_is_short_or_goes_to_the_engine(default_model_path: Path) -> None:
    with gguf.open(default_model_path) as file:
        ours = tokenizer.from_metadata(file.metadata)
    engine = ours._engine
    assert isinstance(engine, bpe.ByteLevelBPE)
    texts = ["The capital of France is", "\x00\x01 ab", "antidisestablishmentarianism" * 4]
    short = [ours.encode(text) for text in texts]
    assert "engine" not in vars(engine)
    long = [ours.encode(text) for text in ("x" * (bpe.WORD + 1), "a b " * bpe.SHORT)]
    assert "engine" in vars(engine)
    assert [ours.encode(text) for text in texts] == short and all(long)


# --- against llama.cpp ---


@needs_llama
def test_default_model(default_model_path: Path) -> None:
    with gguf.open(default_model_path) as file:
        compare_with(default_model_path, file.metadata, 1500)


@needs_llama
@pytest.mark.parametrize("name", [V1, V3])
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    compare(cases.from_sentencepiece(cases.mistral_data(name)), tmp_path, 1500)


@needs_llama
def test_small_model(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "data" / "small-model"
    compare(cases.from_sentencepiece(folder / "tokenizer.model"), tmp_path, 1500)


@needs_llama
@pytest.mark.parametrize("pre", ["tekken", "qwen2", "llama-bpe"])
def test_byte_level(pre: str, tmp_path: Path) -> None:
    compare(tekken() | {"tokenizer.ggml.pre": pre}, tmp_path, 1500)


@needs_llama
@pytest.mark.parametrize("pre", DISTINCT)
def test_pre_tokenizer(pre: str, tmp_path: Path) -> None:
    compare(small() | {"tokenizer.ggml.pre": pre}, tmp_path, 120, seed=5)


@needs_llama
@pytest.mark.parametrize(
    "more",
    [
        {"add_space_prefix": False},
        {"add_bos_token": False, "add_eos_token": True},
        {"eos_token_id": 1, "eot_token_id": 5},
        {"bos_token_id": 999_999},
    ],
    ids=str,
)
def test_sentencepiece_settings(more: dict[str, Any], tmp_path: Path) -> None:
    compare(spm() | {f"tokenizer.ggml.{k}": v for k, v in more.items()}, tmp_path, 60)


@needs_llama
def test_several_unknown_user_defined_and_control_tokens(tmp_path: Path) -> None:
    keys = dict(spm())
    n = len(keys["tokenizer.ggml.tokens"])
    new = ["<|im_start|>", "<|im_end|>", "[x]", "[xy]", "\n\n", " [z] ", "<unk2>", "{{unused}}", "▁▁[q]"]
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + new
    keys["tokenizer.ggml.scores"] = np.append(keys["tokenizer.ggml.scores"], np.zeros(9, np.float32))
    types = np.append(keys["tokenizer.ggml.token_type"], [3, 4, 4, 4, 4, 4, 2, 3, 4]).astype(np.int32)
    keys["tokenizer.ggml.token_type"] = types
    compare(keys, tmp_path, 400)
    t = tokenizer.from_metadata(keys)
    assert t.encode("a[xy]b", False)[1:-1] == [n + 3]
    assert n + 1 in t.eog_ids


@needs_llama
def test_strip_attributes(tmp_path: Path) -> None:
    """Phi-3's special tokens eat the blanks behind them, jina's <mask> those before it."""
    texts = ["a <|end|> \n b", "x<|user|>   \t\n<|end|> y", "<s> z </s> q", "<mask> a  <mask>  <mask>b"]
    base = spm()
    new = ["<|user|>", "<|end|>", "<|endoftext|>"]
    phi = base | {
        "general.name": "Phi-3 mini",
        "tokenizer.ggml.tokens": base["tokenizer.ggml.tokens"] + new,
        "tokenizer.ggml.scores": np.append(base["tokenizer.ggml.scores"], np.zeros(3, np.float32)),
        "tokenizer.ggml.token_type": np.append(base["tokenizer.ggml.token_type"], [3, 3, 3]).astype(np.int32),
    }
    jina = dict(small())
    jina["tokenizer.ggml.pre"] = "jina-v2-de"
    jina["tokenizer.ggml.tokens"] = [*jina["tokenizer.ggml.tokens"], "<mask>"]
    jina["tokenizer.ggml.token_type"] = np.append(jina["tokenizer.ggml.token_type"], [3]).astype(np.int32)
    for keys in (phi, jina):
        with llama.Llama(cases.write_gguf(tmp_path / "strip.gguf", keys), vocab_only=True) as oracle:
            assert not cases.differences(tokenizer.from_metadata(keys), oracle, texts)


@needs_llama
def test_vocabulary_with_holes(tmp_path: Path) -> None:
    """Bytes without tokens, merges with unknown parts and results, repeated and broken merges, unused tokens."""
    tokens = [*"abcdefgh", "ab", "cd", "abcd", "\u0120", "\u0120a", "[gone]", "fg", "\u010a", "é", "<|end|>"]
    merges = ["a b", "c d", "\u0120 a", "e f", "ab cd", "ef g", "a b", "broken", "x y", "f g", " z", "q ", "\u0100 a"]
    types = [1] * 13 + [5, 1, 1, 1, 3]
    keys = bpe_keys(tokens, merges, token_type=np.array(types, np.int32), bos_token_id=0, eos_token_id=1)
    texts = [
        "abcd",
        "abxcd",
        "a b",
        " abab",
        "efg",
        "efgh",
        "e\x00a",
        "üab",
        "ab\ncd<|end|>",
        "xyz",
        "fg",
        "ééé",
        "[gone]",
    ]
    for pre in ("gpt-2", "llama-bpe", "smollm"):
        keys["tokenizer.ggml.pre"] = pre
        with llama.Llama(cases.write_gguf(tmp_path / "holes.gguf", keys), vocab_only=True) as oracle:
            ours = tokenizer.from_metadata(keys)
            assert [ours.encode(t, False) for t in texts] == oracle.tokenize(texts, False)
            theirs = oracle.token_to_piece()
            assert [ours.piece(i) for i in range(len(tokens))] == theirs


@needs_llama
def test_cleaned_spaces(tmp_path: Path) -> None:
    keys = small() | {"tokenizer.ggml.pre": "gpt-2"}
    ours = tokenizer.from_metadata(keys)
    texts = [
        "a . b , c ! d ? e",
        "it 's I 'm we 're you 've he 'll I 'd don 't",
        "x ' y ' ' z",
        " ' ' ' ",
        " .",
        "'s 's",
    ]
    ids = [ours.encode(t, False) for t in texts]
    with llama.Llama(cases.write_gguf(tmp_path / "clean.gguf", keys), vocab_only=True) as oracle:
        assert [ours.decode(i).encode() for i in ids] == oracle.detokenize(ids)


# --- against the libraries themselves ---


def test_equals_sentencepiece() -> None:
    """Strings without U+2581 (which sentencepiece takes for a blank, as llama.cpp does) and control tokens."""
    import sentencepiece

    theirs: Any = sentencepiece.SentencePieceProcessor()
    theirs.LoadFromFile(str(cases.mistral_data(V1)))
    ours = tokenizer.from_metadata(spm())
    for text in cases.strings(400, 11):
        assert ours.encode(text, False) == theirs.encode(text), text


def test_unicode_tables() -> None:
    """Categories of Python's Unicode (14 to 17) are those of the tables, where both know the code point."""
    import unicodedata

    known = {c: k for k, runs in unicode15.categories().items() for a, b in runs for c in range(a, b + 1)}
    both = 0
    for c in range(0x110000):
        theirs = unicodedata.category(chr(c))[0]
        if c in known and theirs != "C":
            both += 1
            assert known[c] == theirs, hex(c)
    assert both > 140_000


# --- encode, decode, stream ---


def test_real_gguf_mapping(default_model_path: Path) -> None:
    with gguf.open(default_model_path) as file:
        t = tokenizer.from_metadata(file.metadata)
    assert (t.n_vocab, t.bos_id, t.eos_id, t.add_bos, t.eog_ids) == (49152, 1, 2, False, {0, 2, 4})
    assert t.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert t.encode("<|im_end|>", parse_special=True) == [2]
    assert len(t.encode("<|im_end|>")) > 1
    text = "A naïve café:\n\t日本 🤦🏽‍♂️  \x00 end"
    assert t.decode(t.encode(text)) == text
    assert t.decode([1, 504], skip_special=True) == "The"


def test_stream_never_splits_characters() -> None:
    t = tokenizer.from_metadata(tekken())
    text = "naïve 🤦🏽‍♂️ 日本語 ภาษา"
    stream = t.stream()
    parts = [stream.push(i) for i in t.encode(text, add_special=False)]
    assert "".join(parts) + stream.finish() == text
    assert not any("\ufffd" in part for part in parts)
    half = t.encode("\U0010a000", add_special=False)[:1]
    assert stream.push(half[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.push(t.vocabulary.ids["eos"]) == ""
    assert t.stream(skip_special=False).push(t.vocabulary.ids["eos"]) != ""


def test_decode_of_sentencepiece() -> None:
    t = tokenizer.from_metadata(spm())
    assert t.encode("Hello") == [1, *t.encode("Hello", add_special=False)]
    assert t.decode(t.encode("Hello", add_special=False)) == "Hello"
    assert t.decode(t.encode("Hello"), skip_special=True) == "Hello"
    assert t.decode(t.encode("  two blanks 😀\n", add_special=False)) == "  two blanks 😀\n"
    assert t.encode("") == [1]
    assert t.decode([]) == ""


def test_prompt_with_bos_is_not_doubled() -> None:
    t = tokenizer.from_metadata(spm())
    assert t.encode_prompt("<s>[INST] a") == t.encode("[INST] a", parse_special=True)
    assert t.encode("<s>a", parse_special=True)[:2] == [1, 1]  # as llama.cpp


def test_ids_out_of_range_and_wrong_types() -> None:
    t = tokenizer.from_metadata(small())
    for i in (-1, t.n_vocab, 10**12):
        with pytest.raises(UsageError, match="not in the vocabulary"):
            t.decode([i])
    with pytest.raises(UsageError, match="takes a str"):
        t.encode(b"bytes")  # type: ignore[arg-type]


def test_lone_surrogates_become_replacement_characters() -> None:
    t = tokenizer.from_metadata(small())
    assert t.encode("a\udc80b") == t.encode("a\ufffdb")


def test_missing_byte_tokens_become_unknown() -> None:
    t = tokenizer.from_metadata(spm_keys(["<unk>", "<s>", "</s>", "▁", "a", "▁a"], [0, 0, 0, -1, -2, -3]))
    assert t.encode("a☃☃a") == [1, 5, 0, 4]
    t = tokenizer.from_metadata(spm_keys(["▁a"], [0], unknown_token_id=7, add_bos_token=False))
    assert t.unk_id == 0  # llama.cpp's default
    assert t.encode("a") == [0]


# --- metadata that do not hold together ---

BAD: list[tuple[dict[str, Any], type, str]] = [
    ({}, FormatError, "no tokenizer.ggml.model"),
    ({"tokenizer.ggml.model": "t5"}, UnsupportedError, "'t5' is not supported"),
    ({"tokenizer.ggml.model": 5}, FormatError, "should be str"),
    ({"tokenizer.ggml.model": "llama"}, FormatError, "tokens is missing"),
    (bpe_keys([], []), FormatError, "tokens is missing"),
    (bpe_keys(["a", "b", "a"], []), FormatError, "0 and 2 are the same token 'a'"),
    (bpe_keys("abc", []), FormatError, "array of strings"),  # type: ignore[arg-type]
    (bpe_keys([1, 2], []), FormatError, "should hold strings"),  # type: ignore[list-item]
    (bpe_keys(["a"], [], token_type=np.zeros(0, np.int32)), FormatError, "0 entries for 1 tokens"),
    (bpe_keys(["a"], [], token_type=np.zeros(1, np.float32)), FormatError, "array of numbers"),
    (bpe_keys(["a"], [], token_type="x"), FormatError, "array of numbers"),
    ({**bpe_keys(["a"], []), "tokenizer.ggml.merges": None}, FormatError, "needs merges"),
    (bpe_keys(["a"], [], pre="qwen3"), UnsupportedError, r"unknown pre-tokenizer 'qwen3' \(nearest known: qwen"),
    (bpe_keys(["a"], [], pre="zzzz"), UnsupportedError, "--pre-tokenizer NAME"),
    (bpe_keys(["a"], [], pre=3), FormatError, "should be str"),
    (bpe_keys(["a"], [], bos_token_id="1"), FormatError, "should be int"),
    (bpe_keys(["a"], [], add_bos_token=1), FormatError, "should be bool"),
    (bpe_keys(["a"], [], add_bos_token=True), FormatError, "no BOS token"),
    (bpe_keys(["a"], [], add_eos_token=True), FormatError, "no EOS token"),
    (spm_keys(["a", "b"], [0.0]), FormatError, "1 entries for 2 tokens"),
    (spm_keys(["a"], [np.nan]), FormatError, "token 0 is not a number"),
    ({**spm_keys(["a", "b"], [0, 0]), "tokenizer.ggml.scores": [np.zeros(1), np.zeros(2)]}, FormatError, "of numbers"),
    (bpe_keys(["a"], [], pre="z" * 10**6), UnsupportedError, "unknown pre-tokenizer"),
    ({"tokenizer.ggml.model": "z" * 10**6}, UnsupportedError, "is not supported"),
    ({**spm_keys(["a", "b", "c"], [0] * 3), "tokenizer.chat_template": 3}, FormatError, "should be a string"),
]


@pytest.mark.parametrize(("keys", "error", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_metadata(keys: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        tokenizer.from_metadata({k: v for k, v in keys.items() if v is not None}).encode("abc")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500


def test_odd_metadata_work() -> None:
    """Empty tokens, ids and types out of range, types and scores that are too long, tokens that are no Unicode."""
    types = np.array([1, 99, -5, 1, 4, 6, 1], np.int32)
    keys = bpe_keys(["a", "", "c", "\udcff", "zz", "<0xZZ>"], ["a c", "a \udcff"], token_type=types, eos_token_id=2**31)
    t = tokenizer.from_metadata(keys)
    assert t.vocabulary.tokens[1] == "[EMPTY_1]"
    assert t.encode("acazz", False) == [0, 2, 0, 4]
    assert t.piece(3) == b"\xff"
    assert t.piece(5) == b"<0xZZ>"
    assert t.eos_id is None
    keys = spm_keys(["<unk>", "<s>", "</s>", "\udcff", "▁a"], [0, np.inf, -np.inf, 1, 2, 3], add_bos_token=False)
    assert tokenizer.from_metadata(keys).encode("a") == [4]


def test_random_metadata_never_crash() -> None:
    rng = np.random.default_rng(0)
    pool = [
        "a",
        "b",
        "ab",
        "▁",
        "▁a",
        "<0x41>",
        "",
        "<s>",
        "\u0120",
        "\x00",
        "é",
        "😀",
        "▁" * 50,
        "a" * 5000,
        "<|im_end|>",
    ]
    for _ in range(150):
        tokens = [pool[i] for i in rng.permutation(len(pool))[: rng.integers(1, len(pool))]]
        merges = [f"{rng.choice(pool)} {rng.choice(pool)}" for _ in range(rng.integers(0, 6))]
        types = rng.integers(-2, 9, len(tokens)).astype(np.int32)
        ids = {f"{name}_token_id": int(rng.integers(0, 20)) for name in ("bos", "eos", "unknown", "padding")}
        scores = [float(x) for x in rng.choice([0, 1, -1e30, np.inf, -np.inf], len(tokens))]
        for keys in (
            bpe_keys(tokens, merges, token_type=types, **ids),
            spm_keys(tokens, scores, token_type=types, **ids),
        ):
            try:
                t = tokenizer.from_metadata(keys)
                for text in ("ab a", "", "é😀<s>", "\x00▁A"):
                    t.decode(t.encode(text, True, True))
            except GgufkitError as error:
                assert "\n" not in str(error)


def test_pre_override() -> None:
    keys = small() | {"tokenizer.ggml.pre": "from-the-future"}
    with pytest.raises(UnsupportedError, match="from-the-future"):
        tokenizer.from_metadata(keys)
    same = tokenizer.from_metadata(keys, pre="tekken")
    assert same.encode("Hello 123") == tokenizer.from_metadata(small()).encode("Hello 123")


def test_token_bytes() -> None:
    assert bpe.token_bytes("\u0120caf\u00c3\u00a9") == " café".encode()
    assert bpe.token_bytes("日") == "日".encode()
