"""ggufkit bench: tokens per second, in llama-bench's tests."""

from __future__ import annotations

import dataclasses
import sys

import click
from ggufkit_formats.errors import UsageError

from . import screen


@click.command(name="bench", short_help="Measure tokens per second.")
@screen.model_option
@screen.hf_option
@click.option("-p", "--n-prompt", type=click.IntRange(0), default=512, show_default=True, metavar="N",
              help="Tokens of the prompt; 0 for none.")  # fmt: skip
@click.option("-n", "--n-gen", type=click.IntRange(0), default=128, show_default=True, metavar="N",
              help="Tokens to generate; 0 for none.")  # fmt: skip
@click.option(
    "-r",
    "--repetitions",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Runs of each test; the median counts.",
)
@screen.threads_option
@screen.device_option
@screen.gpu_layers_option
@screen.json_option
def command(model: str | None, hf: str | None, n_prompt: int, n_gen: int, repetitions: int, threads: int | None,
            device: str, n_gpu_layers: int | None, as_json: bool) -> None:  # fmt: skip
    """Time reading a prompt (pp) and generating (tg), as llama-bench does."""
    from ggufkit_runtime import evaluate

    from ..quantize import file_types

    if n_prompt == n_gen == 0:
        raise UsageError("nothing to measure: -p and -n are both 0")
    loaded = screen.load(screen.model_name(model, hf), device, threads, n_gpu_layers=n_gpu_layers)
    with screen.Progress("bench", 1, unit=lambda n: f"{n:.2f} runs", patience=0) as bar:
        bar(0)

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar(done)

        results = evaluate.bench(loaded, n_prompt, n_gen, repetitions, progress)
    info = loaded.info
    file_type = None if info.file_type is None else file_types.by_id(info.file_type)
    document = {
        "model": info.name,
        "type": file_type.name if file_type else info.main_type,
        "n_parameters": info.n_parameters,
        "n_bytes": info.n_bytes,
        "device": loaded.ops.name,
        "threads": loaded.ops.threads,
        "results": [dataclasses.asdict(r) for r in results],
    }
    if as_json:
        return screen.print_json(document)
    sys.stdout.write(
        f"{screen.printable(info.name)} {document['type']}, {info.n_parameters / 1e6:.1f} M parameters, "
        f"{screen.size(info.n_bytes)}, {document['device']}, {document['threads']} threads\n"
    )
    rows = [(r.test, f"{r.tokens_per_s:.1f} ± {r.stdev:.1f}", f"{r.gb_per_s:.2f}") for r in results]
    sys.stdout.write(screen.table(rows, ("test", "tokens/s", "GB/s of weights"), right=(1, 2)) + "\n")
    return None
