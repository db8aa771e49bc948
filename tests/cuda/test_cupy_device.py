"""CupyDevice without a GPU: what it says when something is missing or fails, how it hands on arguments, in which order
graphs are recorded, what it asks of cuBLAS. (That CuPy and CUDA then do it is for the tests with a device.)"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import subprocess
import sys

import emulated
import numpy as np
import pytest
from fake_cupy import Cublas, CUDARuntimeError, Fake
from ggufkit_formats.errors import DeviceError, DeviceMemoryError
from ggufkit_kernels.cuda import cupy_device, driver, loader
from ggufkit_kernels.cuda.cupy_device import CupyDevice

KERNELS = loader.module("elementwise.cu")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A fake CuPy in the place of the real one."""
    monkeypatch.setenv("GGUFKIT_CACHE_DIR", str(tmp_path))
    made = Fake()
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cupy_device, "installed", lambda: True)
    monkeypatch.setattr(driver, "can_launch_early", lambda: False)
    return made


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# -- what is missing ---------------------------------------------------------------------------------------


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError) as error:
        CupyDevice()
    assert one_line(error) == "--device cuda needs CuPy: pip install 'ggufkit[cuda13]' (or [cuda12])"
    assert not cupy_device.available()


def test_cupy_that_does_not_import(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libsomething.so.1: cannot open shared object file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(DeviceError) as error:
        CupyDevice()
    assert one_line(error) == "CuPy cannot be imported: libsomething.so.1: cannot open shared object file"
    assert not cupy_device.available()


def test_no_device(fake):
    fake.devices = 0
    with pytest.raises(DeviceError, match=r"^there is no CUDA device$"):
        CupyDevice()
    assert not cupy_device.available()


@pytest.mark.parametrize(
    ("status", "driver", "said"),
    [
        (35, 0, "there is no NVIDIA driver"),
        (35, 12040, "the NVIDIA driver is one for CUDA 12.4, and this CuPy needs 13.2: pip install 'ggufkit[cuda12]'"),
        (35, 13000, "the NVIDIA driver is one for CUDA 13.0, and this CuPy needs 13.2"),
        (100, 13000, "cudaErrorNoDevice: no CUDA-capable device is detected"),
    ],
)
def test_no_driver(fake, status, driver, said):
    text = "cudaErrorNoDevice: no CUDA-capable device is detected" if status == 100 else "cudaErrorInsufficientDriver"
    fake.count_error, fake.driver = CUDARuntimeError(status, text + "\nmore"), driver
    with pytest.raises(DeviceError) as error:
        CupyDevice()
    assert one_line(error) == f"there is no CUDA device: {said}"
    assert not cupy_device.available()


@pytest.mark.parametrize("arch", ["52", "72"])
def test_too_old(fake, arch):
    fake.arch = arch
    with pytest.raises(DeviceError) as error:
        CupyDevice()
    said = f"Fake GPU has compute capability {arch[0]}.{arch[1]}; ggufkit needs 7.5 (Turing) or newer"
    assert one_line(error) == said
    assert not cupy_device.available()


MISSING = "a library of the CUDA toolkit is missing, pip install 'ggufkit[cuda13]' (or [cuda12]) brings it: "


def test_no_nvrtc(fake):
    fake.nvrtc.missing = True
    with pytest.raises(DeviceError) as error:
        CupyDevice()
    assert one_line(error) == MISSING + 'Failure finding "libnvrtc.so":'


def test_no_cublas(fake):
    device = CupyDevice()
    fake.no_cublas = True
    x, out = device.zeros((8, 8), np.float16), device.zeros((8, 8), np.float32)
    with pytest.raises(DeviceError) as error:
        device.gemm(x, x, out)
    assert one_line(error) == MISSING + 'Failure finding "libcublas.so":'


def test_a_device(fake):
    device = CupyDevice()
    assert (device.name, device.arch, device.n_sm) == ("Fake GPU", 90, 7)
    assert device.memory() == ((1 << 20) + 100, 4 << 20)
    assert cupy_device.available()


def test_looking_for_cupy_imports_nothing():
    code = "import sys; from ggufkit_kernels.cuda import cupy_device as d; d.installed(); print('cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- memory ------------------------------------------------------------------------------------------------


def test_out_of_memory(fake):
    device = CupyDevice()
    fake.most = 1000
    with pytest.raises(DeviceMemoryError) as error:
        device.empty((3 << 20,), np.float16)
    assert one_line(error) == "the GPU's memory is full: 6 MiB were asked for, 1 of 4 MiB are free"
    assert device.pool.freed == 1  # it tried twice
    fake.room_when_freed = True
    assert device.empty((1000,), np.float32).shape == (1000,)


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (2, "cudaErrorMemoryAllocation: out of memory", DeviceMemoryError),
        (3, "CUBLAS_STATUS_ALLOC_FAILED", DeviceMemoryError),
        (1, "CUBLAS_STATUS_NOT_INITIALIZED", DeviceError),
        (700, "cudaErrorIllegalAddress: an illegal memory access was encountered", DeviceError),
        (719, "cudaErrorLaunchFailure: unspecified launch failure", DeviceError),
    ],
)
def test_failures_are_one_line(fake, status, text, kind):
    device = CupyDevice()
    graph = device.capture([[(KERNELS.kernel("add"), (1,), 32)]])
    error = fake.broken = fake.launch_error = CUDARuntimeError(status, text + "\nmore")
    array = device.empty((2,), np.float32)
    launch = (KERNELS.kernel("add"), (1,), 32)
    for fails in (
        device.synchronize, graph.launch, lambda: device.download(array), lambda: device.launch(*launch),
        lambda: device.capture([[launch]]),
    ):  # fmt: skip
        with pytest.raises(DeviceError) as raised:
            fails()
        assert type(raised.value) is kind and raised.value.__cause__ is None
        said = {
            f"the GPU failed: {text}",
            f"the GPU failed in add: {text}",  # where it is known in which kernel
        }
        if kind is DeviceMemoryError:
            said = {f"the GPU's memory is full: {text}"}
        elif status == 1:
            said = {"cuBLAS does not start, mostly for want of the GPU's memory"}
        assert one_line(raised) in said
    assert error is fake.broken
    assert device.stream.capture is None  # a capture that failed was ended


