"""What gpu_check.py measures, in a process of its own, so that a fault of the device ends no more than a step.

    python tools/gpu_parts.py --out part.json [--emulate] [--network 8b:q4_k_m] STEP…

A step's result is in the file as soon as there is one: {"doing": step, "done": {step: numbers or {"error": line}}}. A
step that fails leaves its error, in one line, and the next one begins; after a fault of the device, which no process
survives, the program ends with 3, and gpu_check.py goes on with the steps that are left in a new one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ggufkit_formats import blocks
from ggufkit_formats.errors import GgufkitError
from ggufkit_kernels.cpu import pack
from ggufkit_kernels.cuda import loader
from ggufkit_kernels.cuda import weights as packed_weights
from ggufkit_kernels.cuda.modules import modules
from ggufkit_kernels.cuda.ops import CudaOps
from ggufkit_runtime.models import llama

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import make_model  # noqa: E402
from gpu_check import FULL, LOST, ROOT, TINY, Sizes  # noqa: E402

from ggufkit.quantize import file_types  # noqa: E402
from ggufkit.quantize.rules import choose, order  # noqa: E402


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


class Network:
    """A network of a shape of make_model and a file type, its weights random, its cache full size."""

    def __init__(self, device: Any, shape: str, type: str, sizes: Sizes):
        settings = make_model.SHAPES[shape]
        self.device, self.sizes = device, sizes
        self.config = config = llama.config_from_hf(settings)
        facts = file_types.ModelFacts(llama.ARCH, config.n_layers, config.n_heads, config.n_kv_heads)
        specs = {s.gguf: s for s in llama.tensors(config) if make_model._wanted(s, settings["tie_word_embeddings"])}
        names = sorted(specs, key=order)
        choices = choose(file_types.find(type), [(name, specs[name].shape) for name in names], facts)
        self.weights: Any = SimpleNamespace(layers=[SimpleNamespace() for _ in range(config.n_layers)], output=None)
        self.nbytes = self.products = 0  # that a token reads; multiplications of a prompt's token
        pool = Pool(device)
        for name in names:
            spec, words = specs[name], name.split(".")
            place = self.weights.layers[int(words[1])] if words[0] == "blk" else self.weights
            attribute = words[2] if words[0] == "blk" else words[0]
            if len(spec.shape) == 1:
                setattr(place, attribute, device.upload(np.ones(spec.shape, np.float32)))
                continue
            weight = pool.matrix(blocks.find(choices[name].type or "F32"), spec.shape)
            setattr(place, attribute, weight)
            setattr(place, f"{attribute}_bias", None)
            if name != "token_embd.weight" or settings["tie_word_embeddings"]:
                self.nbytes += weight.nbytes
            if words[0] == "blk":
                self.products += spec.shape[0] * spec.shape[1]
        self.weights.output = self.weights.output or self.weights.token_embd
        self.weights.freqs = config.rope.frequencies(None)
        self.ops = CudaOps(device)
        room = max(max(sizes.contexts) + sizes.tokens, sizes.prompt) + 8
        self.cache = self.ops.cache(config.n_layers, config.n_kv_heads, config.head_dim, room)
        self.cache.reserve(self.cache.n_ctx)

    def forward(self, ids: np.ndarray, ops: Any = None, first: int = 0) -> Any:
        """Logits on the device."""
        return (ops or self.ops).forward(llama.forward, self.config, self.weights, ids, self.cache, first)

    def trace(self, context: int) -> Any:
        """One token's trace, recorded anew where `cache.trace` is None; the cache is at that position."""
        self.cache.length = context
        self.forward(np.array([7]))
        self.cache.length = context
        self.device.synchronize()
        return self.cache.trace

    def decode(self, context: int) -> float:
        """Tokens a second, each with its largest logit on the host."""

        def token() -> None:
            self.ops.top(self.forward(np.array([7])), 1)

        self.trace(context)
        token()
        self.device.synchronize()
        began = time.perf_counter()
        for _ in range(self.sizes.tokens):
            token()
        return self.sizes.tokens / (time.perf_counter() - began)

    def prompt(self, ops: Any = None, n: int = 0) -> None:
        """A prompt from the beginning, of n tokens if not of the usual length."""
        self.cache.length = 0
        ids = np.random.default_rng(0).integers(0, self.config.n_vocab, n or self.sizes.prompt)
        self.ops.top(self.forward(ids, ops, len(ids) - 1), 1)

    def prompt_flops(self) -> float:
        """Of a whole prompt: its products, and attention's over half of the pairs."""
        config, n = self.config, self.sizes.prompt
        return (2 * self.products + 2 * config.n_layers * config.n_heads * config.head_dim * n) * n


