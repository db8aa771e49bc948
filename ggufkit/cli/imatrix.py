"""ggufkit imatrix: how much each column of a model's weights matters, measured on a text."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ggufkit_formats.errors import FormatError, UsageError

from . import screen

if TYPE_CHECKING:
    from ..quantize.imatrix import Imatrix


@click.command(name="imatrix", short_help="Make an importance matrix for convert.")
@screen.model_option
@screen.hf_option
@click.option("-f", "--file", "text_file", metavar="TEXT", help="A UTF-8 text file, like what the model will read.")
@click.option("-o", "--output", metavar="FILE", help="The file to write, in llama.cpp's GGUF form.")
@click.option(
    "-c", "--ctx-size", type=click.IntRange(4), default=512, show_default=True, metavar="N", help="Tokens in a window."
)
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="Most windows to run. Default: the whole text.")
@click.option("--in-file", "in_files", multiple=True, metavar="FILE",
              help="Add what this importance matrix holds; repeatable. Without -f no model is run.")  # fmt: skip
@click.option("--process-output", is_flag=True, help="Take the output matrix in, too (slower).")
@click.option("--show", is_flag=True, help="Show for each tensor how many tokens and columns were seen.")
@screen.pre_tokenizer_option
@screen.threads_option
@screen.device_option
@screen.gpu_layers_option
@screen.json_option
def command(model: str | None, hf: str | None, text_file: str | None, output: str | None, ctx_size: int,
            chunks: int | None, in_files: tuple[str, ...], process_output: bool, show: bool,
            pre_tokenizer: str | None, threads: int | None, device: str, n_gpu_layers: int | None,
            as_json: bool) -> None:  # fmt: skip
    """Run a text through a model and note how large the inputs of each matrix are, column by column.

    `ggufkit convert --imatrix FILE` then lets errors count the more, the more a column matters. Take a text like what
    the model is for, of 50,000 tokens or more. With --in-file alone, files are merged, or with --show only shown.
    """
    from ..quantize import imatrix

    if text_file is None and not in_files:
        raise UsageError("nothing to make a matrix from: give -f TEXT, or --in-file FILE")
    if output is None and not show:
        raise UsageError("nothing to do: give -o FILE, or --show")
    if output is not None:
        _check_target(output)
    parts = [imatrix.read(name) for name in in_files]
    if text_file is not None:
        name = screen.model_name(model, hf)
        loaded = screen.load(name, device, threads, None, pre_tokenizer, n_gpu_layers)
        parts.append(_collect(loaded, text_file, ctx_size, chunks, process_output))
    matrix = parts[0] if len(parts) == 1 else imatrix.merged(parts)
    if output is not None:
        imatrix.write(matrix, output, overwrite=True)
    for line in imatrix.warnings(matrix):
        screen.say(f"warning: {screen.printable(line)}")
    _report(matrix, output, show, as_json)


def _check_target(output: str) -> None:
    """Before the work, not after it. A matrix of before is replaced, as llama-imatrix does; nothing else is."""
    from ggufkit_formats import gguf

    from ..quantize import imatrix

    if Path(output).exists():
        try:
            imatrix.read(output)
        except FormatError:
            raise UsageError(f"{output}: exists, and is no importance matrix that could be replaced") from None
    gguf.check_target(Path(output), 0, overwrite=True)


def _collect(loaded: Any, text_file: str, ctx_size: int, chunks: int | None, output: bool) -> Imatrix:
    from ggufkit_runtime import importance

    from ..quantize import imatrix

    text = screen.read_text(text_file)
    with screen.Progress("importance", 1, unit=lambda n: f"{n:.2f} windows", patience=0) as bar:
        bar(0)

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar(done)

        found = importance.collect(loaded, text, ctx_size, chunks, progress, output)
    return imatrix.of_activations(found.sums, found.counts, found.n_chunks, found.n_ctx, text_file)


def _report(matrix: Imatrix, output: str | None, show: bool, as_json: bool) -> None:
    from ..quantize import imatrix

    rows = imatrix.coverage(matrix)
    tokens = max(row.tokens for row in rows)
    if as_json:
        document: dict[str, Any] = {
            "file": output, "datasets": matrix.datasets, "n_chunks": matrix.chunk_count,
            "chunk_size": matrix.chunk_size, "n_tokens": tokens,
            "tensors": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        return screen.print_json(document)
    if show:
        sys.stdout.write(_table(rows) + "\n\n")
    where = f"{screen.printable(output)}: " if output else ""
    sys.stdout.write(
        f"{where}{len(rows)} tensors, {tokens} tokens in {matrix.chunk_count} windows of {matrix.chunk_size}\n"
    )
    return None


def _table(rows: Sequence[Any]) -> str:
    """One line a tensor."""
    lines = []
    for row in rows:
        tokens = str(row.tokens) if row.matrices == 1 else f"{row.fewest}-{row.tokens}"
        cells = (row.name, row.matrices, row.cols, tokens, f"{100 * row.covered:.1f} %")
        lines.append((*cells, f"{row.mean:.4g}", f"{row.largest:.4g}"))
    header = ("tensor", "matrices", "columns", "tokens", "covered", "mean square", "largest")
    return screen.table(lines, header, (1, 2, 3, 4, 5, 6))
