"""The texts: which stretch trains, which stops the training early, which is held out; and the tokenizer.

Each text file is cut, from its end: HELD_OUT bytes that nothing has seen, VALIDATION bytes before them that
choose when to stop, and the rest, which trains network, tokenizer and n-gram model alike. Cuts fall after a
newline, so that a stretch is never longer than its figure.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

HELD_OUT = 60_000  # bytes of each text
VALIDATION = 40_000


@dataclass(frozen=True)
class Stretches:
    """The stretches of one text or, joined, of several."""

    train: str
    validation: str
    held_out: str


def cut(text: bytes, size: int) -> int:
    """Where the last stretch of at most `size` bytes begins: the first line start within it."""
    return text.index(b"\n", max(len(text) - size - 1, 0)) + 1


def split(text: bytes) -> Stretches:
    held_out = cut(text, HELD_OUT)
    validation = cut(text[:held_out], VALIDATION)
    parts = text[:validation], text[validation:held_out], text[held_out:]
    return Stretches(*(part.decode("utf-8") for part in parts))


def read(paths: list[Path]) -> Stretches:
    """All texts, split each for itself, the like stretches joined."""
    parts = [split(path.read_bytes()) for path in paths]
    return Stretches(
        "".join(p.train for p in parts),
        "".join(p.validation for p in parts),
        "".join(p.held_out for p in parts),
    )


def train_tokenizer(text: str, n_vocab: int) -> bytes:
    """A SentencePiece BPE model of `n_vocab` pieces: unk, bos, eos are 0, 1, 2, then the 256 bytes, as in Llama.

    No normalization and no removal of blanks, which is what llama.cpp assumes of a GGUF vocabulary; digits stand
    alone; characters too rare to be a piece fall back to bytes, and so does the newline.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=n_vocab,
        character_coverage=0.9995,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        max_sentence_length=1_000_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def encode(model: bytes, text: str) -> np.ndarray:
    """Token ids of the text as one stream, without BOS; int64."""
    return np.array(sentencepiece.SentencePieceProcessor(model_proto=model).encode(text), np.int64)
