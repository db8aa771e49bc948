"""ggufkit perplexity: how well a model predicts a text, and how far it is from a reference."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from . import screen


@click.command(name="perplexity", short_help="Measure how well a model predicts a text.")
@screen.model_option
@screen.hf_option
@click.option("-f", "--file", "text_file", required=True, metavar="TEXT", help="A UTF-8 text file.")
@click.option(
    "-c", "--ctx-size", type=click.IntRange(4), default=512, show_default=True, metavar="N", help="Tokens in a window."
)
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="Most windows to score. Default: the whole text.")
@click.option("--against", metavar="REF", help="Compare with this GGUF file (same vocabulary, usually F16 or F32).")
@screen.pre_tokenizer_option
@screen.threads_option
@screen.device_option
@screen.gpu_layers_option
@screen.json_option
def command(model: str | None, hf: str | None, text_file: str, ctx_size: int, chunks: int | None, against: str | None,
            pre_tokenizer: str | None, threads: int | None, device: str, n_gpu_layers: int | None,
            as_json: bool) -> None:  # fmt: skip
    """Perplexity by llama-perplexity's definition: windows of N tokens, the second half of each scored.

    With --against, also the Kullback-Leibler divergence from the reference and the share of equal top tokens.
    """
    from ggufkit_runtime import evaluate

    name = screen.model_name(model, hf)
    text = screen.read_text(text_file)
    loaded = screen.load(name, device, threads, None, pre_tokenizer, n_gpu_layers)
    reference = screen.load(against, device, threads, None, pre_tokenizer, n_gpu_layers) if against else None
    with screen.Progress("perplexity", 1, unit=lambda n: f"{n:.2f} windows", patience=0) as bar:
        bar(0)

        def progress(done: int, total: int, value: float) -> None:
            bar.what, bar.total = f"{'perplexity' if reference is None else 'KL divergence'} {value:.4g}", total
            bar(done)

        divergence: Any = None
        if reference is None:
            result: Any = evaluate.perplexity(loaded, text, ctx_size, chunks, progress)
            document = dataclasses.asdict(result)
        else:
            result, divergence = evaluate.against(loaded, reference, text, ctx_size, chunks, progress)
            document = dataclasses.asdict(result) | dataclasses.asdict(divergence)
    if as_json:
        return screen.print_json(document)
    sys.stdout.write(
        f"perplexity {result.perplexity:.4f} ± {result.stderr:.4f}"
        f" ({result.n_tokens} tokens in {result.n_chunks} windows of {ctx_size})\n"
    )
    if divergence is not None:
        sys.stdout.write(
            f"KL divergence {divergence.kl_mean:.6f} ± {divergence.kl_stderr:.6f}, 99 % below {divergence.kl_p99:.6f}\n"
            f"same top token {100 * divergence.same_top:.2f} %\n"
        )
    return None
