"""Values that workers make at the same time and others wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class Collected:
    """Maxima of a tensor's slabs, which workers make at the same time."""

    def __init__(self, n: int):
        self.found: list[np.ndarray] = [np.empty(0, np.float32)] * n
        self._done = [threading.Event() for _ in range(n)]

    def part(self, i: int) -> _Part:
        return _Part(self._done[i])

    def all(self) -> np.ndarray:
        """All of them in order. Waits for slabs that other workers are at; all were begun before this is called."""
        for done in self._done:
            done.wait()
        return np.concatenate(self.found)


class _Part:
    """Marks a slab as done, failed or not: nobody may wait for ever."""

    def __init__(self, done: threading.Event):
        self._done = done

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        self._done.set()


class Once:
    """A value that several workers want, made by the first."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._value, self._lock = make, None, threading.Lock()

    def __call__(self) -> Any:
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value
