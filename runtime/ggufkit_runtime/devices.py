"""Which backend computes: the CPU's, a GPU's, or both, each with its share of the layers."""

from __future__ import annotations

import importlib.util
from typing import Any

from ggufkit_formats.errors import DeviceError, DeviceMemoryError, UsageError

from . import fit


def open_gpu() -> Any:
    """The GPU. Raises DeviceError, in one line, where there is none or what drives it is not installed."""
    from ggufkit_kernels.cuda.cupy_device import CupyDevice

    return CupyDevice()


def gpu_at_hand() -> Any:
    """The GPU, or None where none can be used. Costs nothing where CuPy is not installed."""
    if importlib.util.find_spec("cupy") is None:
        return None
    try:
        return open_gpu()
    except DeviceError:
        return None


def backend(
    device: str = "auto", threads: int | None = None, plan: fit.Plan | None = None, n_gpu_layers: int | None = None
) -> Any:
    """The operations of that device.

    `auto` takes a GPU where one can be used. `n_gpu_layers` of the plan's layers go to the GPU, None: as many as fit;
    0 leaves all to the CPU. Raises DeviceError where --device cuda cannot be had.
    """
    if device not in ("auto", "cpu", "cuda", "reference"):
        raise UsageError(f"unknown device {device!r} (auto, cpu, cuda)")
    if n_gpu_layers is not None and n_gpu_layers < 0:
        raise UsageError(f"{n_gpu_layers} layers on the GPU: 0 is the least")
    if device == "reference":
        from ggufkit_kernels.ops_ref import RefOps

        return RefOps()
    gpu = None
    if device == "cuda" and n_gpu_layers != 0:
        gpu = open_gpu()
    elif device == "auto" and n_gpu_layers != 0:
        gpu = gpu_at_hand()
    if gpu is not None:
        shared = _on_gpu(gpu, device, threads, plan, n_gpu_layers)
        if shared is not None:
            return shared
    from ggufkit_kernels.cpu.ops import CpuOps

    return CpuOps(threads)


def _on_gpu(gpu: Any, device: str, threads: int | None, plan: fit.Plan | None, wanted: int | None) -> Any:
    """The GPU's backend, or one for both sides; None where nothing fits and nobody insists."""
    from ggufkit_kernels.cuda.ops import CudaOps

    if plan is None:
        return CudaOps(gpu, threads)
    n_layers = plan.config.n_layers
    if wanted is None:
        needs, (free, _) = fit.needs(plan), gpu.memory()
        wanted = needs.fitting(free)
        if not wanted:
            if device == "auto":
                return None
            raise DeviceMemoryError(
                f"{gpu.name} has {free / 2**20:,.0f} MiB free, and a layer with its cache of {needs.n_ctx} positions "
                f"needs {needs.total(1) / 2**20:,.0f}: a smaller --ctx-size may help"
            )
    if wanted > n_layers:
        return CudaOps(gpu, threads)
    from ggufkit_kernels.cpu.ops import CpuOps
    from ggufkit_kernels.cuda.hybrid import HybridOps

    return HybridOps(CpuOps(threads), CudaOps(gpu, threads), n_layers, wanted)
