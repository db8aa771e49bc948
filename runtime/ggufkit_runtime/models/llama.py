"""Llama 1 to 3.2, Mistral, TinyLlama, SmolLM2: GGUF's `llama`, whose q and k rotate neighbouring dimensions.

Source: Llama 2 (arXiv 2307.09288), Llama 3 (arXiv 2407.21783), Mistral 7B (arXiv 2310.06825).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
from ggufkit_formats.errors import UnsupportedError

from .decoder import Config, forward, tensors

__all__ = [
    "ARCH",
    "HF_CLASSES",
    "config_from_hf",
    "config_from_metadata",
    "forward",
    "hf_settings",
    "metadata",
    "tensors",
]

ARCH = "llama"
HF_CLASSES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")

_FEATURES: dict[str, Any] = {"interleaved": True, "scales": True}


def config_from_metadata(metadata: Mapping[str, Any]) -> Config:
    return Config.from_metadata(metadata, ARCH, **_FEATURES)


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    if hf.get("pretraining_tp") not in (None, 0, 1) and hf.get("slow_but_exact"):
        raise UnsupportedError("config.json: slow_but_exact with pretraining_tp > 1 is not supported")
    return Config.from_hf(hf, ARCH, **_FEATURES)


def hf_settings(config: Config, names: Container[str]) -> dict[str, Any]:
    """The settings of a config.json; `names` are the tensors of the file."""
    return config.hf_settings(HF_CLASSES[0], ARCH, names)


def metadata(config: Config) -> dict[str, Any]:
    """The GGUF keys of this architecture, in llama.cpp's order (file type and tokenizer come elsewhere)."""
    return config.metadata() | {
        f"{ARCH}.vocab_size": np.uint32(config.n_vocab),
        f"{ARCH}.rope.dimension_count": np.uint32(config.rope.n_rot),
    }
