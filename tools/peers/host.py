"""The machine, and what a build of llama.cpp leaves unused of it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# llama_print_system_info's name: the flag in /proc/cpuinfo
FLAGS = {
    "SSE3": "pni", "SSSE3": "ssse3", "AVX": "avx", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2",
    "AVX_VNNI": "avx_vnni", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8",
    "NEON": "asimd", "FP16_VA": "asimdhp", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm", "SVE": "sve",
}  # fmt: skip


def flags(cpuinfo: str) -> set[str]:
    """The feature flags of the first processor in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def features(cpuinfo: str) -> list[str]:
    """What the host has of the features that llama.cpp names."""
    found = flags(cpuinfo)
    return [name for name, flag in FLAGS.items() if flag in found]


def used(system_info: str) -> set[str]:
    """The features that a build says it uses: "CPU : AVX2 = 1 | FMA = 1 | …"."""
    found = set()
    for part in system_info.replace(":", "|").split("|"):
        name, _, value = part.partition("=")
        if value.strip() not in ("", "0"):
            found.add(name.strip())
    return found


def lacks(system_info: str, cpuinfo: str) -> list[str]:
    """Features of the host that the build does not use."""
    build = used(system_info)
    return [name for name in features(cpuinfo) if name not in build]


def read_cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def describe(cpuinfo: str) -> dict[str, Any]:
    """The machine, as it is printed above results."""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpus": usable,
        "features": features(cpuinfo),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def revision(folder: Path) -> str:
    """The commit that is measured, with + where files were changed since; empty outside a repository."""
    try:
        commit = _git(folder, "rev-parse", "--short", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()
