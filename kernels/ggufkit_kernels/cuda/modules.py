"""All modules that the backend may ask for, so that a test compiles each of them for each architecture."""

from __future__ import annotations

from collections.abc import Iterator

from . import loader
from .loader import Module

PLAIN: tuple[str, ...] = ("elementwise.cu", "sample.cu")  # compiled without macros


def modules() -> Iterator[Module]:
    """Each of them; some more than once."""
    for file in PLAIN:
        yield loader.module(file)
