"""Speed of the CPU kernels: matvec in GB/s of packed weights, matmul of 512 tokens in GOP/s (2 a weight and token).

    python tools/bench_kernels.py [-t THREADS] [--types Q4_K,Q6_K] [--shapes 2048x2048] [-n 512] [--seconds 0.5]

The best of many runs counts. The weights of a matvec are more than one copy of the matrix, at least 64 MB in all,
so that they come from memory and not from a cache; --hot leaves them in the cache.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import llvmlite
import numba
import numpy as np
from ggufkit_formats.blocks import TYPES, TensorType
from ggufkit_formats.tensor import Tensor
from ggufkit_kernels.cpu.ops import CpuOps, CpuWeight
from ggufkit_kernels.cpu.team import default_threads

TYPE_NAMES = "F32,F16,BF16,Q8_0,Q4_0,Q4_1,Q5_0,Q5_1,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,"
TYPE_NAMES += "TQ1_0,TQ2_0,Q1_0,Q2_0,MXFP4,NVFP4,NF4"
SHAPES = "576x576,1536x576,2048x2048,5632x2048"


class Memory:
    """A `Source` over an array."""

    def __init__(self, data: np.ndarray):
        self.data = data

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        return self.data[offset : offset + nbytes]

    read = view


def random_tensor(type: TensorType, rows: int, cols: int) -> Tensor:
    """A tensor of encoded normal numbers; few rows are encoded and repeated, since encoding is slow."""
    x = np.random.default_rng(0).standard_normal((8, cols)).astype(np.float32)
    raw = np.resize(type.encode(x), (rows, type.row_nbytes(cols))).reshape(-1)
    return Tensor("bench", type, (rows, cols), raw.nbytes, 0, Memory(raw))


def best(seconds: float, call: Callable[[int], object]) -> float:
    """The shortest time of `call`, tried for about `seconds`, five times at least."""
    shortest, end, k = 1e9, time.perf_counter() + seconds, 0
    call(0)
    while time.perf_counter() < end or k < 5:
        k += 1
        start = time.perf_counter()
        call(k)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def copies(ops: CpuOps, tensor: Tensor, hot: bool) -> list[CpuWeight]:
    """The packed weight, several times over where it should not stay in a cache."""
    first = ops.weight(tensor)
    n = 1 if hot else max(1, -(-(64 << 20) // first.nbytes))
    return [first] + [ops.weight(tensor) for _ in range(n - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--threads", type=int, default=default_threads())
    parser.add_argument("--types", default=TYPE_NAMES)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("-n", "--tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--hot", action="store_true", help="one copy of the matrix: small ones stay in the cache")
    options = parser.parse_args()
    ops = CpuOps(options.threads)
    print(f"{processor()}, {ops.threads} threads, numba {numba.__version__}, llvmlite {llvmlite.__version__}")
    rng = np.random.default_rng(1)
    launch = np.ones(16384 * ops.threads, np.float32)
    alone, shared = np.ones(8, np.float32), np.ones_like(launch)
    print(f"a call of one item: {1e6 * best(0.2, lambda k: ops.add(alone, alone)):.1f} us", end=", ")
    print(f"of {ops.threads} items of 64 kB: {1e6 * best(0.2, lambda k: ops.add(launch, shared)):.1f} us")
    print(f"{'type':6} {'shape':>10} {'matvec us':>10} {'GB/s':>7} {f'n={options.tokens} ms':>10} {'GOP/s':>7}")
    for name in options.types.split(","):
        for shape in options.shapes.split(","):
            rows, cols = (int(x) for x in shape.split("x"))
            if cols % TYPES[name].block:
                continue
            weights = copies(ops, random_tensor(TYPES[name], rows, cols), options.hot)
            x = rng.standard_normal((options.tokens, cols)).astype(np.float32)
            one = x[:1].copy()
            vec = best(options.seconds, lambda k, w=weights, x=one: ops.matmul(w[k % len(w)], x))
            mat = best(options.seconds, lambda k, w=weights, x=x: ops.matmul(w[k % len(w)], x))
            rate = 2e-9 * rows * cols * options.tokens / mat
            gb = 1e-9 * weights[0].nbytes / vec
            print(f"{name:6} {shape:>10} {1e6 * vec:10.1f} {gb:7.1f} {1e3 * mat:10.2f} {rate:7.0f}", flush=True)


if __name__ == "__main__":
    main()
