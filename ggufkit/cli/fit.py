"""What a model needs of a GPU's memory, and how many of its layers fit there: `ggufkit inspect --fit`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ggufkit_formats.errors import FormatError, UsageError

from . import screen

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def memory_size(text: str) -> int:
    """24G, 24GiB (powers of 1,024), 24GB (of 1,000) or bytes. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if match is None:
        raise UsageError(f"{screen.one_line(text)} is no size of memory: 24G, 800M")
    number, unit, suffix = match.groups()
    thousand = 1000 ** "kmgt".index(unit) * 1000 if unit and suffix == "b" else _UNITS[unit]
    return int(float(number) * thousand)


def document(file: Path, opened: Any, n_ctx: int | None, memory: str | None) -> dict[str, Any]:
    """Bytes that all of the model needs, and the layers that fit in `memory`, or on the GPU at hand if there is one."""
    from ggufkit_runtime import devices, fit, models

    arch = opened.metadata.get("general.architecture")
    if not isinstance(arch, str) or not opened.tensors:
        raise FormatError(f"{file}: not a model, so there is nothing to fit")
    architecture = models.by_arch(arch)
    config = architecture.config_from_metadata(opened.metadata)
    needs = fit.needs(fit.Plan(architecture, config, opened.tensors, n_ctx))
    gpu = None if memory is not None else devices.gpu_at_hand()
    free = memory_size(memory) if memory is not None else None if gpu is None else gpu.memory()[0]
    return {
        "n_ctx": needs.n_ctx,
        "n_layers": needs.n_layers,
        "weights": sum(needs.layers) + needs.ends,
        "cache": needs.cache * needs.n_layers,
        "scratch": needs.scratch,
        "total": needs.total(needs.n_layers + 1),
        "device": None if gpu is None else gpu.name,
        "free": free,
        "n_gpu_layers": None if free is None else needs.fitting(free),
    }


def text(found: dict[str, Any]) -> str:
    """The same for a person."""
    size = screen.size
    lines = [
        f"All {found['n_layers']} layers and the output on a GPU, {found['n_ctx']} positions: {size(found['total'])}",
        f"  weights {size(found['weights'])}, keys and values {size(found['cache'])}, at work {size(found['scratch'])}",
    ]
    n, layers = found["n_gpu_layers"], found["n_layers"]
    if n is None:
        lines.append("There is no GPU that can be used here; --memory 24G says what fits in so much.")
    else:
        where = f"{found['device']}, {size(found['free'])} free" if found["device"] else size(found["free"])
        what = "all of it" if n > layers else f"{n} of {layers} layers" if n else "not one layer"
        lines.append(f"{where}: {what} fit{'s' if n > layers or n in (0, 1) else ''} (-ngl {n})")
    return "\n".join(lines)
