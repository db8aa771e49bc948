"""NF4 in GGUF, which has no type for it: codes and maxima are ordinary tensors, and the reader puts them together.

docs/formats/nf4.md is the specification. A file that has the key VERSION holds, for a tensor X of type NF4,

    X.nf4          I8   (…, cols / 2)   two codes a byte, the first in the high half
    X.nf4_absmax   F32  (blocks,)       the largest |x| of each block; or, quantized again,
                   I8   (blocks,)       codes of 8 bits, and
    X.nf4_nested   F32  (1 + ceil(blocks / 256),)   the offset, then the second-level maxima
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .blocks.nf4 import BLOCK, NESTED_BLOCK, NF4, NF4_LEVELS, FourBitType, encode_4bit, encode_maxima, four_bit
from .errors import FormatError, GgufkitError, UnsupportedError, UsageError
from .four_bit import Maxima, four_bit_tensor
from .gguf_strings import quote
from .tensor import Tensor

VERSION = "ggufkit.nf4.version"
LEVELS = "ggufkit.nf4.levels"
BLOCK_SIZE = "ggufkit.nf4.block_size"
NESTED_LEVELS = "ggufkit.nf4.nested_levels"
NESTED_BLOCK_SIZE = "ggufkit.nf4.nested_block_size"
KEYS = (VERSION, LEVELS, BLOCK_SIZE, NESTED_LEVELS, NESTED_BLOCK_SIZE)
CODES, ABSMAX, NESTED = ".nf4", ".nf4_absmax", ".nf4_nested"  # suffixes
SUFFIXES = (CODES, ABSMAX, NESTED)

Row = tuple[str, str, tuple[int, ...]]  # what a Plan takes


# -- reading -----------------------------------------------------------------------------------------


def join(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors as a model means them: each NF4 tensor once, under its own name, in the place of its codes.

    Raises FormatError where the parts of a tensor do not fit each other, or levels are missing or make no sense;
    UnsupportedError for another version.
    """
    if VERSION not in metadata:
        return dict(tensors)
    version = metadata[VERSION]
    if version != 1:
        raise UnsupportedError(f"{path}: metadata {VERSION!r} is {version!r}; version 1 of NF4 tensors can be read")
    try:
        kind = four_bit("NF4", _floats(metadata, LEVELS), _integer(metadata, BLOCK_SIZE))
        nested = _nested_levels(metadata)
    except GgufkitError as error:
        raise type(error)(f"{path}: {error}") from None
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(CODES):
            whole = name.removesuffix(CODES)
            if whole in tensors:
                raise FormatError(f"{path}: tensor {quote(whole)} stands there both whole and as {quote(name)}")
            try:
                found[whole] = _joined(whole, tensor, tensors, kind, nested)
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from None
        elif name.endswith((ABSMAX, NESTED)):
            whole = name.removesuffix(ABSMAX if name.endswith(ABSMAX) else NESTED)
            if whole + CODES not in tensors:
                raise FormatError(f"{path}: tensor {quote(name)} belongs to {quote(whole + CODES)}, which is missing")
        else:
            found[name] = tensor
    return found


