"""Measure every file type on a model: perplexity, divergence from the model as F32, bits a weight, bytes; draw it.

    python tools/quality.py -o results.json -f TEXT [MODEL]       # default: the default model
    python tools/quality.py tests/data/small-model -o docs/quality/small-model.json \\
        -f tests/data/small-model-heldout.txt --imatrix auto --plot docs/quality/small-model.svg --page docs/quality.md

MODEL is a checkpoint folder or a GGUF file. Results are kept in the JSON file after each type, and a run that was
stopped goes on; with all results there, the table and the plot are made again. `--page` puts the table into a document
between `<!-- quality: NAME -->` and `<!-- end -->`, NAME being that of the JSON file. The plot needs matplotlib
(`pip install ggufkit[plot]`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import quality_page
from ggufkit_formats.errors import GgufkitError, UsageError

from ggufkit import quality, sources
from ggufkit.cli import screen


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: $GGUFKIT_MODEL, else SmolLM2-135M-Instruct")
    parser.add_argument("-f", "--file", type=Path, required=True, metavar="TEXT", help="a UTF-8 text to score")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="JSON", help="where results are kept")
    parser.add_argument("--types", default="", metavar="A,B,…", help="file types; default: all that can be written")
    parser.add_argument("--imatrix", metavar="FILE|auto", help="an importance matrix, for the types that use one; auto "
                        "makes it from the first half of the text, and scores the second")  # fmt: skip
    parser.add_argument("--rescale", type=int, metavar="SEED", help="move random factors between tensors before, so "
                        "that no type is favoured; for a model that is quantized already")  # fmt: skip
    parser.add_argument("-c", "--ctx-size", type=int, default=512, metavar="N", help="tokens in a window (512)")
    parser.add_argument("--chunks", type=int, metavar="N", help="most windows to score")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="put the table into this document")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw divergence against bits a weight")
    parser.add_argument("--title", help="of the plot; default: the model's name")
    parser.add_argument("-t", "--threads", type=int, metavar="N")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for files on their way (default: a new one)")
    return parser


class Shown:
    """A bar for what is being done; one at a time."""

    def __init__(self) -> None:
        self.what, self.bar = "", screen.Progress("", 1)

    def __call__(self, what: str, done: float, total: float) -> None:
        if what != self.what:
            self.bar.close()
            self.what, self.bar = what, screen.Progress(what, max(total, 1), unit=lambda n: f"{n:.3g}")
        self.bar(done)


def measured(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    settings = quality.Settings(args.file, args.ctx_size, args.chunks, args.rescale, args.imatrix, args.threads)
    model = Path(args.model) if args.model else sources.model(None)
    study = quality.Study(model, args.output, settings, work)
    wanted = quality.variants([t for t in args.types.split(",") if t], args.imatrix is not None)
    left, shown = len(study.missing(wanted)), Shown()
    try:
        for result in study.run(wanted, shown):
            left -= 1
            shown("", 0, 1)
            screen.say(f"{quality_page.line(result)} ({left} left)")
    finally:
        shown.bar.close()
    return study.document


def main() -> int:
    args = arguments().parse_args()
    try:
        if args.plot and not quality_page.can_plot():
            raise UsageError("the plot needs matplotlib: pip install 'ggufkit[plot]'")
        with tempfile.TemporaryDirectory(prefix="quality-") as temporary:
            document = measured(args, args.work or Path(temporary))
        text = quality_page.table(document)
        if args.page:
            quality_page.insert(args.page, args.output.stem, text)
        if args.plot:
            quality_page.plot(document, args.plot, args.title or document["model"]["name"])
    except GgufkitError as error:
        print(f"error: {screen.describe(error)}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
