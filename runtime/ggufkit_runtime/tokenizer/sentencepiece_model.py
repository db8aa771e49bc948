"""`tokenizer.model`: pieces, scores and types of a SentencePiece model, read and written."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ggufkit_formats.errors import FormatError, UnsupportedError

from .spm import varint
from .vocabulary import BYTE, CONTROL, NORMAL, UNDEFINED, UNKNOWN, UNUSED

ALGORITHMS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


def is_model(path: Path) -> bool:
    """Whether the file is a serialized model. (Llama 3's `tokenizer.model` is tiktoken's list of ranks.)"""
    with path.open("rb") as file:
        return file.read(1) == b"\x0a"


def pieces(path: Path) -> list[tuple[str, float, int]]:
    """(piece, score, type as in GGUF) of every token. UnsupportedError where the model does not merge pairs."""
    from sentencepiece import SentencePieceProcessor

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}") from None
    model: Any = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(raw)
        algorithm = model_type(raw)
    except Exception as error:
        raise FormatError(f"{path}: not a SentencePiece model: {' '.join(str(error).split())}") from None
    if algorithm != 2:
        name = ALGORITHMS.get(algorithm, str(algorithm))
        raise UnsupportedError(f"{path}: a {name} SentencePiece model; only BPE is supported")
    kinds = ((model.IsUnknown, UNKNOWN), (model.IsControl, CONTROL), (model.IsUnused, UNUSED), (model.IsByte, BYTE))
    out = []
    for i in range(model.vocab_size()):
        kind = next((kind for test, kind in kinds if test(i)), NORMAL)
        out.append((model.IdToPiece(i), model.GetScore(i), kind))
    return out


def model_type(raw: bytes) -> int:
    """trainer_spec.model_type of a ModelProto (field 2, in it field 3); 1 (unigram) is its default."""
    for field, value in fields(raw):
        if field == 2 and isinstance(value, bytes):
            for inner, number in fields(value):
                if inner == 3 and isinstance(number, int):
                    return number
    return 1


def fields(raw: bytes) -> list[tuple[int, int | bytes]]:
    """Field numbers and values of a protobuf message: integers, or the bytes of everything else."""
    out: list[tuple[int, int | bytes]] = []
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = raw[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(raw):
        key = varint()
        kind = key & 7
        if kind == 0:
            out.append((key >> 3, varint()))
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            size = varint()
        out.append((key >> 3, raw[position : position + size]))
        position += size
    return out


# -- writing -----------------------------------------------------------------------------------------

# sentencepiece_model.proto: TrainerSpec has the id of a special piece under the first number, its text under the other
SPECIAL = {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47), "pad": (43, 48)}


def serialized(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], ids: Mapping[str, int | None], prefix: bool
) -> bytes | None:
    """A ModelProto (BPE) of the tokens with their types as in GGUF; None where SentencePiece has no such model.

    It wants exactly one unknown piece, no piece twice, and all 256 bytes or none. `ids` are those of SPECIAL, `prefix`
    says whether a blank is put before a text. Nothing is normalized.
    """
    from sentencepiece import SentencePieceProcessor

    if sum(kind == UNKNOWN for kind in types) != 1 or sum(kind == BYTE for kind in types) not in (0, 256):
        return None
    texts = [token.replace(" ", "▁") for token in tokens]
    if len(set(texts)) < len(texts):
        return None
    parts: list[bytes] = []
    for text, score, kind in zip(texts, scores, types, strict=True):
        piece = message(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        parts.append(message(1, piece + (b"" if kind in (NORMAL, UNDEFINED) else integer(3, kind))))
    trainer = integer(3, 2) + integer(4, len(texts)) + integer(35, int(BYTE in types))
    for name, (number, text) in SPECIAL.items():
        i = ids.get(name)
        trainer += integer(number, -1 if i is None else i)
        trainer += b"" if i is None else message(text, texts[i].encode())
    normalizer = message(1, b"identity") + integer(3, int(prefix)) + integer(4, 0) + integer(5, 1)
    model = b"".join([*parts, message(2, trainer), message(3, normalizer)])
    try:
        SentencePieceProcessor().LoadFromSerializedProto(model)
    except Exception:  # whatever else it does not want
        return None
    return model


def message(field: int, content: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return varint(field << 3 | 2) + varint(len(content)) + content


def integer(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value & (1 << 64) - 1)
