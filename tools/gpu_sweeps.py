"""Steps of gpu_parts.py that say where a token's and a prompt's time goes, and what other settings would make of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ggufkit_formats.errors import GgufkitError
from ggufkit_kernels.cuda import attention
from ggufkit_kernels.cuda import ops as cuda_ops
from ggufkit_kernels.cuda import weights as packed_weights
from ggufkit_kernels.cuda.ops import CudaOps

WARPS = (2, 4, 6, 8, 12, 16)
BLOCKS = (1, 2, 4, 8)  # a multiprocessor, that go from strip to strip
PREFETCHED = (2, 4, 8, 16)  # MB
SLABS = (8, 16, 32, 128, 256)  # MB of weights unpacked at a time; less than the second-level cache need not leave it
SHORT = (4, 8, 16, 32, 64)  # tokens
TILES = ((4, 2, 32), (8, 1, 32), (4, 1, 32), (2, 2, 32), (4, 2, 16), (4, 2, 48))  # of a prompt's attention

Launch = tuple[Any, ...]
ATTEND = "attend"


def kind(launch: Launch) -> str:
    """Launches that are alike but for their arrays: the kernel, its layout in short, the grid that says the shape."""
    kernel, grid, block, *_ = launch
    macros = dict(kernel.module.defines)
    layout = "".join(f" {macros[name]}" for name in ("VALUES", "BITS", "BLOCK", "NUMBER") if name in macros)
    return f"{kernel.name}{layout} grid {'x'.join(map(str, grid))} of {block}"


def shape_of(launch: Launch) -> str:
    """`kind` without the threads and the grid's size, which settings change: what is compared between settings."""
    kernel, *_ = launch
    arrays = [a for a in launch[3:] if hasattr(a, "nbytes")]
    return f"{kernel.name} {max((a.nbytes for a in arrays), default=0) / 1e6:.2f} MB"


def nbytes(launch: Launch, cache: Any, context: int) -> int:
    """What a launch has to read and write at least; of attention, the positions that there are."""
    kernel = launch[0]
    if kernel.name == ATTEND:
        return cache.nbytes // cache.n_layers * (context + 1) // cache.positions
    if kernel.name.endswith("embed"):
        return 0  # one row
    return sum(a.nbytes for a in launch[3:] if hasattr(a, "nbytes"))


def timed(bench: Any, launches: list[Launch]) -> float:
    """Seconds of one of these launches, one after the other in a graph: all layers', so that no cache holds them."""
    device, sizes = bench.device, bench.sizes
    graph = device.capture([[launch] for launch in launches])
    graph.launch()
    best = float("inf")
    for _ in range(max(2, sizes.repetitions - 2)):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(sizes.rounds):
            graph.launch()
        device.synchronize()
        best = min(best, (time.perf_counter() - began) / sizes.rounds)
    return best / len(launches)


def grouped(trace: Any, name: Callable[[Launch], str]) -> dict[str, list[Launch]]:
    """A token's launches by name, in their order."""
    groups: dict[str, list[Launch]] = {}
    for level in trace.levels:
        for launch in level:
            groups.setdefault(name(launch), []).append(launch)
    return groups


def kernels(bench: Any) -> dict[str, Any]:
    """Where one token's time goes: for each kind of launch µs, GB/s, and how many there are."""
    net, rows = bench.network, []
    for context in bench.sizes.contexts:
        trace = net.trace(context)
        for name, launches in grouped(trace, kind).items():
            if context != bench.sizes.contexts[0] and launches[0][0].name != ATTEND:
                continue  # nothing else depends on it
            each = timed(bench, launches)
            moved = sum(nbytes(launch, net.cache, context) for launch in launches) / len(launches)
            rows.append({
                "context": context, "name": name, "launches": len(launches), "us": 1e6 * each,
                "gb_s": moved / each / 1e9, "ms_a_token": 1e3 * each * len(launches),
            })  # fmt: skip
    rows.sort(key=lambda row: -row["ms_a_token"])
    total = sum(row["ms_a_token"] for row in rows if row["context"] == bench.sizes.contexts[0])
    return {"rows": rows, "sum_ms": total}


