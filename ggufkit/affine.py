"""The plain affine quantizer of the textbooks, for arrays: x ≈ scale * (code - zero_point), rounded to nearest.

    q = ggufkit.affine.quantize(x, bits=8)                          # one scale and zero point for the array
    q = ggufkit.affine.quantize(x, bits=4, axis=0)                  # one a channel (here: a row)
    q = ggufkit.affine.quantize(x, bits=4, group=32)                # one for each 32 values along the last axis
    q = ggufkit.affine.quantize(x, bits=8, symmetric=True)          # codes around 0, zero point 0
    q = ggufkit.affine.quantize(x, bits=8, limits=(-20, 1000))      # a range that is known, not that of the values
    q.codes, q.scale, q.zero_point, q.dequantize()

docs/affine.md explains the block types of GGUF in these terms. Source: Jacob et al., arXiv 1712.05877, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ggufkit_formats.errors import FormatError, UsageError

__all__ = ["Affine", "quantize"]


@dataclass(frozen=True)
class Affine:
    """A quantized array: x ≈ scale * (codes - zero_point).

    With groups, `scale` and `zero_point` are (…, groups); else they have as many dimensions as the array, and
    broadcast against it.
    """

    codes: np.ndarray  # int8 if symmetric, else uint8; the array's shape
    scale: np.ndarray  # float64
    zero_point: np.ndarray  # int16, the code that means 0; within the range of the codes
    bits: int
    symmetric: bool
    group: int | None = None

    def dequantize(self) -> np.ndarray:
        """The values that the codes stand for, float32, in the array's shape."""
        codes = _grouped(self.codes, self.group)
        scale, zero_point = self.scale, self.zero_point
        if self.group is not None:
            scale, zero_point = scale[..., None], zero_point[..., None]
        with np.errstate(over="ignore"):
            x = scale * (codes.astype(np.int64) - zero_point)
            return x.astype(np.float32).reshape(self.codes.shape)


def quantize(
    x: np.ndarray,
    bits: int = 8,
    symmetric: bool = False,
    axis: int | None = None,
    group: int | None = None,
    limits: tuple[float, float] | None = None,
) -> Affine:
    """Quantize an array to `bits` (2 to 8), by one scale and zero point for each part of it.

    A part is the whole array, or with `axis` a slice at one index of that axis (a channel), or with `group` that many
    neighbours along the last axis, which they must divide. `limits` (smallest, largest) are taken for those of the
    values, of every part; what lies outside is clipped.

    Asymmetric: codes 0 … 2**bits - 1 cover the range from the smallest to the largest value, widened to include 0, so
    that 0 is exact: scale = (max - min) / (2**bits - 1), zero point = round(-min / scale). Symmetric: codes
    -(2**(bits-1) - 1) … 2**(bits-1) - 1, scale = max|x| / (2**(bits-1) - 1), zero point 0. Halves round to even. A
    part that is all 0 has scale 1. Computed in float64.

    Raises UsageError for wrong arguments, FormatError for NaN and infinities.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "biuf":
        raise UsageError(f"numbers are wanted, not an array of {x.dtype}")
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 2 <= bits <= 8:
        raise UsageError(f"{bits!r} bits: 2 to 8 are possible")
    if axis is not None and group is not None:
        raise UsageError("either axis or group: a part is a channel or a group")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise UsageError(f"axis {axis} of an array of {x.ndim} dimensions")
    if group is not None and (x.ndim == 0 or group < 1 or x.shape[-1] % group):
        raise UsageError(f"groups of {group} do not divide an array of shape {x.shape}")
    if limits is not None and not -np.inf < limits[0] <= limits[1] < np.inf:
        raise UsageError(f"limits {limits}: a smallest and a largest value are wanted")
    values = x.astype(np.float64)
    if not np.isfinite(values).all():
        raise FormatError("NaN or infinite values cannot be quantized")
    parts = _grouped(values, group)
    over = _reduced(parts.ndim, axis, group)
    low = parts.min(axis=over, keepdims=True, initial=0.0)
    high = parts.max(axis=over, keepdims=True, initial=0.0)
    if limits is not None:
        low, high = np.full_like(low, min(limits[0], 0.0)), np.full_like(high, max(limits[1], 0.0))
    if symmetric:
        largest = (1 << (bits - 1)) - 1
        scale = _scale(np.maximum(-low, high), largest)
        zero_point = np.zeros_like(scale)
        codes = np.clip(np.rint(parts / scale), -largest, largest).astype(np.int8)
    else:
        largest = (1 << bits) - 1
        scale = _scale(high - low, largest)
        zero_point = np.rint(-low / scale)
        codes = np.clip(np.rint(parts / scale) + zero_point, 0, largest).astype(np.uint8)
    if group is not None:
        scale, zero_point = scale[..., 0], zero_point[..., 0]
    return Affine(codes.reshape(x.shape), scale, zero_point.astype(np.int16), int(bits), symmetric, group)


def _scale(width: np.ndarray, steps: int) -> np.ndarray:
    scale = width / steps
    return np.where(scale > 0, scale, 1.0)


def _grouped(x: np.ndarray, group: int | None) -> np.ndarray:
    """(…, n) -> (…, n / group, group)."""
    return x if group is None else x.reshape(*x.shape[:-1], x.shape[-1] // group, group)


def _reduced(n_dims: int, axis: int | None, group: int | None) -> tuple[int, ...]:
    """The axes that share a scale."""
    if group is not None:
        return (n_dims - 1,)
    return tuple(i for i in range(n_dims) if axis is None or i != axis % n_dims)
