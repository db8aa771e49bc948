"""Everything that only a GPU can tell, in one command: tests, limits of the device, speeds, and nearness.

    python tools/gpu_check.py                    # on a machine with an NVIDIA GPU, no network; 8 minutes at most
    python tools/gpu_check.py --json check.json --shapes 1b,8b --types q4_k_m,q4_0,q8_0,tq2_0,f16
    python tools/gpu_check.py --emulate          # without a GPU, tiny: whether this program itself works

It runs the tests marked `gpu`; measures the copy bandwidth (bytes read plus bytes written) and cuBLAS' rate in half
precision; decodes at 128 and 8,192 positions and reads a prompt of 2,048 tokens with networks of the shapes of
tools/make_model.py, whose packed bytes are random (no speed depends on them) and whose scales are valid; and compares
the trained model of the tests, in each type, with the same file dequantized (KL divergence, beside the CPU backend's),
and greedily generated text with the CPU's. Ends with a table, and with each of the project's goals: met, missed, or not
measured. When the time is over what is left is said to be not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ggufkit_formats import blocks
from ggufkit_formats.errors import GgufkitError
from ggufkit_kernels.cpu import pack
from ggufkit_kernels.cuda import weights as packed_weights
from ggufkit_kernels.cuda.modules import modules
from ggufkit_kernels.cuda.ops import CudaOps
from ggufkit_runtime import devices, evaluate, generate
from ggufkit_runtime.models import llama

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

import make_model  # noqa: E402

from ggufkit.quantize import file_types  # noqa: E402
from ggufkit.quantize.rules import choose, order  # noqa: E402

GOALS = {  # of the copy bandwidth, decoding at the short context: (shape, type) -> share
    ("8b", "q4_k_m"): 0.65, ("8b", "q8_0"): 0.75, ("8b", "f16"): 0.75, ("8b", "tq2_0"): 0.50, ("1b", "q4_k_m"): 0.40,
}  # fmt: skip
PREFILL_GOAL, LONG_GOAL, KL_GOAL = 0.40, 0.80, 1.2


@dataclasses.dataclass
class Sizes:
    """How much of everything; smaller in emulation."""

    contexts: tuple[int, int] = (128, 8192)
    prompt: int = 2048
    tokens: int = 48  # decoded, at each context
    copy_nbytes: int = 1 << 30
    gemm: tuple[int, int, int] = (2048, 14336, 4096)
    repetitions: int = 5
    windows: int = 4
    n_ctx: int = 256  # of a window
    generated: int = 64


TINY = Sizes((8, 40), 24, 2, 1 << 16, (16, 32, 64), 2, 2, 32, 6)


def seconds(device: Any, run: Callable[[], Any], repetitions: int) -> float:
    """The median time of a run, after one that is not counted."""
    times = []
    for _ in range(repetitions + 1):
        device.synchronize()
        began = time.perf_counter()
        run()
        device.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def limits(device: Any, sizes: Sizes) -> dict[str, float]:
    """Copy bandwidth, GB/s read plus written, and cuBLAS' TFLOP/s with halves."""
    both = [device.zeros((sizes.copy_nbytes // 4,), np.float32) for _ in range(2)]
    copy = seconds(device, lambda: device.copy(*both), sizes.repetitions)
    both.clear()
    m, n, k = sizes.gemm
    rng = np.random.default_rng(0)
    x, w = (device.upload(rng.standard_normal((r, k), np.float32).astype(np.float16)) for r in (m, n))
    out = device.empty((m, n), np.float32)
    gemm = seconds(device, lambda: device.gemm(x, w, out), sizes.repetitions)
    return {"copy_gb_s": 2 * sizes.copy_nbytes / copy / 1e9, "gemm_tflops": 2 * m * n * k / gemm / 1e12}


# -- networks of random weights ----------------------------------------------------------------------------


class Pool:
    """Random packed matrices: bytes of a pool, with scales of a size that keeps the numbers small."""

    def __init__(self, device: Any):
        self.device, self.bytes = device, np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)
        self.halves = (np.random.default_rng(1).standard_normal(1 << 22, np.float32) * 0.02).astype(np.float16)

    def matrix(self, type: blocks.TensorType, shape: tuple[int, int]) -> Any:
        """A matrix on the device."""
        layout = packed_weights.layout_of_type(type)
        if layout.values not in ("codes", "bytes", "f16") or layout.number not in ("f16",):
            raise GgufkitError(f"{type.name}: no random weights are made of this type")
        made = pack.allocate(shape, layout, None, lambda s, dtype: np.broadcast_to(np.zeros((), dtype), s))
        pool = self.halves.view(np.uint8) if layout.is_plain else self.bytes
        made.codes = np.resize(pool, made.codes.nbytes).view(made.codes.dtype).reshape(made.codes.shape)
        size = 0.02 / (1 << max(layout.bits - 1, 0)) / (32 if layout.scale else 1)
        made.d = np.full(made.d.shape, np.float16(size).view(np.uint16))
        made.dmin = np.full(made.dmin.shape, np.float16(size / 4).view(np.uint16))
        for name in ("scale", "minimum"):
            array = getattr(made, name)
            setattr(made, name, np.resize(self.bytes, array.nbytes).view(array.dtype).reshape(array.shape))
        return packed_weights.CudaWeight(self.device, made)


def network(device: Any, shape: str, type: str, pool: Pool) -> tuple[Any, Any, int, int]:
    """Config, weights, bytes that a token reads, and multiplications of a prompt's token, of a shape of make_model."""
    settings = make_model.SHAPES[shape]
    config = llama.config_from_hf(settings)
    file_type = file_types.find(type)
    facts = file_types.ModelFacts(llama.ARCH, config.n_layers, config.n_heads, config.n_kv_heads)
    specs = {s.gguf: s for s in llama.tensors(config) if make_model._wanted(s, settings["tie_word_embeddings"])}
    names = sorted(specs, key=order)
    choices = choose(file_type, [(name, specs[name].shape) for name in names], facts)
    made: Any = SimpleNamespace(layers=[SimpleNamespace() for _ in range(config.n_layers)], output=None)
    nbytes = products = 0
    for name in names:
        spec, words = specs[name], name.split(".")
        place = made.layers[int(words[1])] if words[0] == "blk" else made
        attribute = words[2] if words[0] == "blk" else words[0]
        if len(spec.shape) == 1:
            setattr(place, attribute, device.upload(np.ones(spec.shape, np.float32)))
            continue
        weight = pool.matrix(blocks.find(choices[name].type or "F32"), spec.shape)
        setattr(place, attribute, weight)
        setattr(place, f"{attribute}_bias", None)
        if name != "token_embd.weight" or settings["tie_word_embeddings"]:
            nbytes += weight.nbytes
        if words[0] == "blk":
            products += spec.shape[0] * spec.shape[1]
    made.output = made.output or made.token_embd
    made.freqs = config.rope.frequencies(None)
    return config, made, nbytes, products


def variants(ops: CudaOps, weights: Any) -> list[tuple[str, Callable[[], Any]]]:
    """What else one token's graph could be; each is put on top of the ones before, the last one takes all back."""
    matrices = [w for layer in weights.layers for w in vars(layer).values() if hasattr(w, "blocks")]

    def stay(blocks: int) -> None:
        for matrix in matrices:
            matrix.blocks = blocks

    return [
        ("prefetch", lambda: setattr(ops, "prefetched", 8 << 20)),
        ("not_fused", lambda: (setattr(ops, "prefetched", 0), setattr(ops, "fused", False))),
        ("blocks_stay", lambda: stay(4 * ops.device.n_sm)),
        ("as_it_is", lambda: (stay(0), setattr(ops, "fused", True))),
    ]


def speeds(device: Any, shape: str, type: str, pool: Pool, sizes: Sizes, limit: dict[str, float]) -> dict[str, Any]:
    """Tokens per second of one network, and the shares of the device's limits that they are."""
    config, weights, nbytes, products = network(device, shape, type, pool)
    ops = CudaOps(device)
    found: dict[str, Any] = {"shape": shape, "type": type, "gb_of_weights": nbytes / 1e9}
    cache = ops.cache(config.n_layers, config.n_kv_heads, config.head_dim, max(sizes.contexts) + sizes.tokens + 8)
    cache.reserve(cache.n_ctx)

    def token() -> None:
        ops.top(ops.forward(llama.forward, config, weights, np.array([7]), cache), 1)

    def decode(context: int) -> float:
        cache.length = context
        token()  # compiles and records
        device.synchronize()
        began = time.perf_counter()
        for _ in range(sizes.tokens):
            token()
        return sizes.tokens / (time.perf_counter() - began)

    for context in sizes.contexts:
        found[f"decode_{context}"] = decode(context)
    found["launches"] = cache.trace.n_launches
    for name, change in variants(ops, weights):
        change()
        cache.trace = None
        found[f"decode_{sizes.contexts[0]}_{name}"] = decode(sizes.contexts[0])
    found["share_of_copy"] = found[f"decode_{sizes.contexts[0]}"] * nbytes / 1e9 / limit["copy_gb_s"]
    ids = np.random.default_rng(0).integers(0, config.n_vocab, sizes.prompt)

    def prompt() -> None:
        cache.length = 0
        ops.top(ops.forward(llama.forward, config, weights, ids, cache, len(ids) - 1), 1)

    taken = seconds(device, prompt, max(1, sizes.repetitions // 2))
    found[f"prefill_{sizes.prompt}"] = sizes.prompt / taken
    attention = 2 * 2 * config.n_layers * config.n_heads * config.head_dim * sizes.prompt / 2  # per token, causal
    rate = (2 * products + attention) * sizes.prompt / taken / 1e12
    found["share_of_gemm"] = rate / limit["gemm_tflops"]
    return found


# -- nearness ----------------------------------------------------------------------------------------------


def nearness(device: Any, types: list[str], sizes: Sizes, folder: Path) -> list[dict[str, Any]]:
    """KL divergence of the trained test model from the same file dequantized: the GPU's, and the CPU's."""
    import ggufkit

    text = (ROOT / "tests/data/small-model-heldout.txt").read_text(encoding="utf-8")
    found = []
    for type in types:
        path = folder / f"{type}.gguf"
        if not path.exists():
            ggufkit.convert(ROOT / "tests/data/small-model", type, path)
        reference = generate.load(path, device="reference")
        row: dict[str, Any] = {"type": type}
        for name in ("cuda", "cpu"):
            model = generate.load(path, device=name)
            _, kl = evaluate.against(model, reference, text, sizes.n_ctx, sizes.windows)
            row[f"kl_{name}"] = kl.kl_mean
            model.ops.n_batch = 1  # token by token: other kernels
            _, kl = evaluate.against(model, reference, text, sizes.n_ctx, 1)
            row[f"kl_{name}_by_token"] = kl.kl_mean
        texts = {}
        for name in ("cuda", "cpu"):
            session = generate.load(path, device=name).session()
            ids = session.model.tokenizer.encode("The history of", add_special=True)
            texts[name] = list(session.stream(ids, generate.Sampler(temperature=0), sizes.generated))
        pairs = zip(texts["cuda"], texts["cpu"], strict=False)
        row["same_tokens"] = next((k for k, (a, b) in enumerate(pairs) if a != b), len(texts["cpu"]))
        row["of_tokens"] = len(texts["cpu"])
        found.append(row)
    return found


def run_tests(limit_s: float) -> dict[str, Any]:
    """The tests marked `gpu`: how many passed, failed and were skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests/cuda")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit_s:.0f} s"}
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])}
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return counts | ({"which": failed[:50]} if failed else {})


# -- what was asked for ------------------------------------------------------------------------------------


def goals(report: dict[str, Any], sizes: Sizes) -> list[tuple[str, str]]:
    """Each goal, and whether it is met."""

    def said(value: float | None, goal: float, at_most: bool = False) -> str:
        if value is None:
            return "not measured"
        met = value <= goal if at_most else value >= goal
        return f"{'met' if met else 'MISSED'}: {value:.2f} ({'at most' if at_most else 'at least'} {goal:.2f})"

    rows = {(row["shape"], row["type"]): row for row in report["speeds"]}
    out = []
    for key, goal in GOALS.items():
        share = rows[key]["share_of_copy"] if key in rows else None
        out.append((f"decode {key[0]} {key[1]}, share of the copy bandwidth", said(share, goal)))
    main = rows.get(("8b", "q4_k_m"))
    out.append(("prefill 8b q4_k_m, share of cuBLAS", said(main and main["share_of_gemm"], PREFILL_GOAL)))
    short, long = (f"decode_{context}" for context in sizes.contexts)
    out.append((f"decode 8b q4_k_m, {long} over {short}", said(main and main[long] / main[short], LONG_GOAL)))
    for row in report["nearness"]:
        for way in ("", "_by_token"):
            ratio = max(row[f"kl_cuda{way}"], 1e-7) / max(row[f"kl_cpu{way}"], 1e-7)  # float32's own noise
            out.append((f"KL{way} {row['type']}, over the CPU's", said(ratio, KL_GOAL, at_most=True)))
        near = f"{row['same_tokens']} of {row['of_tokens']} tokens are the CPU's"
        out.append((f"greedy text {row['type']}", near))
    return out


def table(report: dict[str, Any], sizes: Sizes) -> str:
    """The report for a person."""
    lines = [f"{report['device']} (sm_{report['arch']}), {report['memory_gb']:.0f} GB"]
    lines.append(
        "copy {copy_gb_s:.0f} GB/s read + written; cuBLAS {gemm_tflops:.0f} TFLOP/s".format(**report["limits"])
    )
    short, long = (f"decode_{context}" for context in sizes.contexts)
    prefill = f"prefill_{sizes.prompt}"
    lines.append(f"{'shape':6}{'type':8}{short:>13}{'of copy':>9}{long:>13}{prefill:>14}{'of cuBLAS':>11}  tokens/s")
    lines += [
        f"{row['shape']:6}{row['type']:8}{row[short]:13.1f}{row['share_of_copy']:9.0%}{row[long]:13.1f}"
        f"{row[prefill]:14.0f}{row['share_of_gemm']:11.0%}"
        for row in report["speeds"]
    ]
    for row in report["speeds"]:
        others = [f"{key.removeprefix(short)[1:]} {row[key]:.1f}" for key in row if key.startswith(f"{short}_")]
        head = f"{row['shape']} {row['type']}, {row['launches']} launches a token"
        lines.append(f"{head}; {short} otherwise: {', '.join(others)}")
    lines += [f"{row['type']:8} KL {row['kl_cuda']:.3e} (CPU {row['kl_cpu']:.3e})" for row in report["nearness"]]
    lines += [f"{goal}: {what}" for goal, what in report["goals"]]
    lines += [f"not done: {what}" for what in report["left_out"]]
    if "tests" in report:
        lines.append(f"tests: {report['tests']}")
    lines.append("memory errors: compute-sanitizer --tool memcheck python -m pytest -q -m 'gpu and kernels' tests/cuda")
    return "\n".join(lines)


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Do all of it, until the time is over."""
    end = time.monotonic() + 60 * options.minutes
    sizes = TINY if options.emulate else Sizes()
    if options.emulate:
        sys.path.insert(0, str(ROOT / "tests/cuda"))
        import emulated

        device: Any = emulated.EmulatedDevice()
        devices.open_gpu = lambda: device
    else:
        device = devices.open_gpu()
        devices.open_gpu = lambda: device
    report: dict[str, Any] = {
        "device": device.name, "arch": device.arch, "memory_gb": device.memory()[1] / 1e9, "speeds": [],
        "nearness": [], "left_out": [],
    }  # fmt: skip
    report["limits"] = limits(device, sizes)
    tests = not (options.emulate or options.no_tests)
    reserve = 150 if tests else 30  # seconds for what comes last
    pool = Pool(device)
    for shape in options.shapes.split(","):
        for type in options.types.split(","):
            if time.monotonic() > end - reserve - 30:
                report["left_out"].append(f"speed of {shape} {type}: the time is over")
                continue
            print(f"{shape} {type} …", file=sys.stderr, flush=True)
            try:
                report["speeds"].append(speeds(device, shape, type, pool, sizes, report["limits"]))
            except GgufkitError as error:
                report["left_out"].append(f"speed of {shape} {type}: {error}")
    with tempfile.TemporaryDirectory() as folder:
        for type in options.types.split(","):
            if time.monotonic() > end - reserve:
                report["left_out"].append(f"nearness of {type}: the time is over")
                continue
            print(f"nearness of {type} …", file=sys.stderr, flush=True)
            try:
                report["nearness"] += nearness(device, [type], sizes, Path(folder))
            except GgufkitError as error:
                report["left_out"].append(f"nearness of {type}: {error}")
    if tests:
        device.compile(modules())  # by all processors; the tests find them in the cache folder
        report["tests"] = run_tests(max(30.0, end - time.monotonic()))
    report["goals"] = goals(report, sizes)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="of tools/make_model.py; default: 1b,8b (tiny with --emulate)")
    parser.add_argument("--types", default="q4_k_m,q4_0,q8_0,tq2_0,f16", help="file types (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--minutes", type=float, default=8, help="of time (default: %(default)s)")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests marked gpu")
    parser.add_argument("--emulate", action="store_true", help="on the emulated device, tiny")
    options = parser.parse_args()
    options.shapes = options.shapes or ("tiny" if options.emulate else "1b,8b")
    try:
        report = check(options)
    except GgufkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report, TINY if options.emulate else Sizes()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return 1 if report.get("tests", {}).keys() & {"failed", "error", "which"} else 0


if __name__ == "__main__":
    sys.exit(main())
