"""The same network in other weights: factors of its channels moved between tensors that undo one another.

A norm's weight times s and the columns of the matrices it feeds divided by s, or the rows of `ffn_up` times s and
the columns of `ffn_down` divided by s, leave every logit what it was, up to float32's rounding. The values themselves
then lie on no quantizer's grid any more, so that a model which is quantized already can be quantized again
without favour for the type it had. (SmoothQuant, arXiv 2211.10438, and AWQ, arXiv 2306.00978, move such factors
to make weights easier to quantize; here they are random.)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats import gguf, nf4_tensors
from ggufkit_formats.errors import FormatError
from ggufkit_formats.tensor import Tensor

LOW, HIGH = 0.8, 1.25  # of the factors
SLAB_NBYTES = 32 << 20  # float32 bytes that are worked on at a time
FILE_TYPE = "general.file_type"

# (what is multiplied, what is divided by as much, what must not be there): of a layer, and of the whole network
_IN_LAYER = (
    ("attn_norm", ("attn_q", "attn_k", "attn_v"), ""),
    ("attn_sub_norm", ("attn_output",), ""),
    ("ffn_norm", ("ffn_gate", "ffn_up"), ""),
    ("ffn_sub_norm", ("ffn_down",), ""),
    ("ffn_up", ("ffn_down",), "ffn_sub_norm"),  # a norm between them would see other magnitudes
)
_GLOBAL = (("output_norm", ("output",), ""),)


@dataclass(slots=True)
class Factors:
    """What a tensor is multiplied with: its rows (rows, 1) and its columns (cols,), float32."""

    rows: np.ndarray | None = None
    cols: np.ndarray | None = None

    def apply(self, x: np.ndarray, start: int, stop: int) -> np.ndarray:
        """To the rows start…stop of the tensor: x float32 (stop - start, cols)."""
        if self.rows is not None:
            x = x * self.rows[start:stop]
        return x if self.cols is None else x * self.cols


def factors(shapes: dict[str, tuple[int, ...]], n_layers: int, seed: int) -> dict[str, Factors]:
    """Random factors for the tensors of these names and shapes (NumPy order) that can have some.

    They lie between LOW and HIGH, and their logarithms evenly. A network whose embedding is its output keeps both.
    """
    random = np.random.default_rng(seed)
    found: dict[str, Factors] = {}
    places = [(f"blk.{i}.", _IN_LAYER) for i in range(n_layers)] + [("", _GLOBAL)]
    for prefix, moves in places:
        for scaled, divided, unless in moves:
            names = [f"{prefix}{name}.weight" for name in (scaled, *divided)]
            if f"{prefix}{unless}.weight" in shapes or not all(name in shapes for name in names):
                continue
            n = shapes[names[0]][0]
            s = np.exp(random.uniform(math.log(LOW), math.log(HIGH), n)).astype(np.float32)
            _multiply(found, names[0], shapes, s)
            bias = f"{prefix}{scaled}.bias"
            if bias in shapes:
                _multiply(found, bias, shapes, s)
            for name in names[1:]:
                each = found.setdefault(name, Factors())
                each.cols = 1 / s if each.cols is None else each.cols / s
    return found


def _multiply(found: dict[str, Factors], name: str, shapes: dict[str, tuple[int, ...]], s: np.ndarray) -> None:
    """The rows of a matrix, or the items of a vector, which is one row."""
    each = found.setdefault(name, Factors())
    if len(shapes[name]) > 1:
        each.rows = s[:, None]
    else:
        each.cols = s


def write(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> gguf.Plan:
    """Write the GGUF model `source`, dequantized to F32 and rescaled, to `output`.

    `progress` is told (weights written, in all). Raises UnsupportedError for an architecture that does not run here,
    FormatError for a file that is not what its metadata says, or whose weights are NaN or infinite.
    """
    from ggufkit_runtime import models, weights

    with gguf.open(source) as file:
        arch = file.metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise FormatError(f"{os.fspath(source)}: general.architecture is missing, so this is not a model")
        architecture = models.by_arch(arch)
        config = architecture.config_from_metadata(file.metadata)
        weights.check(architecture.tensors(config), file.tensors, os.fspath(source))
        by_name = factors({name: t.shape for name, t in file.tensors.items()}, config.n_layers, seed)
        metadata = {key: value for key, value in file.metadata.copy().items() if key not in nf4_tensors.KEYS}
        metadata[FILE_TYPE] = np.uint32(0)
        plan = gguf.Plan(metadata, [(name, "F32", t.shape) for name, t in file.tensors.items()])
        _write(output, plan, file.tensors.values(), by_name, overwrite, progress)
    return plan


def _write(output: str | os.PathLike[str], plan: gguf.Plan, tensors: Collection[Tensor], by_name: dict[str, Factors],
           overwrite: bool, progress: Callable[[int, int], Any] | None) -> None:  # fmt: skip
    total, done = sum(t.n_elements for t in tensors), 0
    with gguf.Writer(output, plan, overwrite) as writer:
        for tensor in tensors:
            change = by_name.get(tensor.name, Factors())
            for start, stop in tensor.slabs(SLAB_NBYTES):
                x = change.apply(tensor.type.decode(tensor.read_rows(start, stop)), start, stop)
                if not np.isfinite(x).all():
                    raise FormatError(f"tensor {tensor.name!r}: NaN or infinite weights")
                writer.write(tensor.name, x)
                done += x.size
                if progress is not None:
                    progress(done, total)
