"""config.json and generation_config.json: the network's settings, and ids and defaults of generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ggufkit_formats.errors import GgufkitError
from ggufkit_runtime import tokenizer
from ggufkit_runtime.models.base import plain
from ggufkit_runtime.tokenizer.hf import ID_KEYS

from .dtypes import TORCH, Dtype
from .parts import Source

# generation_config.json -> key of the file; llama.cpp's other defaults have no counterpart there
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def config(source: Source, dtype: Dtype, where: str) -> dict[str, Any]:
    """What config.json says. UnsupportedError for a network that transformers' classes cannot be told about."""
    try:
        settings = source.module.hf_settings(source.config, source.names)
    except GgufkitError as error:
        raise type(error)(f"{where}: {error}") from None
    settings |= _ids(source.metadata, "bos", "eos", "pad") | {"torch_dtype": TORCH[dtype.plain], "use_cache": True}
    return settings | ({"quantization_config": dtype.quantization} if dtype.quantization else {})


def generation(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says: the ids, all tokens that end a text, and defaults of sampling."""
    out: dict[str, Any] = _ids(metadata, "bos", "pad")
    ends = sorted(tokenizer.from_metadata(metadata).eog_ids)
    eos = list(_ids(metadata, "eos").values())
    ends = [*eos, *(i for i in ends if i not in eos)]
    if ends:
        out["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    found = {name: metadata.get(key) for name, key in _SAMPLING.items()}
    numbers = {k: plain(v) if isinstance(v, float) else v for k, v in found.items() if isinstance(v, int | float)}
    return out | ({"do_sample": True} if numbers else {}) | numbers


def _ids(metadata: Mapping[str, Any], *names: str) -> dict[str, int]:
    """bos_token_id and the like, where the file names them."""
    found = {name: metadata.get(f"tokenizer.ggml.{ID_KEYS[name]}") for name in names}
    return {f"{name}_token_id": i for name, i in found.items() if type(i) is int}
