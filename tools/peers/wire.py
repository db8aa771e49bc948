"""One contender in one process: JSON lines over pipes, so that only the one that is asked computes.

A worker module (`peers.ours`, `peers.llama`, `peers.limits`) has a class whose methods are called by name. It may run
in another Python environment, so such a module imports only what its contender needs. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A contender refused or died; the message is one line."""


class Remote:
    """A worker process. `ask("method", argument=…)` calls a method of its object and gives its JSON answer."""

    def __init__(self, name: str, module: str, python: str = sys.executable, arguments: Sequence[str] = ()):
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, "-m", module, *arguments], cwd=TOOLS, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env=os.environ | {"PYTHONSAFEPATH": ""},
        )  # fmt: skip

    def ask(self, method: str, **arguments: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps([method, arguments]) + "\n")
            stdin.flush()
            line = stdout.readline()
        if not line:
            self._process.wait()
            raise WorkerError(f"{self.name} ended in {method} (exit status {self._process.returncode}): {self._tail()}")
        ok, answer = json.loads(line)
        if not ok:
            raise WorkerError(f"{self.name}: {answer}")
        return answer

    @property
    def closed(self) -> bool:
        return self._log.closed

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far, to the nanosecond (Linux; else 0)."""
        total = 0
        for path in Path(f"/proc/{self._process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # the thread may have ended
                total += int(path.read_text().split()[0])
        return total / 1e9

    def _tail(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._log.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve(worker: Any) -> None:
    """The worker's side: answer until the pipe closes. What libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = [True, getattr(worker, method)(**arguments)]
        except Exception as error:
            answer = [False, " ".join(f"{type(error).__name__}: {error}".split())]
        out.write(json.dumps(answer) + "\n")
        out.flush()


def memory() -> dict[str, int]:
    """Bytes of this process: `peak` and `now`, resident; 0 where the system does not say."""
    found = {"peak": 0, "now": 0}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("VmHWM", "VmRSS"):
                found["peak" if key == "VmHWM" else "now"] = 1024 * int(value.split()[0])
    return found


def repeat(work: Any, seconds: float) -> tuple[int, float]:
    """Call `work` again and again until `seconds` have passed, once at least: (calls, seconds taken)."""
    calls, began = 0, time.perf_counter()
    while True:
        work()
        calls += 1
        taken = time.perf_counter() - began
        if taken >= seconds:
            return calls, taken
