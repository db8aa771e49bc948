"""A `Device` by CuPy: the only file that imports it.

Kernels are compiled by nvrtc through CuPy's binding of it, to machine code of this device's architecture, and kept in
the cache folder, a file each. Not by `cupy.RawModule`: it always compiles with -ftz=true (loader.options says what
that would break), and does not say whether it compiles or loads. One stream of our own takes all work, so that memory
which is freed may be used again at once, by whatever is queued later.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats.errors import DeviceError, DeviceMemoryError

from ..cpu import store
from . import driver, loader
from .device import in_a_row
from .loader import Kernel, Module

Array = Any

EXTRAS = "pip install 'ggufkit[cuda13]' (or [cuda12])"
OLDEST = 75  # compute capability: __dp4a and what nvrtc 13 still compiles for
UNUSED_SECONDS = 90 * 86400
STAGE_BYTES, SMALL_BYTES = 1 << 18, 1 << 14  # pinned memory, and what goes through it: a prompt's ids do
SIDE_STREAMS = 7  # beside the main one, when a graph is recorded
# cudaDataType_t, cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t
_R_16F, _R_32F, _COMPUTE_32F, _GEMM_DEFAULT, _N, _T = 2, 0, 68, -1, 0, 1
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation as well as CUDA_ERROR_OUT_OF_MEMORY
_OLD_DRIVER = 35  # cudaErrorInsufficientDriver, also where there is none


def installed() -> bool:
    """Whether there is a CuPy to import; does not import it."""
    return importlib.util.find_spec("cupy") is not None


def available() -> bool:
    """Whether CuPy imports and finds a device that is new enough."""
    if not installed():
        return False
    try:
        cupy = _import()
        with _said():
            return _arch(cupy) >= OLDEST
    except DeviceError:
        return False


def _import() -> Any:
    """CuPy. Raises DeviceError where it cannot be imported, or where there is no device."""
    try:
        cupy: Any = importlib.import_module("cupy")
    except ImportError as error:
        if error.name == "cupy":
            raise DeviceError(f"--device cuda needs CuPy: {EXTRAS}") from None
        raise DeviceError(f"CuPy cannot be imported: {_line(error)}") from None
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own class of errors
        raise DeviceError(f"there is no CUDA device: {_driver_fault(cupy.cuda.runtime, error)}") from None
    if not count:
        raise DeviceError("there is no CUDA device")
    return cupy


def _driver_fault(runtime: Any, error: Exception) -> str:
    """Why no device can be asked for; the runtime says "insufficient" of a driver that is not there, too."""
    if getattr(error, "status", None) != _OLD_DRIVER:
        return _line(error)
    driver, wanted = ((v // 1000, v % 1000 // 10) for v in (runtime.driverGetVersion(), runtime.runtimeGetVersion()))
    if driver == (0, 0):
        return "there is no NVIDIA driver"
    said = f"the NVIDIA driver is one for CUDA {driver[0]}.{driver[1]}, and this CuPy needs {wanted[0]}.{wanted[1]}"
    return f"{said}: pip install 'ggufkit[cuda{driver[0]}]'" if driver[0] < wanted[0] else said


def _arch(cupy: Any) -> int:
    return int(cupy.cuda.Device(0).compute_capability)


def _line(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _said(where: str = "") -> Iterator[None]:
    """What CUDA and CuPy raise becomes one line: DeviceMemoryError or DeviceError. `where`: in which kernel."""
    try:
        yield
    except (DeviceError, TypeError, ValueError, OverflowError):
        raise
    except MemoryError as error:  # OutOfMemoryError of CuPy's pool
        raise DeviceMemoryError(f"the GPU's memory is full: {_line(error)}") from None
    except ImportError as error:  # CuPy loads cuBLAS at first use
        raise _missing(error) from None
    except RuntimeError as error:  # CUDARuntimeError, CUDADriverError, CUBLASError, NVRTCError
        if type(error).__module__.startswith("cuda.pathfinder"):  # which finds nvrtc for CuPy
            raise _missing(error) from None
        line, status = _line(error), getattr(error, "status", None)
        if "ALLOC_FAILED" in line or (status == _OUT_OF_MEMORY and "NVRTC" not in line):
            raise DeviceMemoryError(f"the GPU's memory is full: {line}") from None
        if "CUBLAS_STATUS_NOT_INITIALIZED" in line:
            raise DeviceError("cuBLAS does not start, mostly for want of the GPU's memory") from None
        _hush()
        raise DeviceError(f"the GPU failed{where and ' in '}{where}: {line}") from None


def _missing(error: Exception) -> DeviceError:
    return DeviceError(f"a library of the CUDA toolkit is missing, {EXTRAS} brings it: {_line(error)}")


def _hush() -> None:
    """After a fault of the device no object of CuPy's can be freed, and Python would print a traceback for each."""
    before = sys.unraisablehook
    if getattr(before, "hushed", False):
        return

    def hook(unraisable: Any) -> None:
        if not unraisable.exc_type.__module__.startswith("cupy_backends."):
            before(unraisable)

    hook.hushed = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


