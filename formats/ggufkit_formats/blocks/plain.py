"""Plain number types: one weight a block, no scales."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from .base import TensorType, register


class PlainType(TensorType):
    """A number per weight. Decode and encode are casts, with NumPy's rounding (to nearest, ties to even)."""

    uses_importance = False

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return blocks.astype(np.float32)[:, None]

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return x.reshape(-1).astype(self.fields)


@register
class F32(PlainType):
    name, id, fields = "F32", 0, np.dtype("<f4")


@register
class F16(PlainType):
    name, id, fields = "F16", 1, np.dtype("<f2")


@register
class BF16(PlainType):
    """The upper half of a float32. Rounds to nearest even; NaN stays a (quiet) NaN."""

    name, id, fields = "BF16", 30, np.dtype("<u2")

    def decode_blocks(self, blocks: np.ndarray) -> np.ndarray:
        return (blocks.astype(np.uint32) << 16).view(np.float32)[:, None]

    def encode_blocks(self, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        return x.reshape(-1).astype(ml_dtypes.bfloat16).view(np.uint16)


@register
class F64(PlainType):
    name, id, fields = "F64", 28, np.dtype("<f8")


@register
class I8(PlainType):
    name, id, fields = "I8", 24, np.dtype("<i1")


@register
class I16(PlainType):
    name, id, fields = "I16", 25, np.dtype("<i2")


@register
class I32(PlainType):
    name, id, fields = "I32", 26, np.dtype("<i4")


@register
class I64(PlainType):
    name, id, fields = "I64", 27, np.dtype("<i8")
