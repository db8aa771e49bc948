"""From a GGUF file, of any architecture: the metadata is copied, the tensors get the types of the new file type."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from ggufkit_formats import gguf, nf4_tensors
from ggufkit_formats.errors import FormatError

from ..quantize import named
from ..quantize.file_types import ALIASES, FILE_TYPES, QUANTIZATION_VERSION
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
        facts = named.facts(metadata, list(file.tensors))
    except BaseException:
        file.close()
        raise
    return Job(str(path), name or _name(path), metadata, inputs, facts, file.close, is_gguf=True)


def _name(path: Path) -> str:
    """The file's name without its type and shard: model.Q4_1-00001-of-00002.gguf -> model."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.name.removesuffix(".gguf"))
    known = "|".join(re.escape(each) for each in (*FILE_TYPES, *ALIASES))
    return re.sub(rf"[-._](?:{known})$", "", stem, flags=re.IGNORECASE) or stem