class Compiler:
    """From modules to machine code, kept in files. `tell` gets a line at the first compilation."""

    def __init__(self, nvrtc: Any, arch: int, tell: Callable[[str], None], name: str = ""):
        self.nvrtc, self.tell, self.name = nvrtc, tell, name
        self.version = nvrtc.getVersion()
        known = sorted(int(a) for a in nvrtc.getSupportedArchs())
        if arch in known:
            self.target, self.binary, self.arch = f"sm_{arch}", True, arch
        else:  # a device newer than nvrtc: its driver compiles the rest
            older = [a for a in known if a <= arch]
            if not older:
                raise DeviceError(f"nvrtc {self.version} does not compile for compute capability {arch / 10}")
            self.target, self.binary, self.arch = f"compute_{older[-1]}", False, older[-1]
        self._lock, self._told = threading.Lock(), False

    def code(self, module: Module) -> bytes:
        """Machine code, from the cache folder or compiled now."""
        source = loader.source(module)
        options = (*loader.options(module), f"-arch={self.target}")
        key = hashlib.sha256(repr((source, options, self.version)).encode()).hexdigest()[:32]
        folder = _folder()
        if folder is not None and (kept := _read(folder / f"{key}.cubin")) is not None:
            return kept
        with self._lock:
            if not self._told:
                self._told = True
                self.tell(f"compiling CUDA kernels for {self.name or self.target}, which later runs will find compiled")
        code = self._compile(source, module.file, options)
        if folder is not None:
            _write(folder / f"{key}.cubin", code)
        return code

    def _compile(self, source: str, file: str, options: tuple[str, ...]) -> bytes:
        program = self.nvrtc.createProgram(source, file, (), ())
        try:
            try:
                self.nvrtc.compileProgram(program, options)
            except RuntimeError as error:
                log = self.nvrtc.getProgramLog(program)
                wrong = next((line for line in log.splitlines() if "error" in line), _line(error))
                raise DeviceError(f"{file} does not compile for {self.target}: {wrong}") from None
            code = self.nvrtc.getCUBIN(program) if self.binary else self.nvrtc.getPTX(program)
            return code if isinstance(code, bytes) else code.encode()
        finally:
            self.nvrtc.destroyProgram(program)


def _folder() -> Path | None:
    """Where machine code is kept, or None where nothing can be written."""
    for root in (store.cache_root(), store.private_temporary()):
        if root is not None and store.usable(root / "cuda"):
            return root / "cuda"
    return None


def _read(path: Path) -> bytes | None:
    """What was kept, None where nothing was or where the file is damaged."""
    try:
        data = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    return data[32:] if len(data) > 32 and data[:32] == hashlib.sha256(data[32:]).digest() else None


