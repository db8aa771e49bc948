"""What llama-imatrix would collect, by the same callback of llama.cpp, in a process of its own.

sums = imatrix.collect(path, windows)     # windows of ids -> {weight's name: (sum of squared inputs, rows)}
"""

from __future__ import annotations

import ctypes as C
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .llama import LlamaError, Worker, available, receive, send

__all__ = ["available", "collect"]

Sums = dict[str, tuple[np.ndarray, int]]
Callback = C.CFUNCTYPE(C.c_bool, C.c_void_p, C.c_bool, C.c_void_p)


def collect(path: str | os.PathLike[str], windows: Sequence[Sequence[int]]) -> Sums:
    """Run each window by itself; float64 (cols,) and a count for every matrix of the layers."""
    command = [sys.executable, "-m", "oracles.imatrix"]
    with subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        send(process.stdin, (os.fspath(path), [list(map(int, ids)) for ids in windows]))
        try:
            return receive(process.stdout)
        except EOFError:
            raise LlamaError(f"llama.cpp ended (exit status {process.wait()})") from None


# --- below: the worker ---


class Tensor(C.Structure):
    """The beginning of ggml_tensor."""

    _fields_ = [
        ("type", C.c_int32),
        ("buffer", C.c_void_p),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
        ("op", C.c_int32),
        ("op_params", C.c_int32 * 16),
        ("flags", C.c_int32),
        ("src", C.c_void_p * 10),
    ]


class Listener(Worker):
    """Notes the inputs of each product with a matrix of the layers, while a context decodes."""

    def __init__(self, path: str, n_ctx: int):
        super().__init__()
        for name, restype in (("op_name", C.c_char_p), ("get_name", C.c_char_p), ("get_data", C.c_void_p)):
            function = getattr(self.lib, f"ggml_{name}")
            function.restype, function.argtypes = restype, [C.c_int if name == "op_name" else C.c_void_p]
        self.found: Sums = {}
        self.callback = Callback(self._on_eval)
        self.load(path, False, n_ctx, 1, "f16", None)
        c = self.lib.llama_context_default_params()
        c.n_ctx = c.n_batch = c.n_ubatch = n_ctx
        c.cb_eval = C.cast(self.callback, C.c_void_p)
        self.context = self.lib.llama_init_from_model(self.model, c)

    def _on_eval(self, at: int, asked: bool, _: Any) -> bool:
        tensor = Tensor.from_address(at)
        if self.lib.ggml_op_name(tensor.op) != b"MUL_MAT":
            return not asked
        name = self.lib.ggml_get_name(tensor.src[0]).decode()
        inputs = Tensor.from_address(tensor.src[1])
        if not name.startswith("blk.") or inputs.type != 0:
            return not asked
        if not asked:
            cols, rows = inputs.ne[0], inputs.ne[1] * inputs.ne[2] * inputs.ne[3]
            assert inputs.nb[1] == 4 * cols
            pointer = C.cast(self.lib.ggml_get_data(tensor.src[1]), C.POINTER(C.c_float))
            x = np.ctypeslib.as_array(pointer, (rows, cols)).astype(np.float64)
            before, count = self.found.get(name, (0.0, 0))
            self.found[name] = before + (x**2).sum(axis=0), count + rows
        return True


def serve() -> None:
    pipe_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints goes to the log
    path, windows = receive(sys.stdin.buffer)
    listener = Listener(path, max(map(len, windows)))
    for ids in windows:
        listener.clear()
        listener.decode(ids, 0, all_logits=True)
    send(pipe_out, listener.found)


if __name__ == "__main__":
    serve()
