"""LLVM and Numba at work where Ctrl-C does not interrupt them.

Python raises KeyboardInterrupt, or whatever the handler of a signal raises, in the main thread and between any two
instructions. If that is behind the one with which llvmlite takes its lock and before the one from which on it would
give it back, the lock stays held, and whoever links or compiles after that waits for ever. So the main thread leaves
such work to a thread of its own and waits for it, which Ctrl-C may interrupt; the work then goes on to its end.

A thread costs some 30 µs (threading.Thread more, and callbacks in which Ctrl-C would be lost). Where the caller is not
the main thread there is none, since nothing is raised there.
"""

from __future__ import annotations

import _thread
import atexit
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 5.0  # seconds: longer than any kernel takes to compile
_at_work: set[Done] = set()


class Done:
    """That a piece of work has ended: what the main thread waits for, in such a way that Ctrl-C is heard.

    Not `Thread.join`: before Python 3.13, one that was interrupted takes the thread for ended from then on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """It has ended."""
        self._lock.release()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait, for so long at most; whether it has ended."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:  # in pieces: Windows does not interrupt a wait
            left = 0.2 if deadline is None else min(0.2, deadline - time.monotonic())
            if self._lock.acquire(timeout=max(left, 0)):
                self._lock.release()
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False


def apart(work: Callable[[], T]) -> T:
    """What `work` returns or raises; it is done in another thread if this is the main one."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    done, begin = Done(), [True]
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        if not taken(begin):
            return
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            _at_work.discard(done)
            done.set()

    try:
        _at_work.add(done)
        _thread.start_new_thread(run, ())
    except BaseException:  # interrupted: does not begin any more, if it has not yet
        if taken(begin):
            _at_work.discard(done)
        raise
    done.wait()
    if errors:
        raise errors.pop()
    return result.pop()


def taken(token: list[bool]) -> bool:
    """Whether the caller is the one who got what only one gets."""
    try:
        return token.pop()
    except IndexError:
        return False


@atexit.register
def _end() -> None:
    """LLVM must not be at work when the process ends."""
    deadline = time.monotonic() + PATIENCE
    for done in list(_at_work):
        done.wait(deadline - time.monotonic())
