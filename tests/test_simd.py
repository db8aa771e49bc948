"""Every family of instructions, on whatever processor this is: its results, and its assembly.

A family that GGUFKIT_SIMD names runs here with other instructions than its own, where the processor lacks them: that
checks its layouts and arithmetic. That its own instructions are taken is read from what LLVM makes for a processor
that has them. tools/emulate runs those on emulated processors.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simd_cases
from ggufkit_kernels.cpu.ops import CpuOps
from ggufkit_kernels.cpu.simd import FAMILIES, FAMILY, SETTING

HERE = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
BY_FOURS = [name for name, family in FAMILIES.items() if family.dot != "pairs"]


def run_python(*args: str, **environment: str) -> str:
    """A Python process of its own: what it printed."""
    base = {key: value for key, value in os.environ.items() if key != SETTING and not key.startswith("NUMBA_CPU")}
    done = subprocess.run([sys.executable, *args], env=base | environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory):
    """The results of a family by name; they were compared with the definition where they were made."""

    @cache
    def found(family: str, *parts: str) -> dict[str, np.ndarray]:
        if family == FAMILY.name:
            return simd_cases.run(CpuOps(1), parts)
        path = tmp_path_factory.mktemp("simd") / "results.npz"
        said = run_python("simd_cases.py", str(path), *parts, **{SETTING: family})
        assert said.startswith(f"{family}: "), said
        with np.load(path) as file:
            return dict(file)

    return found


def bits_differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray], names: list[str]) -> list[str]:
    assert names and one.keys() >= set(names) and other.keys() >= set(names)
    return [name for name in names if not np.array_equal(one[name].view(np.uint32), other[name].view(np.uint32))]


# "plain" is run as the family of a processor that has nothing, below
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "plain"])
def test_a_family_computes_what_is_defined(family: str, results_of) -> None:
    results = results_of(family, "few")
    assert sum(name.startswith("extreme") for name in results) >= 18


def test_sixteen_lanes_beside_the_products(results_of) -> None:
    """Attention, norms and the rest know the width alone: of the families with 16 lanes, one is run."""
    assert len(results_of("avx512vnni", "attention", "others")) == 12


def test_families_of_one_arithmetic_agree(results_of) -> None:
    """Sums of integers are exact, and floats meet in the same order whatever the width: bit for bit alike."""
    for families in (BY_FOURS, ["avx512", "avx2"]):
        first, *rest = (results_of(family, "few") for family in families)
        names = [name for name in first if "product" in name or "extreme" in name]
        for family, other in zip(families[1:], rest, strict=True):
            assert not bits_differ(first, other, names), family


def test_without_integer_scales_all_families_agree(results_of) -> None:
    fours, pairs = results_of(BY_FOURS[0], "few"), results_of("avx2", "few")
    assert not bits_differ(fours, pairs, [name for name in fours if "bytes" in name])


@pytest.mark.skipif(not X86, reason="another processor's names")
def test_kernels_for_a_lesser_processor(tmp_path: Path) -> None:
    """Without AVX2, F16C and FMA, everything is made of LLVM's portable instructions."""
    target = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}
    said = run_python("simd_cases.py", str(tmp_path / "results"), "few", "attention", "others", **target)
    assert said.startswith("plain: ")
    said = run_python("-m", "pytest", "-q", "test_ops.py", "-k", "half", **target)
    assert "1 passed" in said


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_with_all_types(family: str, results_of) -> None:
    results_of(family, *simd_cases.PARTS)
    which = "embed or alike or finite or attend or rmsnorm or rope or swiglu or codes or slabs"
    said = run_python("-m", "pytest", "-q", "test_ops.py", "test_pack.py", "-k", which, **{SETTING: family})
    assert " passed" in said


def test_a_wrong_family_is_one_line(default_model_path: Path) -> None:
    code = "import sys; from ggufkit.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", str(default_model_path), "hi", "-n", "1"]
    done = subprocess.run(command, env=os.environ | {SETTING: "avx1024"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: {SETTING}='avx1024' is not one of {', '.join(FAMILIES)}\n"


# -- assembly -------------------------------------------------------------------------------------------


def inner_loops(assembly: str) -> list[list[str]]:
    """The instructions of each loop (a label to a jump back to it) that has no other inside."""
    lines = [line.split("#")[0].strip() for line in assembly.splitlines()]
    lines = [line for line in lines if line and (line.endswith(":") or not line.startswith("."))]
    label_at = {line[:-1]: k for k, line in enumerate(lines) if line.endswith(":")}
    jumps = [(re.match(r"j\w+\s+(\S+)", line), k) for k, line in enumerate(lines)]
    loops = [(label_at[found[1]], k) for found, k in jumps if found and label_at.get(found[1], k) < k]
    inner = [one for one in loops if not any(one[0] <= a and b <= one[1] and (a, b) != one for a, b in loops)]
    return [[line for line in lines[a : b + 1] if not line.endswith(":")] for a, b in inner]


def main_loop(assembly: str, instruction: str) -> list[str]:
    """The inner loop with most of an instruction."""
    found = max(inner_loops(assembly), key=lambda loop: sum(instruction in line for line in loop))
    assert any(instruction in line for line in found)
    return found


def spills(loop: list[str]) -> list[str]:
    """Instructions that store a vector on the stack."""
    return [line for line in loop if re.search(r"%[xyz]mm\d+, [-\d]*\(%rsp", line)]


# A processor, its family, the instruction that multiplies bytes, the registers that it takes
TARGETS = [
    ("znver4", "avx512vnni", "vpdpbusd", "zmm"),
    ("icelake-server", "avx512vnni", "vpdpbusd", "zmm"),
    ("skylake-avx512", "avx512", "vpmaddubsw", "zmm"),
    ("alderlake", "avxvnni", "vpdpbusd", "ymm"),
    ("haswell", "avx2", "vpmaddubsw", "ymm"),
]


@cache
def compiled_for(cpu: str) -> dict[str, Any]:
    return json.loads(run_python("simd_assembly.py", NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=""))


@pytest.mark.skipif(not X86, reason="another processor's names")
@pytest.mark.parametrize("cpu, family, instruction, register", TARGETS, ids=[target[0] for target in TARGETS])
def test_instructions_of_another_processor(cpu: str, family: str, instruction: str, register: str) -> None:
    found = compiled_for(cpu)
    assert found["family"] == family
    tokens = FAMILIES[family].tokens
    for name, assembly in found["assembly"].items():
        loop = main_loop(assembly, instruction)
        products = [line for line in loop if instruction in line]
        # 8 quads of 32 inputs, for each token of the tile: no piece of a vector by itself
        assert len(products) == 8 * (1 if name.endswith(", 1") else tokens), name
        assert all(line.count(f"%{register}") >= 2 for line in products), name
        if family == "avx512vnni":  # inputs are broadcast by the instruction itself
            assert all("{1to16}" in line for line in products), name
            assert not any("ymm" in line for line in loop), name
        # Two units of 16 keep more alive than 32 registers hold; with 16 registers every tile spills.
        if register == "zmm" or name.endswith(", 1"):
            assert len(spills(loop)) <= (12 if name == "Q6_K" else 0), (name, spills(loop))