class Watched:
    """A device that times each launch and product: by events on a real one, by the clock else."""

    def __init__(self, device: Any):
        self.device, self.spans = device, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def _mark(self) -> Any:
        if not hasattr(self.device, "cupy"):
            return time.perf_counter()
        event = self.device.cupy.cuda.Event()
        event.record(self.device.stream)
        return event

    def launch(self, kernel: Any, grid: tuple[int, ...], block: int, *args: Any) -> None:
        begin = self._mark()
        self.device.launch(kernel, grid, block, *args)
        self.spans.append((kernel.name, begin, self._mark()))

    def gemm(self, x: Any, w: Any, out: Any, *rest: Any, **named: Any) -> None:
        begin = self._mark()
        self.device.gemm(x, w, out, *rest, **named)
        self.spans.append((f"gemm {'x'.join(map(str, x.shape))} to {out.shape[-1]}", begin, self._mark()))

    def times(self) -> dict[str, list[float]]:
        """Seconds of each span, by name."""
        self.device.synchronize()
        found: dict[str, list[float]] = {}
        for name, begin, end in self.spans:
            if isinstance(begin, float):
                taken = end - begin
            else:
                taken = self.device.cupy.cuda.get_elapsed_time(begin, end) / 1e3
            found.setdefault(name, []).append(taken)
        return found


def prompt_kernels(bench: Any) -> dict[str, Any]:
    """Where a prompt's time goes."""
    net = bench.network
    net.prompt()
    watched = Watched(bench.device)
    ops = CudaOps(watched)  # type: ignore[arg-type]
    net.prompt(ops)
    bench.device.synchronize()
    watched.spans.clear()
    net.prompt(ops)
    rows = [
        {"name": name, "launches": len(times), "us": 1e6 * sum(times) / len(times), "ms_a_prompt": 1e3 * sum(times)}
        for name, times in watched.times().items()
    ]
    rows.sort(key=lambda row: -row["ms_a_prompt"])
    return {"rows": rows, "sum_ms": sum(row["ms_a_prompt"] for row in rows)}


# -- other settings ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def setting(net: Any, fused: bool = True, prefetched: int = 0, blocks: int = 0, warps: int = 0,
            early: bool = True, fewest_blocks: float = CudaOps.fewest_blocks) -> Iterator[None]:  # fmt: skip
    """One token's graph otherwise: recorded anew inside, and again behind."""
    matrices = [w for layer in net.weights.layers for w in vars(layer).values() if hasattr(w, "blocks")]
    matrices.append(net.weights.output)
    before, early_before = packed_weights.warps_of, net.device.early
    try:
        net.device.early = early and early_before
        net.ops.fused, net.ops.prefetched, net.cache.trace = fused, prefetched, None
        net.ops.fewest_blocks = fewest_blocks
        for matrix in matrices:
            matrix.blocks = blocks
        if warps:
            packed_weights.warps_of = lambda steps, stages, most: max(1, min(warps, most, steps))
        yield
    finally:
        packed_weights.warps_of, net.device.early = before, early_before
        for matrix in matrices:
            matrix.blocks = 0
        net.ops.fused, net.ops.prefetched, net.cache.trace = True, 0, None
        net.ops.fewest_blocks = CudaOps.fewest_blocks


def sweeps(bench: Any) -> dict[str, Any]:
    """Tokens a second with other settings, and for each of a token's products which setting is best."""
    net, n_sm = bench.network, bench.device.n_sm
    context = bench.sizes.contexts[0]
    settings: dict[str, dict[str, Any]] = {"as it is": {}, "not begun early": {"early": False}}
    settings |= {"norms in products of few blocks": {"fewest_blocks": 0.25}}
    settings |= {"not fused": {"fused": False}, "neither": {"fused": False, "early": False}}
    settings |= {f"prefetched {mb} MB": {"prefetched": mb << 20} for mb in PREFETCHED}
    settings |= {f"{warps} warps": {"warps": warps} for warps in WARPS}
    settings |= {f"{each} blocks a multiprocessor stay": {"blocks": each * n_sm} for each in BLOCKS}
    if bench.emulate:
        settings = {name: settings[name] for name in (*list(settings)[:4], "4 warps", "1 blocks a multiprocessor stay")}
    rates: dict[str, Any] = {}
    us: dict[str, dict[str, float]] = {}
    for name, changed in settings.items():
        with setting(net, **changed):
            rates[name] = net.decode(context)
            if name == "as it is" or "warps" in changed or "blocks" in changed:
                for group, launches in grouped(net.trace(context), shape_of).items():
                    if launches[0][0].name.startswith(("matvec", "plain_matvec")):
                        us.setdefault(group, {})[name] = 1e6 * timed(bench, launches)
    rates["as it is, again"] = net.decode(context)
    return {"tokens_per_s": rates, "best": max(rates, key=rates.__getitem__), "products": us}


