"""The folder of compiled kernels, the notice while they compile, and several processes that share the folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ggufkit_kernels.cpu import elementwise, jit, store, team
from ggufkit_kernels.cpu.simd import LANES, add_f32, load_f32, store_f32

# Adds twice; says where the folder is, how many kernels were compiled, and whether Numba was loaded.
PROGRAM = """
import sys
import numpy as np
from ggufkit_kernels.cpu import jit, store
from ggufkit_kernels.cpu.ops import CpuOps
{before}
for _ in range(2):
    assert (CpuOps(1).add(np.ones(9, np.float32), np.ones(9, np.float32)) == 2).all()
print(store.CACHE_DIR, jit.compiled(), "numba.core" in sys.modules)
"""
KERNELS = 2  # that PROGRAM needs: add, and the one that runs programs


def start(cache, before="", **env):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**os.environ, "GGUFKIT_CACHE_DIR": str(cache), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """(cache folder, kernels compiled, what it said on stderr) of a process of PROGRAM."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    folder, compiled, with_numba = out.split()
    assert with_numba == "True" or compiled == "0"
    return folder, int(compiled), err


def run(*args, **env):
    return ended(start(*args, **env))


def test_compiles_once_and_says_so_once(tmp_path):
    folder, compiled, said = run(tmp_path)
    assert folder.startswith(str(tmp_path / "numba-")) and compiled == KERNELS
    assert said == "compiling kernels for this processor, once …\n"
    # Only what was needed, and a process that finds it does not even load Numba
    assert sorted(p.name for p in Path(folder).iterdir()) == [
        "elementwise.add.kernel", "features.kernel", "team.run_program.kernel",
    ]  # fmt: skip
    assert run(tmp_path, before="sys.modules['numba'] = None") == (folder, 0, "")
    other, compiled, said = run(tmp_path, before="jit.set_notice(None)", NUMBA_OPT="1")
    assert other != folder and compiled == KERNELS and said == ""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="POSIX permissions")
def test_unwritable_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    folder, _, _ = run(file, TMPDIR=str(tmp_path))
    assert folder.startswith(str(tmp_path / f"ggufkit-{os.getuid()}"))
    shared = tmp_path / "shared" / f"ggufkit-{os.getuid()}"
    shared.mkdir(parents=True)
    shared.chmod(0o777)  # anybody could put code there
    folder, compiled, said = run(file, TMPDIR=str(shared.parent))
    assert (folder, compiled) == ("None", KERNELS)
    assert said == "compiling kernels for this processor, and there is no writable folder to keep them in …\n"


def test_old_folders_are_removed(tmp_path):
    for i in range(10):
        (tmp_path / f"numba-{i:016}").mkdir()
        age = time.time() - 7200 + i
        os.utime(tmp_path / f"numba-{i:016}", (age, age))
    (tmp_path / "models").mkdir()
    keep = tmp_path / f"numba-{0:016}"
    store.prune(tmp_path, keep)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["models", keep.name, *(f"numba-{i:016}" for i in range(10 - store.KEEP, 10))]


def test_digest_follows_sources_and_settings(monkeypatch, tmp_path):
    before = store.digest()
    assert before == store.digest()
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert store.digest() == before
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert store.digest() != before
    monkeypatch.delenv("NUMBA_CPU_NAME")
    assert store.digest() == before
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".numba_config.yaml").write_text("opt: 0\n")
    assert store.digest() != before


def test_damaged_cache_and_full_disk(tmp_path):
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    folder, compiled, _ = run(tmp_path, before=limit)
    assert compiled == KERNELS
    assert [p.name for p in Path(folder).iterdir()] == ["features.kernel"]  # written before the disk was full
    run(tmp_path)
    for k, path in enumerate(sorted(Path(folder).iterdir())):
        data = path.read_bytes()
        path.write_bytes((data[:-20] + bytes(range(20)), b"", data[:33])[k])
    _, compiled, said = run(tmp_path)
    assert compiled == KERNELS and said
    assert run(tmp_path) == (folder, 0, "")


def test_two_processes_at_once(tmp_path):
    """Cold, into one folder: each kernel is compiled by one of them, as far as they meet, and both are right."""
    processes = [start(tmp_path) for _ in range(2)]
    found = [ended(process) for process in processes]
    assert found[0][0] == found[1][0]
    assert sum(compiled for _, compiled, _ in found) == KERNELS
    assert run(tmp_path) == (found[0][0], 0, "")
    assert not [p for p in Path(found[0][0]).iterdir() if p.suffix != ".kernel"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_killed_while_compiling(tmp_path):
    """The folder stays good, whatever the process was at."""
    for compiling, before in enumerate(("elementwise.add", "team.run_program")):
        process = start(tmp_path)
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob(f"{before}.lock")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.communicate()
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.glob("*.*.kernel"))) == compiling
    folder, compiled, _ = run(tmp_path)
    assert compiled == 1
    assert run(tmp_path) == (folder, 0, "")


# -- the decorators --------------------------------------------------------------------------------------


@jit.kernel
def added(x, y):
    return add_f32(load_f32(x), load_f32(y))


@jit.family
def scaled_sum(times):
    def scaled_sum(args, item, worker):
        for _ in range(times):
            store_f32(args, added(args, item))

    return scaled_sum


def test_kernels_by_address(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "CACHE_DIR", tmp_path)
    x, y = np.arange(LANES, dtype=np.float32), np.full(LANES, 2, np.float32)
    entry = scaled_sum.entry(3)
    assert entry.name == "test_jit.scaled_sum-3" and scaled_sum.entry(3) is entry and not entry.here
    entry.function(team.address(x), team.address(y), 0)
    assert np.array_equal(x, np.arange(LANES) + 6)
    assert entry.here and scaled_sum(3) == entry.address and store.holds(entry.name)
    assert "ggufkit_entry:" in entry.assembly()


@jit.kernel
def total(x):
    out = np.float32(0)
    for value in x:
        out += value
    return out


def test_kernels_for_arrays():
    assert total(np.arange(5, dtype=np.float32)) == 10
    assert elementwise.rmsnorm.name == "elementwise.rmsnorm"
