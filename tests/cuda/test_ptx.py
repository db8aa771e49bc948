"""Kernels as the device's compiler leaves them, run on the CPU: that instructions do what the PTX manual says, that the
checker of memory sees what is wrong, and all kernels' tests on small shapes with both."""

from __future__ import annotations

import again
import emulated
import numpy as np
import nvrtc_binding
import ptx
import pytest
from emulated import EmulatedDevice
from ggufkit_formats.errors import DeviceError
from ggufkit_kernels.cuda import loader
from test_shim import PROBE, run

pytestmark = [
    pytest.mark.skipif(emulated.COMPILER is None, reason="PTX is not run: there is no g++"),
    pytest.mark.skipif(not nvrtc_binding.found, reason=nvrtc_binding.reason),
]


@pytest.mark.parametrize(
    "words", ["ptx sm_90 reversed", *(pytest.param(f"ptx sm_{arch}", marks=pytest.mark.slow) for arch in (75, 80, 120))]
)
def test_all_kernels(words, tmp_path):
    """Right results, and no access that races, goes beyond, or reads nothing."""
    again.all_kernels(words, tmp_path / "ran")


def test_what_turing_does_otherwise():
    """Its matrix instructions."""
    again.run_tests("ptx sm_75", ["-m", "kernels and not gpu", str(again.HERE / "test_flash.py")])


@pytest.mark.parametrize("words", ["ptx sm_90", "ptx sm_90 apart"])
def test_networks(words):
    """A token of each network, captured: kernels that begin early do not race, nor, where none does, what is said to
    run side by side."""
    again.run_tests(words, ["-m", "not gpu", "-k", "graph_equals_separate_calls", str(again.HERE / "test_trace.py")])


# -- instructions ------------------------------------------------------------------------------------------

M = 0xFFFFFFFF


def s(x: int) -> int:
    return (x ^ 1 << 31) - (1 << 31)


def byte(x: int, k: int) -> int:
    return (x >> 8 * k & 255 ^ 128) - 128


def f(x: int) -> np.float32:
    return np.uint32(x).view(np.float32)


def bits(x) -> int:
    return int(np.float32(x).view(np.uint32))


def prmt(a: int, b: int, c: int) -> int:
    chosen = [(b << 32 | a) >> 8 * (c >> 4 * k & 7) & 255 for k in range(4)]
    return sum((255 * (v >> 7) if c >> 4 * k & 8 else v) << 8 * k for k, v in enumerate(chosen))


def quotient(a: int, b: int) -> int:  # rounded towards zero
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def choice(a: int, b: int, of) -> int:  # the other one of what is no number
    return b if f(a) != f(a) else a if f(b) != f(b) else bits(of(f(a), f(b)))


def to_int(x: np.float32, rounded) -> int:
    return 0 if x != x else int(min(max(rounded(np.float64(x)), -(2**31)), 2**31 - 1)) & M


def fma_down(a: int, b: int, c: int) -> int:
    """Exactly, then to the float32 below."""
    from fractions import Fraction

    x, y, z = f(a), f(b), f(c)
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    near = np.float32(float(exact))
    while Fraction(float(near)) > exact:
        near = np.nextafter(near, np.float32(-np.inf))
    while Fraction(float(np.nextafter(near, np.float32(np.inf)))) <= exact:
        near = np.nextafter(near, np.float32(np.inf))
    return bits(near)


