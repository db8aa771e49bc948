"""What commands share in talking to a person: options, progress, tables, JSON. Imports stay light."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="A GGUF file, or hf:ORG/REPO[:TYPE]. Default: $GGUFKIT_MODEL or SmolLM2-135M.",
)
hf_option = click.option("-hf", "hf", metavar="ORG/REPO", help="A Hugging Face repository: -hf ORG/REPO[:TYPE].")
threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads. Default: the physical cores."
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
pre_tokenizer_option = click.option(
    "--pre-tokenizer", metavar="NAME", help="Use this pre-tokenizer instead of the one that the file names."
)


def say(line: str) -> None:
    """A line on stderr: everything that is not the result."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def print_json(document: Any) -> None:
    """One JSON document on stdout; numbers that JSON lacks become null."""
    sys.stdout.write(json.dumps(_finite(document), ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def printable(text: str) -> str:
    """Text that cannot drive a terminal: control characters other than newline and tab are shown escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def size(nbytes: float) -> str:
    """Bytes for people: 98.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], right: Sequence[int] = ()) -> str:
    """Aligned plain text; columns in `right` are right-aligned."""
    cells = [[printable(str(c)) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


class Progress:
    """A progress bar with rate and time left on a terminal; elsewhere a plain line every few seconds.

    Use as a context manager; call it with the amount of work that is done so far. Nothing is drawn for work
    that ends within `patience` seconds.
    """

    def __init__(
        self, what: str, total: float, unit: Callable[[float], str] = lambda n: f"{n:.0f}", patience: float = 0.5
    ):
        self.what, self.total, self.unit, self.patience = what, total, unit, patience
        self.began = time.monotonic()
        self.last = self.began
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: float) -> None:
        now = time.monotonic()
        if now - self.began < self.patience:
            return
        if sys.stderr.isatty():
            if self.bar is None:
                self._open()
            rate = self.unit(done / (now - self.began))
            self.bar.update(self.task, completed=done, rate=f"{rate}/s")
        elif now - self.last >= 5 and not os.environ.get("GGUFKIT_NO_PROGRESS"):
            self.last = now
            left = (self.total - done) * (now - self.began) / max(done, 1e-9)
            share = 100 * done / max(self.total, 1e-9)
            say(f"{self.what}: {share:.0f} %, {self.unit(done / (now - self.began))}/s, {left:.0f} s left")

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.task = self.bar.add_task(self.what, total=self.total, rate="")
        self.bar.start()

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def load(model: str | None, device: str = "auto", threads: int | None = None, n_ctx: int | None = None,
         pre_tokenizer: str | None = None) -> Any:  # fmt: skip
    """The model to run, with progress bars for fetching and loading it."""
    from ggufkit_runtime import generate

    from .. import sources

    path = sources.model(model)
    with Progress(f"loading {printable(path.name)}", 1, unit=size, patience=1.0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar(done)

        return generate.load(path, device=device, threads=threads, n_ctx=n_ctx, pre=pre_tokenizer, progress=progress)
