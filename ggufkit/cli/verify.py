"""ggufkit verify: whether a GGUF file is sound, and how far it is from its source."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from . import screen


@click.command(name="verify", short_help="Check a GGUF file, weights and tokenizer included.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", metavar="SOURCE", help="A checkpoint or a GGUF file: show the error of each tensor.")
@screen.json_option
def command(file: Path, against: str | None, as_json: bool) -> int:
    """Check the GGUF FILE: structure, tensors, tokenizer, and that weights are finite. Exit status 1 for any problem.

    --against takes what convert takes, and shows how far each tensor is from the source's.
    """
    from .. import verify

    with screen.Progress("verifying", 1, unit=lambda n: f"{n / 1e6:.1f} million weights") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = max(total, 1)
            bar(done)

        found = verify.verify(file, against, progress)
    for note in found.notes:
        screen.say(f"note: {screen.printable(note)}")
    errors = [
        {"name": name, "type": kind, "relative_rmse": d.relative_rmse, "max_difference": d.max_difference}
        for name, (kind, d) in found.errors.items()
    ]
    if as_json:
        problems = [dataclasses.asdict(problem) for problem in found.problems]
        document = {"file": str(file), "sound": not problems, "problems": problems, "notes": found.notes}
        screen.print_json(document | ({"tensors": errors} if against is not None else {}))
        return 1 if problems else 0
    if errors:
        rows = [(e["name"], e["type"], f"{e['relative_rmse']:.3g}", f"{e['max_difference']:.3g}") for e in errors]
        header = ("tensor", "type", "relative RMSE", "largest difference")
        sys.stdout.write(screen.table(rows, header, (2, 3)) + "\n\n")
    for problem in found.problems:
        sys.stdout.write(screen.printable(f"{problem.where}: {problem.what}") + "\n")
    n = len(found.problems)
    sys.stdout.write(f"{n} problem{'s' if n > 1 else ''}\n" if n else "no problems\n")
    return 1 if found.problems else 0
