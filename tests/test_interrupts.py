"""Ctrl-C at any moment: it ends a command at once and leaves nothing behind, no lock of llvmlite's and no file."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_models
from command_line import MAIN, environment, ggufkit, start
from ggufkit_kernels.cpu.apart import apart

from ggufkit import cli

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")

# How often a thread took llvmlite's lock: the main one, and all others.
COUNTED = """
import sys, threading
import llvmlite.binding.ffi as ffi

taken = {True: 0, False: 0}
enter = ffi._LLVMLock.__enter__

def counted(self):
    taken[threading.current_thread() is threading.main_thread()] += 1
    enter(self)

ffi._LLVMLock.__enter__ = counted

import numpy as np
import ggufkit
from ggufkit_kernels.cpu import attention, jit

jit.set_notice(None)
attention.append.address
x = np.ones((2, 256), np.float32)
assert ggufkit.quantize(x, "q8_0", threads=1).shape == (2, 272)
model = ggufkit.load(sys.argv[1], threads=1)
list(model.generate("w1 w2", max_tokens=3))
print(taken[True], taken[False] > 0)
"""

# The main thread links, over and over, and is interrupted; then somebody else wants to link.
LINKED = """
import random, signal, threading
from ggufkit_kernels.cpu import elementwise, team

entries = [elementwise.add, elementwise.swiglu, elementwise.rmsnorm, team.serve]
for entry in entries:
    entry.address
random.seed(1)
signal.signal(signal.SIGALRM, signal.default_int_handler)
heard = 0
for _ in range(200):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.003))
        while True:
            for entry in entries:
                entry._address = 0
                entry.address
    except KeyboardInterrupt:
        heard += 1
other = threading.Thread(target=lambda: entries[0]._ready(), daemon=True)
entries[0]._address = 0
other.start()
other.join(10)
print(heard, other.is_alive(), flush=True)
import os
os._exit(0)
"""


def run(code: str, *args: object, cache: Path) -> str:
    env = environment({"GGUFKIT_CACHE_DIR": str(cache)})
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_apart():
    """Work of the main thread is done in another one, of another thread in that; what it raises comes back."""
    assert apart(threading.get_ident) != threading.get_ident()
    assert apart(lambda: apart(threading.get_ident) == threading.get_ident())
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 / 0)


def test_an_interrupted_wait_leaves_the_work_to_its_end():
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go.wait(20)
        ended.set()

    def interrupt() -> None:
        begun.wait(20)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        apart(work)
    assert begun.is_set() and not ended.is_set()
    go.set()
    assert ended.wait(20) and apart(lambda: 1) == 1


def test_the_main_thread_never_has_llvmlites_lock(tmp_path):
    """Neither where kernels are compiled nor where they are linked."""
    model = tiny_models.write(tmp_path / "model.gguf", type="Q8_0")
    for _ in ("cold", "warm"):
        assert run(COUNTED, model, cache=tmp_path / "cache") == "0 True"


def test_a_program_that_goes_on_after_ctrl_c_can_link(tmp_path):
    heard, stuck = run(LINKED, cache=tmp_path).split()
    assert int(heard) > 150 and stuck == "False"  # Python ignores one in a finalizer


def interrupted(process: subprocess.Popen[bytes], times: int) -> tuple[float, str]:
    """Ctrl-C, so many times: the seconds until the end, and what was said but for notices."""
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        if times > 1:
            time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.decode().splitlines() if line and not line.startswith("compiling")]
    return time.monotonic() - began, "\n".join(lines)


@pytest.mark.parametrize("times", [1, 4])
def test_at_random_moments_of_a_cold_start(default_model_path, tmp_path, times):
    draw = random.Random(times)
    for k in range(8):
        env = {"GGUFKIT_CACHE_DIR": str(tmp_path / str(k))}
        with start("run", "Count.", "-m", default_model_path, "--raw", "-n", 9999, "--temp", 9, env=env) as process:
            time.sleep(draw.uniform(0.3, 3.5))
            assert process.poll() is None
            seconds, said = interrupted(process, times)
        assert (process.returncode, said) == (130, "")
        assert seconds < 4  # some 0.1; who waits for a kernel that is being compiled takes up to 2


def test_a_conversion_leaves_no_file(tmp_path):
    model = tiny_models.write(tmp_path / "model.gguf", type="F32", vocab_size=4096, hidden_size=512)
    out, cache = tmp_path / "out", tmp_path / "cache"
    out.mkdir()
    command = ["convert", model, "q6_k", "-o", out / "q6.gguf", "--overwrite"]
    draw = random.Random(4)
    began = time.monotonic()
    assert ggufkit(*command, env={"GGUFKIT_CACHE_DIR": str(cache)}).status == 0
    whole = time.monotonic() - began
    for times in (1, 4, 4, 4):
        shutil.rmtree(cache)
        (out / "q6.gguf").unlink(missing_ok=True)
        with start(*command, env={"GGUFKIT_CACHE_DIR": str(cache)}) as process:
            while not cache.exists():
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.6) * whole)
            seconds, said = interrupted(process, times)
        assert process.returncode == 130 or (out / "q6.gguf").exists()
        assert (said, seconds < 4) == ("", True) or process.returncode == 0
        assert process.returncode == 0 or not [*out.iterdir()]


def test_ctrl_c_that_is_ignored_stays_ignored(tmp_path):
    """As behind nohup, or in the background of a script."""
    model = tiny_models.write(tmp_path / "model.gguf", type="Q8_0")
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    command = [sys.executable, "-c", f"{ignore}; {MAIN}", "run", "w1", "-m", str(model), "-n", "3", "--json"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out and b"Interrupt" not in err


def test_a_program_that_calls_the_command_keeps_its_signals(capsys, monkeypatch):
    def found() -> tuple:
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook

    before = found()
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["types"])
    assert found() == before and "Q4_K" in capsys.readouterr().out

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.group, "main", interrupt)
    with pytest.raises(SystemExit, match=r"^130$"):
        cli.main(["types"])
    assert found() == before


def test_the_command_is_quiet_from_its_first_moment_on():
    """While click and the rest are imported, too."""
    hold = "import sys, time; sys.modules['ggufkit.cli'] = None; import ggufkit.__main__ as m\n"
    hold += "import builtins; real = builtins.__import__\n"
    hold += "def slow(*a): print('importing', flush=True); time.sleep(30)\n"
    hold += "builtins.__import__ = slow\nm.main()"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")
