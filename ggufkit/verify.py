"""Whether a GGUF file is sound: structure, network, tokenizer, weights; and how far it is from its source."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats import gguf
from ggufkit_formats.blocks import UnknownType
from ggufkit_formats.errors import FormatError, UnsupportedError
from ggufkit_formats.tensor import Tensor

from .compare import Distance, Summed

SLAB = 1 << 22  # weights that are decoded at a time
Progress = Callable[[int, int], None]  # weights done, weights in all


@dataclass(frozen=True, slots=True)
class Problem:
    where: str  # a tensor, or what part of the file
    what: str


@dataclass(slots=True)
class Findings:
    """`problems` is empty for a sound file. `notes` are what could not be looked at."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, tuple[str, Distance]] = field(default_factory=dict)  # tensor -> type, distance from the source

    def add(self, where: str, what: object) -> None:
        self.problems.append(Problem(where, str(what)))


def verify(
    path: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, progress: Progress | None = None
) -> Findings:
    """Look at everything in the file; `against` is its source, a checkpoint or a GGUF file, as convert takes it.

    Bounds, overlaps, types and names are what opening a file checks. Raises GgufkitError where the file or the source
    cannot be read at all; what is wrong inside the file is found, not raised.
    """
    found = Findings()
    if not Path(path).is_file():
        gguf.open(path)  # raises: no file, a folder, a device
    try:
        file = gguf.open(path)
    except FormatError as error:
        found.add("structure", error)
        return found
    with file:
        total = sum(t.n_elements for t in file.tensors.values()) * (1 if against is None else 2)
        done = 0

        def step(n: int) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress(done, total)

        _network(file, found)
        _tokenizer(file, found)
        for tensor in file.tensors.values():
            _weights(tensor, found, step)
        if against is not None:
            _distances(file, os.fspath(against), found, step)
    return found


def _network(file: gguf.GgufFile, found: Findings) -> None:
    """The tensors that the architecture asks for, where it is known."""
    from ggufkit_runtime import models, weights

    try:
        module = models.by_arch(str(file.metadata.get("general.architecture", "")))
        config = module.config_from_metadata(file.metadata)
        weights.check(module.tensors(config), file.tensors, "the network")
    except UnsupportedError as error:
        found.notes.append(f"not checked as a network: {error}")
    except FormatError as error:
        found.add("network", error)


def _tokenizer(file: gguf.GgufFile, found: Findings) -> None:
    """The vocabulary, its special ids, and whether the embedding has a row for each token."""
    from ggufkit_runtime.tokenizer import vocabulary

    if vocabulary.PREFIX + "tokens" not in file.metadata:
        found.notes.append("holds no tokenizer")
        return
    try:
        words = vocabulary.parse(file.metadata)
    except UnsupportedError as error:
        found.notes.append(f"tokenizer not checked: {error}")
        return
    except FormatError as error:
        found.add("tokenizer", error)
        return
    n = len(words.tokens)
    for _, key in vocabulary.ID_KEYS:
        value = file.metadata.get(vocabulary.PREFIX + key)
        if isinstance(value, int) and not 0 <= value < n:
            found.add("tokenizer", f"{vocabulary.PREFIX}{key} is {value}; there are {n} tokens")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.rows != n:
        found.add("tokenizer", f"token_embd.weight has {embedding.rows} rows for {n} tokens")


def _weights(tensor: Tensor, found: Findings, step: Callable[[int], None]) -> None:
    """Weights that are not finite, and tensors of nothing but zeros."""
    if isinstance(tensor.type, UnknownType):
        found.notes.append(f"{tensor.name}: weights of type {tensor.type} cannot be read")
        return step(tensor.n_elements)
    some = tensor.n_elements == 0
    for start, stop in tensor.slabs(4 * SLAB):
        with np.errstate(all="ignore"):
            x = tensor.type.decode(tensor.read_rows(start, stop))
        finite = np.isfinite(x)
        if not finite.all():
            row = start + int((~finite.reshape(stop - start, -1).all(axis=1)).argmax())
            found.add(tensor.name, f"NaN or infinite weights of type {tensor.type}, the first in row {row}")
            return step((tensor.rows - start) * tensor.cols)
        some = some or bool(x.any())
        step((stop - start) * tensor.cols)
    if not some:
        found.add(tensor.name, "all weights are 0")
    return None


def _distances(file: gguf.GgufFile, against: str, found: Findings, step: Callable[[int], None]) -> None:
    """How far each tensor is from the source's; tensors that only one of them has, or of another shape."""
    from .convert import read_source

    job = read_source(against)
    try:
        inputs = {each.name: each for each in job.inputs}
        for name, tensor in file.tensors.items():
            each = inputs.get(name)
            if each is None:
                if not name.endswith(".scale"):  # which convert may have added, and is counted with its matrix
                    found.add(name, f"is not in {against}")
            elif each.shape != tensor.shape:
                found.add(name, f"has shape {list(tensor.shape)}, and {list(each.shape)} in {against}")
            elif not isinstance(tensor.type, UnknownType) and (
                each.tensor is None or not isinstance(each.tensor.type, UnknownType)
            ):
                distance = _distance(file, tensor, each, step)
                found.errors[name] = tensor.type.name, distance
                if not np.isfinite(distance.relative_rmse):
                    found.add(name, f"is infinitely far from {against}, or not a number")
        for name in inputs:
            if name not in file.tensors:
                found.add(name, f"is in {against}, and not in the file")
    finally:
        job.close()


def _distance(file: gguf.GgufFile, tensor: Tensor, each: Any, step: Callable[[int], None]) -> Distance:
    from ggufkit_runtime.weights import scale_name, scale_of

    from .convert.pipeline import decoded

    has_scale = len(tensor.shape) > 1 and scale_name(tensor.name) in file.tensors
    scale = np.float32(scale_of(file.tensors, tensor.name, str(file.path)) if has_scale else 1)
    summed = Summed()
    unit = each.head_rows if len(each.shape) > 1 and each.head_rows else 1
    size = max(unit, SLAB // max(1, tensor.cols) // unit * unit)
    for start in range(0, tensor.rows, size):
        stop = min(start + size, tensor.rows)
        with np.errstate(all="ignore"):
            x = tensor.type.decode(tensor.read_rows(start, stop)) * scale
        if each.tensor is None:
            y = each.values.reshape(tensor.rows, -1)[start:stop]
        else:
            y = decoded(each.tensor, start, stop, each.head_rows)
        summed.add(x.reshape(-1), y.reshape(-1))
        step((stop - start) * tensor.cols)
    return summed.distance
