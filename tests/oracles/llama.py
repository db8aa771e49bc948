"""llama.cpp as an oracle: xllamacpp's shared object through ctypes, in a process of its own.

ggml aborts on some inputs, so the library never lives in the test process: `Llama` starts this file as a
worker and talks to it in pickles over pipes. A worker that dies raises `LlamaDied` with what it printed last.
Tests say `from oracles.llama import Llama`.

    with Llama(path, vocab_only=True) as oracle:
        ids = oracle.tokenize(["Hello", "world"])          # list of lists
    with Llama(path, n_ctx=512, n_threads=2) as oracle:
        logits = oracle.logits(ids)                        # float32 (len(ids), n_vocab), teacher-forced
        oracle.greedy(ids, 64)                             # ids of the continuation
        oracle.bench(pp=512, tg=128, reps=3)               # llama-bench's two tests

The structures below are those of the pinned xllamacpp; their defaults are checked when the library is loaded.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np


class LlamaError(RuntimeError):
    """llama.cpp refused: a model that does not load, a decode that failed."""


class LlamaDied(LlamaError):
    """The worker process ended (an abort inside ggml, most often)."""


def available() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class Llama:
    """One model in one worker process. Methods are those of `Worker`, called across the pipe."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocab_only: bool = False,
        n_ctx: int = 512,
        n_threads: int = 2,
        kv_type: str = "f16",
        flash_attn: bool | None = None,
    ):
        """`kv_type`: f16 (llama.cpp's default) or f32. `flash_attn`: None leaves the choice to llama.cpp."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.n_vocab: int = self._call("load", os.fspath(path), vocab_only, n_ctx, n_threads, kv_type, flash_attn)
        except BaseException:
            self.close()
            raise

    def tokenize(
        self, texts: Sequence[str | bytes], add_special: bool = True, parse_special: bool = False
    ) -> list[list[int]]:
        """Ids of each text, as `llama_tokenize` gives them."""
        return self._call("tokenize", list(texts), add_special, parse_special)

    def detokenize(
        self, ids: Sequence[Sequence[int]], remove_special: bool = False, unparse_special: bool = True
    ) -> list[bytes]:
        """Bytes of each list of ids, as `llama_detokenize` gives them."""
        return self._call("detokenize", [list(map(int, i)) for i in ids], remove_special, unparse_special)

    def token_to_piece(self, ids: Sequence[int] | None = None, lstrip: int = 0, special: bool = True) -> list[bytes]:
        """What each token prints; all tokens of the vocabulary without `ids`."""
        return self._call("token_to_piece", None if ids is None else list(map(int, ids)), lstrip, special)

    def vocab(self) -> dict[str, Any]:
        """n_vocab, type, bos, eos, eot, nl, pad, sep (-1: none), add_bos, add_eos, add_sep, eog, attr (n,)."""
        return self._call("vocab")

    def metadata(self) -> dict[str, str]:
        """The file's metadata as llama.cpp prints it (arrays shortened)."""
        return self._call("metadata")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (len(ids), n_vocab): one pass over all of `ids` from an empty cache."""
        return self._call("logits", list(map(int, ids)))

    def logits_one_by_one(self, ids: Sequence[int]) -> np.ndarray:
        """The same, one token a pass, as generation does it."""
        return self._call("logits_one_by_one", list(map(int, ids)))

    def greedy(self, ids: Sequence[int], n: int, stop: bool = True) -> list[int]:
        """The `n` likeliest next tokens, fed back one at a time; `stop` ends (without it) at an end token."""
        return self._call("greedy", list(map(int, ids)), n, stop)

    def bench(self, pp: int = 512, tg: int = 128, reps: int = 3) -> dict[str, list[float]]:
        """Tokens per second of each repetition: {"pp512": [...], "tg128": [...]}; 0 tokens: no such test."""
        return self._call("bench", pp, tg, reps)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, method: str, *args: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            send(stdin, (method, args))
            ok, value = receive(stdout)
        except (EOFError, BrokenPipeError):
            self._process.wait()
            self._log.seek(0)
            tail = self._log.read()[-2000:].decode("utf-8", "replace").strip()
            code = self._process.returncode
            raise LlamaDied(f"llama.cpp ended in {method} (exit status {code}): {tail}") from None
        if not ok:
            raise LlamaError(value)
        return value


def send(pipe: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


# --- below: the worker ---


class ModelParams(C.Structure):
    _fields_ = [
        ("devices", C.c_void_p),
        ("tensor_buft_overrides", C.c_void_p),
        ("n_gpu_layers", C.c_int32),
        ("split_mode", C.c_int32),
        ("load_mode", C.c_int32),
        ("lazy_mode", C.c_int32),
        ("main_gpu", C.c_int32),
        ("tensor_split", C.c_void_p),
        ("progress_callback", C.c_void_p),
        ("progress_callback_user_data", C.c_void_p),
        ("kv_overrides", C.c_void_p),
        ("vocab_only", C.c_bool),
        ("check_tensors", C.c_bool),
        ("use_extra_bufts", C.c_bool),
        ("reserve", C.c_ubyte * 181),  # later fields; passed back as they came
    ]


class ContextParams(C.Structure):
    _fields_ = [
        ("n_ctx", C.c_uint32),
        ("n_batch", C.c_uint32),
        ("n_ubatch", C.c_uint32),
        ("n_seq_max", C.c_uint32),
        ("n_rs_seq", C.c_uint32),
        ("n_outputs_max", C.c_uint32),
        ("n_outputs_max_per_seq", C.c_uint32),
        ("n_threads", C.c_int32),
        ("n_threads_batch", C.c_int32),
        ("ctx_type", C.c_int32),
        ("rope_scaling_type", C.c_int32),
        ("pooling_type", C.c_int32),
        ("attention_type", C.c_int32),
        ("flash_attn_type", C.c_int32),
        ("floats", C.c_float * 6),
        ("yarn_orig_ctx", C.c_uint32),
        ("defrag_thold", C.c_float),
        ("cb_eval", C.c_void_p),
        ("cb_eval_user_data", C.c_void_p),
        ("type_k", C.c_int32),
        ("type_v", C.c_int32),
        ("reserve", C.c_ubyte * 144),
    ]


class Batch(C.Structure):
    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.c_void_p),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


LogCallback = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)

P, N, B, S = C.c_void_p, C.c_int32, C.c_bool, C.c_char_p
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, P]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (P, [S, ModelParams]),
    "llama_init_from_model": (P, [P, ContextParams]),
    "llama_model_get_vocab": (P, [P]),
    "llama_model_meta_count": (N, [P]),
    "llama_model_meta_key_by_index": (N, [P, N, S, C.c_size_t]),
    "llama_model_meta_val_str_by_index": (N, [P, N, S, C.c_size_t]),
    "llama_vocab_n_tokens": (N, [P]),
    "llama_vocab_type": (N, [P]),
    "llama_vocab_is_eog": (B, [P, N]),
    "llama_vocab_get_attr": (N, [P, N]),
    "llama_tokenize": (N, [P, S, N, P, N, B, B]),
    "llama_detokenize": (N, [P, P, N, P, N, B, B]),
    "llama_token_to_piece": (N, [P, N, P, N, N, B]),
    "llama_get_memory": (P, [P]),
    "llama_memory_clear": (None, [P, B]),
    "llama_batch_init": (Batch, [N, N, N]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (N, [P, Batch]),
    "llama_get_logits_ith": (C.POINTER(C.c_float), [P, N]),
    "llama_synchronize": (None, [P]),
}
SPECIALS = ("bos", "eos", "eot", "nl", "pad", "sep")
FLAGS = ("add_bos", "add_eos", "add_sep")


class Worker:
    """Holds the library, one model and its context."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("xllamacpp")  # found without being imported
        if spec is None or spec.origin is None:
            raise LlamaError("xllamacpp is not installed")
        self.lib: Any = C.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
        for name, (restype, argtypes) in SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = restype, argtypes
        for name in SPECIALS:
            getattr(self.lib, f"llama_vocab_{name}").argtypes = [P]
        for name in FLAGS:
            function = getattr(self.lib, f"llama_vocab_get_{name}")
            function.restype, function.argtypes = B, [P]
        self.complaints: list[str] = []
        self.log = LogCallback(self._on_log)
        self.lib.llama_log_set(self.log, None)
        self.lib.llama_backend_init()
        self.check_layout()

    def _on_log(self, level: int, text: bytes, _: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            self.complaints.append(text.decode("utf-8", "replace").strip())

    def check_layout(self) -> None:
        """Defaults that are known from llama.h stand where the structures above expect them."""
        m = self.lib.llama_model_default_params()
        c = self.lib.llama_context_default_params()
        model = (m.n_gpu_layers, m.split_mode, m.load_mode, m.vocab_only, m.use_extra_bufts)
        context = (c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max, c.flash_attn_type, c.type_k, c.type_v)
        if model != (-1, 1, -1, False, True) or context != (512, 2048, 512, 1, -1, 1, 1):
            raise LlamaError(f"llama.cpp's structures have another layout: {model} {context}")

    def load(
        self, path: str, vocab_only: bool, n_ctx: int, n_threads: int, kv_type: str, flash_attn: bool | None
    ) -> int:
        params = self.lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise LlamaError("; ".join(self.complaints) or "the model did not load")
        self.handle = self.lib.llama_model_get_vocab(self.model)
        self.n_vocab = self.lib.llama_vocab_n_tokens(self.handle)
        self.n_ctx = n_ctx
        self.context = None
        if not vocab_only:
            c = self.lib.llama_context_default_params()
            c.n_ctx = c.n_batch = n_ctx
            c.n_ubatch = min(512, n_ctx)
            c.n_threads = c.n_threads_batch = n_threads
            c.type_k = c.type_v = {"f32": 0, "f16": 1}[kv_type]
            if flash_attn is not None:
                c.flash_attn_type = int(flash_attn)
            self.context = self.lib.llama_init_from_model(self.model, c)
            if not self.context:
                raise LlamaError("; ".join(self.complaints) or "the context could not be made")
            self.batch = self.lib.llama_batch_init(n_ctx, 0, 1)
        return self.n_vocab

    def tokenize(self, texts: list[str | bytes], add_special: bool, parse_special: bool) -> list[list[int]]:
        size, out = 1024, []
        buffer = (C.c_int32 * size)()
        for text in texts:
            raw = text.encode() if isinstance(text, str) else text
            if len(raw) + 16 > size:
                size = 2 * len(raw) + 16
                buffer = (C.c_int32 * size)()
            n = self.lib.llama_tokenize(self.handle, raw, len(raw), buffer, size, add_special, parse_special)
            if n < 0:
                raise LlamaError(f"llama_tokenize gave {n} for {text!r}")
            out.append(buffer[:n])
        return out

    def detokenize(self, lists: list[list[int]], remove_special: bool, unparse_special: bool) -> list[bytes]:
        out = []
        for ids in lists:
            array = (C.c_int32 * len(ids))(*ids)
            size = 64 + 16 * len(ids)
            n, buffer = -1, C.create_string_buffer(0)
            for _ in range(2):
                buffer = C.create_string_buffer(size)
                n = self.lib.llama_detokenize(
                    self.handle, array, len(ids), buffer, size, remove_special, unparse_special
                )
                if n >= 0:
                    break
                size = -n
            out.append(buffer.raw[:n])
        return out

    def token_to_piece(self, ids: list[int] | None, lstrip: int, special: bool) -> list[bytes]:
        out, size = [], 4096
        buffer = C.create_string_buffer(size)
        for i in range(self.n_vocab) if ids is None else ids:
            n = self.lib.llama_token_to_piece(self.handle, i, buffer, size, lstrip, special)
            if n < 0:
                raise LlamaError(f"token {i} needs {-n} bytes")
            out.append(buffer.raw[:n])
        return out

    def vocab(self) -> dict[str, Any]:
        lib, v = self.lib, self.handle
        info: dict[str, Any] = {"n_vocab": self.n_vocab, "type": lib.llama_vocab_type(v)}
        info |= {name: getattr(lib, f"llama_vocab_{name}")(v) for name in SPECIALS}
        info |= {name: getattr(lib, f"llama_vocab_get_{name}")(v) for name in FLAGS}
        info["eog"] = [i for i in range(self.n_vocab) if lib.llama_vocab_is_eog(v, i)]
        info["attr"] = np.array([lib.llama_vocab_get_attr(v, i) for i in range(self.n_vocab)], np.int32)
        return info

    def metadata(self) -> dict[str, str]:
        out, buffer = {}, C.create_string_buffer(1 << 16)
        for i in range(self.lib.llama_model_meta_count(self.model)):
            self.lib.llama_model_meta_key_by_index(self.model, i, buffer, len(buffer))
            key = buffer.value.decode()
            self.lib.llama_model_meta_val_str_by_index(self.model, i, buffer, len(buffer))
            out[key] = buffer.value.decode("utf-8", "replace")
        return out

    def clear(self) -> None:
        if self.context is None:
            raise LlamaError("the model was loaded with vocab_only")
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def decode(self, ids: list[int], start: int, all_logits: bool = False) -> None:
        """Feed `ids` at positions start…; logits for the last one, or for all."""
        if start + len(ids) > self.n_ctx:
            raise LlamaError(f"{start + len(ids)} tokens do not fit n_ctx {self.n_ctx}")
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise LlamaError(f"token id {i} of {self.n_vocab}")
        b = self.batch
        b.n_tokens = len(ids)
        for k, i in enumerate(ids):
            b.token[k], b.pos[k], b.n_seq_id[k], b.logits[k] = i, start + k, 1, all_logits
            b.seq_id[k][0] = 0
        b.logits[len(ids) - 1] = 1
        status = self.lib.llama_decode(self.context, b)
        if status:
            raise LlamaError(f"llama_decode gave {status}")

    def row(self, index: int) -> np.ndarray:
        pointer = self.lib.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def logits(self, ids: list[int]) -> np.ndarray:
        self.clear()
        self.decode(ids, 0, all_logits=True)
        return np.stack([self.row(k) for k in range(len(ids))])

    def logits_one_by_one(self, ids: list[int]) -> np.ndarray:
        self.clear()
        out = []
        for position, token in enumerate(ids):
            self.decode([token], position)
            out.append(self.row(-1))
        return np.stack(out)

    def greedy(self, ids: list[int], n: int, stop: bool) -> list[int]:
        self.clear()
        self.decode(ids, 0)
        out: list[int] = []
        while len(out) < n:
            token = int(np.argmax(self.row(-1)))
            if stop and self.lib.llama_vocab_is_eog(self.handle, token):
                break
            out.append(token)
            if len(out) < n:
                self.decode([token], len(ids) + len(out) - 1)
        return out

    def bench(self, pp: int, tg: int, reps: int) -> dict[str, list[float]]:
        rng = np.random.default_rng(1)
        out: dict[str, list[float]] = {}
        for name, n, step in ((f"pp{pp}", pp, pp), (f"tg{tg}", tg, 1)):
            for rep in range(reps + 1 if n else 0):  # the first warms up
                ids = rng.integers(0, self.n_vocab, n).tolist()
                self.clear()
                begin = time.perf_counter()
                for start in range(0, n, step):
                    self.decode(ids[start : start + step], start)
                    self.lib.llama_synchronize(self.context)
                if rep:
                    out.setdefault(name, []).append(n / (time.perf_counter() - begin))
        return out


def serve() -> None:
    pipe_in = sys.stdin.buffer
    pipe_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints goes to the log, not between the pickles
    worker: Worker | None = None
    while True:
        try:
            method, args = receive(pipe_in)
        except EOFError:
            return
        try:
            worker = worker or Worker()
            worker.complaints.clear()
            answer = (True, getattr(worker, method)(*args))
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {error}")
        send(pipe_out, answer)


if __name__ == "__main__":
    serve()
