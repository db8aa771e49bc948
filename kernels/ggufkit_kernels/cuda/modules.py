"""All modules that the backend may ask for, so that a test compiles each of them for each architecture."""

from __future__ import annotations

from collections.abc import Iterator

from . import attention, encode, loader, weights
from .loader import Module

PLAIN: tuple[str, ...] = ("elementwise.cu", "prompt.cu", "sample.cu")  # compiled without macros
# head_dim and queries a key head: of the networks there are, and the ends of what attention.cu takes
HEADS = ((64, 3), (64, 8), (80, 1), (128, 1), (128, 4), (128, 8), (34, 3), (2, 1), (256, 16), (250, 16))
PROMPT_DIMS = (64, 80, 96, 128, 192, 256, 16, 112)  # heads of flash.cu: of networks, the smallest, one that is padded


def modules() -> Iterator[Module]:
    """Each of them; some more than once. Weights are packed in strips of 16 or 8 rows, as the host's processor is."""
    for file in PLAIN:
        yield loader.module(file)
    for head_dim, group in HEADS:
        yield attention.attend_module(head_dim, group)
    for head_dim in PROMPT_DIMS:
        for arch in (90, 75):
            if shape := attention.tiles(head_dim, arch):
                yield attention.flash_module(head_dim, shape)
    yield encode.MODULE
    for lanes in (16, 8):
        yield from weights.modules(lanes=lanes)
