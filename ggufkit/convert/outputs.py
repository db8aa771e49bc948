"""What each input becomes in the new file: one stored tensor, or the parts of an NF4 one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ggufkit_formats.four_bit import FourBitTensor

from ..quantize.rules import Choice
from . import nf4
from .job import Input, Job
from .nf4 import Codebook, Nf4Output


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the new file as a model means it, and the rows of the plan that it is stored as."""

    input: Input
    choice: Choice
    type: str  # as `inspect` shows it
    rows: list[tuple[Any, ...]]
    nf4: Nf4Output | None = None

    @property
    def n_elements(self) -> int:
        return math.prod(self.input.shape)


@dataclass(frozen=True, slots=True)
class Outputs:
    """All tensors of the new file, and the metadata that they ask for."""

    tensors: list[Output]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        return [row for each in self.tensors for row in each.rows]


def of(job: Job, choices: Mapping[str, Choice], nested: bool) -> Outputs:
    """The outputs of a job by the types chosen; `nested`: the maxima of NF4 tensors are quantized again."""
    book = nf4.codebook(job.inputs, nested)
    tensors = [_output(each, choices[each.name], book) for each in job.inputs]
    found = [each.nf4 for each in tensors if each.nf4 is not None]
    kept = sum(each.keeps_maxima for each in found)
    if kept:
        job.notes.append(f"{kept} tensors keep the maxima of their blocks as F32, unchanged")
    return Outputs(tensors, book.metadata() if found else {})


def _output(each: Input, choice: Choice, book: Codebook) -> Output:
    tensor = each.tensor
    if choice.type == nf4.NAME or (choice.type is None and isinstance(tensor, FourBitTensor)):
        made = Nf4Output.of(each, book)
        return Output(each, choice, nf4.NAME, list(made.rows), made)
    if choice.type is not None:
        return Output(each, choice, choice.type, [(each.name, choice.type, each.shape)])
    assert tensor is not None
    return Output(each, choice, tensor.type.name, [(each.name, tensor.type, each.shape, tensor.nbytes)])
