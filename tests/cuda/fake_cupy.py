"""What of CuPy 14 `CupyDevice` calls, as far as that can be had without a GPU: memory of the host, streams that only
note what was queued. Copies to "the device" happen when their stream is waited for, as they may on a real one.

It refuses what CuPy's own source refuses (types that Cython declares; copies and cuBLAS in a stream that is being
captured) and what CUDA's documentation forbids (waiting for such a stream, a graph whose branches were not joined)."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import numpy as np


class CUDARuntimeError(RuntimeError):
    """CuPy's takes the status alone and asks CUDA for the text; CUDADriverError, CUBLASError, NVRTCError are alike."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"


class OutOfMemoryError(MemoryError):
    pass


class DynamicLibNotFoundError(RuntimeError):
    """Of cuda.pathfinder, by which CuPy finds nvrtc."""


DynamicLibNotFoundError.__module__ = "cuda.pathfinder._dynamic_libs.load_dl_common"


def is_int(*values: Any) -> bool:
    """Whether Cython takes them as C integers."""
    return all(isinstance(v, (int, np.integer)) for v in values)


class Pointer:
    def __init__(self, fake: Fake, nbytes: int):
        self.fake, self.memory = fake, (ctypes.c_ubyte * max(nbytes, 1))()
        self.ptr = ctypes.addressof(self.memory)

    def copy_from_host_async(self, source: ctypes.c_void_p, nbytes: int, stream: Stream) -> None:
        stream.check("H2D transfers are disallowed")
        address = source.value
        assert address is not None and is_int(nbytes)
        if self.fake.pinned.ptr <= address < self.fake.pinned.ptr + len(self.fake.pinned.memory):
            assert address + nbytes <= self.fake.pinned.ptr + len(self.fake.pinned.memory)
            stream.pending.append(lambda: ctypes.memmove(self.ptr, address, nbytes))
        else:
            stream.synchronize()
            ctypes.memmove(self.ptr, address, nbytes)

    def copy_to_host_async(self, to: ctypes.c_void_p, nbytes: int, stream: Stream) -> None:
        stream.check("D2H transfers are disallowed")
        address = to.value
        assert address is not None and is_int(nbytes)
        stream.pending.append(lambda: ctypes.memmove(address, self.ptr, nbytes))

    def copy_from_device_async(self, source: Pointer, nbytes: int, stream: Stream) -> None:
        assert isinstance(source, Pointer) and is_int(nbytes)
        stream.pending.append(lambda: ctypes.memmove(self.ptr, source.ptr, nbytes))

    def memset_async(self, value: int, nbytes: int, stream: Stream) -> None:
        stream.pending.append(lambda: ctypes.memset(self.ptr, value, nbytes))


class Array:
    def __init__(self, shape: tuple[int, ...], dtype: Any, memptr: Pointer):
        assert is_int(*shape) and isinstance(memptr, Pointer)
        host = np.frombuffer(memptr.memory, np.uint8)[: int(np.prod(shape)) * np.dtype(dtype).itemsize]
        self.host = host.view(dtype).reshape(shape)
        self.data = memptr
        self.shape, self.dtype, self.strides, self.nbytes = shape, self.host.dtype, self.host.strides, self.host.nbytes
        self.ndim, self.itemsize, self.flags = self.host.ndim, self.host.itemsize, self.host.flags

    def __len__(self) -> int:
        return len(self.host)