# -- steps ---------------------------------------------------------------------------------------------------


class Bench:
    """What steps share: the device, and the network, made when the first step asks for it."""

    def __init__(self, options: argparse.Namespace):
        self.emulate, self.sizes = options.emulate, TINY if options.emulate else FULL
        self.shape, _, self.type = (options.network or "").partition(":")
        if self.emulate:
            sys.path.insert(0, str(ROOT / "tests/cuda"))
            import emulated

            self.device: Any = emulated.EmulatedDevice()
        else:
            from ggufkit_runtime import devices

            self.device = devices.open_gpu()
        self._network: Network | None = None

    @property
    def network(self) -> Network:
        if self._network is None:
            self._network = Network(self.device, self.shape, self.type, self.sizes)
        return self._network


def facts(bench: Bench) -> dict[str, Any]:
    """The device, and what drives it."""
    device = bench.device
    versions = {}
    for name in ("cupy-cuda13x", "cupy-cuda12x", "nvidia-cublas", "nvidia-cuda-nvrtc", "numba", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {"device": device.name, "arch": device.arch, "n_sm": device.n_sm, "memory_gb": device.memory()[1] / 1e9}
    if not bench.emulate:
        runtime = device.cupy.cuda.runtime
        found |= {"driver": runtime.driverGetVersion(), "nvrtc": list(device.compiler.version)}
    return found | {"versions": versions}


def limits(bench: Bench) -> dict[str, float]:
    """Copy bandwidth, GB/s read plus written, and cuBLAS' TFLOP/s with halves."""
    device, sizes = bench.device, bench.sizes
    both = [device.zeros((sizes.copy_nbytes // 4,), np.float32) for _ in range(2)]
    copy = seconds(device, lambda: device.copy(*both), sizes.repetitions)
    both.clear()
    m, n, k = sizes.gemm
    rng = np.random.default_rng(0)
    x, w = (device.upload(rng.standard_normal((r, k), np.float32).astype(np.float16)) for r in (m, n))
    out = device.empty((m, n), np.float32)
    gemm = seconds(device, lambda: [device.gemm(x, w, out) for _ in range(sizes.rounds)], sizes.repetitions)
    return {
        "copy_gb_s": 2 * sizes.copy_nbytes / copy / 1e9,
        "gemm_tflops": 2 * m * n * k * sizes.rounds / gemm / 1e12,
    }


def compile_all(bench: Bench) -> dict[str, Any]:
    """Every module compiled and loaded, every kernel found; what fails is told for each."""
    device = bench.device
    wanted = list(dict.fromkeys(packed_weights.modules([blocks.find("Q4_0")]) if bench.emulate else modules()))
    wanted = [m for m in wanted if dict(m.defines).get("LANES", packed_weights.LANES) == packed_weights.LANES]
    began, wrong = time.perf_counter(), []
    try:
        device.compile(wanted)
    except GgufkitError:
        for module in wanted:
            try:
                device.compile([module])
            except GgufkitError as error:
                wrong.append(f"{module.file} {dict(module.defines)}: {error}")
    for module in wanted if hasattr(device, "_function") else ():
        for name in loader.kernel_names(module.file):
            try:
                device._function(module.kernel(name))
            except Exception as error:
                wrong.append(f"{name} of {module.file} {dict(module.defines)}: {one_line(error)}")
    return {"modules": len(wanted), "seconds": time.perf_counter() - began, "wrong": wrong[:20]}


def begins_early(bench: Bench) -> bool:
    """Whether kernels begin early, and tokens come out the same: where not, it is turned off for all to come."""
    net, device = bench.network, bench.device
    if device.early:
        logits = []
        for device.early in (True, False):
            net.cache.trace, net.cache.length = None, 0
            logits.append(np.concatenate([device.download(net.forward(np.array([token]))) for token in (5, 9, 7, 3)]))
        device.early, net.cache.trace = np.array_equal(*logits), None
    return device.early


def decode(bench: Bench) -> dict[str, Any]:
    """Tokens a second at both contexts; and what the device alone takes of a token."""
    net, sizes = bench.network, bench.sizes
    found: dict[str, Any] = {"early": begins_early(bench), "gb_of_weights": net.nbytes / 1e9}
    for context in sizes.contexts:
        found[f"decode_{context}"] = net.decode(context)
        trace = net.trace(context)
        taken = seconds(bench.device, lambda: [trace.graph.launch() for _ in range(sizes.rounds)], sizes.repetitions)  # noqa: B023
        found[f"graph_{context}_ms"] = 1e3 * taken / sizes.rounds
    found["launches"], found["levels"] = trace.n_launches, len(trace.levels)
    return found


def prefill(bench: Bench) -> dict[str, Any]:
    """Tokens a second of a prompt, and its rate."""
    net, sizes = bench.network, bench.sizes
    taken = seconds(bench.device, net.prompt, max(1, sizes.repetitions // 2))
    found = {f"prefill_{sizes.prompt}": sizes.prompt / taken, "tflops": net.prompt_flops() / taken / 1e12}
    if hasattr(CudaOps, "fused_prompt"):  # attention by one kernel, or by cuBLAS and a softmax
        net.ops.fused_prompt = not CudaOps.fused_prompt
        taken = seconds(bench.device, net.prompt, max(1, sizes.repetitions // 2))
        net.ops.fused_prompt = CudaOps.fused_prompt
        found[f"fused_prompt_{not CudaOps.fused_prompt}"] = sizes.prompt / taken
    return found


def nearness(bench: Bench) -> dict[str, Any]:
    """KL divergence of the trained test model from the same file dequantized, the GPU's and the CPU's; greedy text."""
    from ggufkit_runtime import devices, evaluate, generate

    import ggufkit

    devices.open_gpu = lambda: bench.device
    sizes, type = bench.sizes, bench.type
    text = (ROOT / "tests/data/small-model-heldout.txt").read_text(encoding="utf-8")
    row: dict[str, Any] = {"type": type}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{type}.gguf"
        ggufkit.convert(ROOT / "tests/data/small-model", type, path)
        reference = generate.load(path, device="reference")
        texts = {}
        for name in ("cuda", "cpu"):
            model = generate.load(path, device=name)
            _, kl = evaluate.against(model, reference, text, sizes.n_ctx, sizes.windows)
            row[f"kl_{name}"] = kl.kl_mean
            model.ops.n_batch = 1  # token by token: other kernels
            _, kl = evaluate.against(model, reference, text, sizes.n_ctx, 1)
            row[f"kl_{name}_by_token"] = kl.kl_mean
            session = generate.load(path, device=name).session()
            ids = session.model.tokenizer.encode("The history of", add_special=True)
            texts[name] = list(session.stream(ids, generate.Sampler(temperature=0), sizes.generated))
    pairs = zip(texts["cuda"], texts["cpu"], strict=False)
    row["same_tokens"] = next((k for k, (a, b) in enumerate(pairs) if a != b), len(texts["cpu"]))
    return row | {"of_tokens": len(texts["cpu"])}


def one_line(error: BaseException) -> str:
    """An error for the report: a message that is one already, or its kind and where it came from."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if isinstance(error, GgufkitError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


def steps() -> dict[str, Callable[[Bench], Any]]:
    """All steps, by name."""
    import gpu_sweeps

    own = {"facts": facts, "limits": limits, "compile": compile_all, "decode": decode, "prefill": prefill}
    return own | {"nearness": nearness} | gpu_sweeps.STEPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", metavar="STEP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--network", metavar="SHAPE:TYPE")
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args()
    state: dict[str, Any] = {"doing": options.steps[0], "done": {}}

    def save() -> None:
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps(state), encoding="utf-8")
        part.replace(options.out)

    save()
    try:
        bench = Bench(options)
    except Exception as error:
        print(one_line(error), file=sys.stderr)
        return 1
    known = steps()
    for step in options.steps:
        state["doing"] = step
        save()
        began = time.perf_counter()
        try:
            state["done"][step] = known[step](bench)
            bench.device.synchronize()
        except Exception as error:
            state["done"][step] = {"error": one_line(error)}
        state["done"][step]["seconds_taken"] = round(time.perf_counter() - began, 2)
        save()
        try:
            bench.device.synchronize()
        except GgufkitError:
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
