"""What the kernels are compiled for: the instruction sets, and with them the width of a vector.

Numba compiles for the processor it runs on, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say otherwise; an
instruction that this target lacks would end the process, so everything here asks the target, not the processor.

A *family* is how wide vectors are and how products of bytes are summed. `GGUFKIT_SIMD` names another one than the
best: its kernels then run with the instructions there are, an instruction that is missing being made of others.
So a machine can check the layouts and the arithmetic of every family; only speed needs the processor itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

from ggufkit_formats.errors import UsageError

from .. import store
from ..apart import apart

# What a processor's name alone implies, for NUMBA_CPU_NAME without features.
_AVX2 = frozenset(("avx2", "f16c"))
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl"}
_VNNI = _AVX512 | {"avx512vnni"}
BY_NAME = {
    "haswell": _AVX2,
    "broadwell": _AVX2,
    "skylake": _AVX2,
    "znver": _AVX2,
    "x86-64-v3": _AVX2,
    "alderlake": _AVX2 | {"avxvnni"},
    "skylake-avx512": _AVX512,
    "x86-64-v4": _AVX512,
    "cascadelake": _VNNI,
    "icelake": _VNNI,
    "tigerlake": _VNNI,
    "sapphirerapids": _VNNI | {"avxvnni"},
    "znver4": _VNNI,
    "znver5": _VNNI | {"avxvnni"},
    **dict.fromkeys(("neoverse", "apple-m", "cortex-a76", "cortex-a78", "cortex-x"), frozenset(("neon", "dotprod"))),
}
KNOWN = ("avx2", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avxvnni", "neon", "dotprod")


def _has_dotprod() -> bool:
    """Whether this machine is an ARM processor with dot products of bytes, which LLVM does not tell of on Linux."""
    if platform.machine() not in ("aarch64", "arm64"):
        return False
    if sys.platform == "darwin":  # from the M1 on
        return True
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError, TypeError):  # no Linux
        return False
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return bool(getauxval(16) & 1 << 20)  # AT_HWCAP, HWCAP_ASIMDDP


def allow_dotprod(builder: Any) -> None:
    """Let LLVM take dot products in the function that is being built, though it may not know that they are there."""
    from numba.core.registry import cpu_target

    context: Any = cpu_target.target_context
    known = context.codegen()._tm_features  # an attribute replaces them
    attribute = f'"target-features"="{known},+dotprod"' if known else '"target-features"="+dotprod"'
    set.add(builder.function.attributes, attribute)  # llvmlite's own `add` takes flags only


def compiled_features() -> frozenset[str]:
    """The instruction sets among KNOWN that Numba compiles for (not: that the processor has)."""
    kept = store.read("features")  # what Numba said, in the folder that all its settings are in the name of
    return frozenset(kept.decode().split()) if kept is not None else apart(_ask_numba)


def _ask_numba() -> frozenset[str]:
    from numba.core import config
    from numba.core.registry import cpu_target

    context: Any = cpu_target.target_context
    asked = (context.codegen()._tm_features or "").split(",")
    found = {name for name in KNOWN if f"+{name}" in asked}
    cpu = getattr(config, "CPU_NAME", None) or ""
    names = [name for name in BY_NAME if cpu.startswith(name)]
    if names:
        found |= BY_NAME[max(names, key=len)]
    if not cpu and getattr(config, "CPU_FEATURES", None) is None and _has_dotprod():
        found.add("dotprod")
    found -= {name for name in KNOWN if f"-{name}" in asked}
    store.write("features", " ".join(sorted(found)).encode())
    return frozenset(found)


@dataclass(frozen=True)
class Family:
    """How kernels are laid out. `lanes` rows stand side by side; a matmul's tile is `tokens` tokens.

    `dot`: "pairs", products of bytes are summed two by two into int16, then into int32; "u8s8" and "s8s8", four by
    four straight into int32, with an unsigned or a signed first operand.
    """

    name: str
    lanes: int
    tokens: int
    dot: str
    needs: frozenset[str] = frozenset()


FAMILIES = {
    family.name: family
    for family in (  # best first
        Family("avx512vnni", 16, 8, "u8s8", frozenset(("avx512bw", "avx512vl", "avx512vnni"))),
        Family("avx512", 16, 8, "pairs", frozenset(("avx512bw", "avx512vl"))),
        Family("avxvnni", 8, 4, "u8s8", frozenset(("avx2", "avxvnni"))),
        Family("avx2", 8, 4, "pairs", frozenset(("avx2",))),
        Family("dotprod", 8, 4, "s8s8", frozenset(("dotprod",))),
        Family("plain", 8, 4, "pairs"),
    )
}
SETTING = "GGUFKIT_SIMD"


def choose() -> Family:
    """The family that GGUFKIT_SIMD names, or the best one that the target has. Raises UsageError for a wrong name."""
    asked = os.environ.get(SETTING, "")
    if asked:
        if asked not in FAMILIES:
            raise UsageError(f"{SETTING}={asked[:40]!r} is not one of {', '.join(FAMILIES)}")
        return FAMILIES[asked]
    return next(family for family in FAMILIES.values() if family.needs <= FEATURES)


FEATURES = compiled_features()
FAMILY = choose()
LANES = FAMILY.lanes  # rows that are packed side by side
QUAD = 4 * LANES  # bytes of a vector
GROUP = 4  # blocks that packing takes side by side: what a table says is read once for all of them
BIAS = 128 if FAMILY.dot == "u8s8" else 0  # what signed bytes get to become the unsigned operand


def has(*features: str) -> bool:
    """Whether the target has these instruction sets."""
    return FEATURES.issuperset(features)


def planes(bits: int) -> list[int]:
    """Widths of the bit planes that codes of `bits` are stored in, low bits first: 6 -> [4, 2]."""
    return [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]
