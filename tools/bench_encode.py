"""Encode at speed: million weights a second of one thread, beside ggml's on the same rows, in turns; bytes compared.

    python tools/bench_encode.py                      # every type with a kernel
    python tools/bench_encode.py Q4_K Q6_K --rounds 40
    python tools/bench_encode.py --importance         # with an importance matrix (always, for types that need it)
    python tools/bench_encode.py --check 8000000      # no timing: bytes of so many hard weights a type

Times are processor time of this thread, the best round counts. ggml is `ggml_quantize_chunk` of the xllamacpp wheel.
The rows are normal random numbers of 1 MB, which stay in the second-level cache between the two encoders' turns.
"""

from __future__ import annotations

import argparse
import ctypes as C
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats.blocks import find
from ggufkit_formats.errors import FormatError
from ggufkit_kernels.cpu.encode import ENCODERS, WEIGHTED, encode

COLS = 2048
Quantize = Callable[[int, np.ndarray, np.ndarray | None], np.ndarray]


def ggml_quantize() -> Quantize:
    """(type id, float32 (rows, cols), importance) -> uint8 (rows, bytes), by ggml's own library."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise SystemExit("xllamacpp is not installed")
    lib: Any = C.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    lib.ggml_row_size.restype = C.c_size_t
    lib.ggml_row_size.argtypes = [C.c_int, C.c_int64]
    lib.ggml_quantize_chunk.restype = C.c_size_t
    lib.ggml_quantize_chunk.argtypes = [C.c_int, C.c_void_p, C.c_void_p, *[C.c_int64] * 3, C.c_void_p]

    def quantize(type_id: int, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        rows, cols = x.shape
        weights = None if importance is None else importance.ctypes.data
        out = np.zeros((rows, lib.ggml_row_size(type_id, cols)), np.uint8)
        lib.ggml_quantize_chunk(type_id, x.ctypes.data, out.ctypes.data, 0, rows, cols, weights)
        return out

    return quantize


def seconds(call: Callable[[], Any]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def bench(name: str, quantize: Quantize, rounds: int, weighted: bool) -> tuple[float, float, bool]:
    """Million weights a second of ours and of ggml's, and whether the bytes are equal."""
    t, rng = find(name), np.random.default_rng(7)
    x = rng.standard_normal((128, COLS)).astype(np.float32)
    importance = (rng.standard_normal(COLS) ** 2).astype(np.float32) if weighted else None
    ours, theirs = [], []
    same = np.array_equal(encode(t, x, importance, threads=1), quantize(t.id, x, importance))
    for turn in range(rounds):
        ours += [seconds(lambda: encode(t, x, importance, threads=1)) for _ in range(3)]
        if turn % 4 == 0:
            theirs.append(seconds(lambda: quantize(t.id, x, importance)))
    return x.size / min(ours) / 1e6, x.size / min(theirs) / 1e6, same


def hard_rows(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Rows whose scale, spread, sparsity, offset and ties vary by row and by block: normal to denormal."""
    x = rng.standard_normal((rows, COLS)).astype(np.float32)
    kind = rng.integers(0, 12, rows)
    for i in range(rows):
        row = x[i]
        if kind[i] == 1:
            row *= 10.0 ** rng.uniform(-44, 3)
        elif kind[i] == 2:
            row *= np.repeat(10.0 ** rng.uniform(-12, 3, COLS // 16), 16)
        elif kind[i] == 3:
            row[rng.random(COLS) < rng.random()] = 0
        elif kind[i] == 4:
            row[:] = rng.integers(-40, 40, COLS) / rng.integers(1, 9)
        elif kind[i] == 5:
            row += rng.uniform(-30, 30)
        elif kind[i] == 6:
            row[rng.integers(0, COLS, 20)] *= 10.0 ** rng.uniform(0, 3)
        elif kind[i] == 7:
            np.abs(row, out=row)
            row *= rng.choice([-1, 1])
        elif kind[i] == 8:
            row[:] = np.repeat(row[: COLS // 32], 32)
        elif kind[i] == 9:
            row *= 10.0 ** rng.uniform(-40, 0, COLS)
        elif kind[i] == 10:
            row[:] = np.clip(rng.standard_t(2, COLS), -900, 900)
        elif kind[i] == 11:
            row[:] = rng.uniform(0.999999, 1.000001, COLS) * rng.choice([-1.0, 1.0, 1e-3, 500])
    return x


def hard_importance(rng: np.random.Generator) -> np.ndarray:
    """(COLS,) like that of real activations, or with zeros, groups of zeros, huge ratios."""
    importance = rng.standard_normal(COLS) ** 2
    kind = rng.integers(0, 4)
    if kind == 1:
        importance *= rng.random(COLS) < rng.random()
    elif kind == 2:
        importance *= np.repeat(rng.random(COLS // 16) < rng.random(), 16)
    elif kind == 3:
        importance *= 10.0 ** rng.uniform(-12, 12, COLS)
    return importance.astype(np.float32)


def check(name: str, quantize: Quantize, weights: int, weighted: bool) -> tuple[int, int]:
    """(weights compared, weights refused); a difference ends the program."""
    t, rng = find(name), np.random.default_rng(11)
    done = refused = 0
    while done < weights:
        x = hard_rows(rng, 256)
        importance = hard_importance(rng) if weighted else None
        try:
            ours = encode(t, x, importance)
        except FormatError:
            refused += x.size
            continue
        theirs = quantize(t.id, x, importance)
        if not np.array_equal(ours, theirs):
            row = np.flatnonzero((ours != theirs).any(axis=1))
            raise SystemExit(f"{name}: bytes differ in rows {row[:5]} after {done} weights")
        done += x.size
    return done, refused


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--importance", action="store_true", help="with an importance matrix")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of timings (default: 30)")
    parser.add_argument("--check", type=int, metavar="WEIGHTS", help="compare the bytes of so many weights instead")
    args = parser.parse_args()
    quantize = ggml_quantize()
    with_rows = [name for name, encoder in ENCODERS.items() if encoder.weights == "row"]
    types = args.types or ([*WEIGHTED, *with_rows] if args.importance else list(ENCODERS))
    if args.check:
        for name in types:
            done, refused = check(name, quantize, args.check, args.importance or find(name).needs_importance)
            print(f"{name}: {done} weights equal, {refused} refused", flush=True)
        return 0
    print("| type | ggufkit | ggml | ratio |\n|---|---|---|---|")
    equal = True
    for name in types:
        ours, theirs, same = bench(name, quantize, args.rounds, args.importance or find(name).needs_importance)
        equal &= same
        print(
            f"| {name} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.1f} |{'' if same else ' BYTES DIFFER'}", flush=True
        )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
