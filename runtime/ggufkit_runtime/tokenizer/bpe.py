"""Byte-level BPE: the vocabulary, merges and split patterns of a GGUF file, run by `tokenizers`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
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


SHORT = 4096  # characters of a text, and
WORD = 128  # of a word, that are merged in Python


class ByteLevelBPE:
    """Text without special tokens to ids.

    A byte without a token, and a merge whose parts or result are no tokens, get ids above the vocabulary: they
    take part in merging as in llama.cpp (so neighbours do not merge across a missing byte), and are replaced
    afterwards by what llama.cpp writes for them, the ASCII characters among them that are tokens.

    `tokenizers` takes 0.1 s to digest a vocabulary of 50,000, more than all else before a short prompt is answered.
    So it splits texts into words, which needs no vocabulary, and the words of a short text are merged here.
    """

    def __init__(self, vocabulary: Vocabulary):
        import tokenizers
        from tokenizers import pre_tokenizers

        assert vocabulary.pre is not None
        self.vocabulary = vocabulary
        self.n_vocab = len(vocabulary.tokens)
        self.fallback: list[list[int]] = []  # ids that stand for n_vocab, n_vocab + 1, …
        splits = [
            pre_tokenizers.Split(tokenizers.Regex(unicode15.expand(pattern)), behavior="isolated")
            for pattern in vocabulary.pre.patterns
        ]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.splitter = pre_tokenizers.Sequence([*splits, to_bytes])

    def ids(self, text: str) -> list[int]:
        """Ids of a text, none of them special."""
        found = self._short(text) if len(text) <= SHORT and "engine" not in self.__dict__ else None
        if found is not None:
            return found
        ids: list[int] = self.engine.encode(text, add_special_tokens=False).ids
        if self.fallback and max(ids, default=0) >= self.n_vocab:
            ids = [j for i in ids for j in ((i,) if i < self.n_vocab else self.fallback[i - self.n_vocab])]
        return ids

    # --- a short text ---

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The place of each merge, "left right"; the first of two equal ones counts."""
        merges = self.vocabulary.merges
        return dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))

    def _short(self, text: str) -> list[int] | None:
        """The ids, or None where the engine has to look: a long word, or a merge that is not made of tokens."""
        assert self.vocabulary.pre is not None
        whole, index, ids = self.vocabulary.pre.ignore_merges, self.vocabulary.index, []
        for word, _ in self.splitter.pre_tokenize_str(text):
            if whole and word in index:
                ids.append(index[word])
                continue
            parts = self._merged(word) if len(word) <= WORD else None
            if parts is None:
                return None
            ids += [index[part] for part in parts if part in index]  # a byte without a token gives none
        return ids

    def _merged(self, word: str) -> list[str] | None:
        """A word's tokens: of all neighbours that a merge joins, the merge of the lowest rank, the leftmost, again."""
        ranks, index, parts, last = self.ranks, self.vocabulary.index, list(word), len(self.ranks)
        while len(parts) > 1:
            found = [ranks.get(f"{left} {right}", last) for left, right in pairwise(parts)]
            best = min(found)
            if best == last:
                break
            at = found.index(best)
            joined = parts[at] + parts[at + 1]
            if not (parts[at] in index and parts[at + 1] in index and joined in index):
                return None
            parts[at : at + 2] = [joined]
        return parts

    # --- any text ---

    @cached_property
    def engine(self) -> tokenizers.Tokenizer:
        """What merges the words of a long text."""
        vocabulary = self.vocabulary
        index = self._extended(vocabulary)
        merges = [tuple(merge.split(" ", 1)) for merge in unique(vocabulary.merges)]
        # A merge longer than every token makes `tokenizers` panic; other unsound merges make it raise.
        if longest(vocabulary.merges) - 1 <= longest(index):
            with contextlib.suppress(Exception):
                return self._build(index, merges)
        merges = self._admit(vocabulary, index)  # some merge is not made of tokens: look at each of them
        try:
            return self._build(index, merges)
        except Exception as error:
            raise FormatError(f"the vocabulary does not make a byte-level BPE: {error}") from None

    def _build(self, index: dict[str, int], merges: list[tuple[str, ...]]) -> tokenizers.Tokenizer:
        import tokenizers
        from tokenizers import models

        pre = self.vocabulary.pre
        assert pre is not None
        # Typed as it is: `merges` is a list of pairs, which the stubs of older versions do not know.
        model = models.BPE(vocab=index, merges=merges, ignore_merges=pre.ignore_merges)  # type: ignore[arg-type]
        engine = tokenizers.Tokenizer(model)
        engine.pre_tokenizer = self.splitter  # type: ignore[assignment]
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
