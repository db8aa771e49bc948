"""A team of threads that share out the items of compiled kernels.

A kernel is a compiled function (args, item, worker): `args` the address of its int64 words, `item` which part of
the work, `worker` which thread. A *program* is a few kernels one after the other; `Team.run` runs one.

The caller publishes a kernel and its number of items under a ticket (a counter of kernels above, the next item
below). Whoever wants an item, the caller too, advances the ticket by compare-and-swap; that succeeds only while
the kernel that was read is the one that is running, so nobody ever waits for a worker that has not begun:
a sleeping or descheduled worker costs its help and nothing else. The caller returns when all items are done.
Workers are Python threads inside a compiled loop without the GIL. They look for work for about a millisecond
after the last, then sleep until the next program.

One token's program is bound by memory, which has nothing to do while small kernels run or somebody's last item is
awaited. So a kernel may come with *what is read next*: an address for each thread, of whose bytes a thread without work
prefetches up to AHEAD_NBYTES. Wrong or stale addresses do no harm: prefetching faults nowhere.

Why not Numba's prange: on OpenMP a launch costs 1.6 µs, but where libgomp is missing Numba takes its
`workqueue`, 100 µs, which aborts the process when two Python threads enter at once. A launch here is below
1 µs everywhere, callers from several Python threads take turns, and a forked child works alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .jit import kernel, lazy
from .simd import (
    add_atomic,
    call,
    get_i64,
    give_way,
    load_acquire,
    pause,
    prefetch_ahead,
    store_release,
    swap_if,
)

# The mailbox: int64 words. At byte 0 the ticket (counter of kernels << 32 | next item), then the kernel's function, its
# args, number of items and what is read next: one line of the cache, which a worker gets at once. At 64 the items done,
# in a line of which nobody else has a part.
MAIL_WORDS = 16
LOW = 0xFFFFFFFF  # as the next item: closed, nothing to take
SPINS = 20_000  # rounds without work, ~40 ns each, before a worker sleeps
AHEAD_NBYTES = 48 << 10  # a thread's share of what is read next
AHEAD_STEP = 512  # bytes between two looks for work


@kernel
def wait(rounds):
    """One round of waiting: a pause, and after many rounds the processor for others, who may be awaited."""
    pause()
    if rounds > 1000 and rounds % 16 == 0:
        give_way()


@lazy
def serve(mail, worker, spins):
    """A worker's loop: take items while there are any; return after `spins` rounds without one."""
    idle, at, end = 0, 0, 0
    while idle < spins:
        ticket = load_acquire(mail)
        item = ticket & 0xFFFFFFFF
        items = load_acquire(mail + 24)
        if item < items:
            function, args, ahead = load_acquire(mail + 8), load_acquire(mail + 16), load_acquire(mail + 32)
            if swap_if(mail, ticket, ticket + 1):  # still that kernel's item: what was read belongs to it
                if ahead:
                    at = get_i64(ahead + 8 * worker)
                    end = at + AHEAD_NBYTES
                call(function, args, item, worker)
                add_atomic(mail + 64, 1)
                idle = 0
                continue
        idle += 1
        if at < end:
            prefetch_ahead(at, 0, AHEAD_STEP)
            at += AHEAD_STEP
        else:
            wait(idle)


@lazy
def run_program(mail, program, alone):
    """Run a program's kernels. Words: how many, then (function, words to its args, items, words to what is read next)
    of each; the last is 0, or leads to an address for each thread."""
    for step in range(get_i64(program)):
        function = get_i64(program + 8 + 32 * step)
        args = program + 8 * get_i64(program + 16 + 32 * step)
        items = get_i64(program + 24 + 32 * step)
        ahead = get_i64(program + 32 + 32 * step)
        if alone or items == 1:
            for item in range(items):
                call(function, args, item, 0)
            continue
        at, end = 0, 0
        if ahead:
            ahead = program + 8 * ahead
            at = get_i64(ahead)
            end = at + AHEAD_NBYTES
        store_release(mail + 64, 0)
        store_release(mail + 8, function)
        store_release(mail + 16, args)
        store_release(mail + 24, items)
        store_release(mail + 32, ahead)
        opened = (((load_acquire(mail) >> 32) + 1) & 0x7FFFFFFF) << 32
        store_release(mail, opened)
        while True:
            ticket = load_acquire(mail)
            item = ticket & 0xFFFFFFFF
            if item >= items:
                break
            if swap_if(mail, ticket, ticket + 1):
                call(function, args, item, 0)
                add_atomic(mail + 64, 1)
        waited = 0
        while load_acquire(mail + 64) < items:
            if at < end:
                prefetch_ahead(at, 0, AHEAD_STEP)
                at += AHEAD_STEP
                continue
            waited += 1
            wait(waited)
        # Closed: no worker may take an item while the next kernel's words are written.
        store_release(mail, opened | 0xFFFFFFFF)


@lazy
def several(args, item, worker):
    """The items of several kernels as if they were one's. Words: how many, then (function, args, first item) each."""
    k, last = 0, get_i64(args) - 1
    while k < last and item >= get_i64(args + 48 + 24 * k):
        k += 1
    at = args + 8 + 24 * k
    call(get_i64(at), get_i64(at + 8), item - get_i64(at + 16), worker)


