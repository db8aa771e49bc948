"""What an importance matrix is made of: squares of what goes into each matrix of the layers, summed over a text.

The network is not changed: it is handed `Recorder`, a backend that notes the inputs of `matmul` on their way. Of a
backend made of two, each run of the network (cuda/hybrid.py: a segment) is handed one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ggufkit_formats.errors import FormatError

from .evaluate import windows
from .generate import N_BATCH, Model


@dataclass
class Activations:
    """Sums by the names of weights, and how many rows (tokens) went into each."""

    n_ctx: int
    n_chunks: int = 0
    sums: dict[str, np.ndarray] = field(default_factory=dict)  # float64 (cols,): sum of squared inputs a column
    counts: dict[str, int] = field(default_factory=dict)


class Recorder:
    """A backend that adds up the squared inputs of the weights in `names` (by the weight's id); otherwise `ops`."""

    def __init__(self, ops: Any, names: dict[int, str], found: Activations):
        self.ops, self.names, self.found = ops, names, found
        self.last: tuple[Any, np.ndarray] | None = None  # an input and its sums: several weights share one
        self._watched: dict[Callable, Callable] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def forward(self, network: Callable, config: Any, weights: Any, ids: np.ndarray, cache: Any, first: int = 0) -> Any:
        """network(config, weights, self, ids, cache, first): never replayed, so that each call passes here."""
        if hasattr(self.ops, "matmul"):
            return network(config, weights, self, ids, cache, first)
        return self.ops.forward(self._watching(network), config, weights, ids, cache, first)

    def _watching(self, network: Callable) -> Callable:
        """The network, with a recorder around the backend that it is handed; the same function each time."""

        def watched(config: Any, weights: Any, ops: Any, ids: np.ndarray, cache: Any, first: int = 0) -> Any:
            return network(config, weights, Recorder(ops, self.names, self.found), ids, cache, first)

        return self._watched.setdefault(network, watched)

    def matmul(self, weight: Any, x: Any, bias: Any = None) -> Any:
        """The backend's; the squares of x (n, cols) are added to the weight's sums."""
        out = self.ops.matmul(weight, x, bias)
        name = self.names.get(id(weight))
        if name is not None and getattr(self.ops, "computes", True):  # a segment knows of all calls and does some
            if self.last is None or self.last[0] is not x:
                # in float32 over a batch, which is far finer than what a text tells of a column
                self.last = x, np.square(self.ops.to_numpy(x)).sum(axis=0)
            self.found.sums[name] = self.found.sums.get(name, 0.0) + self.last[1].astype(np.float64)
            self.found.counts[name] = self.found.counts.get(name, 0) + len(out)
        return out


def collect(
    model: Model,
    text: str,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
    output: bool = False,
) -> Activations:
    """Run windows of n_ctx tokens, as llama-imatrix cuts them, and sum the squared inputs of the layers' matrices.

    Each window begins with BOS where the model wants one and has a cache of its own; a rest of the text that fills no
    window is left out, as is the output matrix unless `output` asks for it. `progress` is told (windows done, in
    all). Raises UsageError for a text of less than two windows, FormatError where inputs are NaN or infinite.
    """
    found = Activations(n_ctx)
    recorder = Recorder(model.ops, names(model, output), found)
    chunks, n_batch = windows(model, text, n_ctx, n_chunks), getattr(model.ops, "n_batch", N_BATCH)
    while n_ctx % n_batch == 1 and n_batch > 2:  # a single token's forward is replayed by what a backend is made of
        n_batch -= 1
    for window in chunks:
        cache = model.cache(n_ctx)
        for start in range(0, n_ctx, n_batch):
            ids = np.asarray(window[start : start + n_batch], dtype=np.int64)
            first = 0 if output else len(ids) - 1  # logits are of use to nobody
            recorder.forward(model.architecture.forward, model.config, model.weights, ids, cache, first)
        found.n_chunks += 1
        if progress is not None:
            progress(found.n_chunks, len(chunks))
    for name, sums in found.sums.items():
        if not np.isfinite(sums).all():
            raise FormatError(f"{model.info.name}: the inputs of {name!r} are NaN or infinite: its weights are broken")
    return found


def names(model: Model, output: bool = False) -> dict[int, str]:
    """The layers' matrices: the id of the packed weight -> its name in GGUF. With `output` also the output matrix.

    A model whose embedding stands for it has none, as in llama-imatrix.
    """
    found = {}
    for spec in model.architecture.tensors(model.config):
        if spec.is_matrix and spec.gguf.startswith("blk."):
            _, layer, attribute, _ = spec.gguf.split(".")
            weight = getattr(model.weights.layers[int(layer)], attribute)
            if weight is not None:
                found[id(weight)] = spec.gguf
    if output and model.weights.output is not model.weights.token_embd:
        found[id(model.weights.output)] = "output.weight"
    return found
