"""BitNet checkpoints: packed ternary weights, with scales of either polarity, and weights that are not rounded yet."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from ggufkit_formats.bitnet import I2S, PackedTernary, Rows
from ggufkit_formats.errors import FormatError, UnsupportedError
from ggufkit_formats.tensor import Tensor

from ..quantize import ternary
from .job import Input

CONFIG = "quantization_config"

# A scale that divides is 1 / mean |w|, some 20 to 100 in networks there are; one that multiplies is 2 or less.
LEAST_DIVISOR, LARGEST_FACTOR = 4.0, 10.0


def is_packed(settings: Mapping[str, Any]) -> bool:
    """Whether config.json says that a checkpoint is BitNet's; what else it says is `unpacked`'s to judge."""
    said = settings.get(CONFIG)
    return isinstance(said, dict) and said.get("quant_method") == "bitnet"


def is_online(settings: Mapping[str, Any]) -> bool:
    """Whether the network rounds its weights as it runs, so that the checkpoint's are not rounded yet."""
    return settings[CONFIG].get("quantization_mode") == "online"


def unpacked(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The tensors, packed weights as float32 rows that are made when read, without the scales.

    transformers' BitLinear divides by `weight_scale`, AutoBitLinear multiplies with it. Raises UnsupportedError where
    config.json does not tell which it is, and where the scales do not look like what it says.
    """
    packed = [name for name in tensors if name.endswith(".weight") and tensors[name].type.name == "U8"]
    out = {name: tensor for name, tensor in tensors.items() if not name.endswith(".weight_scale")}
    divides = _divides(settings[CONFIG], bool(packed))
    for name in packed:
        scale = tensors.get(f"{name}_scale")
        if scale is None:
            raise FormatError(f"{where}: tensor {name!r} is packed, and there is no '{name}_scale'")
        out[name] = PackedTernary(tensors[name], _scale(scale, divides, where)).tensor(name)
    for name in tensors:
        if name.endswith(".weight_scale") and name.removesuffix("_scale") not in packed:
            raise UnsupportedError(f"{where}: tensor {name!r} belongs to no packed weights")
    return out


def _divides(said: Mapping[str, Any], packed: bool) -> bool:
    """Whether scales divide, by the quantization_config."""
    kind, mode = said.get("linear_class") or "bitlinear", said.get("quantization_mode") or "offline"
    if said.get("use_rms_norm"):
        raise UnsupportedError("config.json: quantization_config.use_rms_norm is not supported")
    if kind == "bitlinear" and mode == "offline":
        return True
    if kind == "autobitlinear" and (mode == "offline" or (mode == "online" and not packed)):
        return False
    raise UnsupportedError(
        f"config.json: quantization_config with linear_class {kind!r} and quantization_mode {mode!r}: whether "
        "weight_scale divides or multiplies is unclear"
    )


def _scale(tensor: Tensor, divides: bool, where: str) -> float:
    """The number that the codes -1, 0, 1 are multiplied with, a float32."""
    if tensor.n_elements != 1:
        raise FormatError(f"{where}: tensor {tensor.name!r} has {tensor.n_elements} numbers; one is wanted")
    value = np.float32(tensor.dequantize().reshape(-1)[0])
    if not np.isfinite(value) or value <= 0:
        raise FormatError(f"{where}: tensor {tensor.name!r} is {value:g}, which is no scale")
    if value < LEAST_DIVISOR if divides else value > LARGEST_FACTOR:
        does, other = ("divides", "multiplies") if divides else ("multiplies", "divides")
        raise UnsupportedError(
            f"{where}: tensor {tensor.name!r} is {value:g}, but config.json says that it {does}, and so it looks like "
            f"one that {other}: unclear what the weights are"
        )
    return float(np.float32(1) / value if divides else value)


def imported(tensor: Tensor) -> Tensor:
    """The tensor; where it is one of bitnet.cpp's I2_S by its id, its size and its scale, the weights in it."""
    return I2S(tensor).tensor(tensor.name) if I2S.holds(tensor) else tensor


_FORKS_NAME = "bitnet-b1.58"  # what bitnet.cpp calls the network with squared ReLU


def renamed(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a GGUF file; bitnet.cpp's architecture under GGUF's name, with its activation said."""
    if metadata.get("general.architecture") != _FORKS_NAME:
        return metadata
    out = {re.sub(rf"^{re.escape(_FORKS_NAME)}\.", "bitnet.", key): value for key, value in metadata.items()}
    return out | {"general.architecture": "bitnet", "bitnet.hidden_activation": "relu2"}


# -- weights that are not rounded yet ----------------------------------------------------------------

_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def rounded(inputs: list[Input]) -> tuple[list[Input], int]:
    """The inputs with the layers' matrices in three levels, and how many were not.

    A BitNet rounds its weights in every forward (WeightQuant): by absmean, as llama.cpp's converter does, too.
    Whatever type they are stored in, these are the network's weights. Matrices that are packed are as they should be.
    """
    out, count = [], 0
    for each in inputs:
        tensor = each.tensor
        wanted = each.name.startswith("blk.") and each.name.split(".")[2] in _MATRICES and len(each.shape) == 2
        if wanted and tensor is not None and not isinstance(tensor.source, Rows):
            each, count = replace(each, tensor=Absmean(tensor).tensor(tensor.name)), count + 1
        out.append(each)
    return out, count


class Absmean(Rows):
    """A tensor's weights rounded to γ * {-1, 0, 1}, γ the mean magnitude; those that are ternary stay as they are."""

    def __init__(self, tensor: Tensor):
        super().__init__(tensor.rows, tensor.cols)
        self.original = tensor
        self._gamma: np.float32 | None = None
        self._lock = threading.Lock()

    @property
    def gamma(self) -> np.float32:
        """γ, found in one pass over the tensor when it is first asked for; 0: nothing is to be rounded."""
        with self._lock:
            if self._gamma is None:
                common = ternary.common_scale(self._chunks())
                self._gamma = np.float32(0 if common is not None else ternary.mean_magnitude(self._chunks()))
            return self._gamma

    def _chunks(self) -> Iterator[np.ndarray]:
        for start, stop in self.original.slabs(1 << 24):
            yield self._decoded(start, stop)

    def _decoded(self, start: int, stop: int) -> np.ndarray:
        return self.original.type.decode(self.original.read_rows(start, stop))

    def make(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop, float32."""
        x, gamma = self._decoded(start, stop), self.gamma
        if not gamma or not np.isfinite(gamma):
            return x
        return np.clip(np.rint(x / np.maximum(gamma, np.float32(1e-5))), -1, 1) * gamma
