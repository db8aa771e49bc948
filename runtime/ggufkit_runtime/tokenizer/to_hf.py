"""From the vocabulary of a GGUF file to a Hugging Face tokenizer's files: the way back of `hf`.

`tokenizer.json` is what the `tokenizers` library and transformers read; a vocabulary of SentencePiece's kind also makes
a `tokenizer.model`, which keeps its scores. `tokenizer_config.json` names the special tokens and has the chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ggufkit_formats.errors import UnsupportedError

from . import recognise, sentencepiece_model
from .bpe import is_unicode
from .hf import ID_KEYS, SPACE
from .vocabulary import CONTROL, NORMAL, PREFIX, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary, numbers, parse

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # tokenizer_config.json: bos_token …


def files(metadata: Mapping[str, Any], n_ctx: int | None = None) -> dict[str, bytes]:
    """File name -> content. `n_ctx` becomes `model_max_length`.

    UnsupportedError for a tokenizer that ggufkit has not, and for tokens that are not Unicode, FormatError where the
    metadata do not hold together.
    """
    v = parse(metadata)
    types = token_types(metadata, v)
    for i, token in enumerate(v.tokens):
        if not is_unicode(token):
            raise UnsupportedError(f"token {i} is not Unicode: tokenizer.json cannot hold it")
    ids = special_ids(metadata, v, types)
    make = {"llama": llama_json, "gpt2": byte_level_json}[v.kind]
    found = {"tokenizer.json": make(v, types, ids), "tokenizer_config.json": config(metadata, v, types, ids, n_ctx)}
    out = {name: json.dumps(value, ensure_ascii=False, indent=2).encode() for name, value in found.items()}
    if v.kind == "llama":
        assert v.scores is not None
        model = sentencepiece_model.serialized(v.tokens, v.scores.tolist(), types, ids, v.add_space_prefix)
        out |= {} if model is None else {"tokenizer.model": model}
    return out


def token_types(metadata: Mapping[str, Any], v: Vocabulary) -> list[int]:
    """The types as the file has them; llama.cpp makes some more tokens special, for itself."""
    types = numbers(metadata, "token_type", len(v.tokens), "iu")
    return [NORMAL] * len(v.tokens) if types is None else [int(t) if 0 <= t <= 6 else NORMAL for t in types]


def special_ids(metadata: Mapping[str, Any], v: Vocabulary, types: list[int]) -> dict[str, int]:
    """The special tokens that the file names, and those that its kind takes for granted where they look like it."""
    out = {}
    for name in NAMES:
        i = v.ids.get(name)
        said = metadata.get(PREFIX + ID_KEYS[name]) is not None
        if i is not None and (said or (v.kind == "llama" and types[i] in (CONTROL, UNKNOWN))):
            out[name] = i
    return out


# -- tokenizer.json ----------------------------------------------------------------------------------


def llama_json(v: Vocabulary, types: list[int], ids: Mapping[str, int]) -> dict[str, Any]:
    """BPE with byte fallback, a blank as ▁: merges in the order of the scores."""
    steps: list[dict[str, Any]] = [{"type": "Prepend", "prepend": SPACE}] if v.add_space_prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
    ]  # fmt: skip
    if v.add_space_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    assert v.scores is not None
    model = bpe_model(v, types, merges_by_score(v.index, v.scores)) | {
        "unk_token": v.tokens[ids["unk"]] if "unk" in ids else None,
        "fuse_unk": True,
        "byte_fallback": all(f"<0x{b:02X}>" in v.index for b in range(256)),
    }
    return whole(v, types, ids) | {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def merges_by_score(index: Mapping[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the one of the highest score first; of equal ones, that of the lower ids.

    SentencePiece merges the pair whose token has the highest score, the leftmost of several.
    """
    found = []
    for token, i in index.items():
        for k in range(1, len(token)):
            left, right = index.get(token[:k]), index.get(token[k:])
            if left is not None and right is not None:
                found.append((-float(scores[i]), i, left, right, token[:k], token[k:]))
    found.sort()
    return [(left, right) for *_, left, right in found]


