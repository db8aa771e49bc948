"""The kernels' tests on small shapes once more, under the address and undefined-behaviour sanitizers, in both orders of
the threads. Another process does it, since the sanitizer has to be loaded first. It tells which kernels it ran, and
these must be all that there are: a kernel without a test marked `kernels` is named here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from ggufkit_kernels.cuda import loader

HERE = Path(__file__).parent


def sanitizer() -> str | None:
    """The library to load first, or None where the compiler has none."""
    if emulated.COMPILER is None:
        return None
    found = subprocess.run([emulated.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True)
    path = found.stdout.strip()
    return path if os.sep in path else None  # a bare name: not found


LIBRARY = sanitizer()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="not sanitized: there is no g++ with libasan")


def sanitized(command: list[str], words: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizers, and the emulated device's settings `words`."""
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=HERE.parent.parent,
        env={
            **os.environ, "GGUFKIT_EMULATED": f"sanitize {words}", "LD_PRELOAD": str(LIBRARY),
            "ASAN_OPTIONS": "detect_leaks=0", **env,
        },
    )  # fmt: skip


@pytest.mark.parametrize("order", ["", "reversed"], ids=["forward", "reversed"])
def test_all_kernels(order, tmp_path):
    # pytest's own workers would each write the record
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "kernels and not gpu",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(HERE),
    ]
    done = sanitized(command, order, GGUFKIT_RAN=str(tmp_path / "ran"), PYTEST_ADDOPTS="")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    lines = (tmp_path / "ran").read_text(encoding="utf-8").splitlines()
    there = {f"{file} {name}" for file in loader.files() for name in loader.kernel_names(file)}
    assert there
    assert there - set(lines) == set(), "kernels that no test marked `kernels` runs"
    # headers may not hide kernels from the loader
    assert {line for line in lines if not line.startswith(os.sep)} <= there


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("t.run(d, 'beyond_shared', 1, 32, np.zeros(32, np.int32), 39)", ""),
        ("t.run(d, 'beyond_shared', 1, 32, np.zeros(32, np.int32), 40)", "out of bounds|global-buffer-overflow"),
        ("t.run(d, 'beyond_global', 1, 32, np.zeros(35, np.int32), 3)", ""),
        ("t.run(d, 'beyond_global', 1, 32, np.zeros(35, np.int32), 4)", "heap-buffer-overflow"),
        ("t.run(d, 'beyond_global', 1, 32, np.zeros(35, np.int32), -1)", "AddressSanitizer"),
        ("d.launch(t.PROBE.kernel('sums'), (1,), 32, None, None)",
         "null pointer"),
    ],
)  # fmt: skip
def test_the_sanitizers_see(statement, said):
    """That the run above would see a number read or written next to an array."""
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_shim as t, numpy as np; d = t.EmulatedDevice()"
    done = sanitized(["-c", f"{code}; {statement}"])
    if said:
        assert done.returncode != 0 and re.search(said, done.stderr), done.stderr
    else:
        assert done.returncode == 0, done.stderr
