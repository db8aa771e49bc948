"""From a Hugging Face tokenizer's files to `tokenizer.ggml.*`, as llama.cpp's converter writes them.

`tokenizer.model` (SentencePiece) makes the `llama` kind, and so does a `tokenizer.json` of Llama 2's sort (BPE with
byte fallback); a byte-level `tokenizer.json` makes `gpt2`. The pre-tokenizer is recognised by what stands in
`tokenizer.json` (see `recognise`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats.errors import FormatError, UnsupportedError, UsageError

from . import pretokenizers, recognise, sentencepiece_model
from .bpe import is_unicode
from .vocabulary import BYTE, CONTROL, NORMAL, PREFIX, UNKNOWN, UNUSED, USER_DEFINED

# Architectures whose converter also writes tokenizer_config.json's add_prefix_space.
LLAMA_CLASSES = {"LLaMAForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "LlamaModel"}

ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
SPACE = "▁"


@dataclass(slots=True)
class Files:
    """The JSON files of a checkpoint, empty where there is none, and where `tokenizer.model` is."""

    name: str
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    config: dict[str, Any]
    added_tokens: dict[str, Any]
    vocab: dict[str, Any]
    merges: str | None
    template: str | None
    templates: dict[str, str]
    sentencepiece: Path | None


@dataclass(slots=True)
class Words:
    """Tokens with their types, in order of id; scores for the `llama` kind, merges for `gpt2`."""

    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_prefix: bool | None = None  # where the file says so


def metadata(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    n_vocab: int | None = None,
    pre: str | None = None,
) -> dict[str, Any]:
    """The tokenizer's keys of a GGUF file: `tokenizer.ggml.*` and the chat template.

    `source`: a checkpoint's folder, one file in it, or the files. `n_vocab` (else config.json's `vocab_size`): how
    many tokens the model has; missing ones are filled up with `[PADn]`. `pre`: the pre-tokenizer's name, where it
    is not to be recognised. Values have the types that a GGUF writer needs: float32 and int32 arrays, `int` for
    ids, `bool`. FormatError for files that contradict themselves, UnsupportedError for other sorts of tokenizers.
    """
    files = read_files(source)
    if n_vocab is None:
        n_vocab = files.config.get("vocab_size")
        if n_vocab is None and isinstance(files.config.get("text_config"), dict):
            n_vocab = files.config["text_config"].get("vocab_size")
    if n_vocab is not None and (not isinstance(n_vocab, int) or not 0 < n_vocab < 1 << 31):
        raise FormatError(f"{files.name}: vocab_size is {n_vocab!r}")
    words = read_words(files, n_vocab, pre)
    for text in (*words.tokens, *(words.merges or ())):
        if not is_unicode(text):
            raise FormatError(f"{files.name}: the token or merge {text[:40]!r} is not Unicode: it has half a character")
    classes = listed(files.config.get("architectures")) or ["LlamaForCausalLM"]
    llama_class = bool(LLAMA_CLASSES & set(map(str, classes)))
    out: dict[str, Any] = {}
    prefix = files.tokenizer_config.get("add_prefix_space")
    if isinstance(prefix, bool) and llama_class:
        out[PREFIX + "add_space_prefix"] = prefix
    elif words.space_prefix is False:
        out[PREFIX + "add_space_prefix"] = False
    out[PREFIX + "model"] = words.kind
    out[PREFIX + "pre"] = words.pre
    out[PREFIX + "tokens"] = words.tokens
    if words.scores is not None:
        out[PREFIX + "scores"] = np.array(words.scores, dtype=np.float32)
    out[PREFIX + "token_type"] = np.array(words.types, dtype=np.int32)
    if words.merges is not None:
        out[PREFIX + "merges"] = words.merges
    out |= special_keys(files, len(words.tokens) if words.kind == "llama" else None)
    out |= chat_templates(files)
    if llama_class and n_vocab == 32016:  # Code Llama's fill-in-the-middle tokens
        ids = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
        out |= {f"{PREFIX}{name}_token_id": i for name, i in ids.items()}
    if llama_class and n_vocab == 49152:
        out[PREFIX + "add_bos_token"] = False
    return out


# --- files ---


def read_files(source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Files:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        paths = {p.name: p for p in folder.iterdir() if p.is_file()} if folder.is_dir() else {}
        name = str(source)
    else:
        paths = {Path(p).name: Path(p) for p in source}
        name = next((str(p.parent) for p in paths.values()), "no files")

    def read(file: str) -> str | None:
        return read_text(paths[file]) if file in paths else None

    def load(file: str) -> dict[str, Any]:
        text = read(file)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{paths[file]}: not JSON: {error}") from None
        if not isinstance(value, dict):
            raise FormatError(f"{paths[file]}: should hold a JSON object")
        return value

    template = read("chat_template.jinja")
    if template is None:
        found = load("chat_template.json").get("chat_template")
        template = found if isinstance(found, str) else None
    folder = next((p.parent for p in paths.values()), None)
    extra = sorted((folder / "additional_chat_templates").glob("*.jinja")) if folder else []
    return Files(
        name=name,
        tokenizer=load("tokenizer.json"),
        tokenizer_config=load("tokenizer_config.json"),
        config=load("config.json"),
        added_tokens=load("added_tokens.json"),
        vocab=load("vocab.json"),
        merges=read("merges.txt"),
        template=template,
        templates={p.stem: read_text(p) for p in extra},
        sentencepiece=paths.get("tokenizer.model"),
    )


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8") from None


# --- tokens ---


def read_words(files: Files, n_vocab: int | None, pre: str | None) -> Words:
    if files.sentencepiece is not None and sentencepiece_model.is_model(files.sentencepiece):
        return from_sentencepiece(files, files.sentencepiece, n_vocab)
    if files.tokenizer:
        model = part(files.tokenizer, "model", files)
        kind = model.get("type") or ("BPE" if "merges" in model else None)
        if kind != "BPE":
            raise UnsupportedError(f"{files.name}: tokenizer.json holds a {kind} tokenizer; only BPE is supported")
        if model.get("byte_fallback"):
            return from_llama_json(files, model, n_vocab)
        return from_byte_level(files, model, n_vocab, pre)
    if files.vocab and files.merges is not None:
        lines = [line for line in files.merges.splitlines() if line and not line.startswith("#version")]
        pairs = [" ".join(line.split()) for line in lines if len(line.split()) == 2]
        model = {"vocab": files.vocab, "merges": pairs}
        name = pre or recognise.by_class(files.tokenizer_config.get("tokenizer_class"))
        return from_byte_level(files, model, n_vocab, name)
    raise UsageError(f"{files.name}: no tokenizer.json, tokenizer.model or vocab.json with merges.txt")


def part(value: Mapping[str, Any], key: str, files: Files, kind: type = dict) -> Any:
    found = value.get(key)
    if not isinstance(found, kind):
        raise FormatError(f"{files.name}: tokenizer.json has no sound {key!r}")
    return found


def listed(value: Any) -> list[Any]:
    """The value where it is a list; whatever else a file may have there counts as none."""
    return value if isinstance(value, list) else []


def looks_special(token: str) -> bool:
    """Tokens that are control tokens by their looks, whatever a checkpoint says of them."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(token.startswith(a) and token.endswith(b) for a, b in ends)