def _joined(name: str, codes: Tensor, tensors: Mapping[str, Tensor], kind: FourBitType,
            nested: np.ndarray | None) -> Tensor:  # fmt: skip
    if codes.type != "I8" or not codes.shape:
        raise FormatError(f"tensor {quote(codes.name)} holds codes: it must be I8, not {codes.type} {codes.shape}")
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    blocks = -(-math.prod(shape) // kind.block)
    absmax = _part(tensors, name + ABSMAX, ("F32", "I8"), blocks, codes)
    if absmax.type == "F32":
        return four_bit_tensor(name, kind, shape, codes, Maxima(absmax, blocks))
    if nested is None:
        raise FormatError(f"tensor {quote(absmax.name)} is quantized, but there is no metadata {NESTED_LEVELS!r}")
    second = _part(tensors, name + NESTED, ("F32",), 1 + -(-blocks // NESTED_BLOCK), codes)
    return four_bit_tensor(name, kind, shape, codes, Maxima(absmax, blocks, nested, second, skip=1))


def _part(tensors: Mapping[str, Tensor], name: str, types: tuple[str, ...], n: int, codes: Tensor) -> Tensor:
    part = tensors.get(name)
    if part is None:
        raise FormatError(f"tensor {quote(name)} is missing, which {quote(codes.name)} needs")
    if part.type.name not in types:
        raise FormatError(f"tensor {quote(name)} has type {part.type}; it must be {' or '.join(types)}")
    if part.shape != (n,):
        raise FormatError(
            f"tensor {quote(name)} has shape {part.shape}; {quote(codes.name)} of shape {codes.shape} needs ({n},)"
        )
    return part


def _nested_levels(metadata: Mapping[str, Any]) -> np.ndarray | None:
    if NESTED_LEVELS not in metadata:
        return None
    levels, block = _floats(metadata, NESTED_LEVELS), _integer(metadata, NESTED_BLOCK_SIZE)
    if levels.shape != (256,) or not np.isfinite(levels).all():
        raise FormatError(f"metadata {NESTED_LEVELS!r} must be 256 finite numbers")
    if block != NESTED_BLOCK:
        raise UnsupportedError(f"metadata {NESTED_BLOCK_SIZE!r} is {block}; {NESTED_BLOCK} can be read")
    return levels


def _floats(metadata: Mapping[str, Any], key: str) -> np.ndarray:
    value = metadata.get(key)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        raise FormatError(f"metadata {key!r} is missing" if value is None else f"metadata {key!r} must be numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(np.float32)


def _integer(metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key)
    if type(value) is not int:
        raise FormatError(f"metadata {key!r} is missing" if value is None else f"metadata {key!r} must be an integer")
    return value


# -- writing -----------------------------------------------------------------------------------------


def metadata(kind: FourBitType | None = None, nested_levels: np.ndarray | None = None) -> dict[str, Any]:
    """The keys of a file with NF4 tensors: their levels and block, and, with `nested_levels` (256,), the map of maxima
    that are quantized again."""
    keys: dict[str, Any] = {
        VERSION: np.uint32(1),
        BLOCK_SIZE: np.uint32(kind.block if kind else BLOCK),
        LEVELS: (kind.levels if kind else NF4_LEVELS).copy(),
    }
    if nested_levels is not None:
        keys |= {NESTED_BLOCK_SIZE: np.uint32(NESTED_BLOCK), NESTED_LEVELS: nested_levels.copy()}
    return keys


def rows(name: str, shape: tuple[int, ...], nested: bool = False, block: int = BLOCK) -> list[Row]:
    """The stored tensors of an NF4 tensor, for a Plan: (name, type, shape), the codes first.

    Raises UsageError for rows of an odd length, whose codes would share bytes.
    """
    if not shape or shape[-1] % 2:
        raise UsageError(f"tensor {quote(name)} of shape {shape} cannot be NF4: rows of an even length are needed")
    blocks = -(-math.prod(shape) // block)
    found: list[Row] = [(name + CODES, "I8", (*shape[:-1], shape[-1] // 2))]
    found.append((name + ABSMAX, "I8" if nested else "F32", (blocks,)))
    if nested:
        found.append((name + NESTED, "F32", (1 + -(-blocks // NESTED_BLOCK),)))
    return found


def encode(x: np.ndarray, nested: bool = False) -> list[np.ndarray]:
    """Float (…, cols) -> the bytes of the stored tensors, uint8, in the order of `rows`. For arrays in memory.

    Raises FormatError for NaN and infinities.
    """
    flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
    NF4().check_finite(flat)
    codes, maxima = encode_4bit(flat, NF4_LEVELS)
    return [codes, *encode_absmax(maxima, nested)]


def encode_absmax(maxima: np.ndarray, nested: bool, levels: np.ndarray | None = None) -> list[np.ndarray]:
    """Maxima float32 (blocks,) -> the bytes of the stored tensors that hold them, uint8."""
    if not nested:
        return [maxima.astype("<f4", copy=False).view(np.uint8)]
    codes, second, offset = encode_maxima(maxima, levels)
    return [codes, nested_bytes(second, offset)]


def nested_bytes(second: np.ndarray, offset: np.float32) -> np.ndarray:
    """The bytes of `X.nf4_nested`, uint8."""
    return np.concatenate([[offset], second]).astype("<f4").view(np.uint8)
