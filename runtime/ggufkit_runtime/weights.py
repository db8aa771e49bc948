"""From a file's tensors to a network's weights: every name and shape is checked, then packed by the backend."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from ggufkit_formats.blocks import UnknownType
from ggufkit_formats.errors import FormatError, UnsupportedError
from ggufkit_formats.gguf_strings import quote
from ggufkit_formats.tensor import Tensor

from .models import TensorSpec


class Weights(SimpleNamespace):
    """The packed weights, under GGUF's names: `.token_embd`, `.output`, `.layers[3].attn_q`, `.attn_q_bias`.

    `.freqs` are the rotary frequencies and the factor on cos and sin; `.nbytes` what the file's tensors take,
    `.nbytes_per_token` what a forward of one token reads of them.
    """

    layers: list[SimpleNamespace]
    freqs: tuple[np.ndarray, float]
    nbytes: int
    nbytes_per_token: int


def check(specs: list[TensorSpec], tensors: Mapping[str, Tensor], file: str) -> None:
    """Compare what the architecture asks for with what the file holds. Raises FormatError or UnsupportedError."""
    asked = {spec.gguf: spec for spec in specs}
    for spec in specs:
        tensor = tensors.get(spec.gguf)
        if tensor is None:
            if not spec.optional:
                raise FormatError(f"{file}: tensor {spec.gguf!r} is missing")
        elif tensor.shape != spec.shape:
            raise FormatError(
                f"{file}: tensor {spec.gguf!r} has shape {tensor.shape}, the metadata asks for {spec.shape}"
            )
        elif isinstance(tensor.type, UnknownType):
            raise UnsupportedError(f"{file}: tensor {spec.gguf!r} has the unknown type {tensor.type.name}")
    for name in tensors:
        if name not in asked:
            near = difflib.get_close_matches(name[:100], asked, n=1, cutoff=0.8)
            hint = f" (nearest: {near[0]})" if near else ""
            raise UnsupportedError(f"{file}: tensor {quote(name)} does not belong to this architecture{hint}")


def load(
    model: ModuleType,
    config: Any,
    tensors: Mapping[str, Tensor],
    ops: Any,
    file: str,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Check all tensors, then pack them one after the other; `progress` is told (bytes done, bytes in all)."""
    specs = model.tensors(config)
    check(specs, tensors, file)
    total = sum(t.nbytes for t in tensors.values())
    weights = Weights(layers=[SimpleNamespace() for _ in range(config.n_layers)], nbytes=total)
    done = 0
    for spec in specs:
        tensor = tensors.get(spec.gguf)
        place, attribute = _place(weights, spec.gguf)
        if not hasattr(place, f"{attribute}_bias"):
            setattr(place, f"{attribute}_bias", None)  # until its own row in the table comes, or for good
        if tensor is None:
            setattr(place, attribute, None)
            continue
        if spec.is_matrix:
            setattr(place, attribute, ops.weight(tensor, scale_of(tensors, spec.gguf, file)))
        elif not attribute.endswith("_scale"):  # which is in its matrix
            setattr(place, attribute, ops.vector(tensor))
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    weights.freqs = config.rope.frequencies(_rope_factors(tensors, file))
    weights.nbytes_per_token = total
    if weights.output is None:
        weights.output = weights.token_embd
    else:
        weights.nbytes_per_token -= tensors["token_embd.weight"].nbytes
    return weights


def scale_of(tensors: Mapping[str, Tensor], name: str, file: str) -> float:
    """What the file multiplies a matrix with: the number in the tensor `….scale` beside it, or 1."""
    tensor = tensors.get(scale_name(name))
    if tensor is None:
        return 1.0
    value = float(tensor.dequantize().reshape(-1)[0])
    if not np.isfinite(value):
        raise FormatError(f"{file}: tensor {quote(tensor.name)} is {value}, which is no scale")
    return value


def scale_name(name: str) -> str:
    """blk.0.attn_q.weight -> blk.0.attn_q.scale"""
    return f"{name.removesuffix('.weight')}.scale"


def _rope_factors(tensors: Mapping[str, Tensor], file: str) -> np.ndarray | None:
    """What divides the rotary frequencies, or None where the file does not say."""
    tensor = tensors.get("rope_freqs.weight")
    if tensor is None:
        return None
    factors = tensor.dequantize()
    if not ((factors >= 1e-6) & (factors <= 1e6)).all():
        raise FormatError(f"{file}: tensor 'rope_freqs.weight' holds factors that make no sense (0, NaN, or huge)")
    return factors


def _place(weights: Weights, name: str) -> tuple[SimpleNamespace, str]:
    """Where a tensor goes: blk.3.attn_q.bias -> (weights.layers[3], "attn_q_bias")."""
    parts = name.split(".")
    place: SimpleNamespace = weights
    if parts[0] == "blk":
        place, parts = weights.layers[int(parts[1])], parts[2:]
    return place, parts[0] if parts[1] == "weight" else f"{parts[0]}_{parts[1]}"
