"""Everything that only a GPU can tell, in one command: are kernels right, the device's limits, speeds, best settings.

    python tools/gpu_check.py                    # on a machine with an NVIDIA GPU, no network; 8 minutes at most
    python tools/gpu_check.py --json check.json --shapes 1b,8b --types q4_k_m,q8_0,f16,tq2_0,q4_0
    python tools/gpu_check.py --only smoke       # parts whose names begin so
    python tools/gpu_check.py --emulate          # without a GPU, tiny: whether this program itself works

In this order: all kernels compiled and loaded; each run on small shapes against its definition (the tests marked `gpu`
and `kernels`); of the first type in the largest shape, decoding at 128 and 8,192 positions, a prompt of 2,048 tokens,
where the time of both goes kernel by kernel, and the settings that a device has to choose; the speeds of the other
types and shapes; nearness to the file dequantized, beside the CPU's; all tests marked `gpu`; compute-sanitizer, if it
is found. Networks have the shapes of tools/make_model.py; their packed bytes are random (no speed depends on them).

Each part is a process of its own with a time of its own: what fails, hangs or loses the device ends with a line, and
the next one begins. Parts are printed as they end, and the JSON file is written anew behind each, so that nothing is
lost at the time limit or by Ctrl-C. Ends with a table, and each of the project's goals: met, missed, or not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EARLY = "GGUFKIT_CUDA_EARLY"  # "0": kernels do not begin early
LOST = 3  # exit status of gpu_parts.py after a fault of the device
GOALS = {  # of the copy bandwidth, decoding at the short context: (shape, type) -> share
    ("8b", "q4_k_m"): 0.65, ("8b", "q8_0"): 0.75, ("8b", "f16"): 0.75, ("8b", "tq2_0"): 0.50, ("1b", "q4_k_m"): 0.40,
}  # fmt: skip
PREFILL_GOAL, LONG_GOAL, KL_GOAL = 0.40, 0.80, 1.2
SMOKE = ("elementwise", "sample", "attention", "flash", "weights", "cuda_encode")  # tests/cuda/test_….py, if there
# seconds at most
MAIN = {"decode": 60, "prefill": 45, "kernels": 45, "prompt_kernels": 30, "sweeps": 75, "prompt_sweeps": 60}
OTHER = {"decode": 30, "prefill": 25}


@dataclasses.dataclass
class Sizes:
    """How much of everything; smaller in emulation."""

    contexts: tuple[int, int] = (128, 8192)
    prompt: int = 2048
    tokens: int = 48  # decoded, at each context
    copy_nbytes: int = 1 << 30
    gemm: tuple[int, int, int] = (2048, 14336, 4096)
    repetitions: int = 5
    rounds: int = 8  # of a graph, between two looks at the clock
    windows: int = 4
    n_ctx: int = 256  # of a window
    generated: int = 64


FULL, TINY = Sizes(), Sizes((8, 40), 24, 2, 1 << 16, (16, 32, 64), 1, 1, 2, 32, 6)


@dataclasses.dataclass
class Part:
    """Steps of gpu_parts.py with the seconds that each may take, or a command: what one process does."""

    name: str
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    network: str = ""
    command: list[str] | None = None
    seconds: int = 0


def tests_command(files: list[str], marks: str) -> list[str]:
    """pytest on these files; failures in a line each."""
    options = ["-q", "-m", marks, "-p", "no:cacheprovider", "--tb=line", "-rfEs"]
    return [sys.executable, "-m", "pytest", *options, *(f"tests/cuda/test_{name}.py" for name in files)]


def parts(options: argparse.Namespace) -> list[list[Part]]:
    """What is to be done, most valuable first; parts of one list run side by side."""
    shapes, types = options.shapes.split(","), options.types.split(",")
    first = (shapes[-1], types[0])
    there = [name for name in SMOKE if (ROOT / f"tests/cuda/test_{name}.py").exists()]
    todo = [[Part("device", {"facts": 60, "limits": 30, "latency": 15})], [Part("compile", {"compile": 90})]]
    if options.emulate:
        todo += [[Part("smoke sample", command=tests_command(["sample"], "kernels and not gpu"), seconds=300)]]
    else:
        todo += [[Part(f"smoke {x}", command=tests_command([x], "gpu and kernels"), seconds=90) for x in there]]
    todo.append([Part("speed {} {}".format(*first), MAIN, "{}:{}".format(*first))])
    for shape in reversed(shapes):
        todo += [[Part(f"speed {shape} {x}", OTHER, f"{shape}:{x}")] for x in types if (shape, x) != first]
    todo += [[Part(f"nearness {x}", {"nearness": 60}, f"tiny:{x}")] for x in types]
    if not options.emulate and not options.no_tests:
        todo.append([Part("tests", command=[*tests_command([], "gpu"), "tests/cuda"], seconds=180)])
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if sanitizer:
            tests = tests_command([x for x in there if x != "cuda_encode"], "gpu and kernels")
            todo.append([Part("sanitizer", command=[sanitizer, "--tool", "memcheck", *tests], seconds=150)])
    return [kept for side in todo if (kept := [part for part in side if part.name.startswith(options.only)])]


# -- running them ------------------------------------------------------------------------------------------


class Runner:
    """Runs parts until `end`; `report` has what there is so far, and is written behind each part."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.folder, self.program = options, folder, ROOT / "tools/gpu_parts.py"
        self.end, self.start_s = time.monotonic() + 60 * options.minutes, 40
        self.report: dict[str, Any] = {"parts": {}, "left_out": []}
        self.running: list[subprocess.Popen] = []
        self.nowhere = False  # there is no device
        roots = [str(ROOT), *(str(ROOT / name) for name in ("formats", "kernels", "runtime"))]
        path = os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}  # nothing has to be installed

    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self) -> None:
        if self.options.json:
            part = self.options.json.with_suffix(".part")
            part.write_text(json.dumps(self.report, indent=1), encoding="utf-8")
            part.replace(self.options.json)

    def tell(self, name: str, line: str) -> None:
        spent = 60 * self.options.minutes - self.left()
        print(f"[{spent:5.0f} s] {name}: {line}", flush=True)

    def fail(self, name: str, line: str) -> None:
        self.report["left_out"].append(f"{name}: {line}")
        self.tell(name, f"NOT DONE: {line}")

    def start(self, command: list[str], out: Path) -> subprocess.Popen:
        with out.open("w") as stdout:
            started = subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, cwd=ROOT, env=self.env)
        self.running.append(started)
        return started

    def wait(self, process: subprocess.Popen, seconds: float) -> bool:
        """Whether it ended by itself."""
        try:
            process.wait(max(0.1, min(seconds, self.left())))
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.stop(process)

    def stop(self, process: subprocess.Popen) -> None:
        """End it, if it has not."""
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process in self.running:
            self.running.remove(process)

    def run(self, todo: list[list[Part]]) -> None:
        for number, side_by_side in enumerate(todo):
            if self.left() < 8 or self.nowhere:
                why = "the time is over" if self.left() < 8 else "there is no device"
                self.report["left_out"] += [f"{part.name}: {why}" for side in todo[number:] for part in side]
                break
            if side_by_side[0].command:
                self.run_commands(side_by_side)
            else:
                for part in side_by_side:
                    self.run_steps(part)
            self.save()

    # -- steps of gpu_parts.py ---------------------------------------------------------------------------------

    def run_steps(self, part: Part) -> None:
        """All of a part's steps; in a new process where one ended the last one."""
        left = list(part.steps)
        while left and self.left() > 5:
            out, log = self.folder / "part.json", self.folder / "log"
            out.unlink(missing_ok=True)
            command = [sys.executable, str(self.program), "--out", str(out), *left]
            command += ["--network", part.network] if part.network else []
            command += ["--emulate"] if self.options.emulate else []
            process = self.start(command, log)
            done, ended = self.watch(process, out, part)
            left = [step for step in left if step not in done]
            if left and not (done and ended and process.returncode == LOST):  # by the last one that was done
                self.keep(part, left.pop(0), {"error": self.why(process, ended, log)})
                if process.returncode == 1:  # it did not even begin
                    self.nowhere, left = part.name == "device", []
            left = self.again_without_early(part, left)
        for step in left:
            self.report["left_out"].append(f"{part.name}, {step}: the time is over")

    def again_without_early(self, part: Part, left: list[str]) -> list[str]:
        """The steps that are left; where decoding failed, it may be for kernels that begin early: once more without."""
        failed = "decode" in part.steps and "decode" not in (*left, *self.report["parts"].get(part.name, {}))
        if not failed or self.nowhere or self.options.emulate or self.env.get(EARLY) == "0":
            return left
        self.env[EARLY] = "0"
        self.report["left_out"].append(f"{part.name} and all behind it, kernels that begin early: decode failed")
        return ["decode", *left]

    def watch(self, process: subprocess.Popen, out: Path, part: Part) -> tuple[set[str], bool]:
        """Take results as they come, while each step keeps to its time, the first with the process's start: the steps
        that were done, and whether the process ended by itself."""
        doing, since, extra, done, ended = None, time.monotonic(), self.start_s, set(), False
        while True:
            ended = process.poll() is not None
            state = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"doing": None, "done": {}}
            for step, found in state["done"].items():
                if step not in done:
                    done.add(step)
                    self.keep(part, step, found)
            if ended:
                break
            if state["doing"] != doing:
                extra = self.start_s if doing is None else 0
                doing, since = state["doing"], time.monotonic()
            if time.monotonic() - since > extra + part.steps.get(doing or "", 0) or self.left() < 1:
                break
            time.sleep(0.05)
        self.stop(process)
        return done, ended

    def why(self, process: subprocess.Popen, ended: bool, log: Path) -> str:
        """Why a process came to no result."""
        if not ended:
            return "the time is over" if self.left() < 2 else "it took too long"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1][:300] if lines else ""
        if process.returncode < 0:
            return f"ended by {signal.Signals(-process.returncode).name}: {last}"
        return "the device was lost" if process.returncode == LOST else last or f"exit status {process.returncode}"

    def keep(self, part: Part, step: str, found: dict[str, Any]) -> None:
        """Take a result into the report, and tell it."""
        if "error" in found:
            return self.fail(f"{part.name}, {step}", found["error"])
        self.report["parts"].setdefault(part.name, {})[step] = found
        self.tell(f"{part.name}, {step}", brief(step, found))
        return None

    # -- commands ------------------------------------------------------------------------------------------------

    def run_commands(self, side_by_side: list[Part]) -> None:
        """Tests; again without the test that lost the device, where one did."""
        todo = [(part, part.command or [], 0) for part in side_by_side]
        while todo:
            began = time.monotonic()
            jobs = [(part, command, again, self.start(command, self.folder / f"log-{k}"), self.folder / f"log-{k}")
                    for k, (part, command, again) in enumerate(todo)]  # fmt: skip
            todo = []
            for part, command, again, process, log in jobs:
                ended = self.wait(process, part.seconds - (time.monotonic() - began))
                text = log.read_text(encoding="utf-8", errors="replace")
                found = counted(text)
                if not ended:
                    found["error"] = f"not done within {part.seconds:.0f} s"
                elif process.returncode not in (0, 1) and not found.get("passed"):
                    found["error"] = (text.strip().splitlines() or [f"exit status {process.returncode}"])[-1][:300]
                self.add(part.name, found)
                lost = re.search(r"the device was lost in (\S+)", text)
                if lost and again < 3 and self.left() > 20:
                    todo.append((part, [*command, f"--deselect={lost[1]}"], again + 1))

    def add(self, name: str, found: dict[str, Any]) -> None:
        """Counts of tests, on top of what an earlier run of the same part found."""
        if "error" in found:
            self.fail(name, found["error"])
        old = self.report["parts"].get(name, {})
        for key, value in found.items():
            if key == "which":
                found[key] = list(dict.fromkeys(old.get(key, []) + value))
            elif key in ("failed", "errors"):
                found[key] = old.get(key, 0) + value
        self.report["parts"][name] = old | found
        self.tell(name, ", ".join(f"{n} {word}" for word, n in found.items() if word not in ("which", "error")))
        for line in found.get("which", [])[:8]:
            print(f"          {line}", flush=True)


