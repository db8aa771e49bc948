"""The vocabulary of a GGUF file: `tokenizer.ggml.*` checked once, with llama.cpp's defaults filled in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from ggufkit_formats.errors import FormatError, UnsupportedError
from ggufkit_formats.gguf_strings import StringArray, quote, walk

from . import pretokenizers

PREFIX = "tokenizer.ggml."

# Values of tokenizer.ggml.token_type.
UNDEFINED, NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(7)

# The same as bits, since llama.cpp makes some tokens control tokens on top of what they are.
IS_UNKNOWN, IS_UNUSED, IS_NORMAL, IS_CONTROL, IS_USER_DEFINED, IS_BYTE = (1 << n for n in range(6))
LSTRIP, RSTRIP = 1 << 7, 1 << 8
ATTRIBUTES = np.array([0, IS_NORMAL, IS_UNKNOWN, IS_CONTROL, IS_USER_DEFINED, IS_UNUSED, IS_BYTE], dtype=np.int16)

# Tokens that llama.cpp knows by their text: the end of a turn, of a message, and fill-in-the-middle marks.
EOT_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
EOG_TEXTS = (
    *EOT_TEXTS,
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<|eom_id|>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
)
FIM_TEXTS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

# Keys of the special ids. The later of two keys with one name wins, where both are there.
ID_KEYS = (
    ("bos", "bos_token_id"),
    ("eos", "eos_token_id"),
    ("eot", "eot_token_id"),
    ("eom", "eom_token_id"),
    ("unk", "unknown_token_id"),
    ("sep", "seperator_token_id"),
    ("pad", "padding_token_id"),
    ("mask", "mask_token_id"),
    ("fim_pre", "fim_pre_token_id"),
    ("fim_suf", "fim_suf_token_id"),
    ("fim_mid", "fim_mid_token_id"),
    ("fim_pad", "fim_pad_token_id"),
    ("fim_rep", "fim_rep_token_id"),
    ("fim_sep", "fim_sep_token_id"),
    ("fim_pre", "prefix_token_id"),
    ("fim_suf", "suffix_token_id"),
    ("fim_mid", "middle_token_id"),
)


@dataclass(slots=True)
class Vocabulary:
    """What a tokenizer needs to know, every id in range, every array `n_vocab` long."""

    kind: str  # "llama" (SentencePiece) or "gpt2" (byte-level BPE)
    pre_name: str  # as written in the file, or as overridden
    pre: pretokenizers.PreTokenizer | None  # None for SentencePiece
    tokens: list[str]
    index: dict[str, int]  # token -> id
    attributes: np.ndarray  # int16 (n_vocab,): IS_… bits
    scores: np.ndarray | None  # float32 (n_vocab,), SentencePiece only
    merges: Sequence[str]  # byte-level BPE only
    ids: dict[str, int | None]  # "bos", "eos", … as in ID_KEYS
    eog: frozenset[int] = frozenset()
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    clean_spaces: bool = False
    chat_template: str | None = None
    special: list[int] = field(default_factory=list)  # tokens cut out of a text first, longest first


def parse(metadata: Mapping[str, Any], pre: str | None = None) -> Vocabulary:
    """The vocabulary in a GGUF's metadata. `pre` overrides `tokenizer.ggml.pre`.

    FormatError where the metadata contradict themselves, UnsupportedError for tokenizers that ggufkit has not.
    """
    kind = get(metadata, "model", str)
    if kind is None:
        raise FormatError("no tokenizer: the metadata have no tokenizer.ggml.model")
    if kind not in ("llama", "gpt2"):
        raise UnsupportedError(f"tokenizer.ggml.model {quote(kind)} is not supported (known: llama, gpt2)")
    pre_name = pre if pre is not None else get(metadata, "pre", str, "")
    tokens = read_tokens(metadata)
    vocabulary = Vocabulary(
        kind=kind,
        pre_name=pre_name,
        pre=pretokenizers.find(pre_name) if kind == "gpt2" else None,
        tokens=tokens,
        index=make_index(tokens),
        attributes=read_attributes(metadata, len(tokens)),
        scores=read_scores(metadata, len(tokens)) if kind == "llama" else None,
        merges=read_merges(metadata) if kind == "gpt2" else (),
        ids={},
    )
    set_defaults(vocabulary, metadata)
    read_ids(vocabulary, metadata)
    find_by_text(vocabulary)
    find_eog(vocabulary)
    find_special(vocabulary, metadata)
    if vocabulary.add_bos and vocabulary.ids["bos"] is None:
        raise FormatError("tokenizer.ggml.add_bos_token is true, but the vocabulary has no BOS token")
    if vocabulary.add_eos and vocabulary.ids["eos"] is None:
        raise FormatError("tokenizer.ggml.add_eos_token is true, but the vocabulary has no EOS token")
    return vocabulary


def get(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """The value of `tokenizer.ggml.<key>`, which must be a `kind` where it is there."""
    value = metadata.get(PREFIX + key)
    if value is None:
        return default
    known = {bool: (bool, np.bool_), int: (int, np.integer), str: (str,)}[kind]
    if not isinstance(value, known) or (kind is int and isinstance(value, bool)):
        shown = type(value).__name__
        raise FormatError(f"{PREFIX}{key} should be {kind.__name__}, but is {shown}")
    return kind(value)


def read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = strings(metadata, "tokens")
    if not tokens:
        raise FormatError(f"{PREFIX}tokens is missing or empty: the file holds no vocabulary")
    if "" in tokens:  # llama.cpp's name for them
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    return tokens


def strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(PREFIX + key)
    if value is None:
        return []
    if isinstance(value, str | bytes | np.ndarray) or not isinstance(value, Iterable):
        raise FormatError(f"{PREFIX}{key} should be an array of strings, but is {type(value).__name__}")
    out = decode_all(value) if isinstance(value, StringArray) else list(value)
    for item in out[:1] + out[-1:]:
        if not isinstance(item, str):
            raise FormatError(f"{PREFIX}{key} should hold strings, but holds {type(item).__name__}")
    return out


def decode_all(array: StringArray) -> list[str]:
    """All items at once, several times as fast as one by one; bytes that are no UTF-8 become lone surrogates."""
    blob, n = array.encoded(), len(array)
    starts = np.empty(n, dtype=np.int64)
    walk(memoryview(blob), 0, n, "<", starts)
    ends = np.append(starts[1:], len(blob))
    # The strings without their lengths are one text, cut where each begins, unless one begins amid a character
    raw = np.frombuffer(blob, np.uint8)
    letters = np.ones(len(raw), bool)
    letters[(starts[:, None] + np.arange(8)).reshape(-1)] = False
    raw = raw[letters]
    cuts = np.append(0, np.cumsum(ends - starts - 8))
    begins = raw & 0xC0 != 0x80  # a character
    try:
        text = raw.tobytes().decode()
        if not begins[cuts[:-1][cuts[:-1] < cuts[1:]]].all():
            raise ValueError
    except ValueError:
        items = [blob[start:end] for start, end in zip((starts + 8).tolist(), ends.tolist(), strict=True)]
        return [item.decode("utf-8", "surrogateescape") for item in items]
    index = np.int32 if len(raw) < 1 << 31 else np.int64  # new memory is what this costs
    at = np.append(index(0), np.cumsum(begins, dtype=index))[cuts].tolist()
    return [text[start:end] for start, end in pairwise(at)]


def make_index(tokens: list[str]) -> dict[str, int]:
    index = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(index) != len(tokens):
        seen: dict[str, int] = {}
        for i, token in enumerate(tokens):
            if seen.setdefault(token, i) != i:
                raise FormatError(f"{PREFIX}tokens: {seen[token]} and {i} are the same token {token[:40]!r}")
    return index


def numbers(metadata: Mapping[str, Any], key: str, n: int, kinds: str) -> np.ndarray | None:
    value = metadata.get(PREFIX + key)
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # arrays of different lengths in an array
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise FormatError(f"{PREFIX}{key} should be an array of numbers, but is {type(value).__name__}")
    if len(array) < n:
        raise FormatError(f"{PREFIX}{key} has {len(array)} entries for {n} tokens")
    return array[:n]


def read_attributes(metadata: Mapping[str, Any], n: int) -> np.ndarray:
    types = numbers(metadata, "token_type", n, "iu")
    if types is None:
        return np.full(n, IS_NORMAL, dtype=np.int16)
    known = (types >= 0) & (types < len(ATTRIBUTES))
    return ATTRIBUTES[np.where(known, types, UNDEFINED).astype(np.intp)]


def read_scores(metadata: Mapping[str, Any], n: int) -> np.ndarray:
    scores = numbers(metadata, "scores", n, "fiu")
    if scores is None:
        return np.zeros(n, dtype=np.float32)
    with np.errstate(over="ignore"):
        scores = scores.astype(np.float32)
    if np.isnan(scores).any():
        raise FormatError(f"{PREFIX}scores: the score of token {int(np.isnan(scores).argmax())} is not a number")
    return scores


def read_merges(metadata: Mapping[str, Any]) -> Sequence[str]:
    if metadata.get(PREFIX + "merges") is None:
        raise FormatError(f"{PREFIX}merges is missing: byte-level BPE needs merges")
    return strings(metadata, "merges")


def set_defaults(v: Vocabulary, metadata: Mapping[str, Any]) -> None:
    """What llama.cpp assumes for the kind and the pre-tokenizer, then what the file says."""
    if v.pre is None:
        v.add_space_prefix, v.add_bos, v.clean_spaces = True, True, False
        v.ids = {"bos": 1, "eos": 2, "unk": 0}
    else:
        v.add_space_prefix, v.add_bos, v.clean_spaces = False, v.pre.add_bos, v.pre.clean_spaces
        v.ids = {"bos": None if v.pre.no_bos else 11, "eos": 11, "unk": None}
    v.add_space_prefix = get(metadata, "add_space_prefix", bool, v.add_space_prefix)
    v.add_bos = get(metadata, "add_bos_token", bool, v.add_bos)
    v.add_eos = get(metadata, "add_eos_token", bool, v.add_eos)
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise FormatError(f"tokenizer.chat_template should be a string, but is {type(template).__name__}")
    v.chat_template = template or None


def read_ids(v: Vocabulary, metadata: Mapping[str, Any]) -> None:
    """Special ids: a default or a value outside of the vocabulary does not count, as in llama.cpp."""
    n = len(v.tokens)
    for name, key in ID_KEYS:
        default = v.ids.get(name)
        if default is not None and default >= n:
            default = None
        value = get(metadata, key, int)
        v.ids[name] = value if value is not None and 0 <= value < n else default


def find_by_text(v: Vocabulary) -> None:
    """Marks that the file does not name are found by their text, and become control tokens."""
    marks = {"eot": EOT_TEXTS, "eom": ("<|eom_id|>",)} | {k: t.split() for k, t in FIM_TEXTS.items()}
    for name, texts in marks.items():
        if v.ids[name] is None:
            found = next((v.index[text] for text in texts if text in v.index), None)
            if found is not None:
                v.ids[name] = found
                v.attributes[found] |= IS_CONTROL


def find_eog(v: Vocabulary) -> None:
    """The tokens that end a generation."""
    for i in np.flatnonzero(v.attributes & IS_CONTROL):
        if "unused" in v.tokens[i]:
            v.attributes[i] |= IS_UNUSED
    eog = {v.ids[name] for name in ("fim_pad", "fim_rep", "fim_sep")}
    for text in EOG_TEXTS:
        if text in v.index:
            eog.add(v.index[text])
            v.attributes[v.index[text]] |= IS_CONTROL
    for text in ALWAYS_SHOWN:
        if text in v.index:
            v.attributes[v.index[text]] = IS_USER_DEFINED
    eog |= {v.ids[name] for name in ("eos", "eot", "eom")}
    eog.discard(None)

    def has(text: str) -> bool:
        return v.index.get(text) in eog

    # Two families use a common end mark for something else.
    call = has("<|call|>") or has("<|calls|>")
    if has("<|end|>") and call and (has("<|return|>") or has("<|flush|>")):
        eog.discard(v.index["<|end|>"])
        v.attributes[v.index["<|end|>"]] = IS_USER_DEFINED
    if has("</s>") and (has("<|tool_response>") or has("<|plamo:eos|>")):
        eog.discard(v.index["</s>"])
        v.attributes[v.index["</s>"]] = IS_NORMAL
    v.eog = frozenset(i for i in eog if i is not None)


def find_special(v: Vocabulary, metadata: Mapping[str, Any]) -> None:
    """The tokens that are cut out of a text before anything else, longest first; who eats blanks beside it."""
    special = np.flatnonzero(v.attributes & (IS_CONTROL | IS_USER_DEFINED | IS_UNKNOWN)).tolist()
    v.special = sorted(special, key=lambda i: -len(v.tokens[i].encode("utf-8", "surrogateescape")))
    name = metadata.get("general.name")
    name = name.lower() if isinstance(name, str) else ""
    strips: dict[str, int] = {}
    if any(text in v.pre_name for text in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        strips["<mask>"] = LSTRIP
    elif "phi-3" in name or "phi3" in name:
        keep = {v.index.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
        strips = {v.tokens[i]: RSTRIP for i in v.special if i not in keep} | {"</s>": RSTRIP}
    elif "modern-bert" in name:
        strips["[MASK]"] = LSTRIP
    for text, bit in strips.items():
        if text in v.index:
            v.attributes[v.index[text]] |= bit
