"""A tokenizer built from a GGUF file's metadata: text to ids and back, as llama.cpp does it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from ggufkit_formats.errors import UsageError

from . import bpe, spm, template
from .vocabulary import (
    IS_BYTE,
    IS_CONTROL,
    IS_NORMAL,
    IS_UNKNOWN,
    IS_USER_DEFINED,
    LSTRIP,
    RSTRIP,
    Vocabulary,
    parse,
)

BLANKS = " \t\n\v\f\r"


def from_metadata(metadata: Mapping[str, Any], pre: str | None = None) -> Tokenizer:
    """The tokenizer described by `tokenizer.ggml.*` in a GGUF file's metadata, with or without weights beside it.

    `pre` overrides the name of the pre-tokenizer (`tokenizer.ggml.pre`). FormatError where the metadata do not
    make a tokenizer, UnsupportedError for kinds and pre-tokenizers that ggufkit has not.
    """
    return Tokenizer(parse(metadata, pre))


class Tokenizer:
    """Ids, special tokens and chat template of one model. Heavy parts are built at the first `encode`."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.n_vocab = len(vocabulary.tokens)
        self.kind = vocabulary.kind
        self.bos_id = vocabulary.ids["bos"]
        self.eos_id = vocabulary.ids["eos"]
        self.eot_id = vocabulary.ids["eot"]
        self.unk_id = vocabulary.ids["unk"]
        self.pad_id = vocabulary.ids["pad"]
        self.eog_ids = vocabulary.eog
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.chat_template = vocabulary.chat_template

    # --- text to ids ---

    @cached_property
    def _engine(self) -> bpe.ByteLevelBPE | spm.SentencePieceBPE:
        v = self.vocabulary
        return spm.SentencePieceBPE(v) if v.kind == "llama" else bpe.ByteLevelBPE(v)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`, as `llama_tokenize` gives them.

        `add_special`: BOS before and EOS after, where the model wants them. `parse_special`: control tokens
        written in the text become those tokens; without it they are text (user-defined tokens are always found).
        """
        if not isinstance(text, str):
            raise UsageError(f"encode takes a str, not {type(text).__name__}")
        if not bpe.is_unicode(text):  # lone surrogates, as from undecodable arguments
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        engine, after_special = self._engine, True
        for part in self._parts(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if after_special and self.kind == "llama" and self.vocabulary.add_space_prefix:
                part = " " + part
            ids.extend(engine.ids(part))
            after_special = False
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a rendered chat template: special tokens are parsed, and BOS and EOS are not doubled.

        As in llama.cpp, a BOS that the template wrote is dropped where the model adds one anyway.
        """
        if self.add_bos and self.bos_id is not None:
            prompt = prompt.removeprefix(self._text(self.bos_id))
        if self.add_eos and self.eos_id is not None:
            prompt = prompt.removesuffix(self._text(self.eos_id))
        return self.encode(prompt, add_special=True, parse_special=True)

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.vocabulary.tokens[token]

    @cached_property
    def _special(self) -> list[tuple[str, int, int]]:
        v = self.vocabulary
        return [(v.tokens[i], i, int(v.attributes[i])) for i in v.special]

    def _parts(self, text: str, parse_special: bool) -> list[str | int]:
        """`text` cut at its special tokens, the longest first: pieces of text and ids."""
        parts: list[str | int] = [text] if text else []
        for token, i, attributes in self._special:
            if token not in text or (not parse_special and attributes & (IS_CONTROL | IS_UNKNOWN)):
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int) or token not in part:
                    cut.append(part)
                else:
                    cut.extend(self._cut(part, token, i, attributes))
            parts = cut
        return parts

    @staticmethod
    def _cut(text: str, token: str, i: int, attributes: int) -> Iterable[str | int]:
        pieces = text.split(token)
        for k, piece in enumerate(pieces):
            if attributes & RSTRIP and k > 0:
                piece = piece.lstrip(BLANKS)
            if attributes & LSTRIP and k < len(pieces) - 1:
                piece = piece.rstrip(BLANKS)
            if piece:
                yield piece
            if k < len(pieces) - 1:
                yield i

    # --- ids to text ---

    def piece(self, token: int, special: bool = True) -> bytes:
        """What a token prints: UTF-8, not always whole characters. `special=False`: control tokens print nothing."""
        if not 0 <= token < self.n_vocab:
            raise UsageError(f"token id {token} is not in the vocabulary of {self.n_vocab} tokens")
        text, bits = self.vocabulary.tokens[token], int(self.vocabulary.attributes[token])
        if bits & (IS_CONTROL | IS_UNKNOWN):
            return text.encode("utf-8", "surrogateescape") if special else b""
        if bits & IS_USER_DEFINED:
            return text.encode("utf-8", "surrogateescape")
        if bits & IS_NORMAL:
            if self.kind == "gpt2":
                return bpe.token_bytes(text)
            return text.replace(spm.SPACE, " ").encode("utf-8", "surrogateescape")
        if bits & IS_BYTE:
            found = re.match(r"<0x([0-9A-Fa-f]{2})>", text)
            return bytes([int(found.group(1), 16)]) if found else text.encode("utf-8", "surrogateescape")
        return b""  # unused and undefined tokens

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`, as `llama_detokenize` gives it; bytes that are no UTF-8 become U+FFFD.

        The blank that SentencePiece puts before a text is dropped again; `skip_special` leaves control tokens out
        (and then looks for that blank behind them).
        """
        pieces = [self.piece(int(i), special=not skip_special) for i in ids]
        if self.vocabulary.add_space_prefix:
            first = next((k for k, p in enumerate(pieces) if p), 0) if skip_special else 0
            if pieces and pieces[first].startswith(b" "):
                pieces[first] = pieces[first][1:]
        raw = b"".join(pieces)
        return (clean_spaces(raw) if self.vocabulary.clean_spaces else raw).decode("utf-8", "replace")

    def stream(self, skip_special: bool = True) -> Stream:
        """Decoding one token at a time, for text that is shown while it is made."""
        return Stream(self, skip_special)

    # --- chat ---

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation, written by the model's chat template (or by `chat_template`).

        `messages`: mappings with "role" and "content". `variables` reach the template (`tools=…`). The template
        runs in Jinja's sandbox with bounded time and output; GgufkitError where it fails.
        """
        source = chat_template or self.chat_template
        if source is None:
            raise UsageError("the model has no chat template")
        ids = self.vocabulary.ids
        names = ("bos", "eos", "unk", "pad", "sep", "mask")
        tokens = {f"{name}_token": self._text(ids[name]) for name in names if ids[name] is not None}
        given = {"bos_token": "", "eos_token": "", "tools": None, "documents": None} | tokens | variables
        return template.render(source, messages=messages, add_generation_prompt=add_generation_prompt, **given)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a conversation: `apply_chat_template`, then `encode_prompt`."""
        return self.encode_prompt(self.apply_chat_template(messages, add_generation_prompt, **variables))


class Stream:
    """Text of tokens as they come: bytes of an unfinished character wait for the rest of it."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that has become complete with `token`, often empty or a word."""
        return self._decoder.decode(self._tokenizer.piece(token, special=not self._skip_special))

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became whole."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def clean_spaces(text: bytes) -> bytes:
    """llama.cpp's clean-up after some byte-level vocabularies: " ." to ".", " 's" to "'s", and their like."""
    text = re.sub(rb" (?=[?!.,])", b"", text)
    text = re.sub(rb" ' ", b"'", text)
    return re.sub(rb" (?='(?:s|m|re|ve))", b"", text)
