"""ggml's encoders and decoders as an oracle: xllamacpp's shared object through ctypes, in a process of its own.

ggml aborts on some rows. The worker that dies of it raises `GgmlDied`; the next call starts another.

    ggml = Ggml()
    raw = ggml.quantize(12, x)                       # ggml_quantize_chunk: float32 (rows, cols) -> uint8 (rows, nbytes)
    raw = ggml.quantize_row("q8_K", x, nbytes)       # quantize_row_<name>_ref, for types ggml_quantize_chunk lacks
    x = ggml.dequantize("q4_K", raw, cols)           # dequantize_row_<name>
    ggml.validate(12, raw)                           # ggml_validate_row_data
"""

from __future__ import annotations

import ctypes as C
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .llama import available, receive, send

__all__ = ["Ggml", "GgmlDied", "available"]


class GgmlDied(RuntimeError):
    """The worker process ended: ggml aborted on this input."""


class Ggml:
    """Functions of ggml, each call in a worker process that is started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115

    def quantize(self, type_id: int, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """uint8 (rows, bytes per row). Bytes that ggml leaves unwritten are 0."""
        return self._call("quantize", type_id, x, importance)

    def quantize_row(self, name: str, x: np.ndarray, row_nbytes: int) -> np.ndarray:
        return self._call("quantize_row", name, x, row_nbytes)

    def dequantize(self, name: str, raw: np.ndarray, cols: int) -> np.ndarray:
        """float32 (rows, cols); `name` as ggml spells it (q4_K)."""
        return self._call("dequantize", name, raw, cols)

    def validate(self, type_id: int, raw: np.ndarray) -> bool:
        return self._call("validate", type_id, raw)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _call(self, method: str, *args: Any) -> Any:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "oracles.ggml"],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            send(stdin, (method, args))
            ok, value = receive(stdout)
        except (EOFError, BrokenPipeError):
            self.close()
            self._log.seek(0)
            tail = self._log.read()[-2000:].decode("utf-8", "replace").strip()
            raise GgmlDied(f"ggml ended in {method}: {tail}") from None
        if not ok:
            raise RuntimeError(value)
        return value


# --- below: the worker ---


class Worker:
    def __init__(self) -> None:
        spec = importlib.util.find_spec("xllamacpp")  # found without being imported
        if spec is None or spec.origin is None:
            raise RuntimeError("xllamacpp is not installed")
        self.lib: Any = C.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
        self.lib.ggml_row_size.restype = C.c_size_t
        self.lib.ggml_row_size.argtypes = [C.c_int, C.c_int64]
        self.lib.ggml_quantize_chunk.restype = C.c_size_t
        self.lib.ggml_quantize_chunk.argtypes = [C.c_int, C.c_void_p, C.c_void_p, *[C.c_int64] * 3, C.c_void_p]
        self.lib.ggml_validate_row_data.restype = C.c_bool
        self.lib.ggml_validate_row_data.argtypes = [C.c_int, C.c_void_p, C.c_size_t]

    def quantize(self, type_id: int, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        rows, cols = x.shape
        out = np.zeros((rows, self.lib.ggml_row_size(type_id, cols)), np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        pointer = None if weights is None else weights.ctypes.data
        n = self.lib.ggml_quantize_chunk(type_id, x.ctypes.data, out.ctypes.data, 0, rows, cols, pointer)
        assert n == out.nbytes, (n, out.nbytes)
        return out

    def quantize_row(self, name: str, x: np.ndarray, row_nbytes: int) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        out = np.zeros((len(x), row_nbytes), np.uint8)
        function = getattr(self.lib, f"quantize_row_{name}_ref")
        function.argtypes = [C.c_void_p, C.c_void_p, C.c_int64]
        function(x.ctypes.data, out.ctypes.data, x.size)
        return out

    def dequantize(self, name: str, raw: np.ndarray, cols: int) -> np.ndarray:
        raw = np.ascontiguousarray(raw, np.uint8)
        out = np.empty((len(raw), cols), np.float32)
        function = getattr(self.lib, f"dequantize_row_{name}")
        function.argtypes = [C.c_void_p, C.c_void_p, C.c_int64]
        function(raw.ctypes.data, out.ctypes.data, out.size)
        return out

    def validate(self, type_id: int, raw: np.ndarray) -> bool:
        raw = np.ascontiguousarray(raw, np.uint8)
        return bool(self.lib.ggml_validate_row_data(type_id, raw.ctypes.data, raw.nbytes))


def serve() -> None:
    pipe_in = sys.stdin.buffer
    pipe_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints goes to the log, not between the pickles
    worker = Worker()
    while True:
        try:
            method, args = receive(pipe_in)
        except EOFError:
            return
        try:
            answer = (True, getattr(worker, method)(*args))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        send(pipe_out, answer)


if __name__ == "__main__":
    serve()
