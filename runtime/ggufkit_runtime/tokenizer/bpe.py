"""Byte-level BPE: the vocabulary, merges and split patterns of a GGUF file, run by `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ggufkit_formats.errors import FormatError

from . import unicode15
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import tokenizers


def byte_alphabet() -> list[str]:
    """The printable character that stands for each of the 256 bytes (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {b: chr(b) for b in printable}
    others = (b for b in range(256) if b not in alphabet)
    alphabet |= {b: chr(256 + n) for n, b in enumerate(others)}
    return [alphabet[b] for b in range(256)]


BYTE_OF = {character: byte for byte, character in enumerate(byte_alphabet())}


def token_bytes(token: str) -> bytes:
    """The bytes that a token stands for; a character outside the byte alphabet stands for itself."""
    try:
        return bytes([BYTE_OF[c] for c in token])
    except KeyError:
        parts = (bytes([BYTE_OF[c]]) if c in BYTE_OF else c.encode("utf-8", "surrogateescape") for c in token)
        return b"".join(parts)


class ByteLevelBPE:
    """Text without special tokens to ids.

    A byte without a token, and a merge whose parts or result are no tokens, get ids above the vocabulary: they
    take part in merging as in llama.cpp (so neighbours do not merge across a missing byte), and are replaced
    afterwards by what llama.cpp writes for them, the ASCII characters among them that are tokens.
    """

    def __init__(self, vocabulary: Vocabulary):
        assert vocabulary.pre is not None
        self.n_vocab = len(vocabulary.tokens)
        self.fallback: list[list[int]] = []  # ids that stand for n_vocab, n_vocab + 1, …
        index = self._extended(vocabulary)
        merges = [tuple(merge.split(" ", 1)) for merge in unique(vocabulary.merges)]
        # A merge longer than every token makes `tokenizers` panic; other unsound merges make it raise.
        sound = longest(vocabulary.merges) - 1 <= longest(index)
        try:
            engine = self._build(vocabulary, index, merges) if sound else None
        except Exception:
            engine = None
        if engine is None:  # some merge is not made of tokens: look at each of them
            merges = self._admit(vocabulary, index)
            try:
                engine = self._build(vocabulary, index, merges)
            except Exception as error:
                raise FormatError(f"the vocabulary does not make a byte-level BPE: {error}") from None
        self.engine = engine

    def _build(
        self, vocabulary: Vocabulary, index: dict[str, int], merges: list[tuple[str, ...]]
    ) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models, pre_tokenizers

        pre = vocabulary.pre
        assert pre is not None
        # Typed as it is: `merges` is a list of pairs, which the stubs of older versions do not know.
        model = models.BPE(vocab=index, merges=merges, ignore_merges=pre.ignore_merges)  # type: ignore[arg-type]
        engine = tokenizers.Tokenizer(model)
        splits = [
            pre_tokenizers.Split(tokenizers.Regex(unicode15.expand(pattern)), behavior="isolated")
            for pattern in pre.patterns
        ]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])  # type: ignore[assignment]
        return engine

    def _extended(self, vocabulary: Vocabulary) -> dict[str, int]:
        """The vocabulary, plus an id for each byte that has no token."""
        index = vocabulary.index
        missing = [c for c in BYTE_OF if c not in index]
        tokens = vocabulary.tokens
        broken = [] if is_unicode("".join(tokens)) else [t for t in tokens if not is_unicode(t)]
        if missing or broken:
            index = dict(index)
            for token in broken:  # not Unicode, so never part of a text: any other name will do
                i = index.pop(token)
                index[f"\U0010ffff{i}"] = i
            for character in missing:
                self._add(character, index)
        return index

    def _add(self, text: str, index: dict[str, int]) -> None:
        if text not in index:
            index[text] = self.n_vocab + len(self.fallback)
            characters = (c for c in text if c.isascii())
            self.fallback.append([index[c] for c in characters if index.get(c, self.n_vocab) < self.n_vocab])

    def _admit(self, vocabulary: Vocabulary, index: dict[str, int]) -> list[tuple[str, ...]]:
        """The merges that can ever apply, with ids for the texts in them that are no tokens."""
        merges = []
        for merge in unique(vocabulary.merges):
            cut = merge.find(" ", 1)
            left, right = merge[:cut], merge[cut + 1 :]
            if cut < 0 or not right or not all(c in BYTE_OF for c in left + right):
                continue
            for text in (left, right, left + right):
                self._add(text, index)
            merges.append((left, right))
        return merges

    def ids(self, text: str) -> list[int]:
        """Ids of a text, none of them special."""
        ids: list[int] = self.engine.encode(text, add_special_tokens=False).ids
        if self.fallback and max(ids, default=0) >= self.n_vocab:
            ids = [j for i in ids for j in ((i,) if i < self.n_vocab else self.fallback[i - self.n_vocab])]
        return ids


def unique(merges: Sequence[str]) -> Sequence[str]:
    """Without repetitions: the first of two equal merges counts."""
    once = dict.fromkeys(merges)
    return merges if len(once) == len(merges) else list(once)


def longest(texts: Iterable[str]) -> int:
    """The length in bytes of the longest text; lone surrogates count as what they would take."""
    try:
        return max(map(len, map(str.encode, texts)), default=0)
    except UnicodeEncodeError:
        return max((len(text.encode("utf-8", "surrogatepass")) for text in texts), default=0)


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
