"""What the backend asks of a GPU. `cupy_device.CupyDevice` is the real one; tests bring one that runs the same source
on the CPU.

Arrays are the device's own: they have .shape, .dtype, .nbytes, .strides, .reshape() and slicing as NumPy's have, but
only `upload`, `download` and `write` move numbers. All work is queued in one stream, in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from .loader import Kernel, Module, waits

Array = Any


def in_a_row(levels: Sequence[Sequence[tuple]]) -> list[tuple[list[tuple], bool]]:
    """A graph's levels as they are recorded where launches begin early: each with whether its only launch may begin
    before the one in front of it has ended, since it waits by itself.

    Launches of one level that wait by themselves follow one another, the smallest first: all of them are there as soon
    as there is room, so that they read side by side anyway, and no branches have to be joined.
    """
    row: list[list[tuple]] = []
    for level in levels:
        if all(waits(launch[0]) for launch in level):
            row += [[launch] for launch in sorted(level, key=lambda launch: math.prod(launch[1]))]
        else:
            row.append(list(level))
    return [
        (level, at > 0 and len(row[at - 1]) == len(level) == 1 and waits(level[0][0])) for at, level in enumerate(row)
    ]


class Graph(Protocol):
    """Recorded launches."""

    def launch(self) -> None:
        """Queue all of it again, with the same arguments."""
        ...


class Device(Protocol):
    name: str  # as the driver says it
    arch: int  # compute capability: 75, 80, 90, 120
    n_sm: int  # multiprocessors
    early: bool  # whether a graph's launches begin early where they can

    def compile(self, modules: Iterable[Module], progress: Callable[[int, int], None] | None = None) -> None:
        """Compile and load modules ahead, side by side; `progress` is told (done, of how many), from other threads.
        A launch would do it for its own module."""
        ...

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """Memory whose contents are anything. Raises DeviceMemoryError where there is not enough."""
        ...

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array: ...

    def upload(self, array: np.ndarray) -> Array:
        """A copy on the device."""
        ...

    def write(self, to: Array, array: np.ndarray) -> None:
        """Host numbers into device memory of the same shape and dtype."""
        ...

    def copy(self, to: Array, source: Array) -> None:
        """Device to device, contiguous, the same shape and dtype."""
        ...

    def download(self, array: Array) -> np.ndarray:
        """The numbers on the host, when everything queued before is done."""
        ...

    def launch(self, kernel: Kernel, grid: tuple[int, ...], block: int, *args: Any) -> None:
        """Queue a kernel on grid blocks of `block` threads (a multiple of 32, at most 1024).

        An argument is an array (its address is passed), None (a null pointer), an int (32 bits) or a float (32 bits).
        """
        ...

    def gemm(self, x: Array, w: Array, out: Array, beta: float = 0.0, transposed: bool = True) -> None:
        """out = x @ w.T + beta * out (x @ w where not `transposed`), over a leading batch dimension where there is one.

        x (…, m, k) and w (…, n, k) or (…, k, n) are both float16 or both float32 (which nothing rounds), out (…, m, n)
        is float32 and so are the sums. Rows are contiguous, further strides are those of the arrays.
        """
        ...

    def capture(self, levels: Sequence[Sequence[tuple]]) -> Graph:
        """Record launches, each a tuple of `launch`'s arguments: those of one level may run side by side, and begin
        when all of the level before are done, or earlier and wait themselves (`in_a_row`)."""
        ...

    def synchronize(self) -> None:
        """Wait for everything queued. Raises what went wrong on the device as GgufkitError."""
        ...

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, bytes in all."""
        ...