def _write(path: Path, code: bytes) -> None:
    """Keep machine code; a full disk costs the cache, not the run. Files that nobody used for long go."""
    part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_bytes(hashlib.sha256(code).digest() + code)
        part.replace(path)
        for old in path.parent.glob("*.cubin"):
            if old.stat().st_mtime < time.time() - UNUSED_SECONDS:
                old.unlink()
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()


def _say(line: str) -> None:
    print(f"ggufkit: {line}", file=sys.stderr, flush=True)


class CupyGraph:
    """Recorded launches, and the arrays that they work on."""

    def __init__(self, graph: Any, stream: Any, keep: Any):
        self.graph, self.stream, self.keep = graph, stream, keep

    def launch(self) -> None:
        """Queue all of it again, with the same arguments."""
        with _said():
            self.graph.launch(stream=self.stream)


class CupyDevice:
    """The first device that CUDA shows (CUDA_VISIBLE_DEVICES chooses). Raises DeviceError where there is none."""

    def __init__(self, tell: Callable[[str], None] = _say):
        self.cupy = cupy = _import()
        with _said():
            properties = cupy.cuda.runtime.getDeviceProperties(0)
            self.name: str = properties["name"].decode()
            self.arch = _arch(cupy)
            self.n_sm = int(properties["multiProcessorCount"])
        if self.arch < OLDEST:
            raise DeviceError(
                f"{self.name} has compute capability {self.arch / 10}; ggufkit needs {OLDEST / 10} (Turing) or newer"
            )
        with _said():
            self.compiler = Compiler(cupy.cuda.nvrtc, self.arch, tell, f"{self.name} (sm_{self.arch})")
            self.stream = cupy.cuda.Stream(non_blocking=True)
            self.sides: list[Any] = []
            self.pool = cupy.cuda.MemoryPool()
            self.stage = cupy.cuda.alloc_pinned_memory(STAGE_BYTES)
        wanted = os.environ.get("GGUFKIT_CUDA_EARLY") != "0"
        # kernels that are compiled for less than sm_90 do not wait: see common.cuh
        self.early = wanted and self.compiler.arch >= 90 and driver.can_launch_early()
        self.staged = 0  # bytes of the stage that are on their way
        self._modules: dict[Module, Any] = {}
        self._functions: dict[Kernel, Any] = {}
        self._alpha = np.ones(1, np.float32)

    # -- kernels -------------------------------------------------------------------------------------------

    def compile(self, modules: Iterable[Module], progress: Callable[[int, int], None] | None = None) -> None:
        """Compile and load modules, side by side."""
        missing = [m for m in dict.fromkeys(modules) if m not in self._modules]
        done, lock = 0, threading.Lock()

        def code(module: Module) -> bytes:
            nonlocal done
            made = self.compiler.code(module)
            with lock:
                done += 1
                if progress is not None:
                    progress(done, len(missing))
            return made

        with _said(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            for module, made in zip(missing, threads.map(code, missing), strict=True):
                self._load(module, made)

    def _load(self, module: Module, code: bytes) -> Any:
        loaded = self.cupy.cuda.function.Module()
        loaded.load(code)
        self._modules[module] = loaded
        return loaded

    def _function(self, kernel: Kernel) -> Any:
        if (found := self._functions.get(kernel)) is None:
            module = self._modules.get(kernel.module) or self._load(kernel.module, self.compiler.code(kernel.module))
            found = self._functions[kernel] = module.get_function(kernel.name)
        return found

    def launch(self, kernel: Kernel, grid: tuple[int, ...], block: int, *args: Any) -> None:
        with _said(kernel.name):
            self._function(kernel)(grid, (block,), words(args), stream=self.stream)

    def capture(self, levels: Sequence[Sequence[tuple]]) -> CupyGraph:
        """Record launches as a CUDA graph, those of one level on streams side by side."""
        with _said():
            while len(self.sides) < min(SIDE_STREAMS, max(map(len, levels), default=1) - 1):
                self.sides.append(self.cupy.cuda.Stream(non_blocking=True))
            graph = None
            if self.early:
                try:
                    graph = self._captured(in_a_row(levels))
                except RuntimeError:  # a driver that does not record it
                    self.early = False
            if graph is None:
                graph = self._captured([(level, False) for level in levels])
        return CupyGraph(graph, self.stream, [args for level in levels for _, _, _, *args in level])

    def _captured(self, levels: Sequence[tuple[Sequence[tuple], bool]]) -> Any:
        bound = [
            ([(self._function(kernel), grid, block, words(args)) for kernel, grid, block, *args in level], early)
            for level, early in levels
        ]
        events: list[Any] = []  # which stay until the capture has ended
        self.stream.begin_capture()
        try:
            for level, early in bound:
                events += self._record(level, early)
        except BaseException:
            with contextlib.suppress(Exception):
                self.stream.end_capture()
            raise
        graph = self.stream.end_capture()
        graph.upload(stream=self.stream)
        return graph

    def _record(self, level: list[tuple], early: bool) -> list[Any]:
        """Queue one level: forked from the main stream, and joined to it again by the events that are returned.
        `early`: its only launch may begin early."""
        sides = self.sides[: len(level) - 1]
        streams = [self.stream, *sides]
        events = [self.cupy.cuda.Event(disable_timing=True) for _ in streams[1:] and streams]
        if sides:
            events[0].record(self.stream)
            for side in sides:
                side.wait_event(events[0])
        for k, (function, grid, block, args) in enumerate(level):
            stream = streams[k % len(streams)]
            if early:
                driver.launch_early(function.ptr, grid, block, args, stream.ptr)
            else:
                function(grid, (block,), args, stream=stream)
        for side, end in zip(sides, events[1:], strict=True):
            end.record(side)
            self.stream.wait_event(end)
        return events

    # -- memory --------------------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with _said():
            try:
                memory = self.pool.malloc(nbytes)
            except MemoryError:
                self.stream.synchronize()
                self.pool.free_all_blocks()
                try:
                    memory = self.pool.malloc(nbytes)
                except MemoryError:
                    free, total = self.cupy.cuda.runtime.memGetInfo()
                    raise DeviceMemoryError(
                        f"the GPU's memory is full: {nbytes / 2**20:,.0f} MiB were asked for, "
                        f"{free / 2**20:,.0f} of {total / 2**20:,.0f} MiB are free"
                    ) from None
            return self.cupy.ndarray(tuple(shape), dtype, memptr=memory)

    def zeros(self, shape: Sequence[int], dtype: Any) -> Array:
        array = self.empty(shape, dtype)
        with _said():
            if array.nbytes:
                array.data.memset_async(0, array.nbytes, self.stream)
        return array

    def upload(self, array: np.ndarray) -> Array:
        made = self.empty(array.shape, array.dtype)
        self.write(made, array)
        return made

    def write(self, to: Array, array: np.ndarray) -> None:
        if to.shape != array.shape or to.dtype != array.dtype or not to.flags.c_contiguous:
            raise ValueError(f"{array.dtype} {array.shape} is written to {to.dtype} {to.shape}")
        array = np.ascontiguousarray(array)
        if not array.nbytes:
            return
        with _said():
            if array.nbytes > SMALL_BYTES:  # ordinary memory, which may be gone before all systems have taken it
                to.data.copy_from_host_async(ctypes.c_void_p(array.ctypes.data), array.nbytes, self.stream)
                self.synchronize()
                return
            # from pinned memory nobody waits: a token's few bytes must not wait for the token before
            if self.staged + array.nbytes > STAGE_BYTES:
                self.synchronize()
            at = self.stage.ptr + self.staged
            ctypes.memmove(at, array.ctypes.data, array.nbytes)
            to.data.copy_from_host_async(ctypes.c_void_p(at), array.nbytes, self.stream)
            self.staged += -(-array.nbytes // 64) * 64

    def copy(self, to: Array, source: Array) -> None:
        if to.shape != source.shape or to.dtype != source.dtype:
            raise ValueError(f"{source.dtype} {source.shape} is copied to {to.dtype} {to.shape}")
        if not (to.flags.c_contiguous and source.flags.c_contiguous):
            raise ValueError("only contiguous arrays are copied")
        with _said():
            if to.nbytes:
                to.data.copy_from_device_async(source.data, to.nbytes, self.stream)

    def download(self, array: Array) -> np.ndarray:
        if not array.flags.c_contiguous:
            raise ValueError("only contiguous arrays are downloaded")
        host = np.empty(array.shape, array.dtype)
        with _said():
            if host.nbytes:
                array.data.copy_to_host_async(ctypes.c_void_p(host.ctypes.data), host.nbytes, self.stream)
        self.synchronize()
        return host

    def memory(self) -> tuple[int, int]:
        with _said():
            free, total = self.cupy.cuda.runtime.memGetInfo()
            return int(free) + int(self.pool.free_bytes()), int(total)

    def synchronize(self) -> None:
        with _said():
            self.stream.synchronize()
        self.staged = 0

    # -- cuBLAS --------------------------------------------------------------------------------------------

    def gemm(self, x: Array, w: Array, out: Array, beta: float = 0.0, transposed: bool = True) -> None:
        """out = x @ w.T + beta * out by cuBLAS, which counts in columns: out.T = w @ x.T."""
        m, k = x.shape[-2:]
        n = out.shape[-1]
        if w.shape[-2:] != ((n, k) if transposed else (k, n)) or out.shape[-2] != m or w.dtype != x.dtype:
            raise ValueError(f"{x.dtype} {x.shape} and {w.dtype} {w.shape} do not make {out.shape}")
        with _said(), self.stream:
            cublas = self.cupy.cuda.cublas  # not by its module's name: CuPy finds the library by this one's
            handle = self.cupy.cuda.device.get_cublas_handle()
            factor = np.array([beta], np.float32)
            kind = {np.dtype(np.float16): _R_16F, np.dtype(np.float32): _R_32F}[x.dtype]  # float32: not TF32 by default
            operands = [(a.data.ptr, kind, a.strides[-2] // a.itemsize) for a in (w, x)]
            head = (handle, _T if transposed else _N, _N, n, m, k, self._alpha.ctypes.data)
            if x.ndim == 2:
                (a, a_type, lda), (b, b_type, ldb) = operands
                cublas.gemmEx(
                    *head, a, a_type, lda, b, b_type, ldb, factor.ctypes.data,
                    out.data.ptr, _R_32F, out.strides[-2] // 4, _COMPUTE_32F, _GEMM_DEFAULT,
                )  # fmt: skip
                return
            steps = [a.strides[0] // a.itemsize for a in (w, x, out)]
            cublas.gemmStridedBatchedEx(
                *head, *operands[0], steps[0], *operands[1], steps[1], factor.ctypes.data,
                out.data.ptr, _R_32F, out.strides[-2] // 4, steps[2], len(x), _COMPUTE_32F, _GEMM_DEFAULT,
            )  # fmt: skip


def words(args: Sequence[Any]) -> tuple[Any, ...]:
    """A launch's arguments as NumPy numbers of the size that the kernel reads: CuPy would pass an int as 64 bits."""
    return tuple(map(_word, args))


def _word(arg: Any) -> Any:
    if arg is None:
        return np.uint64(0)
    if isinstance(arg, (int, np.integer)):
        return np.int32(int(arg))  # OverflowError where it does not fit
    if isinstance(arg, (float, np.floating)):
        return np.float32(arg)
    return np.uint64(arg.data.ptr)
