"""How near decoding comes to reading: single tokens and readings of memory in turn, in one process.

    python tools/decode_share.py 1b-q4_k_m.gguf 1b-q8_0.gguf [--seconds 60] [--json FILE]

A turn is a reading with one stream a thread, four tokens, a reading with four; the share is the tokens' bytes of
weights a second over those of the way to read that is better on the whole. On a machine that others use too, memory
changes its pace within seconds: what lies between two readings was done at theirs. Turns are told apart by the pace
of reading, in thirds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from ggufkit_kernels.cpu.team import default_threads
from ggufkit_runtime import generate
from peers.limits import BUFFER, LINE, Reader, together
from peers.measure import Facts

CONTEXT, TOKENS = 64, (5, 6, 7, 8)  # tokens before those that are measured, and these


class Turns:
    """A model and a buffer to read."""

    def __init__(self, path: Path, threads: int, nbytes: int):
        self.bytes_per_token = Facts.of(path).bytes_per_token
        self.model = generate.load(path, device="cpu", threads=threads)
        self.cache, self.threads = self.model.cache(2 * CONTEXT), threads
        words = 32 * ((nbytes // 8 // threads // 32 - 1) | 1)
        raw = np.ones(words * threads + 8, np.uint64)
        self.parts = raw[-raw.ctypes.data % LINE // 8 :][: words * threads].reshape(threads, words)
        self.readers = Reader(1), Reader(4)
        self.model.forward(np.arange(CONTEXT), self.cache, first=CONTEXT - 1)
        self.run()

    def read(self, which: int) -> float:
        """Bytes a second."""
        reader = self.readers[which]
        return self.parts.nbytes / together(self.threads, lambda index: reader.run(self.parts[index]))

    def run(self) -> tuple[float, float, float]:
        """Bytes a second: of reading one stream, of four, and of decoding."""
        one = self.read(0)
        self.cache.truncate(CONTEXT)
        began = time.perf_counter()
        for token in TOKENS:
            self.model.forward([token], self.cache)
        taken = time.perf_counter() - began
        return one, self.read(1), len(TOKENS) * self.bytes_per_token / taken


def report(name: str, turns: np.ndarray) -> str:
    """Text of turns (n, 3): both readings and tokens, in bytes a second."""
    better = int(np.argmax(np.median(turns[:, :2], axis=0)))
    lines = [f"{name}: {len(turns)} turns", "  reading, GB/s   weights decoded   share   (quartiles)"]
    order = turns[np.argsort(turns[:, 0] + turns[:, 1])][:, [better, 2]]
    for title, part in (("all", order), *zip(("slow", "middle", "fast"), np.array_split(order, 3), strict=True)):
        if len(part):
            share = np.percentile(part[:, 1] / part[:, 0], (25, 50, 75))
            read, decoded = np.median(part, axis=0) / 1e9
            lines.append(f"  {title:6s} {read:8.1f} {decoded:17.1f} {share[1]:7.2f}   ({share[0]:.2f}-{share[2]:.2f})")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="a model (60)")
    parser.add_argument("-t", "--threads", type=int, default=default_threads(), metavar="N")
    parser.add_argument("--buffer", type=int, default=BUFFER, metavar="BYTES", help="that are read at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all turns, bytes a second")
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for path in args.models:
        turns, rows = Turns(path, args.threads, args.buffer), []
        until = time.monotonic() + args.seconds
        while not rows or time.monotonic() < until:
            rows.append(turns.run())
        found[path.name] = rows
        print(report(path.name, np.array(rows)), flush=True)
        del turns
    if args.json:
        args.json.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
