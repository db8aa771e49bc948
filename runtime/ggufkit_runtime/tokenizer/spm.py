"""SentencePiece BPE: the tokens and scores of a GGUF file as a model proto, run by `sentencepiece`."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from ggufkit_formats.errors import FormatError

from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import sentencepiece

SPACE = "▁"  # stands for a blank in tokens


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def model_proto(vocabulary: Vocabulary) -> bytes:
    """A serialized ModelProto (sentencepiece_model.proto) that merges as llama.cpp does.

    All tokens are plain pieces there, whatever their type: llama.cpp cuts special tokens out of the text first,
    and then merges by text and score alone. The one unknown piece, which a model must have, is added behind them;
    bytes are spelled out afterwards. The text is handed over as it shall be merged, so nothing is normalized.
    """
    assert vocabulary.scores is not None
    lengths = [varint(n) for n in range(4096)]
    parts: list[bytes] = []
    scores = vocabulary.scores.astype("<f4").tobytes()
    for i, token in enumerate(vocabulary.tokens):
        try:
            raw = token.encode()
        except UnicodeEncodeError:  # not Unicode, so never part of a text
            raw = f"\U0010ffff{i}".encode()
        n = len(raw)
        head = lengths[n] if n < 4096 else varint(n)
        size = 1 + len(head) + n + 5
        # ModelProto.pieces (1) { piece (1), score (2) }
        parts.append(b"\x0a%b\x0a%b%b\x15%b" % (varint(size), head, raw, scores[4 * i : 4 * i + 4]))
    unknown = "\U0010ffff".encode()
    piece = b"\x0a%b%b\x15%b\x18\x02" % (varint(len(unknown)), unknown, struct.pack("<f", 0))
    parts.append(b"\x0a%b%b" % (varint(len(piece)), piece))
    # trainer_spec (2): model_type (3) = BPE (2). unk_id (40) is not read from there.
    parts.append(b"\x12\x02\x18\x02")
    # normalizer_spec (3): name "identity", no dummy prefix (3), extra blanks stay (4), blanks are not escaped (5)
    normalizer = b"\x0a\x08identity\x18\x00\x20\x00\x28\x00"
    parts.append(b"\x1a%b%b" % (varint(len(normalizer)), normalizer))
    return b"".join(parts)


class SentencePieceBPE:
    """Text without special tokens to ids."""

    def __init__(self, vocabulary: Vocabulary):
        self.n_vocab = len(vocabulary.tokens)
        index = vocabulary.index
        self.bytes = [index.get(f"<0x{b:02X}>") for b in range(256)]
        self.unknown = vocabulary.ids["unk"]
        self.engine = self._build(model_proto(vocabulary))

    def _build(self, proto: bytes) -> sentencepiece.SentencePieceProcessor:
        import sentencepiece

        engine = sentencepiece.SentencePieceProcessor()
        try:
            engine.LoadFromSerializedProto(proto)
        except Exception as error:
            message = " ".join(str(error).split())
            raise FormatError(f"the vocabulary does not make a SentencePiece model: {message}") from None
        return engine

    def ids(self, text: str) -> list[int]:
        """Ids of a text, none of them special. Characters without a token become bytes, or the unknown token."""
        text = text.replace(" ", SPACE)
        ids: list[int] = self.engine.encode(text, out_type=int)  # type: ignore[call-arg]
        if self.n_vocab not in ids:
            return ids
        pieces: list[str] = self.engine.encode(text, out_type=str)  # type: ignore[call-arg]
        out: list[int] = []
        for i, piece in zip(ids, pieces, strict=True):
            if i < self.n_vocab:
                out.append(i)
            else:
                out.extend(self._spell(piece))
        return out

    def _spell(self, piece: str) -> list[int]:
        ids = [self.bytes[b] for b in piece.encode()]
        known = [i for i in ids if i is not None]
        if len(known) == len(ids):
            return known
        if self.unknown is None:
            raise FormatError(f"the vocabulary has no token for {piece[:20]!r}, nor bytes, nor an unknown token")
        return [self.unknown]
