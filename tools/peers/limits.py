"""What the machine can do at most: bytes it reads a second, int8 multiply-adds it does a second.

Reading: every thread sums its own part of a buffer much larger than the caches, as one stream or as four. Multiplying:
a loop of every instruction for it that the processor has, over independent accumulators in registers, no memory at all.
The loops are LLVM text that is compiled here for this processor, multiplications as opaque assembly, since LLVM
would move what does not change out of the loop. A multiply-add counts as two operations, as in 2 × weights × tokens.
"""

from __future__ import annotations

import ctypes as C
import threading
import time
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from . import wire

BUFFER = 5 << 27  # bytes


LINE = 64  # bytes


def reading(streams: int) -> str:
    """LLVM text of `void work(i64 turns, ptr bytes, ptr out)`: four lines a turn, summed, of one stream or of four.

    A stream is a part of the bytes; the parts follow one another.
    """
    step, part = 4 // streams, "%turns"
    lines = [f"  %at{k} = add i64 %first, {k * LINE}" for k in range(step)]
    sums = []
    for k in range(4):
        stream, line = divmod(k, step)
        if stream:
            lines += [f"  %base{k} = mul i64 {part}, {stream * step * LINE}", f"  %o{k} = add i64 %base{k}, %at{line}"]
        else:
            lines.append(f"  %o{k} = add i64 0, %at{line}")
        lines += [
            f"  %p{k} = getelementptr i8, ptr %bytes, i64 %o{k}",
            f"  %v{k} = load <8 x i64>, ptr %p{k}, align 64",
            f"  %n{k} = add <8 x i64> %s{k}, %v{k}",
        ]
        sums.append(f"  %s{k} = phi <8 x i64> [ zeroinitializer, %entry ], [ %n{k}, %turn ]")
    return "\n".join((
        "define void @work(i64 %turns, ptr %bytes, ptr %out) {", "entry:", "  br label %turn", "turn:",
        "  %first = phi i64 [ 0, %entry ], [ %next, %turn ]", *sums, *lines, f"  %next = add i64 %first, {step * LINE}",
        f"  %end = mul i64 %turns, {step * LINE}", "  %more = icmp slt i64 %next, %end",
        "  br i1 %more, label %turn, label %done", "done:", "  %a = add <8 x i64> %n0, %n1",
        "  %b = add <8 x i64> %n2, %n3", "  %c = add <8 x i64> %a, %b", "  store <8 x i64> %c, ptr %out, align 1",
        "  ret void", "}",
    ))  # fmt: skip


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
    """LLVM text of `void work(i64 turns, ptr operands, ptr out)` for a row of DOTS."""
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
        "define void @work(i64 %turns, ptr %operands, ptr %out) {", "entry:",
        f"  %a = load {vector}, ptr %operands, align 1",
        f"  %second = getelementptr i8, ptr %operands, i64 {nbytes}",
        f"  %b = load {vector}, ptr %second, align 1",
        "  br label %turn", "turn:", "  %left = phi i64 [ %turns, %entry ], [ %next, %turn ]", *starts, *lines,
        "  %next = sub i64 %left, 1", "  %more = icmp sgt i64 %next, 0", "  br i1 %more, label %turn, label %end",
        "end:", *ends, "  ret void", "}",
    ))  # fmt: skip


class Compiled:
    """The function `work` of an LLVM text, for this processor."""

    def __init__(self, text: str):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        if hasattr(llvm, "initialize_native_asmparser"):
            llvm.initialize_native_asmparser()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
        )
        module = llvm.parse_assembly(f'target triple = "{llvm.get_default_triple()}"\n{text}')
        module.verify()
        self.assembly = machine.emit_assembly(module)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        self.call = C.CFUNCTYPE(None, C.c_int64, C.c_void_p, C.c_void_p)(self._engine.get_function_address("work"))


class Peak:
    """The compiled loop of one row of DOTS."""

    def __init__(self, name: str):
        self._compiled = Compiled(loop(name))
        self.assembly = self._compiled.assembly
        _, nbytes, count, operations = DOTS[name]
        self.operations_a_turn = operations * count * REPEATS
        self.operands = np.arange(2 * nbytes, dtype=np.uint8)
        self.size = nbytes * count

    def run(self, turns: int) -> None:
        out = np.empty(self.size, np.uint8)
        self._compiled.call(turns, self.operands.ctypes.data, out.ctypes.data)


class Reader:
    """The compiled loop that reads bytes (a multiple of 4 lines, aligned) as one stream or as four."""

    def __init__(self, streams: int):
        self._compiled = Compiled(reading(streams))

    def run(self, part: np.ndarray) -> int:
        """The sum of uint64 (n,), so that a test can see that all were read."""
        out = np.zeros(8, np.uint64)
        self._compiled.call(part.nbytes // (4 * LINE), part.ctypes.data, out.ctypes.data)
        return int(out.sum())


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
            raw = np.ones(words * threads + 8, np.uint64)
            skip = -raw.ctypes.data % LINE // 8
            self.buffer = raw[skip : skip + words * threads]
        parts = self.buffer.reshape(threads, words)
        readers = {"one": Reader(1), "four": Reader(4)}
        times: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(passes + 1):  # the first warms up
            for name, reader in readers.items():
                taken = together(threads, lambda index, reader=reader: reader.run(parts[index]))
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
