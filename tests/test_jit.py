"""The kernels' cache folder and the notice while they compile."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ggufkit_kernels.cpu import jit

PROGRAM = """
import numpy as np
from ggufkit_kernels.cpu import jit
from ggufkit_kernels.cpu.encode.legacy import inverse_of
{before}
for _ in range(2):
    assert inverse_of(np.float32(4)) == (0.25, True)
print(jit.CACHE_DIR, sum(inverse_of.stats.cache_hits.values()))
"""


def run(cache, before="", **env):
    """Run the program; (cache folder, cache hits, what it said on stderr)."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**os.environ, "GGUFKIT_CACHE_DIR": str(cache), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    folder, hits = done.stdout.split()
    return folder, int(hits), done.stderr


def test_compiles_once_and_says_so_once(tmp_path):
    folder, hits, said = run(tmp_path)
    assert folder.startswith(str(tmp_path / "numba-")) and hits == 0
    assert said == "compiling kernels for this processor, once …\n"
    again, hits, said = run(tmp_path)
    assert (again, hits, said) == (folder, 1, "")
    other, hits, said = run(tmp_path, before="jit.set_notice(None)", NUMBA_OPT="1")
    assert other != folder and hits == 0 and said == ""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_unwritable_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    folder, _, _ = run(file, TMPDIR=str(tmp_path))
    assert folder.startswith(str(tmp_path / f"ggufkit-{os.getuid()}"))
    shared = tmp_path / "shared" / f"ggufkit-{os.getuid()}"
    shared.mkdir(parents=True)
    shared.chmod(0o777)  # anybody could put code there
    folder, hits, said = run(file, TMPDIR=str(shared.parent))
    assert (folder, hits) == ("None", 0)
    assert said == "compiling kernels for this processor, and there is no writable folder to keep them in …\n"


def test_old_folders_are_removed(tmp_path):
    for i in range(10):
        (tmp_path / f"numba-{i:016}").mkdir()
        age = time.time() - 7200 + i
        os.utime(tmp_path / f"numba-{i:016}", (age, age))
    (tmp_path / "models").mkdir()
    keep = tmp_path / f"numba-{0:016}"
    jit.prune(tmp_path, keep)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["models", keep.name, *(f"numba-{i:016}" for i in range(10 - jit.KEEP, 10))]


def test_digest_follows_sources_and_settings(monkeypatch):
    before = jit.digest()
    assert before == jit.digest()
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert jit.digest() == before
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert jit.digest() != before


def test_damaged_cache_and_full_disk(tmp_path):
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    folder, hits, _ = run(tmp_path, before=limit)
    assert hits == 0 and not list(Path(folder).rglob("*.nbc"))
    run(tmp_path)
    files = [path for path in Path(folder).rglob("*.nb?") if path.stat().st_size]
    assert len(files) >= 2
    for path in files:
        path.write_bytes(path.read_bytes()[:-20] + bytes(range(20)))
    _, hits, said = run(tmp_path)
    assert hits == 0 and said
    _, hits, said = run(tmp_path)
    assert hits == 1 and not said
