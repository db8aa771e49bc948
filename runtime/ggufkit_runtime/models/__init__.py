"""Architectures, one file each. A module has ARCH, HF_CLASSES, config_from_metadata, config_from_hf, metadata,
hf_settings, tensors and forward; it imports formats only and is handed its backend. To add one, write the file and
name it here.
"""

from __future__ import annotations

import difflib
from types import ModuleType

from ggufkit_formats.errors import UnsupportedError
from ggufkit_formats.gguf_strings import quote

from . import bitnet, llama, qwen2, qwen3
from .base import TensorSpec, permuted_rows, restored_rows

__all__ = ["MODELS", "TensorSpec", "by_arch", "by_hf_class", "permuted_rows", "restored_rows"]

MODELS: tuple[ModuleType, ...] = (llama, qwen2, qwen3, bitnet)


def by_arch(name: str) -> ModuleType:
    """The module of that `general.architecture`; UnsupportedError names those there are."""
    for module in MODELS:
        if name == module.ARCH:
            return module
    raise UnsupportedError(f"architecture {quote(name)} is not supported (only {', '.join(m.ARCH for m in MODELS)})")


def by_hf_class(name: str) -> ModuleType:
    """The module for the class in config.json's `architectures`."""
    known = [c for module in MODELS for c in module.HF_CLASSES]
    for module in MODELS:
        if name in module.HF_CLASSES:
            return module
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UnsupportedError(f"model class {name!r} is not supported (only {', '.join(known)}){hint}")
