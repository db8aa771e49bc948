"""A `Device` without a GPU: the kernels' own source, compiled as C++ with shim.h, one shared library a module.

Memory is the host's, behind arrays that nothing but the device's methods (and tests, by `.host`) can look into. What
a real device would take in silence is an error: a missing argument, one of another kind, an address that is not
aligned as its type, arrays of another device. New memory is full of NaN patterns.

Settings, as words in $GGUFKIT_EMULATED: `reversed` (threads, blocks and launches of one level in reversed order),
`sanitize` (compiled with the address and undefined-behaviour sanitizers; the process needs libasan preloaded),
`ucontext` (fibers by the C library, as on processors other than x86-64), `ptx` (from what nvrtc makes of the source for
the device's compute capability, see ptx.py, every access to memory watched by checker.cpp; `sm_75`: for that one), and
`apart` (no launch of a graph begins early).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from building import COMPILER, SANITIZED, STACK_BYTES, WORDS, checker, entry_of, library_path, stacks
from ggufkit_formats.errors import DeviceError, DeviceMemoryError
from ggufkit_kernels.cuda.device import in_a_row
from ggufkit_kernels.cuda.loader import Kernel, Module

__all__ = ["COMPILER", "SANITIZED", "STACK_BYTES", "EmulatedArray", "EmulatedDevice", "entry_of", "ran", "stacks"]
ARCH = next((int(word[3:]) for word in WORDS if word.startswith("sm_")), 90)

ran: set[tuple[str, str]] = set()  # (file, kernel) that any device of this process launched

# -- memory ------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None)


class _Block:
    """Memory of the C library, aligned as CUDA's is, and no byte more than asked for: the sanitizer guards its ends."""

    def __init__(self, device: EmulatedDevice, nbytes: int):
        self.device, self.nbytes, self.address = device, nbytes, ctypes.c_void_p()
        if device.used + nbytes > device.total:
            raise DeviceMemoryError(f"{nbytes} bytes do not fit: {device.total - device.used} of {device.total} free")
        if _libc.posix_memalign(ctypes.byref(self.address), ctypes.c_size_t(256), ctypes.c_size_t(max(nbytes, 1))):
            raise MemoryError(nbytes)
        device.used += nbytes
        if device.watch:
            device.watch.checker_allocate(self.address.value, max(nbytes, 1))
        self.__array_interface__ = {
            "data": (self.address.value, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self):
        if self.address.value:
            self.device.used -= self.nbytes
            if self.device.watch:
                self.device.watch.checker_free(self.address.value)
            _libc.free(self.address)


class EmulatedArray:
    """An array in the memory of a device. `host` is the same memory for tests."""

    def __init__(self, device: EmulatedDevice, host: np.ndarray):
        self.device, self.host = device, host
        self.shape, self.dtype, self.strides = host.shape, host.dtype, host.strides
        self.nbytes, self.size, self.ndim, self.itemsize = host.nbytes, host.size, host.ndim, host.itemsize

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, index: Any) -> EmulatedArray:
        part = self.host[index]
        if not isinstance(part, np.ndarray) or part.base is None:
            part = self.host[(*index, ...) if isinstance(index, tuple) else (index, ...)]
        assert part.size == 0 or np.may_share_memory(part, self.host), "only slices and numbers index a device's array"
        return EmulatedArray(self.device, part)

    def reshape(self, *shape: Any) -> EmulatedArray:
        part = self.host.reshape(*shape)
        assert part.size == 0 or np.may_share_memory(part, self.host), "this reshape would copy"
        return EmulatedArray(self.device, part)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("a device's array does not become NumPy's by itself: use download")

    def __iter__(self):
        raise TypeError("a device's array cannot be walked through")

    def __repr__(self) -> str:
        return f"EmulatedArray{self.shape} {self.dtype}"


# -- the device --------------------------------------------------------------------------------------------


