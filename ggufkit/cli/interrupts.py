"""Ctrl-C and SIGTERM: obeyed once, whenever they come, and at once."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

PAUSE = 1.0  # seconds in which a second Ctrl-C counts as the first: what that one set off shall end undisturbed


class Handler:
    """Raises an exception in the main thread; again only when a second has passed.

    People press Ctrl-C until something happens. Raised once more, in the code that removes a temporary file for the
    first one, the exception would leave that file behind.
    """

    def __init__(self, error: Callable[[], BaseException]):
        self.error, self.last = error, -PAUSE

    def __call__(self, *_: Any) -> None:
        now = time.monotonic()
        if now - self.last >= PAUSE:
            self.last = now
            raise self.error()

    def swallowed(self) -> None:
        """Python ignored the exception, since it was raised in a finalizer: raise it again."""
        self.last = -PAUSE
        threading.Timer(0.01, _thread.interrupt_main).start()


def obey() -> None:
    """From here on SIGINT raises KeyboardInterrupt and SIGTERM SystemExit(143), so that temporary files are removed."""
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, Handler(lambda: SystemExit(143)))
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):  # behind nohup, say
        return
    handler = Handler(KeyboardInterrupt)
    signal.signal(signal.SIGINT, handler)
    before = sys.unraisablehook

    def unraisable(what: Any) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            handler.swallowed()
        else:
            before(what)

    sys.unraisablehook = unraisable


def done() -> None:
    """The command is at its end: nothing is raised any more."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, lambda *_: leave(130))


def leave(status: int) -> NoReturn:
    """End at once: at its usual end Python waits for threads, which may be reading or compiling for seconds."""
    prepare = sys.modules.get("ggufkit_kernels.cpu.prepare")
    if prepare is not None and hasattr(prepare, "end_others"):  # else it was being imported
        prepare.end_others()
    os._exit(status)
