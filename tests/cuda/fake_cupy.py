"""What of CuPy `CupyDevice` calls, as far as that can be had without a GPU: memory of the host, and streams that only
note what was queued. Copies to "the device" happen when their stream is waited for, as they may on a real one."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import numpy as np


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class OutOfMemoryError(MemoryError):
    pass


class Pointer:
    def __init__(self, fake: Fake, nbytes: int):
        self.fake, self.memory = fake, (ctypes.c_ubyte * max(nbytes, 1))()
        self.ptr = ctypes.addressof(self.memory)

    def copy_from_host_async(self, source: ctypes.c_void_p, nbytes: int, stream: Stream) -> None:
        address = source.value
        assert address is not None and isinstance(stream, Stream)
        if self.fake.pinned.ptr <= address < self.fake.pinned.ptr + len(self.fake.pinned.memory):
            assert address + nbytes <= self.fake.pinned.ptr + len(self.fake.pinned.memory)
            stream.pending.append(lambda: ctypes.memmove(self.ptr, address, nbytes))
        else:
            stream.synchronize()
            ctypes.memmove(self.ptr, address, nbytes)

    def copy_to_host_async(self, to: ctypes.c_void_p, nbytes: int, stream: Stream) -> None:
        address = to.value
        assert address is not None
        stream.pending.append(lambda: ctypes.memmove(address, self.ptr, nbytes))

    def copy_from_device_async(self, source: Pointer, nbytes: int, stream: Stream) -> None:
        stream.pending.append(lambda: ctypes.memmove(self.ptr, source.ptr, nbytes))

    def memset_async(self, value: int, nbytes: int, stream: Stream) -> None:
        stream.pending.append(lambda: ctypes.memset(self.ptr, value, nbytes))


class Array:
    def __init__(self, shape: tuple[int, ...], dtype: Any, memptr: Pointer):
        host = np.frombuffer(memptr.memory, np.uint8)[: int(np.prod(shape)) * np.dtype(dtype).itemsize]
        self.host = host.view(dtype).reshape(shape)
        self.data = memptr
        self.shape, self.dtype, self.strides, self.nbytes = shape, self.host.dtype, self.host.strides, self.host.nbytes
        self.ndim, self.itemsize, self.flags = self.host.ndim, self.host.itemsize, self.host.flags

    def __len__(self) -> int:
        return len(self.host)


class Stream:
    """Notes (stream, what) in the order of queueing; `done` are the things that what is queued next comes after."""

    def __init__(self, fake: Fake):
        self.fake, self.pending, self.done, self.capturing = fake, [], frozenset(), False

    def queue(self, what: Any) -> None:
        self.fake.after[what] = self.done
        self.done |= {what}

    def wait_event(self, event: Event) -> None:
        self.done |= event.done

    def synchronize(self) -> None:
        self.fake.waits += 1
        if self.fake.broken:
            raise self.fake.broken
        for copy in self.pending:
            copy()
        self.pending.clear()

    def begin_capture(self) -> None:
        assert not self.capturing
        self.capturing, self.done = True, frozenset()

    def end_capture(self) -> Graph:
        assert self.capturing
        self.capturing = False
        return Graph(self.fake, self.done)

    def __enter__(self) -> Stream:
        self.fake.current = self
        return self

    def __exit__(self, *error: Any) -> None:
        self.fake.current = None


class Event:
    def __init__(self, disable_timing: bool = False):
        self.done: frozenset = frozenset()

    def record(self, stream: Stream) -> None:
        self.done = stream.done


class Graph:
    def __init__(self, fake: Fake, joined: frozenset):
        self.fake, self.joined, self.launches = fake, joined, 0

    def upload(self, stream: Stream) -> None:
        pass

    def launch(self, stream: Stream) -> None:
        if self.fake.broken:
            raise self.fake.broken
        self.launches += 1


class Pool:
    def __init__(self, fake: Fake):
        self.fake, self.freed = fake, 0

    def malloc(self, nbytes: int) -> Pointer:
        if nbytes > self.fake.most and not (self.freed and self.fake.room_when_freed):
            raise OutOfMemoryError(f"Out of memory allocating {nbytes} bytes (allocated so far: 0 bytes).")
        return Pointer(self.fake, nbytes)

    def free_all_blocks(self) -> None:
        self.freed += 1

    def free_bytes(self) -> int:
        return 100


class Function:
    def __init__(self, fake: Fake, name: str):
        self.fake, self.name = fake, name

    def __call__(self, grid: tuple, block: tuple, args: tuple, stream: Stream) -> None:
        if self.fake.launch_error:
            raise self.fake.launch_error
        what = (len(self.fake.launches), self.name)
        self.fake.launches.append((self.name, grid, block, args))
        stream.queue(what)


class Loaded:
    def __init__(self, fake: Fake):
        self.fake, self.code = fake, b""

    def load(self, code: bytes) -> None:
        self.code = code

    def get_function(self, name: str) -> Function:
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
        assert handle == "handle" and compute == 68 and algo == -1
        assert isinstance(self.fake.current, Stream)  # CuPy queues in the current stream
        factor, scale = (ctypes.c_float.from_address(address).value for address in (alpha, beta))
        a = self._matrix(A, Atype, k, m, lda).T if transa else self._matrix(A, Atype, m, k, lda)
        b = self._matrix(B, Btype, n, k, ldb).T if transb else self._matrix(B, Btype, k, n, ldb)
        c = self._matrix(C, Ctype, m, n, ldc)
        c[...] = factor * (a.astype(np.float32) @ b.astype(np.float32)) + (scale * c if scale else 0)

    def gemmStridedBatchedEx(
        self, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta,
        C, Ctype, ldc, strideC, batchCount, compute, algo,
    ):  # fmt: skip
        for i in range(batchCount):
            a, b, c = A + 2 * i * strideA, B + 2 * i * strideB, C + 4 * i * strideC
            self.gemmEx(
                handle, transa, transb, m, n, k, alpha, a, Atype, lda, b, Btype, ldb, beta, c, Ctype, ldc, compute, algo
            )


class Nvrtc(types.ModuleType):
    """Compiles nothing; notes what it was given."""

    def __init__(self) -> None:
        super().__init__("nvrtc")
        self.compiled: list[tuple[str, tuple]] = []

    def getVersion(self):
        return (13, 0)

    def getSupportedArchs(self):
        return [75, 80, 90]

    def createProgram(self, source, name, headers, include_names):
        return source

    def compileProgram(self, program, options):
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
        self.waits, self.current = 0, None
        self.pinned = Pointer(self, 0)
        self.nvrtc, self.cublas = Nvrtc(), Cublas(self)

    def count(self) -> int:
        if self.count_error:
            raise self.count_error
        return self.devices

    def alloc_pinned(self, nbytes: int) -> Pointer:
        self.pinned = Pointer(self, nbytes)
        return self.pinned

    def modules(self) -> dict[str, Any]:
        cupy: Any = types.ModuleType("cupy")
        runtime = types.SimpleNamespace(
            getDeviceCount=self.count,
            getDeviceProperties=lambda k: {"name": b"Fake GPU", "multiProcessorCount": 7},
            memGetInfo=lambda: (1 << 20, 4 << 20),
        )
        cupy.ndarray = Array
        cupy.cuda = types.SimpleNamespace(
            runtime=runtime,
            Device=lambda k: types.SimpleNamespace(compute_capability=self.arch),
            Stream=lambda non_blocking: Stream(self),
            Event=Event,
            MemoryPool=lambda: Pool(self),
            alloc_pinned_memory=self.alloc_pinned,
            function=types.SimpleNamespace(Module=lambda: Loaded(self)),
            device=types.SimpleNamespace(get_cublas_handle=lambda: "handle"),
        )
        libs = "cupy_backends.cuda.libs"
        return {"cupy": cupy, f"{libs}.nvrtc": self.nvrtc, f"{libs}.cublas": self.cublas}
