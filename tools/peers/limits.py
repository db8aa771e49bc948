"""What the machine can do at most: bytes it reads a second, int8 multiply-adds it does a second.

Reading: every thread sums its own part of a buffer much larger than the caches, as one stream or as four. Multiplying:
a loop of every instruction for it that the processor has, over independent accumulators in registers, no memory at all.
The loop is LLVM text that is compiled here for this processor, with the instructions as opaque assembly, since LLVM
would move what does not change out of the loop. A multiply-add counts as two operations, as in 2 × weights × tokens.
"""

from __future__ import annotations

import ctypes as C
import threading
import time
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np

from . import wire

BUFFER = 5 << 27  # bytes


@numba.njit(nogil=True)
def read_one(x):
    """Sum of uint64 (n,): one stream."""
    total = np.uint64(0)
    for i in range(len(x)):
        total += x[i]
    return total


@numba.njit(nogil=True)
def read_four(x):
    """The same from four places at once; n is a multiple of 32."""
    n = len(x) // 4
    total = np.uint64(0)
    for start in range(0, n, 64):  # a few lines of each in turn: short loops, which become vector sums
        stop = min(start + 64, n)
        for i in range(start, stop):
            total += (x[i] + x[n + i]) + (x[2 * n + i] + x[3 * n + i])
    return total


def together(threads: int, work: Callable[[int], Any]) -> float:
    """Seconds from the common start of work(0) … work(threads - 1) to the end of the last."""
    barrier, began, ended = threading.Barrier(threads), [0.0] * threads, [0.0] * threads

    def run(index: int) -> None:
        barrier.wait()
        began[index] = time.perf_counter()
        work(index)
        ended[index] = time.perf_counter()

    others = [threading.Thread(target=run, args=(index,)) for index in range(1, threads)]
    for other in others:
        other.start()
    run(0)
    for other in others:
        other.join()
    return max(ended) - min(began)


# -- multiply-adds ---------------------------------------------------------------------------------

# name: (features that it needs, vector bytes, accumulators, operations an instruction)
DOTS: dict[str, tuple[tuple[str, ...], int, int, int]] = {
    "avx512vnni vpdpbusd": (("avx512f", "avx512vnni"), 64, 16, 128),
    "avxvnni vpdpbusd": (("avx2", "avxvnni"), 32, 10, 64),
    "avx512bw vpmaddubsw": (("avx512f", "avx512bw"), 64, 16, 128),
    "avx2 vpmaddubsw": (("avx2",), 32, 8, 64),
    "dotprod sdot": (("dotprod",), 16, 16, 32),
}
REPEATS = 8  # rounds over the accumulators a turn of the loop


def loop(name: str) -> str:
    """LLVM text of `void peak(i64 turns, ptr operands, ptr out)` for a row of DOTS."""
    _, nbytes, count, _ = DOTS[name]
    if "vpmaddubsw" in name:  # the products, then their sum into words; nothing depends on the turn before but the sum
        accumulator, vector = f"<{nbytes // 2} x i16>", f"<{nbytes} x i8>"
        code, kind = (
            "vpmaddubsw $3, $2, $1; vpaddw $1, $0, $0",
            "=&x,=&x,x,x,0".replace("x", "v" if nbytes == 64 else "x"),
        )
        both = f"{{{{{accumulator}, {accumulator}}}}}"
        step = (
            f'%r{{n}} = call {both} asm sideeffect "{code}", "{kind}"'
            f"({vector} %a, {vector} %b, {accumulator} {{last}})\n"
            f"  %s{{n}} = extractvalue {both} %r{{n}}, 0"
        )
    else:
        accumulator = vector = f"<{nbytes // 4} x i32>"
        if name.startswith("dotprod"):
            code, kind = "sdot $0.4s, $2.16b, $3.16b", "=w,0,w,w"
        else:
            prefix = "{{vex}} " if name.startswith("avxvnni") else ""
            code, kind = f"{prefix}vpdpbusd $3, $2, $0", "=v,0,v,v" if nbytes == 64 else "=x,0,x,x"
        step = (
            f'%s{{n}} = call {accumulator} asm sideeffect "{code}", "{kind}"({accumulator} {{last}}, '
            f"{vector} %a, {vector} %b)"
        )
    lines, last = [], [f"%p{k}" for k in range(count)]
    for n in range(count * REPEATS):
        lines.append("  " + step.format(n=n, last=last[n % count]))
        last[n % count] = f"%s{n}"
    starts = [f"  %p{k} = phi {accumulator} [ zeroinitializer, %entry ], [ {last[k]}, %turn ]" for k in range(count)]
    ends = []
    for k in range(count):
        ends.append(f"  %o{k} = getelementptr i8, ptr %out, i64 {k * nbytes}")
        ends.append(f"  store {accumulator} {last[k]}, ptr %o{k}, align 1")
    return "\n".join((
        "define void @peak(i64 %turns, ptr %operands, ptr %out) {", "entry:",
        f"  %a = load {vector}, ptr %operands, align 1",
        f"  %second = getelementptr i8, ptr %operands, i64 {nbytes}",
        f"  %b = load {vector}, ptr %second, align 1",
        "  br label %turn", "turn:", "  %left = phi i64 [ %turns, %entry ], [ %next, %turn ]", *starts, *lines,
        "  %next = sub i64 %left, 1", "  %more = icmp sgt i64 %next, 0", "  br i1 %more, label %turn, label %end",
        "end:", *ends, "  ret void", "}",
    ))  # fmt: skip