class Stream:
    """Notes (stream, what) in the order of queueing; `done` are the things that what is queued next comes after.
    `capture`: the stream whose capture it takes part in."""

    def __init__(self, fake: Fake):
        self.fake, self.pending, self.done = fake, [], frozenset()
        self.capture: Stream | None = None
        self.ptr = id(self)

    def check(self, what: str) -> None:
        if self.capture is not None:
            raise RuntimeError(f"the current stream is capturing, so {what}")

    def queue(self, what: Any) -> None:
        self.fake.after[what] = self.done
        self.done |= {what}

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event) and event.recorded
        if event.capture is not None:
            assert self.capture in (None, event.capture)
            if self.capture is None:
                self.done = frozenset()
                event.capture.forked.add(self)
            self.capture = event.capture
        self.done |= event.done

    def synchronize(self) -> None:
        self.fake.waits += 1
        if self.capture is not None:
            raise CUDARuntimeError(900, "cudaErrorStreamCaptureUnsupported: operation not permitted")
        if self.fake.broken:
            raise self.fake.broken
        for copy in self.pending:
            copy()
        self.pending.clear()

    def begin_capture(self, mode: int | None = None) -> None:
        assert self.capture is None and mode in (None, 0, 1, 2)
        self.capture, self.forked, self.done = self, set(), frozenset()

    def end_capture(self) -> Graph:
        assert self.capture is self
        forked = self.forked
        for stream in (self, *forked):
            stream.capture = None
        if any(not stream.done <= self.done for stream in forked):
            raise CUDARuntimeError(904, "cudaErrorStreamCaptureUnjoined: dependency created on uncaptured work")
        assert Event.lost == 0, "an event of this capture is gone already"
        return Graph(self.fake, self.done)

    def __enter__(self) -> Stream:
        self.fake.current.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        self.fake.current.pop()


class Event:
    lost = 0  # events that went while their capture went on

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False):
        assert all(isinstance(x, bool) for x in (block, disable_timing, interprocess))
        self.done, self.recorded = frozenset(), False
        self.capture: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.done, self.recorded, self.capture = stream.done, True, stream.capture

    def __del__(self):
        Event.lost += self.capture is not None and self.capture.capture is not None


class Graph:
    def __init__(self, fake: Fake, joined: frozenset):
        self.fake, self.joined, self.launches = fake, joined, 0

    def upload(self, stream: Stream) -> None:
        assert stream.capture is None

    def launch(self, stream: Stream) -> None:
        assert stream.capture is None
        if self.fake.broken:
            raise self.fake.broken
        self.launches += 1


class Pool:
    def __init__(self, fake: Fake):
        self.fake, self.freed = fake, 0

    def malloc(self, nbytes: int) -> Pointer:
        assert is_int(nbytes) and nbytes >= 0
        if nbytes > self.fake.most and not (self.freed and self.fake.room_when_freed):
            raise OutOfMemoryError(f"Out of memory allocating {nbytes} bytes (allocated so far: 0 bytes).")
        return Pointer(self.fake, nbytes)

    def free_all_blocks(self) -> None:
        self.freed += 1

    def free_bytes(self) -> int:
        return 100


class Function:
    def __init__(self, fake: Fake, name: str):
        self.fake, self.name, self.ptr = fake, name, id(self)

    def __call__(self, grid: tuple, block: tuple, args: tuple, shared_mem: int = 0, stream: Any = None) -> None:
        assert isinstance(grid, tuple) and isinstance(block, tuple) and is_int(*grid, *block, shared_mem)
        assert isinstance(stream, Stream)  # None is the current stream, which is nobody's
        assert all(isinstance(arg, np.generic) for arg in args)  # Python's numbers would go as 64 bits
        if self.fake.launch_error:
            raise self.fake.launch_error
        what = (len(self.fake.launches), self.name)
        self.fake.launches.append((self.name, grid, block, args))
        stream.queue(what)


class Loaded:
    def __init__(self, fake: Fake):
        self.fake, self.code = fake, b""

    def load(self, code: bytes) -> None:
        assert type(code) is bytes
        self.code = code

    def get_function(self, name: str) -> Function:
        assert self.code and type(name) is str
        return Function(self.fake, name)


