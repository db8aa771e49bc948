"""Every kernel compiles to machine code, with the compiler that compiles at run time, for the architectures of Turing,
Ampere, Hopper and Blackwell.

Machine code is kept in the cache folder as at run time. Cold, a module takes 0.2 s of processor time, and the layouts
of all types make some hundreds of them: so every kernel is compiled for all architectures in one choice of its macros,
every module for one of them (by a hash of its name), and with --slow everything for all.
"""

from __future__ import annotations

import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvrtc_binding
import pytest
from ggufkit_formats.errors import DeviceError
from ggufkit_kernels.cuda import attention, cupy_device, loader
from ggufkit_kernels.cuda.cupy_device import Compiler
from ggufkit_kernels.cuda.loader import Module

pytestmark = pytest.mark.skipif(not nvrtc_binding.found, reason=nvrtc_binding.reason)
ARCHS = [75, 80, 90, 120]
PROBE = loader.module(str(Path(__file__).with_name("probe.cu")))


def all_modules() -> list[Module]:
    """Each module that the backend may ask for: plain ones first, then those of the layouts."""
    from ggufkit_kernels.cuda.modules import modules

    return sorted(dict.fromkeys([*modules(), PROBE]), key=lambda module: (module.defines != (), repr(module)))


def test_modules_cover_the_files():
    assert {m.file for m in all_modules()} - {PROBE.file} == set(loader.files())


def default_jobs() -> list[tuple[int, Module]]:
    """(architecture, module) of what is compiled without --slow."""
    jobs, seen = [], set()
    for module in all_modules():
        first = module.file not in seen
        seen.add(module.file)
        archs = ARCHS if first or not module.defines else [ARCHS[zlib.crc32(repr(module).encode()) % len(ARCHS)]]
        jobs += [(arch, module) for arch in archs]
    return jobs


def test_every_kernel_is_compiled_for_all_architectures():
    for arch in ARCHS:
        files = {module.file for each, module in default_jobs() if each == arch}
        assert files >= set(loader.files())


@pytest.mark.parametrize("arch", [*ARCHS, pytest.param(0, marks=pytest.mark.slow)], ids=lambda a: f"sm_{a or 'all'}")
def test_all_kernels_compile(arch):
    if arch:
        jobs = [job for job in default_jobs() if job[0] == arch]
    else:
        jobs = [(each, module) for each in ARCHS for module in all_modules()]
    compilers = {each: Compiler(nvrtc_binding, each, lambda line: None) for each in ARCHS}

    def compiled(job: tuple[int, Module]) -> bytes:
        return compilers[job[0]].code(job[1])

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for (each, module), code in zip(jobs, threads.map(compiled, jobs), strict=True):
            assert code.startswith(b"\x7fELF"), (each, module)
            for name in loader.kernel_names(module.file):
                assert b".text." + name.encode() + b"\0" in code, (each, module, name)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GGUFKIT_CACHE_DIR", str(tmp_path))
    return tmp_path / "cuda"


def test_machine_code_is_kept(own_cache):
    told = []
    compiler = Compiler(nvrtc_binding, 90, told.append, "a device")
    code = compiler.code(PROBE)
    assert compiler.code(PROBE) == code
    assert told == ["compiling CUDA kernels for a device, which later runs will find compiled"]
    again = []
    assert Compiler(nvrtc_binding, 90, again.append).code(PROBE) == code and not again
    (file,) = own_cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1])  # damaged: compiled again, and mended
    assert Compiler(nvrtc_binding, 90, again.append).code(PROBE) == code and len(again) == 1
    assert Compiler(nvrtc_binding, 90, again.append).code(PROBE) == code and len(again) == 1
    Compiler(nvrtc_binding, 80, again.append).code(PROBE)
    Compiler(nvrtc_binding, 90, again.append).code(Module(PROBE.file, fmad=False))
    Compiler(nvrtc_binding, 90, again.append).code(loader.module(PROBE.file, UNUSED=1))
    assert len(list(own_cache.iterdir())) == 4


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(cupy_device, "_folder", lambda: None)
    assert Compiler(nvrtc_binding, 90, lambda line: None).code(PROBE).startswith(b"\x7fELF")


def test_old_machine_code_goes(own_cache):
    own_cache.mkdir()
    old, new = own_cache / "old.cubin", own_cache / "new.cubin"
    for file in (old, new):
        file.write_bytes(b"x")
    os.utime(old, (1, 1))
    Compiler(nvrtc_binding, 90, lambda line: None).code(PROBE)
    assert not old.exists() and new.exists()


def test_newer_and_older_devices():
    """For a device that nvrtc does not know yet, the newest PTX it can make; for a too old one an error."""
    newer = Compiler(nvrtc_binding, 999, lambda line: None)
    assert newer.target.startswith("compute_1") and b".entry sums" in newer.code(PROBE)
    with pytest.raises(DeviceError, match=r"does not compile for compute capability 5\.2"):
        Compiler(nvrtc_binding, 52, lambda line: None)


def assembly(module: Module, arch: int) -> str:
    """PTX for an architecture and, behind it, what its assembler says of registers."""
    texts = []
    for target, more, get in (
        (f"compute_{arch}", (), nvrtc_binding.getPTX),
        (f"sm_{arch}", ("--ptxas-options=-v",), nvrtc_binding.getProgramLog),
    ):
        program = nvrtc_binding.createProgram(loader.source(module), module.file, (), ())
        nvrtc_binding.compileProgram(program, (*loader.options(module), f"-arch={target}", *more))
        text = get(program)
        texts.append(text if isinstance(text, str) else text.decode())
        nvrtc_binding.destroyProgram(program)
    return "".join(texts)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("arch", [75, 90])
def test_prompts_attention_takes_matrix_instructions(arch, dim):
    """On Turing the ones that it has; the registers suffice but for a few numbers, or for some more on Turing."""
    text = assembly(attention.flash_module(dim, attention.tiles(dim, arch)), arch)
    for there, instruction in (
        (True, "ldmatrix.sync.aligned.m8n8.x4.shared.b16"),
        (True, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"),
        (arch < 80, "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"),
        (arch >= 80, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
        (arch >= 80, "cp.async.cg.shared.global"),
    ):
        assert (instruction in text) == there, instruction
    stack = re.search(r"Function properties for flash\n.*?(\d+) bytes stack frame", text)
    assert stack and int(stack[1]) <= (64 if arch >= 80 else 128)


def test_an_error_names_its_line(tmp_path):
    wrong = tmp_path / "wrong.cu"
    wrong.write_text('extern "C" __global__ void f(int* x) {\n    x[0] = y;\n}\n', encoding="utf-8")
    with pytest.raises(DeviceError, match=r'wrong.cu does not compile for sm_75: .*\(2\): error: identifier "y"'):
        Compiler(nvrtc_binding, 75, lambda line: None).code(loader.module(str(wrong)))


def test_contraction_is_a_choice(own_cache):
    """fmad=False: a product is rounded before it is added."""
    source = 'extern "C" __global__ void f(float* x) { x[0] = x[1] * x[2] + x[3]; }\n'
    compiler = Compiler(nvrtc_binding, 999, lambda line: None)  # PTX, which can be read
    path = own_cache.parent / "mul.cu"
    path.write_text(source, encoding="utf-8")
    fused, apart = (compiler.code(Module(str(path), fmad=fmad)).decode() for fmad in (True, False))
    assert "fma.rn.f32" in fused and "fma" not in apart and "ftz" not in fused + apart