class Peak:
    """The compiled loop of one row of DOTS."""

    def __init__(self, name: str):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        if hasattr(llvm, "initialize_native_asmparser"):
            llvm.initialize_native_asmparser()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
        )
        module = llvm.parse_assembly(f'target triple = "{llvm.get_default_triple()}"\n{loop(name)}')
        module.verify()
        self.assembly = machine.emit_assembly(module)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self._call = C.CFUNCTYPE(None, C.c_int64, C.c_void_p, C.c_void_p)(self._engine.get_function_address("peak"))
        _, nbytes, count, operations = DOTS[name]
        self.operations_a_turn = operations * count * REPEATS
        self.operands = np.arange(2 * nbytes, dtype=np.uint8)
        self.size = nbytes * count

    def run(self, turns: int) -> None:
        out = np.empty(self.size, np.uint8)
        self._call(turns, self.operands.ctypes.data, out.ctypes.data)


class Limits:
    def __init__(self) -> None:
        self.buffer: np.ndarray | None = None
        self.peaks: dict[str, Peak] = {}

    def about(self) -> dict[str, Any]:
        features = llvm.get_host_cpu_features()
        return {"cpu": llvm.get_host_cpu_name(), "dots": [name for name, (needs, *_) in DOTS.items()
                                                          if all(features.get(need) for need in needs)]}  # fmt: skip

    def bandwidth(self, threads: int, passes: int, nbytes: int = BUFFER) -> dict[str, float]:
        """Bytes a second, of one and of four streams a thread: medians of the passes."""
        # An odd number of cache lines a stream: streams a power of two apart would share cache sets.
        words = 32 * ((nbytes // 8 // threads // 32 - 1) | 1)
        if self.buffer is None or self.buffer.size != words * threads:
            self.buffer = np.ones(words * threads, np.uint64)
            for read in (read_one, read_four):
                read(self.buffer[:1024])  # compiles it
        parts = self.buffer.reshape(threads, words)
        times: dict[str, list[float]] = {"one": [], "four": []}
        for turn in range(passes + 1):  # the first warms up
            for name, read in (("one", read_one), ("four", read_four)):
                taken = together(threads, lambda index, read=read: read(parts[index]))
                if turn:
                    times[name].append(taken)
        return {name: self.buffer.nbytes / float(np.median(values)) for name, values in times.items()}

    def peak(self, threads: int, seconds: float) -> dict[str, float]:
        """Operations a second of each instruction there is, all threads together."""
        found = {}
        for name in self.about()["dots"]:
            peak = self.peaks.get(name) or self.peaks.setdefault(name, Peak(name))
            calls, taken = wire.repeat(lambda peak=peak: peak.run(1000), seconds / 10)
            turns = max(1000, int(1000 * calls / taken * seconds))
            taken = together(threads, lambda _, peak=peak, turns=turns: peak.run(turns))
            found[name] = threads * turns * peak.operations_a_turn / taken
        return found


if __name__ == "__main__":
    wire.serve(Limits())
