"""All modules that the backend may ask for, so that a test compiles each of them for each architecture."""

from __future__ import annotations

from collections.abc import Iterator

from . import encode, loader, weights
from .loader import Module

PLAIN: tuple[str, ...] = ("elementwise.cu", "sample.cu")  # compiled without macros


def modules() -> Iterator[Module]:
    """Each of them; some more than once. Weights are packed in strips of 16 or 8 rows, as the host's processor is."""
    for file in PLAIN:
        yield loader.module(file)
    yield encode.MODULE
    for lanes in (16, 8):
        yield from weights.modules(lanes=lanes)
