"""ggufkit as a contender. The same methods as `peers.llama`; times in seconds, of this process alone."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ggufkit_runtime import generate

from . import wire
from .data import SAMPLE, weights


class Ours:
    def __init__(self) -> None:
        generate.backend("cpu", 1)  # importing is not loading
        self.model: Any = None
        self.cache: Any = None

    def about(self) -> dict[str, Any]:
        import importlib.metadata

        import llvmlite
        import numba

        about: dict[str, Any] = {"version": importlib.metadata.version("ggufkit"), "numba": numba.__version__,
                                 "llvmlite": llvmlite.__version__}  # fmt: skip
        try:
            from ggufkit_kernels.cpu.simd.target import FAMILY

            about["simd"] = FAMILY.name
        except ImportError:
            about["simd"] = "unknown"
        return about

    def load(self, path: str, n_ctx: int, threads: int, flash: str = "auto") -> float:
        """Weights packed and an empty cache made."""
        began = time.perf_counter()
        self.model = generate.load(path, device="cpu", threads=threads)
        self.cache = self.model.cache(n_ctx)
        return time.perf_counter() - began

    def unload(self) -> None:
        self.model = self.cache = None
        gc.collect()

    def prefill(self, ids: Sequence[int], at: int = 0) -> float:
        """`ids` in batches after the first `at` tokens of the cache; logits of the last token of each."""
        tokens = np.array(ids)
        self.cache.truncate(at)
        began = time.perf_counter()
        for start in range(0, len(tokens), generate.N_BATCH):
            batch = tokens[start : start + generate.N_BATCH]
            self.model.forward(batch, self.cache, first=len(batch) - 1)
        return time.perf_counter() - began

    def decode(self, ids: Sequence[int], at: int = 0) -> float:
        """`ids` one by one after the first `at` tokens of the cache, logits of each."""
        self.cache.truncate(at)
        began = time.perf_counter()
        for token in ids:
            self.model.forward([token], self.cache)
        return time.perf_counter() - began

    def logits(self, ids: Sequence[int]) -> list[float]:
        """The first logits after `ids`, to see that all compute the same."""
        self.cache.truncate(0)
        return self.model.forward(ids, self.cache, first=len(ids) - 1)[0][:SAMPLE].tolist()

    def memory(self) -> dict[str, int]:
        return wire.memory()

    def encode(self, type: str, type_id: int, seconds: float) -> dict[str, Any]:
        """Weights a second with one thread, and a digest of the bytes."""
        from ggufkit_kernels.cpu.encode import encode

        x = weights()
        raw = encode(type, x, threads=1)
        calls, taken = wire.repeat(lambda: encode(type, x, threads=1), seconds)
        return {"rate": calls * x.size / taken, "digest": hashlib.sha256(raw.tobytes()).hexdigest()}


if __name__ == "__main__":
    wire.serve(Ours())