def added(files: Files) -> dict[int, tuple[str, bool]]:
    """id -> (token, special) of all added tokens; tokenizer_config.json's word is the last."""
    out: dict[int, tuple[str, bool]] = {}
    entries = [(e.get("id"), e) for e in listed(files.tokenizer.get("added_tokens")) if isinstance(e, dict)]
    decoder = files.tokenizer_config.get("added_tokens_decoder") or {}
    if not files.tokenizer:
        entries += [(i, {"content": token}) for token, i in files.added_tokens.items()]
    entries += list(decoder.items()) if isinstance(decoder, dict) else []
    for i, entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        number = int(i) if isinstance(i, int) or (isinstance(i, str) and i.isdecimal() and len(i) < 10) else -1
        if number < 0 or not isinstance(content, str):
            raise FormatError(f"{files.name}: an added token without an id or content: {str(entry)[:80]}")
        out[number] = (content, bool(entry.get("special")))
    return out


def add_type(token: str, special: bool) -> tuple[str, int]:
    """An added token and its type; blanks in a user-defined token are written as such."""
    if special or looks_special(token):
        return token, CONTROL
    return token.replace(SPACE, " "), USER_DEFINED


def ids_of(vocab: Mapping[str, Any], files: Files) -> dict[int, str]:
    out: dict[int, str] = {}
    for token, i in vocab.items():
        if not isinstance(i, int) or isinstance(i, bool) or i < 0:
            raise FormatError(f"{files.name}: token {token[:40]!r} has the id {str(i)[:20]}")
        if i in out:
            raise FormatError(f"{files.name}: tokens {out[i][:40]!r} and {token[:40]!r} share the id {i}")
        out[i] = token
    return out


