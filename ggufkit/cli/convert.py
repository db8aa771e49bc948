"""ggufkit convert: a checkpoint or a GGUF file becomes a GGUF file of another file type."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING

import click

from . import screen

if TYPE_CHECKING:
    from ..convert import Report


@click.command(name="convert", short_help="Convert a checkpoint or a GGUF file to a file type.")
@click.argument("source")
@click.argument("type", metavar="TYPE")
@click.option("-o", "--output", metavar="OUT",
              help="The file, or a folder for it. Default: <name>-<TYPE>.gguf in the current folder.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--plan", "--dry-run", is_flag=True, help="Show the tables and the exact size; write nothing.")
@click.option("--no-fallback", is_flag=True, help="Fail where a tensor's rows do not fit its type.")
@click.option("--allow-requantize", is_flag=True, help="Convert tensors that are quantized already, too.")
@click.option("--pre-tokenizer", metavar="NAME", help="The tokenizer's pre-tokenizer, where it is not recognised.")
@click.option("--tensor-type", "tensor_types", multiple=True, metavar="PATTERN=TYPE",
              help="Type of the tensors whose name the regular expression is found in; repeatable.")  # fmt: skip
@click.option("--output-tensor-type", metavar="T", help="Type of output.weight (or of the embedding in its place).")
@click.option("--token-embedding-type", metavar="T", help="Type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="No mix: every matrix gets the type's own tensor type.")
@click.option("--imatrix", metavar="FILE", help="An importance matrix, from `ggufkit imatrix` or llama-imatrix.")
@click.option("--ternary", type=click.Choice(["ggml", "absmean", "search"], case_sensitive=False), default="ggml",
              help="Scales of ternary types: ggml's (default), the tensor's mean magnitude, or searched.")  # fmt: skip
@click.option("--report", is_flag=True, help="Measure the error of each tensor against its source.")
@screen.threads_option
@screen.device_option
@screen.json_option
def command(
    source: str,
    type: str,
    output: str | None,
    overwrite: bool,
    plan: bool,
    no_fallback: bool,
    allow_requantize: bool,
    pre_tokenizer: str | None,
    tensor_types: tuple[str, ...],
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    pure: bool,
    imatrix: str | None,
    ternary: str,
    report: bool,
    threads: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Convert SOURCE to a GGUF file of the file type TYPE (q4_k_m, q8_0, f16 …).

    SOURCE is a checkpoint folder with config.json and tokenizer, a .safetensors file that has them beside it,
    hf:ORG/REPO, or a GGUF file. Files are byte for byte those of llama.cpp's converter and llama-quantize.
    """
    from ..convert import convert

    with contextlib.ExitStack() as stack:
        bars: list[screen.Progress] = []
        began = time.monotonic()

        def started(planned: Report) -> None:
            for note in planned.notes:
                screen.say(f"note: {screen.printable(note)}")
            bars.append(stack.enter_context(screen.Progress(f"writing {planned.file_type}", 1, screen.size)))

        def progress(done: int, total: int) -> None:
            bars[0].total = total
            bars[0](done)

        done = convert(
            source, type, output, overwrite=overwrite, plan=plan, no_fallback=no_fallback,
            allow_requantize=allow_requantize, tensor_types=tensor_types, output_tensor_type=output_tensor_type,
            token_embedding_type=token_embedding_type, pure=pure, pre_tokenizer=pre_tokenizer, imatrix=imatrix,
            ternary=ternary, measure=report, device=device,
            threads=threads, progress=progress, started=started,
        )  # fmt: skip
    seconds = time.monotonic() - began
    if plan:
        for note in done.notes:
            screen.say(f"note: {screen.printable(note)}")
    if as_json:
        screen.print_json(done.as_json())
    else:
        click.echo(_tables(done))
        if report:
            click.echo(f"\n{_errors(done)}")
        verb = "would be" if plan else "is"
        click.echo(f"\n{screen.printable(done.output)} {verb} {done.n_bytes} bytes ({screen.size(done.n_bytes)}),"
                   f" {done.bits_per_weight:.2f} bits per weight")  # fmt: skip
    if not plan:
        weights = sum(_count(entry.shape) for entry in done.tensors)
        screen.say(f"{weights / 1e6:.1f} million weights in {seconds:.1f} s ({weights / 1e6 / seconds:.1f} million/s)")


def _tables(report: Report) -> str:
    """Types with their tensors and bytes; then what could not have the type asked for, and why."""
    tensors: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for entry in report.tensors:
        tensors[entry.type] += 1
        nbytes[entry.type] += entry.nbytes
    rows = [(name, tensors[name], n) for name, n in nbytes.most_common()]
    text = screen.table([*rows, ("all", len(report.tensors), nbytes.total())], ("type", "tensors", "bytes"), (1, 2))
    fallen = report.fallbacks
    if not fallen:
        return text
    # tensors of all layers share a line
    groups: Counter[tuple[str, str, str, str]] = Counter()
    for entry in fallen:
        groups[_kind(entry.name), entry.asked, entry.type, entry.reason or ""] += 1
    lines = [(name, n, asked, used, why) for (name, asked, used, why), n in groups.items()]
    return f"{text}\n\n{screen.table(lines, ('tensor', 'number', 'asked', 'used', 'why'), (1,))}"


def _errors(report: Report) -> str:
    """The error of each tensor that has one, and of all weights together."""
    assert report.total is not None
    off = [entry for entry in report.tensors if entry.max_error != 0]
    rows = [(entry.name, entry.type, f"{entry.rel_rmse:.3g}", f"{entry.max_error:.3g}") for entry in off]
    rows.append(("all", "", f"{report.total.relative_rmse:.3g}", f"{report.total.max_difference:.3g}"))
    text = screen.table(rows, ("tensor", "type", "relative RMSE", "largest difference"), (2, 3))
    same = len(report.tensors) - len(off)
    return f"{text}\n{same} of {len(report.tensors)} tensors are what they were" if same else text


def _kind(name: str) -> str:
    """blk.7.attn_v.weight -> blk.*.attn_v.weight"""
    parts = name.split(".")
    if len(parts) > 2 and parts[0] == "blk" and parts[1].isdecimal():
        parts[1] = "*"
    return ".".join(parts)


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
