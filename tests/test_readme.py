"""The README says what is: its tables are current, its commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_current():
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.rewritten(README) == README, "run tools/readme_tables.py"


def test_commands_exist():
    from ggufkit.cli import COMMANDS, group

    named = set(re.findall(r"(?:\$ |`|bin/)ggufkit ([a-z]+)", README))
    assert named and named <= set(COMMANDS)
    import click

    context = click.Context(group)
    for line in re.findall(r"^\$ ggufkit (.+)$", README, re.MULTILINE):
        words = line.split(" 2>")[0].split(" | ")[0].split()
        command = group.get_command(context, words[0])
        assert command is not None
        options = {o for p in command.params for o in p.opts + p.secondary_opts}
        assert {w.split("=")[0] for w in words[1:] if w.startswith("-") and len(w) > 1} <= options, line


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_ci_calls_the_test_command():
    marked = re.search(r"<!-- test command -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert marked and "pytest" in marked[1]
    assert "<!-- test command -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
