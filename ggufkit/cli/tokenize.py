"""ggufkit tokenize: the token ids of a text, as the runtime sees them."""

from __future__ import annotations

import sys

import click

from . import screen


@click.command(name="tokenize", short_help="Show the token ids of a text.")
@click.argument("text")
@screen.model_option
@screen.hf_option
@click.option("--no-special", is_flag=True, help="No BOS or EOS, and special tokens in the text are plain text.")
@screen.pre_tokenizer_option
@screen.json_option
def command(text: str, model: str | None, hf: str | None, no_special: bool, pre_tokenizer: str | None,
            as_json: bool) -> None:  # fmt: skip
    """Show the token ids of TEXT; `-` reads it from stdin. MODEL may be a file with a vocabulary and no weights."""
    from ggufkit_formats import gguf
    from ggufkit_runtime import tokenizer

    from .. import sources

    name = screen.model_name(model, hf)
    if text == "-":
        text = screen.read_stdin()
    with gguf.open(sources.model(name)) as file:
        words = tokenizer.from_metadata(file.metadata, pre=pre_tokenizer)
        ids = words.encode(text, add_special=not no_special, parse_special=not no_special)
        pieces = [words.piece(i) for i in ids]
    if as_json:
        return screen.print_json({"ids": ids, "pieces": [piece.decode("utf-8", "replace") for piece in pieces]})
    width = max((len(str(i)) for i in ids), default=0)
    for i, piece in zip(ids, pieces, strict=True):
        sys.stdout.write(f"{i:>{width}}  {_shown(piece)}\n")
    return None


def _shown(piece: bytes) -> str:
    """A piece in quotes; bytes that are not whole characters stay bytes, b'\\xf0\\x9f'."""
    try:
        return repr(piece.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(piece)