def lay_out(
    files: Files, base: dict[int, str], extra: dict[int, tuple[str, int]], n_vocab: int | None
) -> tuple[list[str], list[int]]:
    """Tokens and types in order of id, holes and the end filled with `[PADn]`."""
    last = max([*base, *extra], default=-1)
    count = n_vocab or last + 1
    if last >= count:
        raise FormatError(f"{files.name}: token id {last} does not fit a vocabulary of {count} tokens")
    if count > 2 * len(base) + len(extra) + (1 << 20):
        raise FormatError(f"{files.name}: {len(base)} tokens cannot fill a vocabulary of {count}")
    tokens = [base.get(i) or f"[PAD{i}]" for i in range(count)]
    types = [NORMAL if i in base else UNUSED for i in range(count)]
    for i, (token, kind) in extra.items():
        tokens[i], types[i] = token, kind
    return tokens, types


def from_byte_level(files: Files, model: Mapping[str, Any], n_vocab: int | None, pre: str | None) -> Words:
    if pre is None:
        pre = recognise.pre_tokenizer(files.tokenizer, files.name)
    pretokenizers.find(pre)
    base = ids_of(part(model, "vocab", files), files)
    extra = {i: add_type(*entry) for i, entry in added(files).items()}
    tokens, types = lay_out(files, base, extra, n_vocab)
    merges = [f"{a} {b}" for a, b in merge_pairs(files, model)]
    return Words("gpt2", pre, tokens, types, merges=merges)


