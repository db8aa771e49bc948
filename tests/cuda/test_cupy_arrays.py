"""CupyDevice with CuPy's own arrays, where CuPy is installed; it needs no GPU.

CuPy makes arrays over any memory that it is told to be a device's. So slices, shapes, strides and addresses are CuPy's
here, over the host's memory; launches go through CupyDevice's own code down to the words that a kernel gets, whose
number and kinds are compared with the kernel's parameters before the emulator runs it; and products through its calls
of cuBLAS. Copies and streams are stand-ins. All has to be as on the emulated device, bit for bit.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import ClassVar

import emulated
import numpy as np
import pytest
import tiny_models
from fake_cupy import Cublas
from ggufkit_formats.blocks import find
from ggufkit_kernels.cuda import driver, encode
from ggufkit_kernels.cuda.cupy_device import CupyDevice
from ggufkit_runtime import devices, generate

cupy = pytest.importorskip("cupy", reason="there is no CuPy whose arrays could be taken")
pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="there is no g++")

KINDS = {"*": (np.uint64, ctypes.c_void_p), "i": (np.int32, ctypes.c_int), "f": (np.float32, ctypes.c_float)}


class Stream:
    """Runs what it is given, or keeps it while a graph is recorded, for all streams in the order of queueing."""

    recorded: list | None = None

    def __init__(self, non_blocking: bool):
        self.ptr, self.capture = id(self), None

    def run(self, work):
        work() if Stream.recorded is None else Stream.recorded.append(work)

    def begin_capture(self):
        Stream.recorded = []

    def end_capture(self):
        kept, Stream.recorded = Stream.recorded, None
        return SimpleNamespace(upload=lambda stream: None, launch=lambda stream: [work() for work in kept])

    def synchronize(self):
        assert Stream.recorded is None

    def wait_event(self, event):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Function:
    """A kernel by its address's words."""

    by_ptr: ClassVar[dict] = {}

    def __init__(self, kernel):
        self.kernel, self.entry, self.ptr = kernel, emulated.entry_of(kernel), 2**40 + len(Function.by_ptr)
        Function.by_ptr[self.ptr] = self

    def __call__(self, grid, block, args, shared_mem=0, stream=None):
        name, kinds = self.kernel.name, [kind[0] for kind in self.entry.parameters]
        assert [type(arg) for arg in args] == [KINDS[kind][0] for kind in kinds], (name, kinds, args)
        assert isinstance(grid, tuple) and 0 < block[0] <= self.entry.most and shared_mem == 0
        words = [KINDS[kind][1](arg.item()) for kind, arg in zip(kinds, args, strict=True)]
        pointers = (ctypes.c_void_p * len(words))(*map(ctypes.addressof, words))
        dims = (ctypes.c_int * 3)(*grid, *[1] * (3 - len(grid)))

        def work():
            assert words  # alive
            stacks = emulated.stacks()[1]
            fault = self.entry.launch(dims, block[0], pointers, stacks, emulated.STACK_BYTES, False)
            assert not fault, (name, fault)

        stream.run(work)


class Pool:
    def malloc(self, nbytes):
        room = np.full(nbytes + 512, 0xD5, np.uint8)
        ahead = -room.ctypes.data % 512
        memory = cupy.cuda.UnownedMemory(room.ctypes.data + ahead, nbytes, room, 0)
        return cupy.cuda.MemoryPointer(memory, 0)


class HostDevice(CupyDevice):
    """Its `empty`, `launch`, `capture` and `gemm` are the real ones."""

    early = False

    def __init__(self, n_sm=4):
        self.name, self.arch, self.n_sm = "host", 90, n_sm
        self.stream, self.sides, self.pool = Stream(True), [], Pool()
        state = SimpleNamespace(current=[self.stream])
        cuda = SimpleNamespace(
            Stream=Stream, Event=lambda disable_timing: SimpleNamespace(record=lambda stream: None),
            cublas=Cublas(state), device=SimpleNamespace(get_cublas_handle=lambda: 7),
        )  # fmt: skip
        self.cupy = SimpleNamespace(ndarray=cupy.ndarray, cuda=cuda)
        self._alpha, self.staged, self.functions = np.ones(1, np.float32), 0, {}

    def compile(self, modules, progress=None):
        emulated.EmulatedDevice().compile(modules, progress)

    def _function(self, kernel):
        if kernel not in self.functions:
            self.functions[kernel] = Function(kernel)
        return self.functions[kernel]

    def zeros(self, shape, dtype):
        made = self.empty(shape, dtype)
        ctypes.memset(made.data.ptr, 0, made.nbytes)
        return made

    def write(self, to, array):
        assert to.flags.c_contiguous and (to.shape, to.dtype) == (array.shape, array.dtype)
        array = np.ascontiguousarray(array)
        ctypes.memmove(to.data.ptr, array.ctypes.data, array.nbytes)

    def copy(self, to, source):
        assert to.flags.c_contiguous and source.flags.c_contiguous and to.shape == source.shape
        ctypes.memmove(to.data.ptr, source.data.ptr, to.nbytes)

    def download(self, array):
        assert array.flags.c_contiguous
        host = np.empty(array.shape, array.dtype)
        ctypes.memmove(host.ctypes.data, array.data.ptr, host.nbytes)
        return host

    def memory(self):
        return 1 << 33, 1 << 33


CASES = {
    "Q4_K": ("llama", "Q4_K", {}), "F16": ("llama", "F16", {}), "F32": ("llama", "F32", {}),
    "qwen3 TQ2_0": ("qwen3", "TQ2_0", {}), "bitnet": ("bitnet", "TQ1_0", {"hidden_act": "relu2"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_gpu_layers", [None, 1])
@pytest.mark.parametrize("early", [False, True])
def test_networks(tmp_path, monkeypatch, case, n_gpu_layers, early):
    """`early`: the launches of a graph that would go through the driver's own function."""
    arch, type, settings = CASES[case]
    asked = []

    def launch_early(function, grid, block, args, stream):
        asked.append(function)
        Function.by_ptr[function](grid, (block,), args, stream=device.stream)

    monkeypatch.setattr(driver, "launch_early", launch_early)
    monkeypatch.setattr(HostDevice, "early", early)
    path = tiny_models.write(tmp_path / "m.gguf", arch, type, **settings)
    logits = []
    for device in (emulated.EmulatedDevice(), HostDevice()):
        monkeypatch.setattr(devices, "open_gpu", lambda device=device: device)
        model = generate.load(path, device="cuda", n_gpu_layers=n_gpu_layers)
        cache, ids = model.cache(), np.arange(3, 24)
        rows = [model.forward(ids, cache), *(model.forward([t], cache) for t in (7, 9))]
        cache.truncate(15)
        rows += [model.forward(ids[:5], cache), model.forward([5], cache)]
        if n_gpu_layers is None:
            top = model.ops.top(model.ops.forward(model.architecture.forward, model.config, model.weights,
                                                  np.array([4]), cache), 9)  # fmt: skip
            rows.append(np.concatenate(top)[None])
        logits.append(rows)
    for ours, theirs in zip(*logits, strict=True):
        assert np.array_equal(ours, theirs)
    assert bool(asked) == early


@pytest.mark.parametrize("name", encode.ENCODERS)
def test_encoders(name):
    type = find(name)
    x = np.random.default_rng(2).standard_normal((5, 2 * type.block)).astype(np.float32)
    made: list = [encode.CudaEncoder(device).encode(type, x) for device in (HostDevice(), emulated.EmulatedDevice())]
    assert np.array_equal(*made) and np.array_equal(made[0], type.encode(x))