def address(x: Any) -> int:
    """Where a NumPy array's first element is. (`x.ctypes.data` says the same, five times as slowly.)"""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))
    except (TypeError, ValueError):  # read-only or empty
        return x.ctypes.data


def program_words(kernels: int) -> int:
    """Words of a program's head."""
    return 1 + 4 * kernels


def program(steps: Sequence[tuple[int, int]]) -> list[int]:
    """The head of a program whose kernels (address, items) share the words that follow it."""
    head = [len(steps)]
    for function, items in steps:
        head += (function, program_words(len(steps)), items, 0)
    return head


@cache
def _packer(count: int) -> Callable[..., None]:
    return struct.Struct(f"{count}q").pack_into


class Team:
    """`threads` threads, the caller being one. Made by `team`, one a number of threads."""

    def __init__(self, threads: int):
        self.threads = threads
        self.lock = threading.RLock()
        words = np.zeros(MAIL_WORDS + 8, np.int64)
        skip = -words.ctypes.data % 64 // 8
        self._words = words[skip:]
        self._words[0] = LOW
        self._mail: int = self._words.ctypes.data
        self._asleep: list[threading.Semaphore] = []
        self._scratch, self._scratch_at = np.empty(0, np.uint8), 0
        self._reserve(64)
        self._started = False

    def run(self, steps: Sequence[tuple[int, int]], args: Sequence[int]) -> None:
        """Run kernels (address, items) one after the other, all with the same int64 words `args`."""
        self.run_words([*program(steps), *args], max(items for _, items in steps) > 1)

    def run_words(self, words: list[int], shared: bool) -> None:
        """Run the program in `words`; `shared`: some of its kernels have more than one item."""
        with self.lock:
            if len(words) > self._capacity:
                self._reserve(len(words))
            _packer(len(words))(self._program, 0, *words)
            self._run(self._program_at, shared)

    def run_at(self, program_at: int, shared: bool) -> None:
        """Run a program that lies elsewhere, and stays there meanwhile."""
        with self.lock:
            self._run(program_at, shared)

    def _run(self, program_at: int, shared: bool) -> None:
        alone = not shared or self.threads == 1
        if not alone:
            if not self._started:
                self._start()
            while self._asleep:
                self._asleep.pop().release()
        run_program.function(self._mail, program_at, alone)

    def _reserve(self, words: int) -> None:
        self._program = np.zeros(2 * words, np.int64)
        self._program_at = address(self._program)
        self._capacity = 2 * words

    def scratch(self, nbytes: int) -> int:
        """The address of at least `nbytes` bytes, 64-aligned. The caller holds `lock` while it uses them."""
        if self._scratch.nbytes < nbytes + 64:
            self._scratch = np.empty(max(nbytes + 64, 2 * self._scratch.nbytes), np.uint8)
            at = address(self._scratch)
            self._scratch_at = at + -at % 64
        return self._scratch_at

    def _start(self) -> None:
        self._started = True
        for worker in range(1, self.threads):
            threading.Thread(target=self._work, args=(worker,), name=f"ggufkit-{worker}", daemon=True).start()

    def _work(self, worker: int) -> None:
        awake = threading.Semaphore(0)
        while True:
            serve.function(self._mail, worker, SPINS)
            self._asleep.append(awake)  # a program that starts just now does without us
            awake.acquire()


_teams: dict[int, Team] = {}
_teams_lock = threading.Lock()


def team(threads: int) -> Team:
    """The process's team of that many threads."""
    with _teams_lock:
        if threads not in _teams:
            _teams[threads] = Team(threads)
        return _teams[threads]


def _after_fork() -> None:
    """A forked child has none of its parent's workers: teams begin anew."""
    global _teams_lock
    _teams_lock = threading.Lock()
    for one in _teams.values():
        one.lock = threading.RLock()
        one._started, one._asleep = False, []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def default_threads() -> int:
    """Physical cores that this process may use: its affinity mask, its cgroup's quota, hyperthreads once."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:
        allowed = set(range(os.cpu_count() or 1))
    cores = len({_core(cpu) for cpu in allowed})
    quota = _cgroup_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


@cache
def cores_alike() -> bool:
    """Whether the processors that this process may use are about equally fast, as far as the system says (Linux)."""
    speeds = []
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
            with contextlib.suppress(OSError, ValueError):
                speeds.append(int(Path(f"/sys/devices/system/cpu/cpu{cpu}/{name}").read_text()))
                break
    return sys.platform == "linux" and max(speeds, default=1) <= 1.2 * min(speeds, default=1)


def _core(cpu: int) -> str:
    """A name for the physical core of a logical processor."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> float | None:
    """Processors that the control group grants, or None for no limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:  # noqa: PTH123
            quota, period = file.read().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:  # noqa: PTH123
            quota = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:  # noqa: PTH123
            period = int(file.read())
        return quota / period if quota > 0 else None
    except (OSError, ValueError):
        return None
