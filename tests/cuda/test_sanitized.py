"""The kernels' tests on small shapes once more, under the address and undefined-behaviour sanitizers, in both orders of
the threads. Another process does it, since the sanitizer has to be loaded first. It tells which kernels it ran, and
these must be all that there are: a kernel without a test marked `kernels` is named here."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import again
import emulated
import pytest


def sanitizer() -> str | None:
    """The library to load first, or None where the compiler has none."""
    if emulated.COMPILER is None:
        return None
    found = subprocess.run([emulated.COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True)
    path = found.stdout.strip()
    return path if os.sep in path else None  # a bare name: not found


LIBRARY = sanitizer()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="not sanitized: there is no g++ with libasan")


ENV = {"LD_PRELOAD": str(LIBRARY), "ASAN_OPTIONS": "detect_leaks=0"}


@pytest.mark.parametrize("order", ["", "reversed"], ids=["forward", "reversed"])
def test_all_kernels(order, tmp_path):
    again.all_kernels(f"sanitize {order}", tmp_path / "ran", **ENV)


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
    done = again.python(["-c", f"{code}; {statement}"], "sanitize", **ENV)
    if said:
        assert done.returncode != 0 and re.search(said, done.stderr), done.stderr
    else:
        assert done.returncode == 0, done.stderr