# An instruction; its operands, the result first ("r" a word, "f" a float32); what it makes of words, and of which
ANY = None
INSTRUCTIONS = [
    ("prmt.b32 %0, %1, %2, %3;", "rrrr", prmt, ANY),
    ("bfi.b32 %0, %1, %2, 5, 9;", "rrr", lambda a, b, c: b & ~(511 << 5) & M | (a & 511) << 5, ANY),
    ("bfi.b32 %0, %1, %2, 27, 20;", "rrr", lambda a, b, c: b & ~(M << 27) & M | a << 27 & M, ANY),
    ("shl.b32 %0, %1, %2;", "rrr", lambda a, b, c: a << min(b, 32) & M, ANY),
    ("shr.u32 %0, %1, %2;", "rrr", lambda a, b, c: a >> min(b, 32), ANY),
    ("shr.s32 %0, %1, %2;", "rrr", lambda a, b, c: s(a) >> min(b, 31) & M, ANY),
    ("shf.l.wrap.b32 %0, %1, %2, %3;", "rrrr", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32 & M, ANY),
    ("shf.r.wrap.b32 %0, %1, %2, %3;", "rrrr", lambda a, b, c: (b << 32 | a) >> (c & 31) & M, ANY),
    ("mul.lo.s32 %0, %1, %2;", "rrr", lambda a, b, c: a * b & M, ANY),
    ("mul.hi.s32 %0, %1, %2;", "rrr", lambda a, b, c: s(a) * s(b) >> 32 & M, ANY),
    ("mul.hi.u32 %0, %1, %2;", "rrr", lambda a, b, c: a * b >> 32, ANY),
    ("mad.lo.s32 %0, %1, %2, %3;", "rrrr", lambda a, b, c: a * b + c & M, ANY),
    ("div.s32 %0, %1, %2;", "rrr", lambda a, b, c: quotient(s(a), s(b)) & M, ANY),
    ("div.u32 %0, %1, %2;", "rrr", lambda a, b, c: a // b, ANY),
    ("rem.s32 %0, %1, %2;", "rrr", lambda a, b, c: s(a) - quotient(s(a), s(b)) * s(b) & M, ANY),
    ("rem.u32 %0, %1, %2;", "rrr", lambda a, b, c: a % b, ANY),
    ("min.s32 %0, %1, %2;", "rrr", lambda a, b, c: min(s(a), s(b)) & M, ANY),
    ("max.u32 %0, %1, %2;", "rrr", lambda a, b, c: max(a, b), ANY),
    ("dp4a.s32.s32 %0, %1, %2, %3;", "rrrr",
     lambda a, b, c: c + sum(byte(a, k) * byte(b, k) for k in range(4)) & M, ANY),
    ("not.b32 %0, %1;", "rr", lambda a, b, c: ~a & M, ANY),
    ("neg.s32 %0, %1;", "rr", lambda a, b, c: -a & M, ANY),
    ("{ .reg .u16 x; .reg .u16 y; cvt.u16.u32 x, %1; cvt.u16.u32 y, %2; mul.hi.u16 x, x, y; cvt.u32.u16 %0, x; }",
     "rrr", lambda a, b, c: (a & 65535) * (b & 65535) >> 16, ANY),
    ("{ .reg .b16 x; .reg .b16 y; mov.b32 {x, y}, %1; mov.b32 %0, {y, x}; }", "rr",
     lambda a, b, c: a >> 16 | (a & 65535) << 16, ANY),
    ("popc.b32 %0, %1;", "rr", lambda a, b, c: a.bit_count(), ANY),
    ("clz.b32 %0, %1;", "rr", lambda a, b, c: 32 - a.bit_length(), ANY),
    ("cvt.s32.s8 %0, %1;", "rr", lambda a, b, c: byte(a, 0) & M, ANY),
    ("cvt.s32.s16 %0, %1;", "rr", lambda a, b, c: (((a & 65535) ^ 32768) - 32768) & M, ANY),
    ("cvt.rn.f32.s32 %0, %1;", "fr", lambda a, b, c: bits(np.float32(s(a))), ANY),
    ("cvt.rn.f32.u32 %0, %1;", "fr", lambda a, b, c: bits(np.float32(a)), ANY),
    ("cvt.rni.s32.f32 %0, %1;", "rf", lambda a, b, c: to_int(f(a), np.rint), ANY),
    ("cvt.rzi.s32.f32 %0, %1;", "rf", lambda a, b, c: to_int(f(a), np.trunc), ANY),
    ("cvt.rzi.f32.f32 %0, %1;", "ff", lambda a, b, c: bits(np.trunc(f(a))), ANY),
    ("cvt.sat.f32.f32 %0, %1;", "ff", lambda a, b, c: bits(min(max(f(a), np.float32(0)), np.float32(1))) if f(a) == f(a)
     else 0, lambda a, b, c: f(a)),
    ("cvt.rn.f16x2.f32 %0, %1, %2;", "rff",
     lambda a, b, c: int(np.array([f(b), f(a)]).astype(np.float16).view(np.uint32)[0]),
     lambda a, b, c: f(a) == f(a) and f(b) == f(b)),
    ("copysign.f32 %0, %1, %2;", "fff", lambda a, b, c: bits(np.copysign(f(b), f(a))), ANY),
    ("max.f32 %0, %1, %2;", "fff", lambda a, b, c: choice(a, b, max), lambda a, b, c: f(a) or f(b)),
    ("min.f32 %0, %1, %2;", "fff", lambda a, b, c: choice(a, b, min), lambda a, b, c: f(a) or f(b)),
    ("fma.rm.f32 %0, %1, %2, %3;", "ffff", fma_down,
     lambda a, b, c: all(2e-5 < abs(f(x)) < 1e5 for x in (a, b, c))),
    ("div.rn.f32 %0, %1, %2;", "fff", lambda a, b, c: bits(f(a) / f(b)), ANY),
    ("sqrt.rn.f32 %0, %1;", "ff", lambda a, b, c: bits(np.sqrt(f(a))), ANY),
    ("rcp.rn.f32 %0, %1;", "ff", lambda a, b, c: bits(np.float32(1) / f(a)), ANY),
]  # fmt: skip
for compare, definition in (
    ("lt", lambda x, y: x < y), ("gt", lambda x, y: x > y), ("ne", lambda x, y: x < y or x > y),
    ("leu", lambda x, y: not x > y), ("neu", lambda x, y: x != y), ("nan", lambda x, y: x != x or y != y),
    ("equ", lambda x, y: x == y or x != x or y != y), ("ge", lambda x, y: x >= y),
):  # fmt: skip
    text = f"{{ .reg .pred p; setp.{compare}.f32 p, %1, %2; selp.b32 %0, 1, 0, p; }}"
    INSTRUCTIONS.append((text, "rff", lambda a, b, c, is_so=definition: int(bool(is_so(f(a), f(b)))), ANY))


@pytest.fixture(params=["ptx", pytest.param("gpu", marks=pytest.mark.gpu)])
def compiled_device(request):
    return EmulatedDevice(ptx=True) if request.param == "ptx" else request.getfixturevalue("gpu_device")


def test_instructions(compiled_device, tmp_path):
    """As inline assembly, which nvrtc leaves as it is: random words, floats of middling size, edges."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, 1 << 32, (3, 192), dtype=np.uint32)
    words[:, 64:128] = (rng.standard_normal((3, 64)) * 100).astype(np.float32).view(np.uint32)
    words[1, :40] = np.arange(40)
    words[:, 128:176] = rng.choice([0, 1, 31, 32, 1 << 31, M, M >> 1, 0x7FC00000, 0x3F800000, 0x4F000000], (3, 48))
    words[1][words[1] == 0] = 64  # what is divided by
    lines = []
    for k, (text, kinds, _, _) in enumerate(INSTRUCTIONS):
        given = ", ".join(f'"{kind}"({name}{kind})' for kind, name in zip(kinds[1:], "abc", strict=False))
        result = "r" if kinds[0] == "r" else "__float_as_uint(x)"
        to = f'"={kinds[0]}"({"r" if kinds[0] == "r" else "x"})'
        lines.append(f'{{ u32 r; float x; asm volatile("{text}" : {to} : {given}); out[{k} * n + i] = {result}; }}')
    source = tmp_path / "instructions.cu"
    source.write_text(
        "typedef unsigned int u32;\n"
        'extern "C" __global__ void instructions(const u32* a, const u32* b, const u32* c, u32* out, int n) {\n'
        "const int i = threadIdx.x;\n"
        "const u32 ar = a[i], br = b[i], cr = c[i];\n"
        "const float af = __uint_as_float(ar), bf = __uint_as_float(br), cf = __uint_as_float(cr);\n"
        + "\n".join(lines) + "\n}\n", encoding="utf-8")  # fmt: skip
    device, n = compiled_device, words.shape[1]
    out = device.zeros((len(INSTRUCTIONS), n), np.uint32)
    device.launch(
        loader.module(str(source)).kernel("instructions"), (1,), n, *(device.upload(w) for w in words), out, n
    )
    found = device.download(out)
    asked = 0
    with np.errstate(all="ignore"):
        for k, (text, kinds, definition, condition) in enumerate(INSTRUCTIONS):
            for i in range(n):
                given = [int(w) for w in words[:, i]]
                if condition and not condition(*given):
                    continue
                wanted, got = definition(*given), int(found[k, i])
                nan = kinds[0] == "f" and f(wanted) != f(wanted)
                assert f(got) != f(got) if nan else got == wanted, (
                    text,
                    [hex(v) for v in given],
                    hex(got),
                    hex(wanted),
                )
                asked += 1
    assert asked > 120 * len(INSTRUCTIONS)


def test_what_is_not_known_is_an_error(tmp_path):
    source = tmp_path / "unknown.cu"
    source.write_text(
        'extern "C" __global__ void f(unsigned* x) { asm("bfind.u32 %0, %1;" : "=r"(x[0]) : "r"(x[1])); }\n',
        encoding="utf-8",
    )
    with pytest.raises(ptx.UnknownInstruction, match=r"bfind\.u32"):
        EmulatedDevice(ptx=True).launch(loader.module(str(source)).kernel("f"), (1,), 32, None)


# -- the checker -------------------------------------------------------------------------------------------


def zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.int32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("name", "grid", "block", "args", "said"),
    [
        ("neighbours", 1, 96, (zeros(96), 1), ""),
        ("neighbours", 1, 96, (zeros(96), 0), "shared memory that (nobody has written|thread .* wrote)"),
        ("neighbours_of_a_warp", 1, 32, (zeros(32), 1), ""),
        ("neighbours_of_a_warp", 1, 32, (zeros(32), 0), "shared memory that (nobody has written|thread .* wrote)"),
        ("unwritten", 1, 64, (np.zeros(64, np.float32),), "reads shared memory that nobody has written"),
        ("beyond_shared", 1, 32, (zeros(32), 40), "outside of its variables"),
        ("beyond_global", 1, 32, (zeros(35), 3), ""),
        ("beyond_global", 1, 32, (zeros(35), 4), "outside of what was allocated"),
        ("beyond_global", 1, 32, (zeros(35), -1), "outside of what was allocated"),
        ("one_place", 3, 32, (zeros(1), 0), "race: writes global memory that thread .* wrote"),
        ("one_place", 3, 32, (zeros(1), 1), ""),
        ("constants", 1, 32, (zeros(32), zeros(32), 0), ""),
        ("constants", 1, 32, (zeros(32), zeros(32), 1), "ld.global.nc what this launch wrote"),
        ("copies", 1, 64, (np.zeros(512, np.uint32), np.zeros(256, np.uint32), 0, 9), ""),
        ("copies", 1, 64, (np.zeros(512, np.uint32), np.zeros(256, np.uint32), 1, 9), "race|nobody"),
        ("copies", 1, 64, (np.zeros(512, np.uint32), np.zeros(256, np.uint32), 2, 9), "race|nobody"),
        ("copies", 1, 64, (np.zeros(512, np.uint32), np.zeros(256, np.uint32), 3, 9), "race|nobody"),
        ("copies", 1, 64, (np.zeros(512, np.uint32), np.zeros(256, np.uint32), 4, 9), "copies of its are under way"),
        ("lonely_barrier", 1, 64, (0, 40), "waits at bar.sync"),
        ("lonely_barrier", 1, 64, (1, 40), ""),  # one barrier, whichever line it stands in
        ("lonely_barrier", 1, 64, (2, 40), "waits at shfl.sync"),
        ("lonely_barrier", 1, 64, (3, 40), "its own mask does not name"),
        ("lonely_barrier", 1, 64, (4, 40), "__trap"),
    ],
)  # fmt: skip
def test_what_the_checker_sees(name, grid, block, args, said, reverse):
    device = EmulatedDevice(ptx=True, reverse=reverse)
    if not said:
        run(device, name, grid, block, *args)
        return
    with pytest.raises(DeviceError, match=said):
        run(device, name, grid, block, *args)
    run(device, "neighbours", 1, 96, zeros(96), 1)  # and the next launch is none the worse


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_hand_over(kind, reverse):
    """Only by fences of those who take the ticket, behind a barrier. (Who has no barrier in front races where other
    threads than the one that takes the ticket wrote.)"""
    device = EmulatedDevice(ptx=True, reverse=reverse)
    args = np.zeros(1, np.uint32), zeros(128), zeros(32), kind
    if kind:
        with pytest.raises(DeviceError, match=r"race: reads global memory that thread .* of block .* wrote"):
            run(device, "handed_over", 4, 32, *args)
    else:
        assert run(device, "handed_over", 4, 32, *args)[2].tolist() == [6 + 4 * k for k in range(32)]


@pytest.mark.parametrize("reverse", [False, True])
def test_launches_side_by_side(reverse):
    """Two of one level that touch the same place race; those of two levels do not, nor do two that only read."""
    device = EmulatedDevice(ptx=True, reverse=reverse)
    kernel, x, out = PROBE.kernel("constants"), device.zeros((32,), np.int32), device.zeros((64,), np.int32)
    reads, writes = (kernel, (1,), 32, x, out[:32], 0), (PROBE.kernel("beyond_global"), (1,), 32, x, 0)
    also_reads = (kernel, (1,), 32, x, out[32:], 0)
    for levels in ([[reads], [writes]], [[writes], [reads, also_reads]]):
        graph = device.capture(levels)
        for _ in range(2):
            graph.launch()
    for level in ([reads, writes], [writes, reads], [reads, also_reads, writes]):
        device.write(x, zeros(32))
        with pytest.raises(DeviceError, match=r"race: .* that a launch beside this one (wrote|read)"):
            device.capture([level]).launch()


def test_memory_that_nobody_wrote():
    """New memory may not be read before it is written: by a kernel, or by the host."""
    device = EmulatedDevice(ptx=True)
    kernel, x, out = PROBE.kernel("constants"), device.empty((40,), np.int32), device.zeros((32,), np.int32)
    with pytest.raises(DeviceError, match="reads global memory that nobody has written"):
        device.launch(kernel, (1,), 32, x, out, 0)
    device.write(x[8:], np.arange(32, dtype=np.int32))
    device.launch(kernel, (1,), 32, x[8:], out, 0)
    with pytest.raises(DeviceError, match="reads global memory that nobody has written"):
        device.launch(kernel, (1,), 32, x[4:], out, 0)
    assert device.download(out).tolist() == list(range(32))
    y = device.empty((32,), np.int32)
    device.launch(PROBE.kernel("beyond_global"), (1,), 32, y, 0)
    device.launch(kernel, (1,), 32, y, out, 0)
    assert device.download(out).tolist() == [1] * 32