def test_a_fault_is_not_told_again_by_each_object(fake, monkeypatch):
    """CuPy's destructors fail, too, after a fault; those of others are still told."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    device = CupyDevice()
    fake.broken = CUDARuntimeError(700, "cudaErrorIllegalAddress: an illegal memory access was encountered")
    for _ in range(2):
        with pytest.raises(DeviceError):
            device.synchronize()

    class Held:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    for error in (CUDARuntimeError(700, "again"), OSError("another")):
        Held(error)
    assert told == [OSError]


def test_copies(fake):
    device = CupyDevice()
    big = np.arange(5000, dtype=np.float32)
    array = device.upload(big)
    assert np.array_equal(device.download(array), big)
    other = device.zeros(big.shape, np.float32)
    device.copy(other, array)
    assert np.array_equal(device.download(other), big)
    assert not device.download(device.zeros((3, 4), np.int32)).any()
    assert device.download(device.empty((0, 4), np.int32)).shape == (0, 4)
    device.write(array, np.flip(big))  # not contiguous on the host
    assert np.array_equal(device.download(array), big[::-1])
    with pytest.raises(ValueError):
        device.write(array, big[1:])
    with pytest.raises(ValueError):
        device.write(array, big.astype(np.float64))
    with pytest.raises(ValueError):
        device.copy(array, device.zeros((4,), np.float32))


def test_small_writes_wait_only_when_they_must(fake):
    """They go through pinned memory, which is not used again before the copies out of it are done."""
    device = CupyDevice()
    arrays = [device.empty((16,), np.int32) for _ in range(3000)]
    fake.waits = 0
    for k, array in enumerate(arrays):
        device.write(array, np.full(16, k, np.int32))
    assert fake.waits == 0
    for k, array in enumerate(arrays * 2):
        device.write(array, np.full(16, k, np.int32))
    assert fake.waits == 9000 * 64 // cupy_device.STAGE_BYTES
    device.synchronize()
    assert [int(array.host[0]) for array in arrays] == list(range(3000, 6000))
    device.write(arrays[0], np.zeros(16, np.int32))
    assert device.staged == 64


# -- launches ----------------------------------------------------------------------------------------------


def test_arguments(fake):
    device = CupyDevice(tell=lambda line: None)
    x = device.zeros((3,), np.float32)
    device.launch(KERNELS.kernel("add"), (3, 2), 64, x, None, -5, np.int64(7), 0.1, np.float32(2), True)
    ((name, grid, block, args),) = fake.launches
    assert (name, grid, block) == ("add", (3, 2), (64,))
    kinds = [np.uint64, np.uint64, np.int32, np.int32, np.float32, np.float32, np.int32]
    assert [type(a) for a in args] == kinds
    assert list(args) == [x.data.ptr, 0, -5, 7, np.float32(0.1), 2, 1]
    for wide in (1 << 31, np.int64(1 << 40), -(1 << 31) - 1):
        with pytest.raises(OverflowError):
            device.launch(KERNELS.kernel("add"), (1,), 32, wide)


def test_compiles_once_and_says_so(fake, capsys):
    device = CupyDevice()
    seen = []
    other = loader.module("sample.cu")
    device.compile([KERNELS, other, KERNELS], lambda done, of: seen.append((done, of)))
    assert sorted(seen) == [(1, 2), (2, 2)]
    said = "ggufkit: compiling CUDA kernels for Fake GPU (sm_90), which later runs will find compiled\n"
    assert capsys.readouterr().err == said
    assert len(fake.nvrtc.compiled) == 2
    for source, options in fake.nvrtc.compiled:
        assert source in (loader.source(KERNELS), loader.source(other))
        assert options == ("-std=c++17", "-ftz=false", "-fmad=true", "-arch=sm_90")
    device.launch(KERNELS.kernel("add"), (1,), 32)
    CupyDevice().launch(KERNELS.kernel("add"), (1,), 32)  # from the cache folder
    assert len(fake.nvrtc.compiled) == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("widths", [[1], [1, 3, 1, 2], [12], [2, 2, 9, 1, 4]])
def test_levels_of_a_graph(fake, widths):
    """Each launch comes after all of the level before, and not after those of its own level (as far as there are
    streams)."""
    device = CupyDevice(tell=lambda line: None)
    names = iter(range(100))
    levels = [[(KERNELS.kernel(str(next(names))), (1,), 32) for _ in range(width)] for width in widths]
    graph = device.capture(levels)
    order = [[(int(kernel.name), kernel.name) for kernel, *_ in level] for level in levels]
    before: set = set()
    for level in order:
        for k, launch in enumerate(level):
            assert fake.after[launch] >= before
            beside = fake.after[launch] & set(level)
            assert len(beside) == k // (cupy_device.SIDE_STREAMS + 1)
        before |= set(level)
    assert graph.graph.joined == before
    graph.launch()
    graph.launch()
    assert graph.graph.launches == 2
    assert len(device.sides) == min(cupy_device.SIDE_STREAMS, max(widths) - 1)


def early_levels() -> list[list[tuple]]:
    """Launches that are told apart by their grids, two of them in one level; all wait but the sixth."""
    add, other = KERNELS.kernel("add"), KERNELS.kernel("halves")
    assert loader.waits(add) and not loader.waits(other)
    sizes = [[1], [2], [8, 3], [4], [5], [6], [7]]
    return [[(other if n == 6 else add, (n, 2), 64, 7, 0.5) for n in level] for level in sizes]


def test_launches_begin_early(fake, monkeypatch):
    """Behind a single launch, those that wait by themselves; those of one level one after the other."""
    early: list[tuple] = []
    monkeypatch.setattr(driver, "can_launch_early", lambda: True)
    device = CupyDevice(tell=lambda line: None)
    assert device.early

    def launch_early(function, grid, block, args, stream):
        assert stream == device.stream.ptr and isinstance(function, int)
        early.append(grid)
        device.stream.queue((len(fake.launches), "early"))
        fake.launches.append(("early", grid, (block,), args))

    monkeypatch.setattr(driver, "launch_early", launch_early)
    device.capture(early_levels())
    assert [grid[0] for grid in early] == [2, 3, 8, 4, 5, 7]
    assert [grid[0] for _, grid, *_ in fake.launches] == [1, 2, 3, 8, 4, 5, 6, 7]
    assert not device.sides[0].done  # no branches
    device.early = False
    device.capture(early_levels())
    assert len(early) == 6


@pytest.mark.parametrize(
    ("arch", "known", "early"),
    [("90", (75, 90), True), ("120", (75, 80), False), ("120", (75, 90), True), ("80", (75, 80, 90), False)],
)
def test_what_is_compiled_for_older_devices_does_not_begin_early(fake, monkeypatch, arch, known, early):
    """Such kernels do not wait, on whichever device they run."""
    fake.arch, fake.nvrtc.getSupportedArchs = arch, lambda: known
    monkeypatch.setattr(driver, "can_launch_early", lambda: True)
    assert CupyDevice(tell=lambda line: None).early == early
    monkeypatch.setenv("GGUFKIT_CUDA_EARLY", "0")
    assert not CupyDevice(tell=lambda line: None).early


def test_a_driver_that_does_not_record_early_launches(fake, monkeypatch):
    """It is asked once; the graph is recorded without them, and so are later ones."""
    asked = []

    def launch_early(*args):
        asked.append(args)
        raise RuntimeError("cuLaunchKernelEx: error 801")

    monkeypatch.setattr(driver, "can_launch_early", lambda: True)
    monkeypatch.setattr(driver, "launch_early", launch_early)
    device = CupyDevice(tell=lambda line: None)
    for _ in range(2):
        fake.launches.clear()
        device.capture(early_levels()).launch()
        assert [grid[0] for _, grid, *_ in fake.launches][-8:] == [1, 2, 8, 3, 4, 5, 6, 7]
    assert len(asked) == 1 and not device.early and device.stream.capture is None


DRIVER = """
#include <stdint.h>
#include <string.h>
struct attribute { int id; char pad[4]; union { int serialization; char room[64]; } value; };
struct config { unsigned gx, gy, gz, bx, by, bz, shared; void* stream; attribute* attributes; unsigned n; };
extern "C" int cuLaunchKernelEx(const config* c, void* function, void** words, void** extra) {
    int64_t seen[12] = {c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, (int64_t)c->stream, c->n,
                        c->attributes->id, c->attributes->value.serialization, (int64_t)function};
    if (extra || sizeof(attribute) != 72) return 1;
    int64_t* const out = *(int64_t**)words[0];
    memcpy(out, seen, sizeof seen);
    out[12] = *(int32_t*)words[1];
    memcpy(out + 13, words[2], 4);
    return (int)out[14];
}
"""


@pytest.mark.skipif(emulated.COMPILER is None, reason="there is no g++")
def test_what_the_driver_is_told(tmp_path, monkeypatch):
    """A driver of our own, with cuda.h's structures written down again, gets what was meant."""
    source, library = tmp_path / "driver.cpp", tmp_path / "driver.so"
    source.write_text(DRIVER, encoding="utf-8")
    subprocess.run([str(emulated.COMPILER), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    monkeypatch.setattr(driver, "_library", lambda: loaded)
    assert driver.can_launch_early()
    out = np.zeros(16, np.int64)
    words = np.uint64(out.ctypes.data), np.int32(-5), np.float32(0.5)
    driver.launch_early(0x7FFF_1234_5678_9ABC, (70000, 3), 256, words, 0x7EEE_1234_5678)
    assert out[:12].tolist() == [70000, 3, 1, 256, 1, 1, 0, 0x7EEE_1234_5678, 1, 6, 1, 0x7FFF_1234_5678_9ABC]
    assert out[12] == -5 and out[13:14].view(np.float32)[0] == 0.5
    out[14] = 801
    with pytest.raises(RuntimeError, match="cuLaunchKernelEx: error 801"):
        driver.launch_early(1, (1,), 32, words, 2)


def test_no_driver_launches_nothing_early(monkeypatch):
    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "_library", missing)
    assert not driver.can_launch_early()
    monkeypatch.setattr(driver, "_library", lambda: ctypes.CDLL(None))  # a driver for CUDA 11
    assert not driver.can_launch_early()


# -- cuBLAS ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("cut", [0, 8])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_gemm_in_columns(fake, dtype, lead, transposed, beta, cut):
    """Against the definition of cuBLAS's call, also where rows are parts of wider ones."""
    device = CupyDevice()
    rng = np.random.default_rng(5)
    m, n, k = 5, 6, 16
    x, w = rng.standard_normal((*lead, m, k)), rng.standard_normal((*lead, n, k))
    if not transposed:
        w = np.swapaxes(w, -1, -2)

    def part(values, dtype):
        """An array whose rows lie `cut` numbers further apart."""
        wide = device.upload(np.zeros((*values.shape[:-1], values.shape[-1] + cut), dtype))
        wide.host = wide.host[..., : values.shape[-1]]
        wide.host[...] = values
        wide.shape, wide.strides = wide.host.shape, wide.host.strides
        return wide

    x, w, out = part(x, dtype), part(w, dtype), part(np.ones((*lead, m, n)), np.float32)
    right = np.swapaxes(w.host, -1, -2) if transposed else w.host
    wanted = x.host.astype(np.float64) @ right.astype(np.float64) + beta
    device.gemm(x, w, out, beta, transposed)
    assert np.allclose(out.host, wanted, atol=1e-5)
    with pytest.raises(ValueError):
        device.gemm(x, w, out, beta, not transposed)
    with pytest.raises(ValueError):
        device.gemm(x, part(w.host, np.float32 if dtype == np.float16 else np.float16), out, beta, transposed)


# -- the real CuPy, where it is installed ------------------------------------------------------------------


def test_the_real_cupy_has_these_names():
    """Names and parameters that the fake takes for granted."""
    cupy = pytest.importorskip("cupy", reason="there is no CuPy to compare the fake with")
    cuda = cupy.cuda
    for owner, names in {
        cuda.runtime: "getDeviceCount getDeviceProperties memGetInfo driverGetVersion runtimeGetVersion",
        cuda.Stream.null: "ptr",
        cuda.Stream: "begin_capture end_capture synchronize wait_event __enter__",
        cuda.MemoryPool: "malloc free_all_blocks free_bytes",
        cuda.MemoryPointer: "copy_from_host_async copy_to_host_async copy_from_device_async memset_async",
        cuda.function.Module: "load get_function",
        cuda.function.Function: "ptr",
        cuda.device: "get_cublas_handle",
        cuda.Graph: "launch upload",
        cuda: "Event alloc_pinned_memory Device get_elapsed_time",
        cuda.nvrtc: "getVersion getSupportedArchs createProgram compileProgram getCUBIN getPTX getProgramLog "
            "destroyProgram",
    }.items():  # fmt: skip
        for name in names.split():
            assert hasattr(owner, name), (owner, name)
    assert "memptr" in cupy.ndarray.__doc__ and "non_blocking" in cuda.Stream.__doc__
    assert list(inspect.signature(cuda.Event.__init__).parameters)[2] == "disable_timing"
    for name, ours in (("gemmEx", Cublas.gemmEx), ("gemmStridedBatchedEx", Cublas.gemmStridedBatchedEx)):
        stated = getattr(cuda.cublas, name).__doc__.partition("(")[2].partition(")")[0]
        assert len(stated.split(",")) == len(inspect.signature(ours).parameters) - 1, stated
    assert issubclass(cuda.memory.OutOfMemoryError, MemoryError)
    for module, name in (("api.runtime", "CUDARuntimeError"), ("api.driver", "CUDADriverError"),
                         ("libs.cublas", "CUBLASError"), ("libs.nvrtc", "NVRTCError")):  # fmt: skip
        error = getattr(importlib.import_module(f"cupy_backends.cuda.{module}"), name)
        assert issubclass(error, RuntimeError) and error.__module__.startswith("cupy_backends.")


def test_the_real_nvrtc_through_cupy(tmp_path, monkeypatch):
    """The compiler needs no device: machine code of every module without macros, and a fault that is told."""
    cupy = pytest.importorskip("cupy", reason="there is no CuPy to compile by")
    monkeypatch.setenv("GGUFKIT_CACHE_DIR", str(tmp_path))
    compiler = cupy_device.Compiler(cupy.cuda.nvrtc, 90, lambda line: None)
    for file in ("elementwise.cu", "sample.cu", "inputs.cu"):
        code = compiler.code(loader.module(file))
        assert code[:4] == b"\x7fELF" and compiler.code(loader.module(file)) == code
    with pytest.raises(DeviceError) as error:
        compiler.code(loader.module("matvec.cu"))
    assert one_line(error).startswith("matvec.cu does not compile for sm_90: matvec.cu(")
    newer = cupy_device.Compiler(cupy.cuda.nvrtc, 199, lambda line: None)
    assert not newer.binary and b".target sm_" in newer.code(loader.module("sample.cu"))


def test_the_real_cupy_without_a_driver():
    cupy = pytest.importorskip("cupy", reason="there is no CuPy to ask")
    if cupy.cuda.runtime.driverGetVersion():
        pytest.skip("there is a driver")
    with pytest.raises(DeviceError) as error:
        CupyDevice()
    assert one_line(error) == "there is no CUDA device: there is no NVIDIA driver"
    assert not cupy_device.available()
