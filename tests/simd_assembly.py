"""The assembly of matmul kernels, for the processor that NUMBA_CPU_NAME names; nothing of it is run.

python simd_assembly.py    JSON on stdout: the family, and the assembly by name
"""

from __future__ import annotations

import json

from ggufkit_kernels.cpu import matmul
from ggufkit_kernels.cpu.pack import Layout
from ggufkit_kernels.cpu.simd import FAMILY

LAYOUTS = {
    "Q4_0": Layout("codes", 4, 32, 32, 8),
    "Q4_K": Layout("codes", 4, 256, 32, 0, "u1", 2),
    "Q6_K": Layout("codes", 6, 256, 16, 32, "i1"),
}


def assembly(layout: Layout, tokens: int) -> str:
    return matmul.matmul_kernel(layout, tokens).assembly()


if __name__ == "__main__":
    found = {name: assembly(LAYOUTS[name], matmul.TOKENS) for name in ("Q4_0", "Q6_K")}
    found["Q4_K, 1"] = assembly(LAYOUTS["Q4_K"], 1)
    print(json.dumps({"family": FAMILY.name, "assembly": found}))
