"""Checkpoints that bitsandbytes quantized: NF4, FP4 and LLM.int8, each matrix put together from its parts.

A 4-bit matrix X.weight (transformers' `load_in_4bit`) is stored as

    X.weight                    two codes a byte, the first in the high half; uint8, or another dtype of the same bytes
    X.weight.absmax             float32 (blocks,), or uint8 where the maxima are quantized again
    X.weight.quant_map          float32 (16,): the levels
    X.weight.nested_absmax      float32 (ceil(blocks / 256),)       } where they are
    X.weight.nested_quant_map   float32 (256,)                      }
    X.weight.quant_state.bitsandbytes__nf4 (or __fp4)   JSON: blocksize, shape, nested_offset …

and an 8-bit one as X.weight int8 (rows, cols) and X.SCB float32 (rows,), the largest |x| of each row.
Source: bitsandbytes 0.50, functional.py (QuantState) and nn/modules.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .blocks import TensorType
from .blocks.nf4 import (
    BLOCK,
    FP4_LEVELS,
    NESTED_BLOCK,
    NF4_LEVELS,
    dynamic_map,
    encode_4bit,
    encode_maxima,
    four_bit,
)
from .errors import FormatError, UnsupportedError
from .four_bit import F32, Maxima, four_bit_tensor, numbers
from .gguf_strings import quote
from .safetensors_writer import Planned
from .tensor import Tensor

STATE = ".quant_state.bitsandbytes__"
KINDS = {"nf4": "NF4", "fp4": "FP4"}
LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_MAX_STATE = 1 << 16  # bytes of JSON


def join(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors with each quantized matrix as one, in the place of its codes.

    Checkpoints of others pass unchanged. Raises FormatError where the parts of a matrix do not fit each other, and
    UnsupportedError for what bitsandbytes stores otherwise.
    """
    whole: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in tensors:
        if STATE in name:
            base, _, kind = name.rpartition(STATE)
            whole[base] = _four_bit(base, kind, tensors[name], tensors)
            used |= {name, *(f"{base}.{part}" for part in _PARTS)}
        elif name.endswith(".SCB"):
            base = name.removesuffix(".SCB")
            whole[f"{base}.weight"] = _int8(base, tensors)
            used |= {name, f"{base}.weight_format"}
    return {name: whole.get(name, tensor) for name, tensor in tensors.items() if name not in used}


# -- four bits ---------------------------------------------------------------------------------------


