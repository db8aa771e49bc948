"""All modules that the backend may ask for, so that a test compiles each of them for each architecture."""

from __future__ import annotations

from collections.abc import Iterator

from . import attention, loader, weights
from .loader import Module

PLAIN: tuple[str, ...] = ("elementwise.cu", "prompt.cu", "sample.cu")  # compiled without macros
# head_dim and queries a key head: of the networks there are, and the ends of what attention.cu takes
HEADS = ((64, 1), (64, 3), (64, 4), (64, 8), (96, 1), (128, 1), (128, 4), (128, 5), (128, 8), (80, 4), (34, 3), (2, 1),
         (256, 1), (256, 16), (250, 16))  # fmt: skip


def modules() -> Iterator[Module]:
    """Each of them; some more than once."""
    for file in PLAIN:
        yield loader.module(file)
    for head_dim, group in HEADS:
        yield attention.attend_module(head_dim, group)
    yield from weights.modules()
