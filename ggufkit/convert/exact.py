"""Tensors that are ternary already, with a scale that float16 does not hold: the scale goes into a tensor beside.

Blocks of ternary types have a float16 d. Where s of the weights {-s, 0, s} is none, the blocks get d = 1, and the
tensor `….scale` (F32, one number) holds s: llama.cpp and the runtime multiply the matrix with it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ggufkit_formats.errors import FormatError

from ..quantize import ternary
from ..quantize.rules import Choice, order
from .job import Input, Job
from .pipeline import chunks

_ARCHITECTURES = ("llama", "qwen3", "bitnet")  # llama.cpp's qwen2 leaves out those of the feed-forward
_PEEK = 1 << 16  # weights that are looked at at a time: most tensors are not ternary


def keep_scales(job: Job, choices: dict[str, Choice]) -> None:
    """Add the scales that are needed to the job, for architectures whose networks read them."""
    if job.facts.arch not in _ARCHITECTURES:
        return
    names = {each.name for each in job.inputs}
    for k, each in enumerate(list(job.inputs)):
        stem = each.name.removesuffix(".weight")
        beside = f"{stem}.scale"
        alone = beside not in names and f"{stem}.bias" not in names  # llama.cpp multiplies some biases, too
        if not (each.tensor and alone and each.name.startswith("blk.") and choices[each.name].type in ternary.TYPES):
            continue
        try:
            scale = ternary.common_scale(chunks(each.tensor, _PEEK))
        except FormatError as error:
            raise FormatError(f"{each.label}: {error}") from None
        if scale is None or _is_half(scale):
            continue
        job.inputs[k] = replace(each, scale=scale)
        job.inputs.append(Input(beside, (1,), None, np.array([scale], np.float32)))
        choices[beside] = Choice("F32", "F32")
    job.inputs.sort(key=lambda each: order(each.name))


def _is_half(scale: float) -> bool:
    """Whether float16 holds the scale."""
    with np.errstate(over="ignore"):
        return float(np.float16(scale)) == scale
