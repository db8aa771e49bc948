"""From a GGUF file, of any architecture: the metadata is copied, the tensors get the types of the new file type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats import gguf, nf4_tensors
from ggufkit_formats.errors import FormatError

from ..quantize import rules
from ..quantize.file_types import ALIASES, FILE_TYPES, QUANTIZATION_VERSION, ModelFacts
from . import bitnet
from .job import FILE_TYPE, QUANTIZATION_VERSION_KEY, Input, Job


def read(path: Path, name: str | None = None, pre_tokenizer: str | None = None) -> Job:
    """A GGUF file as a source. Keys keep their types and order; file type and quantization version go last."""
    file = gguf.open(path)
    try:
        metadata = bitnet.renamed(file.metadata.copy())
        for key in (QUANTIZATION_VERSION_KEY, FILE_TYPE, *nf4_tensors.KEYS):
            metadata.pop(key, None)
        metadata[QUANTIZATION_VERSION_KEY] = np.uint32(QUANTIZATION_VERSION)
        metadata[FILE_TYPE] = np.uint32(0)
        if pre_tokenizer:
            if "tokenizer.ggml.tokens" not in metadata:
                raise FormatError(f"{path}: holds no tokenizer whose pre-tokenizer could be {pre_tokenizer!r}")
            metadata["tokenizer.ggml.pre"] = pre_tokenizer
        inputs = [Input(each.name, each.shape, bitnet.imported(each)) for each in file.tensors.values()]
        facts = _facts(metadata, list(file.tensors))
    except BaseException:
        file.close()
        raise
    return Job(str(path), name or _name(path), metadata, inputs, facts, file.close, is_gguf=True)


def _facts(metadata: Mapping[str, Any], names: list[str]) -> ModelFacts:
    """What the rules want to know, from the keys that all architectures share; 0 where a key is missing."""
    arch = metadata.get("general.architecture", "")
    if not isinstance(arch, str):
        raise FormatError(f"metadata 'general.architecture' should be a string, not {arch!r}")

    def count(key: str, default: int = 0) -> int:
        value = metadata.get(f"{arch}.{key}", default)
        if isinstance(value, np.ndarray):  # one a layer: llama.cpp's rules look at the first
            value = value[0].item() if len(value) else default
        return int(value) if isinstance(value, (int, float)) else default

    n_layers = count("block_count", 1 + max((rules.layer(name) for name in names), default=-1))
    n_heads = count("attention.head_count")
    return ModelFacts(arch, n_layers, n_heads, count("attention.head_count_kv", n_heads), count("expert_count"))


def _name(path: Path) -> str:
    """The file's name without its type and shard: model.Q4_1-00001-of-00002.gguf -> model."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.name.removesuffix(".gguf"))
    known = "|".join(re.escape(each) for each in (*FILE_TYPES, *ALIASES))
    return re.sub(rf"[-._](?:{known})$", "", stem, flags=re.IGNORECASE) or stem
