"""Run the kernels for AVX-512 on an emulated processor: Bochs, which has AVX-512 with VNNI where this machine has not.

    python tools/emulate/bochs.py [--processor icelake|icelake-ymm|tigerlake|skylake|haswell] [--keep FOLDER] [--spoil]

1. tests/simd_cases.py runs here with the family's layouts and other instructions; every program of kernels is recorded
   with the memory before and after (record.py).
2. The same kernels are compiled for the processor, and linked with a few lines that play the records (boot.S, main.c).
3. Bochs boots that from a CD image by GRUB. Each program must leave every byte as recorded, and touch no other.

`--spoil` changes one recorded byte, which must be found. Needs Debian's bochs, bochsbios, vgabios, gcc, grub-pc-bin,
grub-common, xorriso and mtools. It takes about three minutes, and ends with status 0 if everything was alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROCESSORS = {  # the name here: Bochs's model, LLVM's processor, the family of instructions
    "icelake": ("corei7_icelake_u", "icelake-client", "avx512vnni"),
    "tigerlake": ("tigerlake", "tigerlake", "avx512vnni"),
    "skylake": ("corei7_skylake_x", "skylake-avx512", "avx512"),
    "icelake-ymm": ("corei7_icelake_u", "icelake-client", "avxvnni"),  # its vpdpbusd, encoded by EVEX instead of VEX
    "haswell": ("corei7_haswell_4770", "haswell", "avx2"),
}
# In gf2p8affineqb, by which LLVM shifts bytes, Bochs 2.7 has the parity the wrong way round: the identity gives ~x.
WITHOUT = "-gfni"
C = ["-c", "-O2", "-Wall", "-ffreestanding", "-fno-pic", "-fno-stack-protector", "-mno-red-zone", "-mgeneral-regs-only"]
SETUP = """
megs: 512
cpu: model={model}, count=1, ips=100000000, reset_on_triple_fault=0
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={image}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
display_library: rfb, options="timeout=0"
log: {log}
panic: action=fatal
error: action=report
sound: driver=dummy
speaker: enabled=0
"""
SECONDS = 900  # a run that takes longer has failed


def call(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """A program's output; an error shows what it said."""
    words = [str(word) for word in command]
    base = {key: value for key, value in os.environ.items() if key not in ("GGUFKIT_SIMD", "NUMBA_CPU_FEATURES")}
    done = subprocess.run(words, cwd=cwd, env=base | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(words)} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def link(folder: Path, kernels: int) -> None:
    """folder/<k>.o, the player and the records -> folder/kernel, which GRUB loads."""
    for k in range(kernels):
        call("objcopy", "--redefine-sym", f"ggufkit_entry=kernel_{k}", f"--keep-global-symbol=kernel_{k}", f"{k}.o",
             cwd=folder)  # fmt: skip
    objects = [f"{k}.o" for k in range(kernels)]
    undefined = call("nm", "--undefined-only", "--format=just-symbols", *objects, cwd=folder).split()
    known = {"memset", "memcpy", "memmove", "_GLOBAL_OFFSET_TABLE_"}
    wanted = sorted({name for name in undefined if not name.endswith(":")} - known)
    lines = [".data", ".globl kernels", ".balign 8", "kernels:", *(f".quad kernel_{k}" for k in range(kernels))]
    lines += [".globl records", ".balign 8", "records:", '.incbin "records"', ".text"]
    for k, name in enumerate(wanted):  # what no kernel should call here
        lines += [f".globl {name}", f"{name}: movl $name_{k}, %edi", "andq $-64, %rsp", "call missing"]
        lines += [f'name_{k}: .asciz "{name}"']
    (folder / "tables.s").write_text("\n".join(lines) + "\n")
    call("gcc", *C, "-o", "main.o", HERE / "main.c", cwd=folder)
    call("gcc", "-c", "-o", "boot.o", HERE / "boot.S", cwd=folder)
    call("gcc", "-c", "-o", "tables.o", "tables.s", cwd=folder)
    call("ld", "-T", HERE / "link.ld", "-o", "player", "boot.o", "main.o", "tables.o", *objects, cwd=folder)
    call("objcopy", "-O", "binary", "player", "kernel", cwd=folder)


def boot(folder: Path, model: str) -> list[str]:
    """The lines that the player wrote to its serial port."""
    (folder / "disk/boot/grub").mkdir(parents=True, exist_ok=True)
    (folder / "kernel").replace(folder / "disk/kernel")
    (folder / "disk/boot/grub/grub.cfg").write_text("multiboot /kernel\nboot\n")
    call("grub-mkrescue", "-o", "disk.iso", "disk", cwd=folder)
    serial, setup = folder / "serial", folder / "bochsrc"
    serial.unlink(missing_ok=True)
    setup.write_text(SETUP.format(model=model, image=folder / "disk.iso", serial=serial, log=folder / "log"))
    emulator = subprocess.Popen(
        ["bochs", "-q", "-f", str(setup)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert emulator.stdin
    emulator.stdin.write(b"c\n" * 10)  # where Bochs was built with its debugger
    emulator.stdin.flush()
    end = time.monotonic() + SECONDS
    said = ""
    try:
        while "end\n" not in said and emulator.poll() is None and time.monotonic() < end:
            time.sleep(0.5)
            said = serial.read_text(errors="replace") if serial.exists() else ""
    finally:
        emulator.kill()
        emulator.wait()
    return said.splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run kernels on an emulated processor with AVX-512.")
    parser.add_argument("--processor", choices=PROCESSORS, default="icelake")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    parser.add_argument("--spoil", action="store_true", help="change one recorded byte: it must be found")
    args = parser.parse_args()
    model, cpu, family = PROCESSORS[args.processor]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        call("gcc", "-shared", "-fPIC", "-O2", "-o", folder / "arena.so", HERE / "arena.c")
        call(sys.executable, HERE / "record.py", "run", folder, GGUFKIT_SIMD=family)
        target: dict[str, Any] = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": WITHOUT}
        if args.processor == "icelake-ymm":  # not the best family of that processor
            target["GGUFKIT_SIMD"] = family
        call(sys.executable, HERE / "record.py", "compile", folder, **target)
        names = json.loads((folder / "names.json").read_text())
        if args.spoil:
            records = bytearray((folder / "records").read_bytes())
            records[-16] ^= 1  # in the last piece that is expected
            (folder / "records").write_bytes(records)
        link(folder, len(names["kernels"]))
        began = time.monotonic()
        said = boot(folder, model)
        print(f"{model}, code for {cpu}, {len(names['kernels'])} kernels, {time.monotonic() - began:.0f} s")
    for line in said:
        words = line.split()
        which = f": {names['runs'][int(words[1])]}" if words[:1] == ["run"] else ""
        print(line + which)
    expected = ["begin", f"runs {len(names['runs'])} wrong 0", "end"]
    return 0 if said == expected else 1


if __name__ == "__main__":
    sys.exit(main())
