"""Tokenizers: from the metadata of a GGUF file, and (in `hf`) from Hugging Face files to such metadata.

    t = tokenizer.from_metadata(gguf.open(path).metadata)
    ids = t.encode("Hello"); text = t.decode(ids)

`hf`, `sentencepiece`, `tokenizers` and `jinja2` are loaded when they are first needed, not by importing this package.
"""

from .tokenizer import Stream, Tokenizer, from_metadata

__all__ = ["Stream", "Tokenizer", "from_metadata"]
