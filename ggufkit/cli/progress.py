"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any

REDRAW = 0.1  # seconds between two drawings of a bar
LINE = 5.0  # seconds between two lines where there is no terminal


class Guarded:
    """stderr while bars stand there: whoever writes a line, the bar makes way and is drawn anew behind it."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.bars: list[Progress] = []

    def write(self, text: str) -> int:
        for bar in self.bars:
            bar.wipe()
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def say(line: str) -> None:
    """A line on stderr: everything that is not the result."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class Progress:
    """A progress bar with rate and time left on a terminal; elsewhere a plain line every few seconds.

    Use as a context manager; call it with the amount of work that is done so far. `what` and `total` may change
    on the way. Nothing is drawn for work that ends within `patience` seconds, and nothing stays behind.
    """

    def __init__(
        self, what: str, total: float, unit: Callable[[float], str] = lambda n: f"{n:.0f}", patience: float = 0.5
    ):
        self.what, self.total, self.unit, self.patience = what, total, unit, patience
        self.began = time.monotonic()
        self.last = -1e9 if patience == 0 else self.began
        self.shown = 0  # columns of the bar that stands on the terminal
        self.guard: Guarded | None = None

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: float) -> None:
        now = time.monotonic()
        elapsed = now - self.began
        if elapsed < self.patience:
            return
        if sys.stderr.isatty():
            if now - self.last >= REDRAW or not self.shown or done >= self.total:
                self.last = now
                self._draw(done, elapsed)
        elif now - max(self.last, self.began) >= LINE and not os.environ.get("GGUFKIT_NO_PROGRESS"):
            self.last = now
            left = f", {duration(self._left(done, elapsed))} left" if done > 0 else ""
            say(f"{_one_line(self.what)}: {self._share(done):.0%}, {self.unit(done / elapsed)}/s{left}")

    def _share(self, done: float) -> float:
        return min(max(done / self.total, 0.0), 1.0) if self.total > 0 else 0.0

    def _left(self, done: float, elapsed: float) -> float:
        return max(self.total - done, 0) * elapsed / max(done, 1e-9)

    def _draw(self, done: float, elapsed: float) -> None:
        share = self._share(done)
        left = duration(self._left(done, elapsed)) if done > 0 else "-:--"
        left += " left" if done < self.total else ""
        rate = f"{self.unit(done / elapsed)}/s" if done > 0 and elapsed > 0 else ""
        line = layout(_one_line(self.what), share, rate, left, _columns() - 1, _bar_characters())
        blank = " " * (self.shown - columns(line))
        if self.guard is None:
            self.guard = sys.stderr if isinstance(sys.stderr, Guarded) else Guarded(sys.stderr)
            self.guard.bars.append(self)
            sys.stderr = self.guard
        self._put(f"\r{line}{blank}" + "\b" * len(blank))
        self.shown = columns(line)

    def _put(self, text: str) -> None:
        assert self.guard is not None
        self.guard.stream.write(text)
        self.guard.stream.flush()

    def wipe(self) -> None:
        """Take the bar off the terminal; the next call draws it anew. No escape sequences: all terminals can."""
        if self.shown:
            self._put("\r" + " " * self.shown + "\r")
            self.shown = 0

    def close(self) -> None:
        """The work is done: the bar goes."""
        if self.guard is None:
            return
        self.wipe()
        self.guard.bars.remove(self)
        if not self.guard.bars and sys.stderr is self.guard:
            sys.stderr = self.guard.stream
        self.guard = None

    def __exit__(self, *_: object) -> None:
        self.close()


def layout(what: str, share: float, rate: str, left: str, room: int, characters: str = "━─") -> str:
    """One line of at most `room` columns: what, bar, per cent, rate, time left; what there is no room for goes."""
    full, empty = characters
    tail = f"{share:4.0%}"
    for part in (f"{rate}  {left}", left):
        if columns(tail) + columns(part) + 2 + 16 <= room:
            tail = f"{tail}  {part}"
            break
    space = room - columns(tail) - 1
    what = cut(what, max(space // 2, min(space - 11, columns(what))))
    bar = min(space - columns(what) - 1, 40)
    if bar < 4:
        return cut(f"{what} {tail}".strip(), room)
    done = round(bar * share)
    return f"{what} {full * done}{empty * (bar - done)} {tail}"


def duration(seconds: float) -> str:
    """0:07, 12:34, 3:02:01."""
    minutes, second = divmod(round(min(seconds, 3.6e6)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def cut(text: str, room: int) -> str:
    """The text in at most `room` columns, with … where something is left out."""
    if columns(text) <= room:
        return text
    while text and columns(text) > room - 1:
        text = text[:-1]
    return text + "…" if room > 0 else ""


def _one_line(text: str) -> str:
    """File names may hold anything; on the bar's line they hold printable characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _columns() -> int:
    try:
        return max(os.get_terminal_size(sys.stderr.fileno()).columns, 20)
    except (OSError, ValueError):
        return 80


def _bar_characters() -> str:
    try:
        "━─…".encode(sys.stderr.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return "#-"
    return "━─"
