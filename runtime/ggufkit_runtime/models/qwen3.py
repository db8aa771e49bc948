"""Qwen3 (dense): each head of q and k is normed before it rotates; the two halves of a head rotate together.

Source: arXiv 2505.09388.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

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

ARCH = "qwen3"
HF_CLASSES = ("Qwen3ForCausalLM",)

_FEATURES: dict[str, Any] = {"qk_norm": True, "other_bias": False, "scales": True}


def config_from_metadata(metadata: Mapping[str, Any]) -> Config:
    return Config.from_metadata(metadata, ARCH, **_FEATURES)


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    return Config.from_hf(hf, ARCH, **_FEATURES)


def hf_settings(config: Config, names: Container[str]) -> dict[str, Any]:
    """The settings of a config.json; `names` are the tensors of the file."""
    return config.hf_settings(HF_CLASSES[0], ARCH, names)


def metadata(config: Config) -> dict[str, Any]:
    return config.metadata()
