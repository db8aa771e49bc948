"""Starting up: cold caches and the bar that counts, processes that share or are killed, threads without libgomp."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_models
from command_line import Terminal, environment, ggufkit, start
from ggufkit_kernels.cpu import prepare

RUN = ["-n", "3", "--temp", "0", "--raw", "--json"]


def kernels(cache: Path) -> list[Path]:
    return list(cache.rglob("*.*.kernel"))  # not features.kernel


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
def test_cold_processes_share_the_work_that_a_killed_one_left(tmp_path):
    model, cache = tiny_models.write(tmp_path / "model.gguf"), tmp_path / "cache"
    env = {"GGUFKIT_CACHE_DIR": str(cache), "GGUFKIT_NO_PROGRESS": None}
    command = ["run", "w1 w2", "-m", model, *RUN]
    killed = start(*command, env=env)
    deadline = time.monotonic() + 120
    while len(kernels(cache)) < 2:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    left = len(kernels(cache))

    with Terminal(*command, env=env) as terminal:  # a bar counts here, beside
        # one that says one line; how far loading is would be said too, every few seconds on a slow machine
        other = start(*command, env={**env, "GGUFKIT_NO_PROGRESS": "1"})
        found = terminal.expect(r"compiling kernels (\d+)/(\d+) ")
        assert 0 <= int(found[1]) < int(found[2]) <= 30
        assert terminal.end(120) == 0
        out, err = other.communicate(timeout=120)
    assert other.returncode == 0, err
    assert err.decode() == "compiling kernels for this processor, once …\n"
    assert terminal.shown.count("compiling kernels for this") == 0
    folder = kernels(cache)[0].parent
    assert len(kernels(cache)) > left
    assert not [path.name for path in folder.iterdir() if path.suffix == ".part" and str(killed.pid) not in path.name]

    before = {path: path.stat().st_mtime_ns for path in kernels(cache)}
    third = ggufkit(*command, env=env)
    assert third.err == "" and {path: path.stat().st_mtime_ns for path in kernels(cache)} == before
    texts = [
        line
        for text in (out.decode(), third.out, terminal.shown)
        for line in text.split("\n")
        if '"logits_hash"' in line
    ]
    assert len(texts) == 3 and len(set(texts)) == 1


def test_helpers_end_with_who_started_them(tmp_path):
    """A process that compiles for another one stops at the next kernel when that one is gone."""
    code = (
        "import os; from ggufkit_kernels.cpu import prepare; p = prepare._start([e.name for e in prepare.common()]); "
    )
    code += "print(p.pid, flush=True); os._exit(0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GGUFKIT_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    deadline = time.monotonic() + 30
    while not gone(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(kernels(tmp_path)) <= 1


THREADS = """
import sys
for name in ("numba.np.ufunc.omppool", "numba.np.ufunc.tbbpool"):
    sys.modules[name] = None
import threading
import numpy as np
import ggufkit
from ggufkit_kernels.cpu import jit
jit.set_notice(None)
x = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
found = {}

def generate(k):
    model = ggufkit.load(sys.argv[1], threads=2)
    found[k] = "".join(model.generate("w1 w2 w3", max_tokens=24, temperature=0))

def encode(k):
    found[k] = [ggufkit.quantize(x, "q4_k").tobytes() for _ in range(8)]

threads = [threading.Thread(target=f, args=(k,)) for k, f in enumerate([generate, generate, encode, encode])]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(found) == 4 and found[0] == found[1] and found[2] == found[3] and len(set(found[2])) == 1
generate(0)
assert found[0] == found[1]
import numba
try:
    layer = numba.threading_layer()
except ValueError:
    layer = "none"  # Numba's threads were never asked for
print(layer)
"""


def test_threads_without_libgomp(tmp_path):
    """Where libgomp is missing, Numba's own threads abort when two Python threads enter at once. Ours do not."""
    model = tiny_models.write(tmp_path / "model.gguf", type="Q4_K")
    env = {**environment(), "NUMBA_THREADING_LAYER": ""}
    del env["NUMBA_THREADING_LAYER"]
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(model)], env=env, capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stdout) == (0, "none\n"), done.stderr


def test_the_end_does_not_wait_for_a_lock_that_is_held_for_good(monkeypatch):
    held = threading.Event()

    class Stuck:
        name, here = "stuck", True

        @property
        def address(self) -> int:
            held.wait()
            return 1

    monkeypatch.setattr(prepare, "PATIENCE", 0.1)
    preparation = prepare.Preparation([Stuck()])
    preparation.start()
    preparation.stop()
    assert preparation._thread.is_alive()
    held.set()
    preparation._thread.join(10)
    assert not preparation._thread.is_alive()
