"""ggufkit export: a GGUF file becomes a Hugging Face checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING

import click

from . import screen

if TYPE_CHECKING:
    from ..export import Report


@click.command(name="export", short_help="Write a GGUF file as a Hugging Face checkpoint.")
@click.argument("file")
@click.argument("output", metavar="OUT_DIR")
@click.option("--dtype", default="bf16", show_default=True, metavar="TYPE",
              help="bf16, f16, f32; nf4, nf4_dq, fp4, fp4_dq (bitsandbytes); packed (BitNet).")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a folder that holds a checkpoint.")
@screen.threads_option
@screen.json_option
def command(file: str, output: str, dtype: str, overwrite: bool, threads: int | None, as_json: bool) -> None:
    """Write the model in a GGUF FILE to the folder OUT_DIR: safetensors, config.json and tokenizer.

    FILE is a path or hf:ORG/REPO[:TYPE]. With nf4 and its kin the matrices inside the blocks are those of bitsandbytes
    (dq: double quantization), with packed those of a ternary BitNet; everything else is BF16.
    """
    from .. import sources
    from ..export import export

    path = sources.model(file)
    with contextlib.ExitStack() as stack:
        bars: list[screen.Progress] = []
        began = time.monotonic()

        def started(report: Report) -> None:
            for note in report.notes:
                screen.say(f"note: {screen.printable(note)}")
            bars.append(stack.enter_context(screen.Progress(f"writing {report.dtype}", 1, screen.size)))

        def progress(done: int, total: int) -> None:
            bars[0].total = total
            bars[0](done)

        report = export(path, output, dtype, overwrite=overwrite, threads=threads, progress=progress, started=started)
    seconds = time.monotonic() - began
    if as_json:
        screen.print_json(report.as_json())
    else:
        click.echo(_table(report))
        click.echo(f"\n{screen.printable(report.output)} holds {', '.join(report.files)}")
    screen.say(f"{screen.size(report.n_bytes)} in {seconds:.1f} s")


def _table(report: Report) -> str:
    """Types in the file and dtypes in the checkpoint, with tensors and bytes."""
    tensors: Counter[tuple[str, str]] = Counter()
    nbytes: Counter[tuple[str, str]] = Counter()
    for entry in report.tensors:
        tensors[entry.source_type, entry.dtype] += 1
        nbytes[entry.source_type, entry.dtype] += entry.nbytes
    rows = [(*kinds, tensors[kinds], n) for kinds, n in nbytes.most_common()]
    total = ("all", "", len(report.tensors), nbytes.total())
    return screen.table([*rows, total], ("from", "to", "tensors", "bytes"), (2, 3))