def byte_level_json(v: Vocabulary, types: list[int], ids: Mapping[str, int]) -> dict[str, Any]:
    """Byte-level BPE: the merges of the file, as far as they are made of tokens."""
    assert v.pre is not None
    merges = []
    for merge in dict.fromkeys(v.merges):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut > 0 and left in v.index and right in v.index and left + right in v.index:
            merges.append((left, right))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    out = whole(v, types, ids)
    own = out["post_processor"]
    both = {"type": "Sequence", "processors": [byte_level, own]}
    return out | {
        "pre_tokenizer": recognise.written(v.pre),
        "post_processor": byte_level if own is None else both,
        "decoder": byte_level,
        "model": bpe_model(v, types, merges) | {"ignore_merges": v.pre.ignore_merges},
    }


def whole(v: Vocabulary, types: list[int], ids: Mapping[str, int]) -> dict[str, Any]:
    """What the two kinds have in common; special tokens, BOS and EOS among it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": special[kind]}
            for i, (token, kind) in enumerate(zip(v.tokens, types, strict=True))
            if kind in special
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": template(v, ids),
    }


def template(v: Vocabulary, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """BOS before and EOS behind each text, where the model wants them."""
    names = [name for name, adds in (("bos", v.add_bos), ("eos", v.add_eos)) if adds]
    used = {name: v.ids[name] for name in names}
    if not used:
        return None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        for name, i in used.items():
            token = {"SpecialToken": {"id": v.tokens[i or 0], "type_id": type_id}}
            parts = [token, *parts] if name == "bos" else [*parts, token]
        return parts

    tokens = {
        v.tokens[i or 0]: {"id": v.tokens[i or 0], "ids": [i], "tokens": [v.tokens[i or 0]]} for i in used.values()
    }
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1),
            "special_tokens": tokens}  # fmt: skip


def bpe_model(v: Vocabulary, types: list[int], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The model without what its kind sets. Tokens that fill the vocabulary up are left out."""
    vocab = {
        token: i for i, token in enumerate(v.tokens) if not (types[i] == UNUSED and re.fullmatch(r"\[PAD\d+\]", token))
    }
    blanks = any(" " in left or " " in right for left, right in merges)  # then older libraries cannot read them
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
        "merges": [list(merge) if blanks else " ".join(merge) for merge in merges],
    }  # fmt: skip


# -- tokenizer_config.json ---------------------------------------------------------------------------


def config(metadata: Mapping[str, Any], v: Vocabulary, types: list[int], ids: Mapping[str, int],
           n_ctx: int | None) -> dict[str, Any]:  # fmt: skip
    out: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if v.kind == "llama" and not v.add_space_prefix:
        out["add_prefix_space"] = False
    out |= {"add_bos_token": v.add_bos, "add_eos_token": v.add_eos}
    out |= {f"{name}_token": v.tokens[i] for name, i in ids.items()}
    if v.kind == "llama":  # what tokenizer.model does not tell from others: user-defined tokens, and blanks in tokens
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        out["added_tokens_decoder"] = {
            str(i): {"content": v.tokens[i], **flags, "special": kind == CONTROL}
            for i, kind in enumerate(types)
            if kind == USER_DEFINED or (kind == CONTROL and " " in v.tokens[i])
        }
    templates = chat_templates(metadata, v)
    if templates is not None:
        out["chat_template"] = templates
    out["clean_up_tokenization_spaces"] = v.clean_spaces
    return out | ({"model_max_length": n_ctx} if n_ctx else {})


def chat_templates(metadata: Mapping[str, Any], v: Vocabulary) -> str | list[dict[str, str]] | None:
    """The chat template, or a list where the file has several."""
    names = metadata.get("tokenizer.chat_templates")
    names = names if isinstance(names, Sequence) and not isinstance(names, str) else ()
    more = [(str(name), metadata.get(f"tokenizer.chat_template.{name}")) for name in names]
    found = [{"name": name, "template": text} for name, text in more if isinstance(text, str)]
    if not found:
        return v.chat_template
    first = [{"name": "default", "template": v.chat_template}] if v.chat_template else []
    return [*first, *found]
