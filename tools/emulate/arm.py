"""Run the kernels on emulated ARM processors: qemu-user, with dot products of bytes and without.

    python tools/emulate/arm.py [--folder FOLDER] [--tests "tests/test_pack.py tests/test_ops.py -k …"]
                                   [--encoders Q4_K,TQ2_0]

1. A root with Debian's Python for arm64 and wheels for aarch64 is unpacked into FOLDER (150 MB; kept if named).
2. For each of two processors (qemu's `max`, which has `sdot`, and a Cortex-A72, which has not), tests/simd_cases.py
   runs there: each result is compared with the definition, and those of the products bit for bit with what this
   machine computes for the same family of instructions. The assembly is read for `sdot`.
3. tests/encode_cases.py: the encoders' bytes, with importance too where that is a kernel of its own, compared with the
   definition on every hard row: one type for each of their files, or those that `--encoders` names.
4. `--tests`: pytest with these arguments instead of 2 and 3; `--encoders` with types: 3 alone.

Needs qemu-user-static, apt-get, dpkg-deb and pip, and the network. It takes about twenty minutes: Numba compiles ten
times as slowly there. Status 0 if all went well.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
TOP = HERE.parents[1]
PROCESSORS = {"max": "dotprod", "cortex-a72": "plain"}  # qemu's name, and the family that is to be taken
ENCODERS = "Q4_1,Q5_0,Q4_K,Q6_K,Q3_K,IQ4_NL,IQ2_S,IQ1_S,TQ2_0,Q1_0,NVFP4,NF4"  # one or two of each file in cpu/encode
PACKAGES = ["python3.11", "libstdc++6", "libgomp1"]
WHEELS = [f"{name}=={version(name)}" for name in ("numpy", "numba", "llvmlite", "ml_dtypes", "platformdirs", "pytest")]
WHEELS += ["pluggy", "iniconfig", "packaging", "pygments"]
# What LLVM reads on ARM, and qemu-user does not make up
CPUINFO = "processor\t: 0\nFeatures\t: fp asimd {features}\nCPU implementer\t: {maker}\nCPU part\t: {part}\n\n"
PARTS = {"max": ("crc32 atomics asimddp", "0x99", "0xabc"), "cortex-a72": ("crc32", "0x41", "0xd08")}
ASSEMBLY = """
import simd_assembly as s
from ggufkit_kernels.cpu.simd import FAMILY, FEATURES
code = s.assembly(s.LAYOUTS["Q4_0"], s.matmul.TOKENS)
print(FAMILY.name, "features", *sorted(FEATURES), "sdot", code.count("sdot"))
"""


def call(*words: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in words], env=os.environ | environment, text=True, stdout=subprocess.PIPE, cwd=TOP
    )
    if done.returncode:
        sys.exit(f"error: {words[0]} … ended with {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def unpack_root(folder: Path) -> None:
    """folder/root: Debian's Python and what it needs; folder/site: the wheels."""
    if (folder / "site").exists():
        return
    for name in ("lists/partial", "cache/archives/partial", "root/proc", "wheels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()  # nothing is installed there
    options = ["APT::Architecture=arm64", "APT::Architectures::=arm64", f"Dir::State::Lists={folder}/lists"]
    options += [f"Dir::State::status={folder}/status", f"Dir::Cache={folder}/cache", "Debug::NoLocking=1"]
    options += ["APT::Get::Download-Only=true", "APT::Install-Recommends=false"]
    apt = ["apt-get", "-q", *(f"-o{option}" for option in options)]
    call(*apt, "update")
    call(*apt, "-y", "install", *PACKAGES)
    for path in sorted((folder / "cache/archives").glob("*.deb")):
        call("dpkg-deb", "-x", path, folder / "root")
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in ("2014", "_2_17", "_2_27", "_2_28")]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.11"]
    call(*pip, *platforms, "-d", folder / "wheels", *WHEELS)
    for path in (folder / "wheels").glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder / "site")


def emulated(folder: Path, cpu: str, *args: object) -> str:
    """Python on an emulated processor: what it printed."""
    features, maker, part = PARTS[cpu]
    (folder / "root/proc/cpuinfo").write_text(CPUINFO.format(features=features, maker=maker, part=part))
    sources = [folder / "site", *(TOP / name for name in ("kernels", "formats", "runtime", ".", "tests"))]
    return call(
        "qemu-aarch64-static", "-L", folder / "root", folder / "root/usr/bin/python3.11", *args,
        QEMU_CPU=cpu,
        PYTHONPATH=os.pathsep.join(map(str, sources)),
        PYTHONDONTWRITEBYTECODE="1",
        GGUFKIT_CACHE_DIR=str(folder / f"kernels-{cpu}"),
        GGUFKIT_SIMD="",
    )  # fmt: skip


def compare(folder: Path, cpu: str) -> bool:
    """Run the compact set there and here; whether the products are alike bit for bit, by the family that was meant."""
    family = PROCESSORS[cpu]
    there, here = folder / f"{cpu}.npz", folder / f"{family}-here.npz"
    said = emulated(folder, cpu, "tests/simd_cases.py", there)
    code = emulated(folder, cpu, "-c", ASSEMBLY)
    call(sys.executable, "tests/simd_cases.py", here, "products", GGUFKIT_SIMD=family)
    with np.load(there) as one, np.load(here) as other:
        names = [name for name in other.files if "plain" not in name]
        differ = [name for name in names if not np.array_equal(one[name].view("u4"), other[name].view("u4"))]
    alike = f"{len(names) - len(differ)} of {len(names)} products bit for bit as here"
    print(f"{cpu}: {said.strip()}; {alike}; {code.strip()}")
    print(*(f"  differs: {name}" for name in differ), sep="\n", end="\n" if differ else "")
    return not differ and said.startswith(f"{family}:") and ("sdot 0" in code) == (family == "plain")


def encoders(folder: Path, cpu: str, types: str) -> bool:
    """Whether the encoders give the definition's bytes, by the family that was meant; what differs ends the program."""
    said = emulated(folder, cpu, "tests/encode_cases.py", *types.split(",")).split()
    print(f"{cpu}: encoders of {types} as defined: {' '.join(said)} lanes", flush=True)
    return said[:1] == [PROCESSORS[cpu]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Run kernels on emulated ARM processors.")
    parser.add_argument("--folder", type=Path, help="where the root lies, or is to be made; it stays")
    parser.add_argument("--tests", help="arguments of a pytest run instead of the compact set")
    parser.add_argument("--encoders", metavar="TYPES", help="the encoders of these types instead of all else")
    parser.add_argument("--processor", choices=PROCESSORS, action="append", help="only this one")
    args = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        unpack_root(folder)
        for cpu in args.processor or PROCESSORS:
            if args.tests:
                words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *args.tests.split()]
                print(f"{cpu}:\n{emulated(folder, cpu, *words)}", flush=True)
                continue
            if not args.encoders:
                good &= compare(folder, cpu)
            good &= encoders(folder, cpu, args.encoders or ENCODERS)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
