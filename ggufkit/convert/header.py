"""The `general.*` keys: a model's name, size, licence and origin, by the heuristics of the `gguf` package.

They are the ones that llama.cpp's converter takes: the model card's front matter (README.md), `_name_or_path` in
config.json, the folder's name, and the sampling defaults in generation_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats.errors import GgufkitError
from ggufkit_formats.gguf import StringArray

# generation_config.json -> general.sampling.*; the second name wins where both are there
_SAMPLING = {
    "sampling_sequence": ("sequence",),
    "sampling_top_k": ("top_k",),
    "sampling_top_p": ("top_p",),
    "sampling_min_p": ("min_p",),
    "sampling_xtc_probability": ("xtc_probability",),
    "sampling_xtc_threshold": ("xtc_threshold",),
    "sampling_temp": ("temperature",),
    "sampling_penalty_last_n": ("penalty_last_n",),
    "sampling_penalty_repeat": ("repetition_penalty", "penalty_repeat"),
    "sampling_mirostat": ("mirostat",),
    "sampling_mirostat_tau": ("mirostat_tau",),
    "sampling_mirostat_eta": ("mirostat_eta",),
}

_DTYPES = {
    "UINT8": np.uint8, "INT8": np.int8, "UINT16": np.uint16, "INT16": np.int16, "UINT32": np.uint32,
    "INT32": np.int32, "FLOAT32": np.float32, "UINT64": np.uint64, "INT64": np.int64, "FLOAT64": np.float64,
    "BOOL": np.bool_,
}  # fmt: skip

_YAML = {False: "no", True: "yes"}  # what YAML makes of the codes of Norwegian and of nothing else


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; GgufkitError where it is missing or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GgufkitError(f"{path}: no such file") from None
    except OSError as error:
        raise GgufkitError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise GgufkitError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise GgufkitError(f"{path}: not a JSON object")
    return value


def general(folder: Path, name: str, arch: str, config: Mapping[str, Any], n_parameters: int,
            notes: list[str]) -> dict[str, Any]:  # fmt: skip
    """`general.architecture`, `general.type` and what describes the model, typed, in llama.cpp's order.

    `name` stands for the folder's (a download's folder is named by a hash). Trouble in a model card is noted and
    costs its keys, not the conversion.
    """
    start: dict[str, Any] = {"general.architecture": arch, "general.type": "model"}
    from gguf import GGUFWriter, Metadata, size_label

    found = Metadata()
    try:
        card = Metadata.load_model_card(folder)
    except Exception as error:
        notes.append(f"README.md: its front matter is ignored: {_line(error)}")
        card = {}
    try:
        found = Metadata.apply_metadata_heuristic(found, card, dict(config), Path(name), n_parameters)
        _sampling(found, folder)
        found.name = found.name or name
        found.size_label = found.size_label or size_label(n_parameters, n_parameters, 0, 0)
        writer = GGUFWriter(None, arch)
        found.set_gguf_meta_model(writer)
        described = {key: _typed(value) for key, value in writer.kv_data[0].items()}
    except Exception as error:
        notes.append(f"README.md and config.json: what they say of the model's name is ignored: {_line(error)}")
        described = {"general.name": name, "general.size_label": size_label(n_parameters, n_parameters, 0, 0)}
    described.pop("general.architecture", None)
    return start | described


def _sampling(found: Any, folder: Path) -> None:
    """Defaults for sampling, as far as the installed `gguf` has keys for them."""
    path = folder / "generation_config.json"
    try:
        said = read_json(path) if path.exists() else {}
    except GgufkitError:
        said = {}  # llama.cpp ignores a broken one, too
    for attribute, names in _SAMPLING.items():
        for name in names:
            if hasattr(found, attribute) and said.get(name) is not None:
                setattr(found, attribute, said[name])


def _typed(value: Any) -> Any:
    """A GGUFValue of the `gguf` package in the form that our writer writes with the same type."""
    kind = value.type.name
    if kind == "STRING":
        return str(value.value)
    if kind == "ARRAY":
        items = list(value.value)
        if value.sub_type is not None and value.sub_type.name in _DTYPES:
            return np.array(items, _DTYPES[value.sub_type.name])
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items) and items:
            return np.array(items, np.int32)
        return StringArray.of([_YAML.get(item, str(item)) if isinstance(item, bool) else str(item) for item in items])
    return _DTYPES[kind](value.value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
