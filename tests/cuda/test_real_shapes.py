"""The shapes that gpu_check.py measures, in their real sizes, on a device that checks launches and computes nothing:
threads within what kernels are compiled for, grids, kinds of arguments, sizes of products. One layer of them is
computed, too."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import emulated
import numpy as np
import nvrtc_binding
import pytest
from emulated import EmulatedArray, EmulatedDevice

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_sweeps  # noqa: E402
import make_model  # noqa: E402


class DryDevice(EmulatedDevice):
    """Memory that is never touched, kernels that are looked up and not run."""

    def __init__(self):
        super().__init__(n_sm=132, total=1 << 38)

    def empty(self, shape, dtype):
        return EmulatedArray(self, np.zeros(shape, dtype))  # of the system's empty pages

    def zeros(self, shape, dtype):
        return self.empty(shape, dtype)

    def upload(self, array):
        return self.empty(array.shape, array.dtype)

    def write(self, to, array):
        assert (to.shape, to.dtype) == (array.shape, array.dtype)

    def copy(self, to, source):
        assert (to.shape, to.dtype) == (source.shape, source.dtype)

    def download(self, array):
        return np.zeros(array.shape, array.dtype)

    def run(self, bound):
        self.launches += 1

    def gemm(self, x, w, out, beta=0.0, transposed=True):
        n, k = (w.shape[-2:] if transposed else w.shape[:-3:-1])[:2]
        assert x.shape[:-2] == w.shape[:-2] == out.shape[:-2]
        assert (x.shape[-1], out.shape[-2:]) == (k, (x.shape[-2], n))
        assert x.dtype == w.dtype and x.dtype in (np.float16, np.float32) and out.dtype == np.float32


@pytest.mark.skipif(emulated.COMPILER is None, reason="there is no g++")
@pytest.mark.parametrize(("shape", "type", "levels"), [("8b", "q4_k_m", 13), ("1b", "f16", None)])
def test_every_launch_is_one_that_the_device_takes(monkeypatch, shape, type, levels):
    monkeypatch.setitem(
        gpu_parts.make_model.SHAPES, shape, gpu_parts.make_model.SHAPES[shape] | {"num_hidden_layers": 2}
    )
    monkeypatch.setattr(gpu_sweeps, "TILES", gpu_sweeps.TILES[-1:])  # each is a module to be compiled
    sizes, device = gpu_check.FULL, DryDevice()
    bench = SimpleNamespace(device=device, emulate=False, sizes=sizes)
    bench.network = gpu_parts.Network(device, shape, type, sizes)
    steps = gpu_parts.steps()
    found = {step: steps[step](bench) for step in gpu_check.MAIN}
    assert found["decode"]["decode_8192"] > 0 and found["prefill"]["prefill_2048"] > 0
    rows = [row for row in found["kernels"]["rows"] if row["context"] == 128]
    assert sum(row["launches"] for row in rows) == found["decode"]["launches"]
    assert levels is None or found["decode"]["levels"] == levels
    settings = found["sweeps"]["tokens_per_s"]
    assert {"as it is", "not fused", "prefetched 8 MB", "16 warps", "2 blocks a multiprocessor stay"} < set(settings)
    assert all(len(us) > 10 for us in found["sweeps"]["products"].values())
    assert bench.network.weights.output.blocks == 0  # all is as it was
    assert not found["prompt_sweeps"]["wrong"] and "unpacked 32 MB" in found["prompt_sweeps"]["tokens_per_s"]
    text = gpu_check.brief("kernels", found["kernels"]) + gpu_check.brief("sweeps", found["sweeps"])
    assert "attend" in text and "GB/s" in text and "best: " in text


@pytest.mark.skipif(emulated.COMPILER is None, reason="there is no g++")
@pytest.mark.skipif(not nvrtc_binding.found, reason=nvrtc_binding.reason)
@pytest.mark.parametrize(
    ("shape", "type"),
    [
        ("1b", "q4_k_m"),
        *(pytest.param("8b", name, marks=pytest.mark.slow) for name in ("q4_k_m", "q8_0", "tq2_0", "f16")),
    ],
)
def test_a_layer_runs_as_ptx(monkeypatch, shape, type):
    """Of real size, on as many multiprocessors as a real device has, memory watched: whether fused or not."""
    settings = {**make_model.SHAPES[shape], "num_hidden_layers": 1, "vocab_size": 1024}
    monkeypatch.setitem(make_model.SHAPES, "one layer", settings)
    sizes = replace(gpu_check.FULL, contexts=(8, 16), prompt=8, tokens=8)
    network = gpu_parts.Network(EmulatedDevice(n_sm=132, total=1 << 36, ptx=True), "one layer", type, sizes)
    found = []
    for fused in (True, False):
        network.ops.fused, network.cache.trace, network.cache.length = fused, None, 0
        found += [network.device.download(network.forward(np.array([token]))) for token in (5, 9)][1:]
    assert np.isfinite(found[0]).all() and np.abs(found[0]).max() > 0
    assert np.abs(found[0] - found[1]).max() < 2e-2 * np.abs(found[0]).max()
