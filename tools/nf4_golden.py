"""Make the vectors that tests/test_bitsandbytes.py compares with, by bitsandbytes itself, on the CPU.

In an environment with `pip install torch bitsandbytes safetensors` (the vectors in the repository: torch 2.13.0,
bitsandbytes 0.50.2):

    python tools/nf4_golden.py tests/data

writes bitsandbytes.npz (inputs, codes, maxima, and the SHA-256 of what they are dequantized to) and
bitsandbytes.safetensors (layers as `Linear4bit` and `Linear8bitLt` save them).
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"normal": (160, 128), "short": (7, 50), "odd": (5, 13), "nasty": (4, 64), "float32": (12, 64)}


def inputs() -> dict[str, np.ndarray]:
    """Float32 matrices; most of few bits, so that the file stays small."""
    rng = np.random.default_rng(4)
    found = {}
    for name, shape in SHAPES.items():
        found[name] = rng.standard_normal(shape).astype(np.float32) * np.float32(0.05)
    nasty = found["nasty"]
    nasty[0] = 0
    nasty[1] *= np.float32(2.0**-130)  # denormal
    nasty[2, ::5] *= np.float32(2.0**90)
    nasty[3] = np.sign(nasty[3])
    for name, x in found.items():
        if name != "float32":
            x.view(np.uint32)[...] &= np.uint32(0xFFFF0000)
    return found


def digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def vectors() -> dict[str, np.ndarray]:
    """For each input, type and way to hold the maxima: what bitsandbytes makes of it."""
    import torch
    from bitsandbytes import functional as bnb

    out: dict[str, np.ndarray] = {}
    for name, x in inputs().items():
        out[f"{name}/x"] = x if name == "float32" else (x.view(np.uint32) >> 16).astype(np.uint16)
        for kind in ("nf4", "fp4"):
            for nested in (False, True):
                tensor = torch.from_numpy(x.copy())
                packed, state = bnb.quantize_4bit(tensor, quant_type=kind, compress_statistics=nested)
                at = f"{name}/{kind}{'/nested' if nested else ''}"
                out[f"{at}/sha256"] = np.array(digest(bnb.dequantize_4bit(packed, state).numpy()))
                if nested:
                    out[f"{at}/absmax"] = state.absmax.numpy()
                    out[f"{at}/second"] = state.state2.absmax.numpy()
                    out[f"{at}/offset"] = state.offset.numpy()
                    out["map"] = state.state2.code.numpy()
                else:
                    out[f"{at}/packed"] = packed.numpy().reshape(-1)
                    out[f"{at}/absmax"] = state.absmax.numpy()
                    out[f"{kind}/levels"] = state.code.numpy()
    return out


def layers() -> tuple[dict[str, Any], dict[str, str]]:
    """State dictionaries of quantized layers, and the SHA-256 of each weight dequantized to float32."""
    import torch
    from bitsandbytes import functional as bnb
    from bitsandbytes import nn

    torch.manual_seed(5)
    tensors: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for storage in (torch.uint8, torch.bfloat16) if kind == "nf4" else (torch.uint8,):
                layer = nn.Linear4bit(128, 24, bias=False, compute_dtype=torch.float32, quant_type=kind,
                                      compress_statistics=nested, quant_storage=storage)  # fmt: skip
                layer.weight.data = 0.05 * torch.randn(24, 128)
                layer = layer.to("cpu")
                name = f"{kind}{'_nested' if nested else ''}{'_bf16' if storage == torch.bfloat16 else ''}"
                if layer.weight.quant_state is None:  # nothing was moved, so nothing was quantized
                    layer.weight._quantize("cpu")
                tensors |= {f"{name}.{key}": value.contiguous() for key, value in layer.state_dict().items()}
                state = layer.weight.quant_state
                digests[name] = digest(bnb.dequantize_4bit(layer.weight.data, state).float().numpy())
    weight = 0.05 * torch.randn(24, 128)
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
    tensors["int8.weight"], tensors["int8.SCB"] = codes, scales
    tensors["int8.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    digests["int8"] = digest(bnb.int8_vectorwise_dequant(codes, scales).numpy())
    return tensors, digests


def main() -> None:
    from safetensors.torch import save_file

    folder = Path(sys.argv[1])
    tensors, digests = layers()
    save_file(tensors, folder / "bitsandbytes.safetensors")
    made = vectors() | {f"layers/{name}": np.array(value) for name, value in digests.items()}
    np.savez_compressed(folder / "bitsandbytes.npz", **made)


if __name__ == "__main__":
    main()
