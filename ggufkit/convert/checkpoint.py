"""From a Hugging Face checkpoint: config.json says the architecture, whose table says what each tensor becomes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ggufkit_formats import safetensors
from ggufkit_formats.blocks.base import UnknownType
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError
from ggufkit_formats.tensor import Tensor

from ..quantize.file_types import QUANTIZATION_VERSION, ModelFacts
from . import bitnet, header
from .job import FILE_TYPE, QUANTIZATION_VERSION_KEY, Input, Job

# Tensors that some checkpoints carry and no converter needs: they follow from the settings.
_DERIVED = (
    "rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "attention.masked_bias", "attention.bias",
    "attn.masked_bias",
)  # fmt: skip


def read(path: Path, name: str | None = None, pre_tokenizer: str | None = None) -> Job:
    """A checkpoint folder, or a .safetensors file (or index) with config.json and tokenizer beside it.

    `name` is the model's, where the folder's is none. Raises GgufkitError for missing companions, UnsupportedError
    for an unknown model class or setting, FormatError for tensors that do not fit the configuration.
    """
    from ggufkit_runtime.models import by_hf_class

    folder = path if path.is_dir() else path.parent
    config_path = folder / "config.json"
    if not config_path.exists():
        what = "the folder" if path.is_dir() else f"{path.name}, which says nothing about its network,"
        raise GgufkitError(f"{config_path}: no such file; {what} needs one to be converted")
    settings = _as_if_unquantized(header.read_json(config_path))
    classes = settings.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise FormatError(f"{config_path}: 'architectures' does not name a model class")
    module = by_hf_class(classes[0])
    packed = bitnet.is_packed(settings)  # then its quantization_config is understood, and refused for nobody
    asked = {key: value for key, value in settings.items() if not (packed and key == bitnet.CONFIG)}
    config = module.config_from_hf(_with_defaults(asked))
    notes = [f"config.json: {note}" for note in config.notes]
    name = name or _name(path)
    checkpoint = safetensors.open(path)
    try:
        tensors = checkpoint.tensors
        if packed:
            tensors = bitnet.unpacked(tensors, settings, str(path))
        inputs = match(module.tensors(config), tensors, str(path), settings)
        if module.ARCH == "bitnet" or (packed and bitnet.is_online(settings)):
            inputs, count = bitnet.rounded(inputs)
            if count:
                notes.append(
                    f"{count} matrices are rounded to three levels by their mean magnitude, as the network does"
                )
        n_parameters = sum(each.n_elements for each in inputs)
        metadata = header.general(folder, name, module.ARCH, settings, n_parameters, notes)
        metadata |= _settings(module, config)
        metadata |= _tokenizer(folder, config.n_vocab, pre_tokenizer)
    except BaseException:
        checkpoint.close()
        raise
    facts = ModelFacts(module.ARCH, config.n_layers, config.n_heads, config.n_kv_heads)
    return Job(str(path), name, metadata, inputs, facts, checkpoint.close, notes=notes)


def _as_if_unquantized(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without bitsandbytes' quantization_config: its matrices are read like any other."""
    quantization = settings.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "bitsandbytes":
        return settings
    return {key: value for key, value in settings.items() if key != "quantization_config"}


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the head size that transformers fills in where config.json has none (and llama.cpp writes)."""
    kind, dim, heads = (settings.get(key) for key in ("model_type", "hidden_size", "num_attention_heads"))
    if settings.get("head_dim") is not None or not isinstance(dim, int) or not isinstance(heads, int) or heads < 1:
        return settings
    defaults = {"llama": dim // heads, "mistral": dim // heads, "qwen3": 128}
    return settings | ({"head_dim": defaults[kind]} if kind in defaults else {})


def match(specs: list[Any], tensors: Mapping[str, Tensor], where: str, settings: Mapping[str, Any]) -> list[Input]:
    """The checkpoint's tensors by the architecture's table; every one of both sides is accounted for."""
    inputs: list[Input] = []
    missing: list[str] = []
    left = dict(tensors)
    for spec in specs:
        found = next((left.pop(name) for name in spec.hf if name in left), None)
        if found is not None:
            _check(found, spec.shape, where)
            head_rows = spec.shape[0] // spec.permute_heads if spec.permute_heads else 0
            inputs.append(Input(spec.gguf, spec.shape, found, head_rows=head_rows))
        elif spec.values is not None:
            inputs.append(Input(spec.gguf, spec.shape, None, np.asarray(spec.values, np.float32)))
        elif not spec.optional or (spec.gguf == "output.weight" and settings.get("tie_word_embeddings") is False):
            missing.append(spec.hf[0] if spec.hf else spec.gguf)
    extra = [name for name in left if not name.endswith(_DERIVED)]
    if missing:
        near = difflib.get_close_matches(missing[0], extra, n=1, cutoff=0.8)
        hint = f"; there is {near[0]!r}" if near else ""
        raise FormatError(f"{where}: {_listed('tensor', missing)} missing that config.json asks for{hint}")
    if extra:
        raise UnsupportedError(f"{where}: {_listed('tensor', extra)} not known to this architecture")
    return inputs


def _check(tensor: Tensor, shape: tuple[int, ...], where: str) -> None:
    if tensor.shape != shape:
        raise FormatError(
            f"{where}: tensor {tensor.name!r} has shape {list(tensor.shape)}; config.json makes it {list(shape)}"
        )
    if isinstance(tensor.type, UnknownType):
        raise UnsupportedError(f"{where}: tensor {tensor.name!r} has type {tensor.type}, which cannot be converted")


def _listed(what: str, names: list[str]) -> str:
    """tensor 'a' is · tensors 'a', 'b', 'c' and 5 more are"""
    shown = ", ".join(repr(name) for name in names[:3])
    if len(names) == 1:
        return f"{what} {shown} is"
    return f"{what}s {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''} are"


def _settings(module: ModuleType, config: Any) -> dict[str, Any]:
    """The architecture's keys with the file type among them, where llama.cpp has it."""
    keys, common = module.metadata(config), config.metadata()
    first = {key: value for key, value in keys.items() if key in common}
    rest = {key: value for key, value in keys.items() if key not in common}
    version = {QUANTIZATION_VERSION_KEY: np.uint32(QUANTIZATION_VERSION)}
    return first | {FILE_TYPE: np.uint32(0)} | rest | version


def _tokenizer(folder: Path, n_vocab: int, pre: str | None) -> dict[str, Any]:
    from ggufkit_runtime.tokenizer import hf

    return hf.metadata(folder, n_vocab, pre)


def _name(path: Path) -> str:
    """The model's name by its path: the folder's, or the file's where that says more than `model`."""
    path = path.absolute() if path.name not in ("", "..") else path.resolve()  # not through links: caches name by hash
    if path.is_dir():
        return path.name or "model"
    stem = path.name.removesuffix(".json").removesuffix(".index").removesuffix(".safetensors")
    generic = stem.split("-00")[0] in ("model", "pytorch_model", "consolidated")
    return path.parent.name or "model" if generic else stem