def counted(text: str) -> dict[str, Any]:
    """What pytest, and compute-sanitizer around it, says in its last lines."""
    words = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text[-400:])
    counts: dict[str, Any] = {"errors" if word == "error" else word: int(n) for n, word in words}
    if summary := re.search(r"ERROR SUMMARY: (\d+) error", text):
        counts["memory errors"] = int(summary[1])
        first = re.search(r"=+ (Invalid .*|Program hit .*)\n=+ +(at .*)", text)
        counts |= {"which": [f"{first[1]} {first[2]}"[:300]]} if first else {}
    failed = [line[:300] for line in text.splitlines() if line.startswith(("FAILED", "ERROR "))]
    return counts | ({"which": failed[:50]} if failed else {})


# -- for a person ------------------------------------------------------------------------------------------


def brief(step: str, found: dict[str, Any]) -> str:
    """A step's result; the kernels' and the settings' in lines of their own."""
    if step in ("kernels", "prompt_kernels"):
        lines = [f"{found['sum_ms']:.3f} ms in all"]
        for row in found["rows"][:16]:
            rest = f"{row['gb_s']:8.0f} GB/s" if "gb_s" in row else ""
            share = row.get("ms_a_token", row.get("ms_a_prompt"))
            context = f" at {row['context']}" if row["name"].startswith("attend") else ""
            lines.append(
                f"    {share:8.3f} ms = {row['launches']:4} x {row['us']:8.2f} us {rest}  {row['name']}{context}"
            )
        return "\n".join(lines)
    if step in ("sweeps", "prompt_sweeps"):
        lines = [", ".join(f"{name} {rate:.1f}" for name, rate in found["tokens_per_s"].items()) + " tokens/s"]
        lines.append(f"    best: {found['best']}")
        lines += [f"    {name}: NOT DONE: {line}" for name, line in found.get("wrong", {}).items()]
        for n, (few, many) in found.get("short_ms", {}).items():
            lines.append(f"    a prompt of {n}: {few:.2f} ms by the kernels for single tokens, {many:.2f} ms by cuBLAS")
        for name, us in found["products"].items():
            best = min(us, key=us.__getitem__)
            times = ", ".join(f"{setting} {value:.2f}" for setting, value in us.items())
            lines.append(f"    {name}: best {best} ({us[best]:.2f} us); {times}")
        return "\n".join(lines)
    numbers = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())
    return ", ".join(numbers)