def merge_pairs(files: Files, model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs, from "a b" or ["a", "b"]; a blank inside a part is written as the byte alphabet has it."""
    pairs = []
    for merge in part(model, "merges", files, list):
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise FormatError(f"{files.name}: not a merge of two tokens: {str(merge)[:60]!r}")
        pairs.append((pair[0].replace(" ", "Ġ"), pair[1].replace(" ", "Ġ")))
    return pairs


def from_llama_json(files: Files, model: Mapping[str, Any], n_vocab: int | None) -> Words:
    """The `llama` kind from a tokenizer.json with byte fallback.

    llama.cpp's converter gives every token the score -1000 here, which loses the order of merges. The scores
    written here are minus the rank of a token's first merge, so that tokenizing by scores does what the merges do.
    """
    base = ids_of(part(model, "vocab", files), files)
    special = named_special(files)
    extra = {}
    for i, (token, is_special) in added(files).items():
        control = is_special or token in special
        extra[i] = (token, CONTROL) if control else add_type(token, False)
    tokens, types = lay_out(files, base, extra, n_vocab)
    lowest = -float(len(part(model, "merges", files, list)))
    scores = dict.fromkeys(tokens, min(-1000.0, lowest))
    for rank, (left, right) in reversed(list(enumerate(merge_pairs(files, model)))):
        scores[left + right] = -float(rank)
    for i, token in enumerate(tokens):
        if types[i] == NORMAL and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            types[i] = BYTE
        elif types[i] == NORMAL and token in special:
            types[i] = CONTROL
    prefix = recognise.space_prefix(files.tokenizer, files.name)
    return Words("llama", "default", tokens, types, [scores[t] for t in tokens], space_prefix=prefix)


def named_special(files: Files) -> set[str]:
    """The texts of the tokens that tokenizer_config.json names as special."""
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    values = [files.tokenizer_config.get(name) for name in names]
    values += listed(files.tokenizer_config.get("additional_special_tokens"))
    return {text for value in values if (text := content_of(value)) is not None}


def content_of(value: Any) -> str | None:
    """The text of a special token, written as such or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def from_sentencepiece(files: Files, path: Path, n_vocab: int | None) -> Words:
    pieces = sentencepiece_model.pieces(path)
    count = n_vocab or len(pieces)
    if count > 2 * len(pieces) + (1 << 20):
        raise FormatError(f"{files.name}: {len(pieces)} tokens cannot fill a vocabulary of {count}")
    tokens = [f"[PAD{i}]" for i in range(count)]
    scores, types = [-10000.0] * count, [UNUSED] * count
    # A user-defined piece is a normal token: so llama.cpp's converter has it.
    kinds = {UNKNOWN: UNKNOWN, CONTROL: CONTROL, UNUSED: UNUSED, BYTE: BYTE}
    for i, (piece, score, kind) in enumerate(pieces[:count]):
        tokens[i], scores[i], types[i] = piece, score, kinds.get(kind, NORMAL)
    for token, i in files.added_tokens.items():
        if isinstance(i, int) and 0 <= i < count:
            tokens[i], scores[i], types[i] = token, -1000.0, USER_DEFINED
    decoder = files.tokenizer_config.get("added_tokens_decoder") or {}
    for i, entry in decoder.items() if isinstance(decoder, dict) else ():
        content = content_of(entry) if isinstance(entry, dict) else None
        if not i.isdecimal() or len(i) > 9 or content is None:
            raise FormatError(f"{files.name}: added_tokens_decoder: {i[:40]!r} is not a sound entry")
        if int(i) < count:
            token, kind = add_type(content, bool(entry.get("special")))
            tokens[int(i)], scores[int(i)], types[int(i)] = token, -1000.0, kind
    return Words("llama", "default", tokens, types, scores)


# --- special ids, BOS and EOS, templates ---


def special_keys(files: Files, limit: int | None) -> dict[str, Any]:
    """Ids of special tokens, and whether BOS, EOS and SEP are added. `limit`: ids must be below it."""
    config = dict(files.tokenizer_config)
    adds: dict[str, bool] = {}
    types = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"]
    if files.tokenizer:
        recognise.post_processor(files.tokenizer.get("post_processor"), config, adds, types)
    entries = [e for e in listed(files.tokenizer.get("added_tokens")) if isinstance(e, dict)]
    ids: dict[str, int] = {}

    def put(name: str, i: Any) -> None:
        if isinstance(i, int) and not isinstance(i, bool) and name not in ids and (limit is None or i < limit):
            if i < 0:
                raise FormatError(f"{files.name}: the id of the {name} token is {i}")
            ids[name] = i

    if config:
        for name in types:
            if isinstance(config.get(f"add_{name}_token"), bool):
                adds.setdefault(name, config[f"add_{name}_token"])
            text = content_of(config.get(f"{name}_token"))
            if text is not None:
                put(name, next((e.get("id") for e in entries if e.get("content") == text), None))
    nested = files.config.get("text_config")
    for name in types:
        i = files.config.get(f"{name}_token_id")
        if i is None and isinstance(nested, dict):
            i = nested.get(f"{name}_token_id")
        put(name, i)
    out: dict[str, Any] = {PREFIX + ID_KEYS[name]: i for name, i in ids.items()}
    return out | {f"{PREFIX}add_{name}_token": on for name, on in adds.items() if name in ("bos", "eos", "sep")}


def chat_templates(files: Files) -> dict[str, Any]:
    """`tokenizer.chat_template`, and `tokenizer.chat_template.NAME` where there are several."""
    if not files.tokenizer_config:
        return {}
    value: Any = files.tokenizer_config.get("chat_template")
    if value is None:
        value = files.template
        if value is not None and files.templates:
            value = [{"name": "default", "template": value}]
            value += [{"name": name, "template": text} for name, text in files.templates.items()]
    if isinstance(value, str):
        return {"tokenizer.chat_template": value}
    out: dict[str, Any] = {}
    names = []
    for choice in value if isinstance(value, list) else []:
        if not isinstance(choice, dict) or not isinstance(choice.get("template"), str):
            continue
        name = re.sub(r"[^A-Za-z0-9]", "_", str(choice.get("name", "")))
        if name == "default":
            out["tokenizer.chat_template"] = choice["template"]
        elif name:
            names.append(name)
            out[f"tokenizer.chat_template.{name}"] = choice["template"]
    if names:
        out["tokenizer.chat_templates"] = names
    return out
