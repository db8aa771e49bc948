"""Write the generated tables of README.md anew: `python tools/readme_tables.py`, or `--check` to compare only."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ggufkit_formats.blocks import TYPES, TensorType

README = Path(__file__).resolve().parent.parent / "README.md"


def types_table() -> str:
    """All tensor types: id, block, bits a weight, and what can be done with each."""
    lines = [
        "| type | id | block | bits/weight | read | write | run on CPU | run on CUDA |",
        "|---|--:|--:|--:|:-:|:-:|:-:|:-:|",
    ]
    for t in sorted(TYPES.values(), key=lambda t: (t.is_quantized, t.id < 0, t.name[0] != "F", t.id)):
        cells = [yes(True), yes(writes(t)), yes(True), yes(True)]
        lines.append(
            f"| {t.name} | {t.id if t.id >= 0 else 'none'} | {t.block} | {t.bits_per_weight:g} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def writes(t: TensorType) -> bool:
    return type(t).encode_blocks is not TensorType.encode_blocks


def yes(value: bool) -> str:
    return "✓" if value else "-"


TABLES = {"types": types_table}


def rewritten(text: str) -> str:
    """The README with the text between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no table {name!r}")
        text = pattern.sub(lambda m, make=make: m[1] + "\n" + make() + "\n\n" + m[2], text)
    return text


def main() -> None:
    old = README.read_text(encoding="utf-8")
    new = rewritten(old)
    if "--check" in sys.argv:
        raise SystemExit(0 if new == old else "README.md: tables are out of date, run tools/readme_tables.py")
    README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