def rows_of(report: dict[str, Any], sizes: Sizes) -> dict[tuple[str, str], dict[str, float]]:
    """(shape, type) -> the speeds that were measured, and their shares of the device's limits."""
    found, limit = {}, report["parts"].get("device", {}).get("limits", {})
    for name, part in report["parts"].items():
        if not name.startswith("speed "):
            continue
        row = {**part.get("decode", {}), **part.get("prefill", {})}
        short = row.get(f"decode_{sizes.contexts[0]}")
        if short and limit:
            row["share_of_copy"] = short * row["gb_of_weights"] / limit["copy_gb_s"]
        if "tflops" in row and limit:
            row["share_of_gemm"] = row["tflops"] / limit["gemm_tflops"]
        _, shape, type = name.split()
        found[shape, type] = row
    return found


def goals(report: dict[str, Any], sizes: Sizes) -> list[tuple[str, str]]:
    """Each goal, and whether it is met."""

    def said(value: float | None, goal: float, at_most: bool = False) -> str:
        if value is None:
            return "not measured"
        met = value <= goal if at_most else value >= goal
        return f"{'met' if met else 'MISSED'}: {value:.2f} ({'at most' if at_most else 'at least'} {goal:.2f})"

    rows = rows_of(report, sizes)
    out = []
    for key, goal in GOALS.items():
        share = rows.get(key, {}).get("share_of_copy")
        out.append((f"decode {key[0]} {key[1]}, share of the copy bandwidth", said(share, goal)))
    main = rows.get(("8b", "q4_k_m"), {})
    out.append(("prefill 8b q4_k_m, share of cuBLAS", said(main.get("share_of_gemm"), PREFILL_GOAL)))
    short, long = (f"decode_{context}" for context in sizes.contexts)
    out.append((f"decode 8b q4_k_m, {long} over {short}", said(main[long] / main[short] if long in main else None,
                                                                LONG_GOAL)))  # fmt: skip
    for part in report["parts"].values():
        if not (row := part.get("nearness")):
            continue
        for way in ("", "_by_token"):
            ratio = max(row[f"kl_cuda{way}"], 1e-7) / max(row[f"kl_cpu{way}"], 1e-7)  # float32's own noise
            out.append((f"KL{way} {row['type']}, over the CPU's", said(ratio, KL_GOAL, at_most=True)))
        near = f"{row['same_tokens']} of {row['of_tokens']} tokens are the CPU's"
        out.append((f"greedy text {row['type']}", near))
    return out


