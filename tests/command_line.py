"""The `ggufkit` command as a user meets it: in a process of its own, between pipes or on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

# The terminal that stdin is becomes the controlling one, so that Ctrl-C typed there is a signal.
MAIN = "from ggufkit.__main__ import main; main()"
ON_TERMINAL = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); {MAIN}"


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line `error: …`, checked to be the last of stderr and the only one of its kind."""
        lines = self.err.splitlines()
        assert lines and lines[-1].startswith("error: "), self.err
        assert sum(line.startswith("error") for line in lines) == 1, self.err
        assert "Traceback" not in self.err and "internal error" not in self.err, self.err
        return lines[-1]

    @property
    def json(self) -> Any:
        assert self.status == 0, self.err

        def refuse(name: str) -> None:
            raise ValueError(f"{name} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


def environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """This process's environment without what would change the command's behaviour, and with `changes`."""
    drop = ("GGUFKIT_MODEL", "GGUFKIT_DEBUG", "COLUMNS", "LINES")
    env: dict[str, str | None] = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"PYTHONUTF8": "1", "GGUFKIT_NO_PROGRESS": "1"}  # no progress lines, however slow the machine
    return {k: v for k, v in (env | dict(changes or {})).items() if v is not None}


def start(*args: object, env: Mapping[str, str | None] | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """The command between pipes, running."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", MAIN, *map(str, args)], env=environment(env), **(pipes | options))


def ggufkit(*args: object, stdin: bytes = b"", env: Mapping[str, str | None] | None = None, **options: Any) -> Done:
    """The command between pipes, to its end."""
    process = start(*args, env=env, **options)
    try:
        out, err = process.communicate(stdin, timeout=180)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Done(process.returncode, (out or b"").decode(), (err or b"").decode())


class Terminal:
    """The command on a pseudo-terminal, as a context manager: `expect` what it shows, `type` what a user does."""

    def __init__(self, *args: object, columns: int = 80, env: Mapping[str, str | None] | None = None,
                 stdout: Any = None):  # fmt: skip
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *map(str, args)],
            stdin=slave,
            stdout=stdout or slave,
            stderr=slave,
            start_new_session=True,
            env=environment({"TERM": "xterm", **(env or {})}),
        )
        os.close(slave)
        self.shown = ""  # all that it showed
        self.seen = 0  # how far `expect` has read

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, pattern: str, timeout: float = 120) -> re.Match[str]:
        """Wait until the pattern is shown, behind what was expected before."""
        deadline = time.monotonic() + timeout
        while True:
            if found := re.compile(pattern, re.DOTALL).search(self.shown, self.seen):
                self.seen = found.end()
                return found
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern!r} is not in what was shown: {self.shown[self.seen :]!r}")

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C, and wait for the pattern. The line editor misses one that comes while it shows its prompt."""
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                self.expect(pattern, 5)
                return
        self.expect(pattern, 1)

    def end(self, timeout: float = 60) -> int:
        """Wait for the command's end; its exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 1))

    def _read(self, timeout: float) -> bool:
        """Read once; False where there is no more, or not in time."""
        if timeout <= 0 or not select.select([self.master], [], [], timeout)[0]:
            return False
        data = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other side open
            data = os.read(self.master, 65536)
        self.shown += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(data)


def control_characters(text: str, besides: str = "\n") -> set[str]:
    """The control characters in a text that could drive a terminal."""
    return {c for c in text if (ord(c) < 32 or 127 <= ord(c) < 160) and c not in besides}
