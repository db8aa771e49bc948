"""The kernels' tests on small shapes once more, in a process of its own with other settings of the emulated device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ggufkit_kernels.cuda import loader

HERE = Path(__file__).parent


def python(command: list[str], words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the emulated device's settings `words`."""
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=HERE.parent.parent,
        env={**os.environ, "GGUFKIT_EMULATED": words, **env},
    )  # fmt: skip


def run_tests(words: str, selection: list[str], **env: str) -> None:
    """Run tests of this folder, which must pass, in a process for each processor: most of it is compiling."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-n", str(min(os.cpu_count() or 1, 8))]
    done = python(["-m", "pytest", *options, *selection], words, PYTEST_ADDOPTS="", **env)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def all_kernels(words: str, record: Path, **env: str) -> None:
    """Run the tests marked `kernels`: they must pass, and run every kernel there is. `record`: a folder for notes."""
    record.mkdir()
    run_tests(words, ["-m", "kernels and not gpu", str(HERE)], GGUFKIT_RAN=str(record), **env)
    lines = [line for file in record.iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    there = {f"{file} {name}" for file in loader.files() for name in loader.kernel_names(file)}
    assert there
    assert there - set(lines) == set(), "kernels that no test marked `kernels` runs"
    # headers may not hide kernels from the loader
    assert {line for line in lines if not line.startswith(os.sep)} <= there