def table(report: dict[str, Any], sizes: Sizes) -> str:
    """The report for a person, whatever there is of it."""
    lines = []
    if device := report["parts"].get("device", {}).get("facts"):
        lines.append(f"{device['device']} (sm_{device['arch']}), {device['memory_gb']:.0f} GB, {device['versions']}")
    if limit := report["parts"].get("device", {}).get("limits"):
        lines.append("copy {copy_gb_s:.0f} GB/s read + written; cuBLAS {gemm_tflops:.0f} TFLOP/s".format(**limit))
    short, long = (f"decode_{context}" for context in sizes.contexts)
    prefill = f"prefill_{sizes.prompt}"
    lines.append(f"{'shape':6}{'type':8}{short:>13}{'of copy':>9}{long:>13}{prefill:>14}{'of cuBLAS':>11}  tokens/s")
    columns = ((short, 13, ".1f"), ("share_of_copy", 9, ".0%"), (long, 13, ".1f"), (prefill, 14, ".0f"),
               ("share_of_gemm", 11, ".0%"))  # fmt: skip
    for (shape, type), row in rows_of(report, sizes).items():
        cells = (f"{row[key]:{width}{form}}" if key in row else f"{'-':>{width}}" for key, width, form in columns)
        lines.append(f"{shape:6}{type:8}{''.join(cells)}")
    lines += [f"{goal}: {what}" for goal, what in report["goals"]]
    lines += [f"not done: {what}" for what in report["left_out"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="of tools/make_model.py; default: 1b,8b (tiny with --emulate)")
    parser.add_argument("--types", default="q4_k_m,q8_0,f16,tq2_0,q4_0", help="file types (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, behind each part")
    parser.add_argument("--minutes", type=float, default=8, help="of time (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="NAME", help="parts whose names begin so")
    parser.add_argument("--no-tests", action="store_true", help="only the small tests, and no sanitizer")
    parser.add_argument("--emulate", action="store_true", help="on the emulated device, tiny")
    options = parser.parse_args()
    options.shapes = options.shapes or ("tiny" if options.emulate else "1b,8b")
    sizes = TINY if options.emulate else FULL

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(options, Path(folder))
        report = runner.report
        try:
            runner.run(parts(options))
        except KeyboardInterrupt:
            report["left_out"].append("what came behind: stopped")
        finally:
            for process in list(runner.running):
                runner.stop(process)
    report["goals"] = goals(report, sizes)
    runner.save()
    print(table(report, sizes))
    bad = any(part.get(key) for part in report["parts"].values() for key in ("failed", "errors", "memory errors"))
    return 1 if bad or ("device" not in report["parts"] and not options.only) else 0


if __name__ == "__main__":
    sys.exit(main())
