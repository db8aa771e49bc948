"""What `tokenizer.model` holds: pieces, scores and types of a SentencePiece model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggufkit_formats.errors import FormatError, UnsupportedError

from .vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED

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
