"""Checkpoints as transformers saves them after bitsandbytes quantized their linear layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from ggufkit_formats import bitsandbytes


def int8_parts(name: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that stand for the weight `name` after LLM.int8."""
    scales = np.abs(x).max(axis=1).astype(np.float32)
    codes = np.rint(x * (127 / scales[:, None])).astype(np.int8)
    base = name.removesuffix(".weight")
    return {name: codes, f"{base}.SCB": scales, f"{base}.weight_format": np.array(0, np.uint8)}


def quantize(folder: Path, kind: str = "nf4", nested: bool = False, block: int = 64) -> Path:
    """Quantize the linear layers of the checkpoint in `folder`, in place."""
    path = folder / "model.safetensors"
    tensors: dict[str, np.ndarray] = {}
    for name, x in safetensors.numpy.load_file(path).items():
        if not name.endswith("proj.weight"):
            tensors[name] = x
        elif kind == "int8":
            tensors |= int8_parts(name, x.astype(np.float32))
        else:
            tensors |= bitsandbytes.encode(name, x, kind, nested, block)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
