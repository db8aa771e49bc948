"""llama.cpp as a contender, through its C API: `native` (llama-cpp-python) or `xllamacpp` (a wheel built for all).

Both are asked for the same: no layers on a GPU, n_threads for single tokens and batches, batches of 512, float16
cache, memory mapping and repacking as llama.cpp does by default. Threads are OpenMP's where the build has it.
"""

from __future__ import annotations

import ctypes as C
import hashlib
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import wire
from .data import SAMPLE, weights

FLASH = {"auto": -1, "off": 0, "on": 1}
N_BATCH = 512


def native() -> tuple[Any, Any, Any, str]:
    """(llama.cpp's functions, library with ggml's encoders, type of a log callback, version) of llama-cpp-python."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    folder = Path(llama_cpp.__file__).parent / "lib"
    libraries = [path for stem in ("libggml-base", "ggml-base", "libllama") for path in folder.glob(f"{stem}.*")]
    version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    return llama_cpp, C.CDLL(str(libraries[0])), llama_cpp.llama_log_callback, version


def wheel() -> tuple[Any, Any, Any, str]:
    """The same of xllamacpp, whose structures stand beside the tests' oracle."""
    sys.path.insert(0, str(wire.TOOLS.parent / "tests"))
    from oracles import llama as oracle

    lib = oracle.Worker().lib
    for name, result, arguments in (
        ("llama_memory_seq_rm", C.c_bool, [C.c_void_p, C.c_int32, C.c_int32, C.c_int32]),
        ("llama_free", None, [C.c_void_p]),
        ("llama_model_free", None, [C.c_void_p]),
        ("llama_print_system_info", C.c_char_p, []),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib, lib, oracle.LogCallback, f"xllamacpp {importlib.metadata.version('xllamacpp')}"


class Peer:
    def __init__(self, build: str):
        self.api, self.ggml, callback, self.version = {"native": native, "xllamacpp": wheel}[build]()
        self.complaints: list[str] = []
        self._log = callback(self._on_log)  # kept: the library goes on calling it
        self.api.llama_log_set(self._log, C.c_void_p(0))
        self.api.llama_backend_init()
        self.ggml.ggml_row_size.restype = C.c_size_t
        self.ggml.ggml_row_size.argtypes = [C.c_int, C.c_int64]
        self.ggml.ggml_quantize_chunk.restype = C.c_size_t
        self.ggml.ggml_quantize_chunk.argtypes = [C.c_int, C.c_void_p, C.c_void_p, *[C.c_int64] * 3, C.c_void_p]
        self.model: Any = None
        self.context: Any = None

    def _on_log(self, level: int, text: bytes, _: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.complaints.append(text.decode("utf-8", "replace").strip())

    def about(self) -> dict[str, Any]:
        return {"version": self.version, "system_info": self.api.llama_print_system_info().decode().strip()}

    def load(self, path: str, n_ctx: int, threads: int, flash: str = "auto") -> float:
        """Model loaded and a context made."""
        began = time.perf_counter()
        m = self.api.llama_model_default_params()
        m.n_gpu_layers = 0
        self.model = self.api.llama_model_load_from_file(path.encode(), m)
        if not self.model:
            raise RuntimeError(self._complaint("the model did not load"))
        c = self.api.llama_context_default_params()
        c.n_ctx = n_ctx
        c.n_batch = c.n_ubatch = min(N_BATCH, n_ctx)
        c.n_threads = c.n_threads_batch = threads
        c.flash_attn_type = FLASH[flash]
        self.context = self.api.llama_init_from_model(self.model, c)
        if not self.context:
            raise RuntimeError(self._complaint("the context could not be made"))
        taken = time.perf_counter() - began
        self.memory_of_tokens = self.api.llama_get_memory(self.context)
        self.batch = self.api.llama_batch_init(N_BATCH, 0, 1)
        self.n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        return taken

    def _complaint(self, otherwise: str) -> str:
        return "; ".join(self.complaints[-3:]) or otherwise

    def unload(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)
        self.model = self.context = None

    def prefill(self, ids: Sequence[int], at: int = 0) -> float:
        """As `Ours.prefill`."""
        self._truncate(at)
        began = time.perf_counter()
        for start in range(0, len(ids), N_BATCH):
            self._decode(ids[start : start + N_BATCH], at + start)
        return time.perf_counter() - began

    def decode(self, ids: Sequence[int], at: int = 0) -> float:
        """As `Ours.decode`."""
        self._truncate(at)
        began = time.perf_counter()
        for k, token in enumerate(ids):
            self._decode([token], at + k)
        return time.perf_counter() - began

    def logits(self, ids: Sequence[int]) -> list[float]:
        """As `Ours.logits`."""
        self._truncate(0)
        self._decode(ids, 0)
        pointer = self.api.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,))[:SAMPLE].astype(float).tolist()

    def _truncate(self, at: int) -> None:
        if at == 0:
            self.api.llama_memory_clear(self.memory_of_tokens, False)
        elif not self.api.llama_memory_seq_rm(self.memory_of_tokens, 0, at, -1):
            raise RuntimeError(f"the cache could not be cut to {at} tokens")

    def _decode(self, ids: Sequence[int], at: int) -> None:
        """One batch at positions at…; logits of its last token."""
        b, n = self.batch, len(ids)
        b.n_tokens = n
        for k, i in enumerate(ids):
            b.token[k], b.pos[k], b.n_seq_id[k], b.logits[k] = i, at + k, 1, k == n - 1
            b.seq_id[k][0] = 0
        status = self.api.llama_decode(self.context, b)
        if status:
            raise RuntimeError(f"llama_decode gave {status} ({self._complaint('no message')})")
        self.api.llama_synchronize(self.context)

    def memory(self) -> dict[str, int]:
        return wire.memory()

    def encode(self, type: str, type_id: int, seconds: float) -> dict[str, Any]:
        """As `Ours.encode`, by ggml_quantize_chunk."""
        x = weights()
        rows, cols = x.shape
        out = np.zeros((rows, self.ggml.ggml_row_size(type_id, cols)), np.uint8)

        def work() -> None:
            self.ggml.ggml_quantize_chunk(type_id, x.ctypes.data, out.ctypes.data, 0, rows, cols, None)

        work()
        calls, taken = wire.repeat(work, seconds)
        return {"rate": calls * x.size / taken, "digest": hashlib.sha256(out.tobytes()).hexdigest()}


if __name__ == "__main__":
    wire.serve(Peer(sys.argv[1]))
