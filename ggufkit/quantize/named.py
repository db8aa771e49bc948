"""What file type a GGUF file is, for people: by its number, and where that says too little, by its tensors.

MXFP4_MOE and our own MXFP4 share a number, and NF4 files have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ggufkit_formats.errors import FormatError, GgufkitError
from ggufkit_formats.four_bit import FourBitTensor
from ggufkit_formats.gguf import GgufFile

from .file_types import FILE_TYPES, FileType, ModelFacts
from .rules import choose, layer


def file_type(file: GgufFile) -> FileType | None:
    """The file type, or None where the file does not say, or says a number that nobody knows."""
    four_bit = [t for t in file.tensors.values() if isinstance(t, FourBitTensor)]
    if four_bit:
        return FILE_TYPES["NF4_DQ" if any(t.maxima.is_nested for t in four_bit) else "NF4"]
    number = file.metadata.get("general.file_type")
    found = [t for t in FILE_TYPES.values() if type(number) is int and t.id == number >= 0]
    if len(found) < 2:
        return found[0] if found else None
    shapes = [(t.name, t.shape) for t in file.tensors.values()]
    try:
        model = facts(file.metadata, [name for name, _ in shapes])
        return max(found, key=lambda t: _alike(file, choose(t, shapes, model)))
    except GgufkitError:
        return found[0]


def _alike(file: GgufFile, choices: Mapping[str, Any]) -> int:
    """How many weights have the type that the rules give them."""
    return sum(t.n_elements for t in file.tensors.values() if choices[t.name].type == t.type.name)


def facts(metadata: Mapping[str, Any], names: list[str]) -> ModelFacts:
    """What the rules want to know, from the keys that all architectures share; 0 where a key is missing."""
    arch = metadata.get("general.architecture", "")
    if not isinstance(arch, str):
        raise FormatError(f"metadata 'general.architecture' should be a string, not {arch!r}")

    def count(key: str, default: int = 0) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        if isinstance(value, np.ndarray):  # one a layer: llama.cpp's rules look at the first
            value = value[0].item() if len(value) else default
        return int(value) if isinstance(value, (int, float)) else default

    n_layers = count("block_count", 1 + max((layer(name) for name in names), default=-1))
    n_heads = count("attention.head_count")
    return ModelFacts(arch, n_layers, n_heads, count("attention.head_count_kv", n_heads), count("expert_count"))
