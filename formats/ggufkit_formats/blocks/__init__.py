"""Tensor types, one class each: `TYPES["Q4_K"]`, `find("q4_k")`, `by_id(12)`."""

from . import fp4, iq, iq4, k, legacy, nf4, plain, ternary  # noqa: F401  (importing a family registers its types)
from .base import BY_ID, TYPES, Quants, ScaledType, TensorType, UnknownType, by_id, find

__all__ = ["BY_ID", "TYPES", "Quants", "ScaledType", "TensorType", "UnknownType", "by_id", "find"]
