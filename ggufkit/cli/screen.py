"""What commands share in talking to a person: options, lines, tables, JSON, loading. Imports stay light."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import click
from ggufkit_formats.errors import FormatError, GgufkitError, UsageError

from .document import print_json
from .progress import Progress, say

__all__ = ["Progress", "print_json", "say"]  # and all below

model_option = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="A GGUF file, or hf:ORG/REPO[:TYPE]. Default: $GGUFKIT_MODEL, else SmolLM2-135M-Instruct.",
)
hf_option = click.option("-hf", "hf", metavar="ORG/REPO", help="A Hugging Face repository: -hf ORG/REPO[:TYPE].")
threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads. Default: the physical cores."
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)


class _Layers(click.ParamType):
    """How many layers: a number, `all`, or `auto`, which is None."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or isinstance(value, int):
            return value
        text = value.strip().lower()
        if text in ("auto", "-1"):
            return None
        if text == "all":
            return 1 << 30
        if not text.isascii() or not text.isdigit():
            self.fail(f"{printable(value)} is neither a number of layers nor auto or all", param, ctx)
        return min(int(text), 1 << 30)


gpu_layers_option = click.option(
    "-ngl",
    "--n-gpu-layers",
    type=_Layers(),
    default=None,
    metavar="N|auto",
    help="The last N layers on the GPU, the others on the CPU; more than there are: all. Default: as many as fit.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
pre_tokenizer_option = click.option(
    "--pre-tokenizer", metavar="NAME", help="Use this pre-tokenizer instead of the one that the file names."
)


def model_name(model: str | None, hf: str | None) -> str | None:
    """What -m and -hf say together; None where neither is given."""
    if model is not None and hf is not None:
        raise UsageError("-m and -hf both name a model: give one of them")
    if model == "":
        raise UsageError("-m names no model: it is empty")
    return f"hf:{hf.removeprefix('hf:')}" if hf is not None else model


# -- text that is safe to show ----------------------------------------------------------------


def printable(text: str) -> str:
    """Text that cannot drive a terminal: control characters other than newline and tab are shown escaped.

    So are marks that turn the writing direction and surrogates; joiners, blanks and other invisible characters
    that writing needs are left alone.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_hostile(c) else c for c in text)


def _is_hostile(c: str) -> bool:
    if c.isprintable() or c in "\n\t":
        return False
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in _TURNING


_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def one_line(text: object) -> str:
    """Text as one printable line."""
    return printable(" ".join(str(text).split()))


def describe(error: BaseException) -> str:
    """An error in one line, as it stands after `error: `."""
    if isinstance(error, GgufkitError):
        return one_line(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{error.strerror or error}")
    if isinstance(error, MemoryError):
        return "out of memory"
    return one_line(f"internal error: {type(error).__name__}: {error} (GGUFKIT_DEBUG=1 shows where)")


# -- results ----------------------------------------------------------------------------------


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


# -- models and texts -------------------------------------------------------------------------


def read_stdin() -> str:
    """All of stdin as text; bytes that are no UTF-8 become U+FFFD."""
    if sys.stdin is None:
        raise UsageError("- reads the text from stdin, which is closed")
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def read_text(path: str) -> str:
    """A text file, which must be UTF-8."""
    from pathlib import Path

    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except ValueError as error:  # a name with a null character
        raise FormatError(f"{path!r}: cannot be read ({error})") from None


class compiling:
    """A bar that counts kernels while they are compiled: `with compiling() as progress` (done, in all).

    Where there is no terminal `progress` is None, and who compiles says one line.
    """

    def __enter__(self) -> Any:
        self.bar = Progress("compiling kernels", 1, unit=lambda n: f"{n:.1f}", patience=0.3)
        return self._progress if sys.stderr.isatty() else None

    def _progress(self, done: int, total: int) -> None:
        self.bar.what, self.bar.total = f"compiling kernels {done}/{total}", total
        if done < total:
            self.bar(done)
        else:
            self.bar.close()

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _compile_ahead(model: str | None, device: str) -> None:
    """Compile in the background what every model needs, while a model is fetched."""
    from .. import sources

    if device in ("auto", "cpu") and sources.fetches(model):
        from ggufkit_kernels.cpu import prepare

        prepare.prepare(prepare.common(), progress=None if not sys.stderr.isatty() else lambda done, total: None)


def load(model: str | None, device: str = "auto", threads: int | None = None, n_ctx: int | None = None,
         pre_tokenizer: str | None = None, n_gpu_layers: int | None = None) -> Any:  # fmt: skip
    """The model to run, with progress bars for fetching and loading it."""
    from ggufkit_runtime import generate

    from .. import sources

    _compile_ahead(model, device)
    path = sources.model(model)
    counting = compiling()
    with counting as kernels, Progress(f"loading {path.name}", 1, unit=size, patience=1.0) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            if counting.bar.guard is None:  # one bar at a time
                bar(done)

        loaded = generate.load(path, device=device, threads=threads, n_ctx=n_ctx, pre=pre_tokenizer,
                               progress=progress, kernels=kernels, n_gpu_layers=n_gpu_layers)  # fmt: skip
    _tell_device(loaded, n_gpu_layers)
    compiled()  # those do not count in the timings
    trained = loaded.config.n_ctx_train
    if n_ctx is not None and n_ctx > trained:
        say(f"note: the model was trained on contexts of up to {trained} tokens, not {n_ctx}")
    return loaded


def _tell_device(loaded: Any, n_gpu_layers: int | None) -> None:
    """What is not where it was asked for, or not all on one side."""
    if loaded.ops.name == "cuda+cpu":
        say(f"{loaded.ops.n_gpu_layers} of {loaded.ops.n_layers} layers on the GPU, the rest and the output on the CPU")
    elif n_gpu_layers and loaded.ops.name == "cpu":
        say("note: no GPU is used here, the CPU runs all layers")


_known = 0


def compiled() -> bool:
    """Whether kernels were compiled since this was last asked, so that the timings are not typical."""
    global _known
    jit = sys.modules.get("ggufkit_kernels.cpu.jit")
    before, _known = _known, jit.compiled() if jit else 0
    return _known > before


def reading(session: Any) -> Progress:
    """A progress bar for the prompt that the session is about to read; it goes away when the prompt is read."""
    bar = Progress("reading the prompt", 1, unit=lambda n: f"{n:.0f} tokens", patience=1.0)

    def progress(done: int, total: int) -> None:
        bar.total = total
        if done < total:
            bar(done)
        else:
            bar.close()

    session.progress = progress
    return bar
