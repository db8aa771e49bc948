"""BitNet b1.58: norms before the attention's output and before ffn_down, squared ReLU or SiLU, the embedding as output.

The two halves of a head rotate together. GGUF's `bitnet` has no key for the activation, and llama.cpp's graph takes
SiLU for granted; a network of another one says so under `bitnet.hidden_activation`, a key that others
have. llama.cpp does not read it there: it loads a file with squared ReLU, and computes another network.

Source: arXiv 2402.17764, and 2504.12285 (2B-4T).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .base import TensorSpec
from .decoder import Config, forward
from .decoder import tensors as decoder_tensors

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

ARCH = "bitnet"
HF_CLASSES = ("BitNetForCausalLM", "BitnetForCausalLM")

_FEATURES: dict[str, Any] = {"qkv_bias": False, "other_bias": False, "sub_norms": True, "scales": True}

# Names of the sub-norms in the first checkpoints (1bitLLM), which have them inside of a projection's module
_OLD_NAMES = {"self_attn.attn_sub_norm.": "self_attn.inner_attn_ln.", "mlp.ffn_sub_norm.": "mlp.ffn_layernorm."}


def config_from_metadata(metadata: Mapping[str, Any]) -> Config:
    return Config.from_metadata(metadata, ARCH, ("silu", "relu2"), **_FEATURES)


def config_from_hf(hf: Mapping[str, Any]) -> Config:
    config = Config.from_hf(hf, ARCH, activations=("relu2", "silu", "swish"), **_FEATURES)
    if config.activation == "silu":
        return config
    note = "hidden_act = relu2: the file runs here; llama.cpp would load it and compute SiLU, which gives nonsense"
    return replace(config, notes=(*config.notes, note))


def hf_settings(config: Config, names: Container[str]) -> dict[str, Any]:
    """The settings of a config.json; `names` are the tensors of the file."""
    return config.hf_settings(HF_CLASSES[0], ARCH, names)


def metadata(config: Config) -> dict[str, Any]:
    """The GGUF keys; the activation only where it is not the one that everybody takes for granted.

    llama.cpp's converter says of every BitNet that its context is stretched, by 1.
    """
    said: dict[str, Any] = {}
    if config.rope.scaling == "none":
        said |= {f"{ARCH}.rope.scaling.type": "linear", f"{ARCH}.rope.scaling.factor": np.float32(1)}
    if config.activation != "silu":
        said[f"{ARCH}.hidden_activation"] = config.activation
    return config.metadata() | said


def tensors(config: Config) -> list[TensorSpec]:
    """All tensors of the network, in the order of a forward pass."""
    specs = decoder_tensors(config)
    for k, spec in enumerate(specs):
        for new, old in _OLD_NAMES.items():
            if spec.hf and new in spec.hf[0]:
                specs[k] = replace(spec, hf=(*spec.hf, spec.hf[0].replace(new, old)))
    return specs