def prompt_sweeps(bench: Any) -> dict[str, Any]:
    """Tokens a second of a prompt with other settings."""
    net, sizes = bench.network, bench.sizes
    rates: dict[str, float] = {}
    wrong: dict[str, str] = {}

    def rate(name: str) -> None:
        best = float("inf")
        try:
            for k in range(3):
                bench.device.synchronize()
                began = time.perf_counter()
                net.prompt()
                bench.device.synchronize()
                best = min(best, time.perf_counter() - began) if k else best  # the first one compiles
            rates[name] = sizes.prompt / best
        except GgufkitError as error:
            wrong[name] = str(error)[:200]

    rate("as it is")
    slab = cuda_ops.SLAB_NBYTES
    for each in SLABS[:1] if bench.emulate else SLABS:
        cuda_ops.SLAB_NBYTES, net.ops._rooms = each << 20, {}
        rate(f"unpacked {each} MB")
    cuda_ops.SLAB_NBYTES, net.ops._rooms = slab, {}
    table: dict[int, Any] = getattr(attention, "TILES", {})
    most = next((most for most in table if net.config.head_dim <= most), None)
    for each in TILES if most is not None else ():
        before = table[most]
        table[most] = type(before)(*each)
        rate("attention by {} warps, {} times 16 rows, {} positions".format(*each))
        table[most] = before
    best = max(rates, key=rates.__getitem__)
    return {"tokens_per_s": rates, "best": best, "products": {}, "wrong": wrong, "short_ms": short_prompts(bench)}


def short_prompts(bench: Any) -> dict[str, list[float]]:
    """Milliseconds of prompts of a few tokens, through the kernels for single ones and through cuBLAS: from where on do
    the latter pay?"""
    few = cuda_ops.FEW
    found: dict[str, list[float]] = {}
    for n in SHORT[:1] if bench.emulate else SHORT:
        found[str(n)] = both = []
        for most in (n, 0):
            cuda_ops.FEW = most
            both.append(1e3 * min(timed_once(bench, n) for _ in range(3)))
    cuda_ops.FEW = few
    return found


def timed_once(bench: Any, n: int) -> float:
    bench.device.synchronize()
    began = time.perf_counter()
    bench.network.prompt(n=n)
    bench.device.synchronize()
    return time.perf_counter() - began


def latency(bench: Any) -> dict[str, float]:
    """µs of a kernel that does nothing much: launched, in a graph one after the other, and in levels of three."""
    device, sizes = bench.device, bench.sizes
    from ggufkit_kernels.cuda import launches

    x = device.zeros((32,), np.float32)
    one = (launches.ELEMENTWISE.kernel("add"), (1,), 32, x, x, x, 32)
    n = 256 if not bench.emulate else 4
    began, found = time.perf_counter, {}
    device.launch(*one)
    device.synchronize()
    start = began()
    for _ in range(n):
        device.launch(*one)
    device.synchronize()
    found["launch_us"] = 1e6 * (began() - start) / n
    for name, levels in (("graph_us", [[one]] * n), ("graph_of_three_us", [[one] * 3] * n)):
        graph = device.capture(levels)
        graph.launch()
        device.synchronize()
        start = began()
        for _ in range(sizes.rounds):
            graph.launch()
        device.synchronize()
        found[name] = 1e6 * (began() - start) / n / sizes.rounds
    return found


STEPS: dict[str, Callable[[Any], Any]] = {
    "kernels": kernels, "prompt_kernels": prompt_kernels, "sweeps": sweeps, "prompt_sweeps": prompt_sweeps,
    "latency": latency,
}  # fmt: skip
