"""What `ggufkit.open` returns: a GGUF file that also knows its tokenizer."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from ggufkit_formats.gguf import GgufFile

if TYPE_CHECKING:
    from ggufkit_runtime.tokenizer import Tokenizer


class File(GgufFile):
    """An open GGUF file: `.metadata`, `.tensors` (name -> tensor), `.tokenizer`. Also a context manager."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the metadata; works on a file that holds a vocabulary and no weights, too.

        Raises UnsupportedError for an unknown kind or pre-tokenizer, FormatError where it is missing or broken.
        """
        from ggufkit_runtime import tokenizer

        return tokenizer.from_metadata(self.metadata)