class EmulatedGraph:
    def __init__(self, device: EmulatedDevice, levels: Sequence[Sequence[tuple]]):
        self.device = device
        row = in_a_row(levels) if device.early else [(level, False) for level in levels]
        self.levels = [([device.bind(*launch) for launch in level], early) for level, early in row]

    def launch(self) -> None:
        """Run all of it again: the launches of one level backwards where the order is reversed."""
        for level, early in self.levels:
            self.device.begin_level()
            if self.device.watch and early:
                self.device.watch.checker_early(True)
            for bound in reversed(level) if self.device.reversed else level:
                self.device.run(bound)


class EmulatedDevice:
    """A `Device` on the CPU, with `total` bytes of memory."""

    def __init__(self, arch: int = ARCH, n_sm: int = 4, total: int = 1 << 33, reverse: bool | None = None,
                 ptx: bool = "ptx" in WORDS):  # fmt: skip
        self.name, self.arch, self.n_sm, self.early = "emulated", arch, n_sm, arch >= 90 and "apart" not in WORDS
        self.ptx = arch if ptx else 0  # the compute capability whose PTX is run, or 0: the source is
        self.watch = checker() if ptx else None
        self.total, self.used, self.launches = total, 0, 0
        self.reversed = "reversed" in WORDS if reverse is None else reverse

    def compile(self, modules: Iterable[Module], progress: Callable[[int, int], None] | None = None) -> None:
        wanted = list(dict.fromkeys(modules))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for k, _ in enumerate(pool.map(lambda module: library_path(module, self.ptx), wanted)):
                if progress is not None:
                    progress(k + 1, len(wanted))

    def _new(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        dtype = np.dtype(dtype)
        block = _Block(self, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return np.asarray(block).view(dtype).reshape(shape)

    def empty(self, shape: Sequence[int], dtype: Any) -> EmulatedArray:
        host = self._new(shape, dtype)
        raw = host.reshape(-1).view(np.uint8)
        raw[0::2], raw[1::2] = 0xD5, 0x7F  # 0x7fd5 is NaN as a half, 0x7fd57fd5 as float32
        return EmulatedArray(self, host)

    def zeros(self, shape: Sequence[int], dtype: Any) -> EmulatedArray:
        host = self._new(shape, dtype)
        host.fill(0)
        return self._written(host)

    def upload(self, array: np.ndarray) -> EmulatedArray:
        host = self._new(array.shape, array.dtype)
        host[...] = array
        return self._written(host)

    def _written(self, host: np.ndarray) -> EmulatedArray:
        made = EmulatedArray(self, host)
        self._note(made)
        return made

    def _note(self, array: EmulatedArray) -> None:
        """The host, or a library, has written an array, and all before that is done."""
        self.begin_level()
        if self.watch is None or not array.size:
            return
        pieces = [array.host]
        while not pieces[0].flags.c_contiguous:  # rows of it, or rows of these
            pieces = [part for piece in pieces for part in piece]
        for piece in pieces:
            self.watch.checker_written(piece.__array_interface__["data"][0], piece.nbytes)

    def begin_level(self) -> None:
        """What is launched from here on is ordered behind all before it, but not among itself."""
        if self.watch:
            self.watch.checker_level()

    def write(self, to: EmulatedArray, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray), type(array)
        assert (to.shape, to.dtype) == (array.shape, array.dtype), (to, array.shape, array.dtype)
        assert to.host.flags.c_contiguous
        to.host[...] = array
        self._note(to)

    def copy(self, to: EmulatedArray, source: EmulatedArray) -> None:
        assert (to.shape, to.dtype) == (source.shape, source.dtype), (to, source)
        assert to.host.flags.c_contiguous and source.host.flags.c_contiguous
        to.host[...] = source.host
        self._note(to)

    def download(self, array: EmulatedArray) -> np.ndarray:
        assert array.device is self
        return array.host.copy()

    def launch(self, kernel: Kernel, grid: tuple[int, ...], block: int, *args: Any) -> None:
        bound = self.bind(kernel, grid, block, *args)
        self.begin_level()
        self.run(bound)

    def bind(self, kernel: Kernel, grid: tuple[int, ...], block: int, *args: Any) -> tuple:
        """A launch, checked and made ready for `run`."""
        entry = entry_of(kernel, self.ptx)
        if not 1 <= len(grid) <= 3 or min(grid) < 1 or max(grid[1:], default=1) > 65535 or grid[0] > 2**31 - 1:
            raise ValueError(f"{kernel.name}: a grid of {grid}")
        if block % 32 or not 0 < block <= entry.most:
            raise ValueError(f"{kernel.name}: {block} threads a block, of at most {entry.most}")
        if len(args) != len(entry.parameters):
            raise TypeError(
                f"{kernel.name} takes {len(entry.parameters)} arguments ({entry.parameters}), not {len(args)}"
            )
        words = [
            self._word(f"{kernel.name}, argument {k}", kind, arg)
            for k, (kind, arg) in enumerate(zip(entry.parameters, args, strict=True))
        ]
        pointers = (ctypes.c_void_p * max(len(words), 1))(*[ctypes.addressof(word) for word in words])
        dims = (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid)))
        return kernel, entry, dims, block, pointers, words, args

    def _word(self, where: str, kind: str, arg: Any) -> Any:
        if kind == "f":
            if not isinstance(arg, (float, np.float32, np.float64)):
                raise TypeError(f"{where}: a float is wanted, not {arg!r}")
            return ctypes.c_float(arg)
        if kind == "i":
            if not isinstance(arg, (int, np.integer)) or not -(2**31) <= arg < 2**31:
                raise TypeError(f"{where}: an int of 32 bits is wanted, not {arg!r}")
            return ctypes.c_int(int(arg))
        if arg is None:
            return ctypes.c_void_p(None)
        if not isinstance(arg, EmulatedArray) or arg.device is not self:
            raise TypeError(f"{where}: an array of this device is wanted, not {arg!r}")
        is_float, itemsize = kind[1] == "f", int(kind[2:])
        # bytes may be read as anything; else numbers must be what the kernel takes them for
        numbers = arg.dtype != np.uint8 and kind[1] != "b" and itemsize > 1
        if numbers and (arg.itemsize != itemsize or (arg.dtype == np.float32) != is_float):
            raise TypeError(f"{where}: {arg!r} is passed for {kind[1:]} (its kind and bytes)")
        address = arg.host.__array_interface__["data"][0]
        if address % itemsize:
            raise ValueError(f"{where}: the address is not a multiple of {itemsize}")
        return ctypes.c_void_p(address)

    def run(self, bound: tuple) -> None:
        """Run a launch that `bind` made, in the level that was begun last."""
        kernel, entry, dims, block, pointers, _words, _args = bound
        ran.add((kernel.module.file, kernel.name))
        self.launches += 1
        fault = entry.launch(dims, block, pointers, stacks()[1], STACK_BYTES, self.reversed)
        if fault:
            said = fault.decode()
            if self.ptx and (at := re.search(r"\(line ([1-9]\d*)", said)):
                from ptx import place

                said += f"; source {place(kernel.module, self.ptx, int(at[1]))}"
            raise DeviceError(f"{kernel.module.file}, {kernel.name}: {said}")

    def gemm(
        self, x: EmulatedArray, w: EmulatedArray, out: EmulatedArray, beta: float = 0.0, transposed: bool = True
    ) -> None:
        assert x.dtype == w.dtype and x.dtype in (np.float16, np.float32) and out.dtype == np.float32, (x, w, out)
        for array in (x, w, out):
            assert array.device is self, array
            assert array.strides[-1] == array.itemsize and array.ndim == x.ndim, array
        right = w.host.astype(np.float32)
        if transposed:
            right = np.swapaxes(right, -1, -2)
        assert out.shape == (*x.shape[:-1], right.shape[-1]) and x.shape[-1] == right.shape[-2], (x, w, out)
        assert x.ndim == 2 or (x.ndim == 3 and len(x) == len(w)), (x, w)
        with np.errstate(all="ignore"):
            product = x.host.astype(np.float32) @ right
            out.host[...] = product if beta == 0.0 else product + np.float32(beta) * out.host
        self._note(out)

    def capture(self, levels: Sequence[Sequence[tuple]]) -> EmulatedGraph:
        return EmulatedGraph(self, levels)

    def synchronize(self) -> None:
        pass

    def memory(self) -> tuple[int, int]:
        return self.total - self.used, self.total
