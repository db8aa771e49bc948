"""What a model needs of a GPU's memory, and how many of its layers fit. Nothing of the GPU is asked for, or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ggufkit_formats.tensor import Tensor

from .weights import scale_name


@dataclass(frozen=True)
class Plan:
    """A model about to be loaded: its architecture's module, its Config, the file's tensors, positions (None: all)."""

    architecture: ModuleType
    config: Any
    tensors: Mapping[str, Tensor]
    n_ctx: int | None = None


@dataclass(frozen=True)
class Needs:
    """Bytes on a GPU. Layers go there from the last one on; embedding and output follow when all layers are there."""

    layers: tuple[int, ...]  # the weights of each layer
    ends: int  # embedding, output norm and output
    cache: int  # keys and values of a layer, all positions
    scratch: int
    n_ctx: int

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    def total(self, n_gpu_layers: int) -> int:
        """Bytes with so many layers on the GPU; more than there are: the ends too."""
        if n_gpu_layers <= 0:
            return 0
        count = min(n_gpu_layers, self.n_layers)
        weights = sum(self.layers[self.n_layers - count :]) + (self.ends if n_gpu_layers > self.n_layers else 0)
        return weights + count * self.cache + self.scratch

    def fitting(self, free: int) -> int:
        """The most layers that fit in so many bytes, 0 … n_layers + 1."""
        return max((n for n in range(self.n_layers + 2) if self.total(n) <= free), default=0)


def needs(plan: Plan) -> Needs:
    """What a model needs."""
    from ggufkit_kernels.cuda import sizes

    config = plan.config
    n_ctx = plan.n_ctx or config.n_ctx_train
    layers, ends = [0] * config.n_layers, 0
    for name, tensor in plan.tensors.items():
        if len(tensor.shape) == 2:
            nbytes = sizes.weight_nbytes(tensor.type, *tensor.shape, scaled=scale_name(name) in plan.tensors)
        else:
            nbytes = 4 * tensor.n_elements
        words = name.split(".")
        if words[0] == "blk":
            layers[int(words[1])] += nbytes
        else:
            ends += nbytes
    return Needs(
        layers=tuple(layers),
        ends=ends,
        cache=sizes.cache_nbytes(config.n_kv_heads, config.head_dim, n_ctx),
        scratch=sizes.scratch_nbytes(config.dim, config.n_ffn, config.n_heads, config.n_kv_heads, config.head_dim,
                                     config.n_vocab, n_ctx),
        n_ctx=n_ctx,
    )  # fmt: skip