class Cublas(types.ModuleType):
    """cuBLAS's definition: matrices stand in memory column by column, `ld` numbers apart."""

    def __init__(self, fake: Fake):
        super().__init__("cublas")
        self.fake = fake

    def _matrix(self, address: int, kind: int, rows: int, cols: int, ld: int) -> np.ndarray:
        assert ld >= rows
        dtype = {0: np.float32, 2: np.float16}[kind]
        nbytes = np.dtype(dtype).itemsize * (ld * (cols - 1) + rows)
        flat = np.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), (flat.itemsize, ld * flat.itemsize))

    def gemmEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, compute, algo
    ):
        assert handle == 7 and compute == 68 and algo == -1  # CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT
        assert is_int(transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc)
        assert transa in (0, 1) and transb in (0, 1) and min(m, n, k) > 0
        assert (Atype, Btype, Ctype) in ((2, 2, 0), (0, 0, 0))  # of those that cuBLAS takes with float32 sums
        stream = self.fake.current[-1]  # CuPy queues in the current stream
        if stream.capture is not None:
            raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
        factor, scale = (ctypes.c_float.from_address(address).value for address in (alpha, beta))
        a = self._matrix(A, Atype, k, m, lda).T if transa else self._matrix(A, Atype, m, k, lda)
        b = self._matrix(B, Btype, n, k, ldb).T if transb else self._matrix(B, Btype, k, n, ldb)
        c = self._matrix(C, Ctype, m, n, ldc)
        c[...] = factor * (a.astype(np.float32) @ b.astype(np.float32)) + (scale * c if scale else 0)

    def gemmStridedBatchedEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta,
        C, Ctype, ldc, strideC, batchCount, compute, algo,
    ):  # fmt: skip
        assert is_int(strideA, strideB, strideC, batchCount)
        for i in range(batchCount):
            size = {2: 2, 0: 4}[Atype]
            a, b, c = A + size * i * strideA, B + size * i * strideB, C + 4 * i * strideC
            self.gemmEx(
                handle, transa, transb, m, n, k, alpha, a, Atype, lda, b, Btype, ldb, beta, c, Ctype, ldc, compute, algo
            )


class Nvrtc(types.ModuleType):
    """Compiles nothing; notes what it was given."""

    def __init__(self) -> None:
        super().__init__("nvrtc")
        self.compiled: list[tuple[str, tuple]] = []
        self.missing = False

    def getVersion(self):
        if self.missing:
            raise DynamicLibNotFoundError('Failure finding "libnvrtc.so":\n  No such file')
        return (13, 0)

    def getSupportedArchs(self):
        return (75, 80, 90)

    def createProgram(self, source, name, headers, include_names):
        assert type(source) is str and type(name) is str and len(headers) == len(include_names)
        return source

    def compileProgram(self, program, options):
        assert all(type(option) is str for option in options)
        self.compiled.append((program, options))

    def getCUBIN(self, program):
        return b"code"

    def destroyProgram(self, program):
        pass


class Fake:
    """The state behind the modules; `modules()` is what goes into sys.modules."""

    def __init__(self, arch: str = "90", devices: int = 1):
        self.arch, self.devices, self.most, self.room_when_freed = arch, devices, 1 << 30, False
        self.broken: Exception | None = None
        self.launch_error: Exception | None = None
        self.count_error: Exception | None = None
        self.launches: list[tuple] = []
        self.after: dict[Any, frozenset] = {}
        self.waits, self.no_cublas = 0, False
        self.driver = 13000
        self.current: list[Stream] = []
        self.pinned = Pointer(self, 0)
        self.nvrtc, self.cublas = Nvrtc(), Cublas(self)

    def count(self) -> int:
        if self.count_error:
            raise self.count_error
        return self.devices

    def handle(self) -> int:
        assert self.cublas is not None
        return 7

    def alloc_pinned(self, nbytes: int) -> Pointer:
        self.pinned = Pointer(self, nbytes)
        return self.pinned

    def modules(self) -> dict[str, Any]:
        cupy: Any = types.ModuleType("cupy")
        runtime = types.SimpleNamespace(
            getDeviceCount=self.count,
            getDeviceProperties=lambda k: {"name": b"Fake GPU", "multiProcessorCount": 7},
            memGetInfo=lambda: (1 << 20, 4 << 20),
            driverGetVersion=lambda: self.driver,
            runtimeGetVersion=lambda: 13020,
        )
        cupy.ndarray = Array
        fake = self

        class Cuda(types.SimpleNamespace):
            @property
            def cublas(self) -> Cublas:
                if fake.no_cublas:
                    raise ImportError('Failure finding "libcublas.so":\n  No such file')
                return fake.cublas

        cupy.cuda = Cuda(
            runtime=runtime,
            nvrtc=self.nvrtc,
            Device=lambda k: types.SimpleNamespace(compute_capability=self.arch),
            Stream=lambda *, non_blocking: Stream(self),
            Event=Event,
            MemoryPool=lambda: Pool(self),
            alloc_pinned_memory=self.alloc_pinned,
            function=types.SimpleNamespace(Module=lambda: Loaded(self)),
            device=types.SimpleNamespace(get_cublas_handle=self.handle),
        )
        return {"cupy": cupy}