def _four_bit(base: str, kind: str, state: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    what = f"tensor {quote(base)}"
    if kind not in KINDS:
        raise UnsupportedError(f"{what} has bitsandbytes' type {kind!r}; nf4 and fp4 can be read")
    settings = _state(state, what)
    shape = _shape(settings.get("shape"), what)
    n = math.prod(shape)
    codes = _part(tensors, base)
    if codes.nbytes != -(-n // 2):
        raise FormatError(f"{what} of shape {list(shape)} needs {-(-n // 2)} bytes of codes, not {codes.nbytes}")
    block = settings.get("blocksize")
    if type(block) is not int:
        raise FormatError(f"{what}: its quant_state has blocksize {block!r}; an integer is wanted")
    levels = _floats(tensors, f"{base}.quant_map", 16)
    try:
        type_ = four_bit(KINDS[kind], levels, block)
    except FormatError as error:
        raise FormatError(f"{what}: {error}") from None
    blocks = -(-n // block)
    absmax = _part(tensors, f"{base}.absmax")
    if f"{base}.nested_absmax" not in tensors:
        _check(absmax, "F32", blocks)
        return four_bit_tensor(base, type_, shape, codes, Maxima(absmax, blocks))
    _check(absmax, "U8", blocks)
    second = _part(tensors, f"{base}.nested_absmax")
    _check(second, "F32", -(-blocks // NESTED_BLOCK))
    if settings.get("nested_blocksize") != NESTED_BLOCK:
        raise UnsupportedError(f"{what} has nested_blocksize {settings.get('nested_blocksize')}; 256 can be read")
    offset = settings.get("nested_offset")
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise FormatError(f"{what}: its quant_state has nested_offset {offset!r}; a number is wanted")
    nested = _floats(tensors, f"{base}.nested_quant_map", 256)
    return four_bit_tensor(base, type_, shape, codes, Maxima(absmax, blocks, nested, second, offset=offset))


def _state(tensor: Tensor, what: str) -> dict[str, Any]:
    if tensor.nbytes > _MAX_STATE:
        raise FormatError(f"{what}: its quant_state is {tensor.nbytes} bytes long")
    try:
        value = json.loads(tensor.source.read(tensor.offset, tensor.nbytes).tobytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise FormatError(f"{what}: its quant_state is not JSON") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what}: its quant_state is not a JSON object")
    return value


def _shape(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(type(n) is int and n > 0 for n in value):
        raise FormatError(f"{what}: its quant_state has shape {str(value)[:80]}; a list of integers is wanted")
    return tuple(value)


def _floats(tensors: Mapping[str, Tensor], name: str, n: int) -> np.ndarray:
    tensor = _part(tensors, name)
    _check(tensor, "F32", n)
    values = numbers(tensor, F32, 0, n)
    if not np.isfinite(values).all():
        raise FormatError(f"tensor {quote(name)} holds levels that are not finite")
    return values


def _part(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise FormatError(
            f"tensor {quote(name)} is missing, which a bitsandbytes checkpoint has for a quantized matrix"
        )
    return tensors[name]


def _check(tensor: Tensor, type: str, n: int) -> None:
    if tensor.type.name != type or tensor.n_elements != n:
        found = f"{tensor.type} of {tensor.n_elements}"
        raise FormatError(f"tensor {quote(tensor.name)} is {found}; {type} of {n} is needed")


def encode(
    name: str, x: np.ndarray, kind: str = "nf4", nested: bool = False, block: int = BLOCK, dtype: str = "bfloat16"
) -> dict[str, np.ndarray]:
    """The tensors that stand for the float matrix x under `name` in a checkpoint of bitsandbytes, as it writes them.

    `kind` is nf4 or fp4, `nested` quantizes the maxima again, `dtype` is torch's name of the type that bitsandbytes
    dequantizes to. Codes are uint8 (ceil(n / 2), 1). Raises FormatError for NaN and infinities, UnsupportedError for
    another kind.
    """
    if kind not in LEVELS:
        raise UnsupportedError(f"bitsandbytes' type {kind!r}: nf4 and fp4 can be written")
    flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
    four = four_bit(KINDS[kind], LEVELS[kind], block)
    four.check_finite(flat)
    packed, maxima = encode_4bit(flat, four.levels, block)
    offset: Any = None
    out = {name: packed[:, None], f"{name}.absmax": maxima, f"{name}.quant_map": four.levels.copy()}
    if nested:
        codes, second, offset = encode_maxima(maxima)
        out |= {f"{name}.absmax": codes, f"{name}.nested_absmax": second}
        out[f"{name}.nested_quant_map"] = dynamic_map().copy()
    out[f"{name}{STATE}{kind}"] = np.frombuffer(state(kind, x.shape, block, dtype, offset), np.uint8).copy()
    return out


def planned(name: str, shape: tuple[int, ...], kind: str, nested: bool, block: int = BLOCK) -> list[Planned]:
    """The tensors that stand for a matrix of that shape, as `encode` makes them; the JSON text is open."""
    n = math.prod(shape)
    blocks = -(-n // block)
    found = [Planned(name, "U8", (-(-n // 2), 1)), Planned(f"{name}.quant_map", "F32", (16,))]
    found.append(Planned(f"{name}.absmax", "U8" if nested else "F32", (blocks,)))
    if nested:
        found.append(Planned(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)))
        found.append(Planned(f"{name}.nested_quant_map", "F32", (256,)))
    longest = len(state(kind, shape, block, "bfloat16", -1.2345678901234567e-300 if nested else None))
    return [*found, Planned(f"{name}{STATE}{kind}", "U8", (longest,), is_open=True)]


def state(kind: str, shape: tuple[int, ...], block: int, dtype: str, offset: float | None = None) -> bytes:
    """The JSON text beside a matrix; `offset` is that of nested maxima."""
    said: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": list(shape)}
    if offset is not None:
        said |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
    return json.dumps(said).encode()


# -- eight bits --------------------------------------------------------------------------------------


class Int8Rows(TensorType):
    """w = q * d / 127: int8 rows with a float32 maximum each, as LLM.int8 has them. Read from checkpoints only."""

    name, id = "LLM.INT8", -1

    def __init__(self, cols: int):
        self.block = cols
        self.fields = np.dtype([("d", "<f4"), ("qs", "i1", cols)])

    @property
    def is_quantized(self) -> bool:
        return True

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """As bitsandbytes does: times d, then times 1 / 127, in float32."""
        return blocks["qs"].astype(np.float32) * blocks["d"][:, None] * np.float32(1 / 127)


_int8_rows = lru_cache(64)(Int8Rows)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Int8Tensor(Tensor):
    """A matrix of Int8Rows; `scales` are float32 (rows,)."""

    values: Tensor
    scales: Tensor

    @property
    def in_one_piece(self) -> bool:
        return False

    @property
    def raw(self) -> np.ndarray:
        return self.read_rows(0, self.rows).reshape(*self.shape[:-1], self.row_nbytes)

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop, uint8 (stop - start, bytes per row)."""
        out = np.empty(stop - start, self.type.fields)
        out["d"] = numbers(self.scales, F32, start, stop)
        out["qs"] = self.values.read_rows(start, stop).view(np.int8)
        return out.view(np.uint8).reshape(stop - start, self.row_nbytes)


def _int8(base: str, tensors: Mapping[str, Tensor]) -> Tensor:
    name = f"{base}.weight"
    values, scales = _part(tensors, name), _part(tensors, f"{base}.SCB")
    if values.type != "I8" or len(values.shape) != 2 or 0 in values.shape:
        raise FormatError(
            f"tensor {quote(name)} is {values.type} of shape {list(values.shape)}; an I8 matrix is needed"
        )
    _check(scales, "F32", values.rows)
    order = tensors.get(f"{base}.weight_format")
    if order is not None and order.source.read(order.offset, order.nbytes).any():
        raise UnsupportedError(f"tensor {quote(name)} is stored in an order for one kind of GPU; only rows can be read")
    kind = _int8_rows(values.cols)
    nbytes = values.nbytes + scales.nbytes
    return Int8Tensor(name, kind, values.shape, nbytes, values.offset, values.source, values=values, scales=scales)
