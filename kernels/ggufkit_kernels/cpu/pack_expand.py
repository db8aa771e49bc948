"""Types whose packing is no map of bits (see pack_map.py) but for one step before: raw blocks into those of a *form*.

TQ1_0 writes five ternary digits into a byte, in base 3; a table of all bytes makes a block of TQ2_0 of them, 112
look-ups for 256 weights. NVFP4's scale of 127 stands for 0, which is put there. `pack_fast` does that to a strip while
it lies in the cache, and goes on with the map of the form.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ggufkit_formats.blocks import Quants, TensorType, find
from ggufkit_formats.blocks.fp4 import NVFP4, e4m3
from ggufkit_formats.blocks.ternary import byte_trits

from .jit import kernel
from .simd import copy_bytes, get_i64, get_u8, put_i64

TQ1_0_NBYTES, TQ2_0_NBYTES, NVFP4_NBYTES = 54, 66, 36


class NoZeroAt127(NVFP4):
    """NVFP4 with a scale of 480 where it has 0."""

    def quants(self, blocks: np.ndarray) -> Quants:
        d, quants = blocks["d"].reshape(-1) & np.uint8(127), super().quants(blocks)
        assert quants is not None
        return replace(quants, d=e4m3(d), d_code=d)


FORMS: dict[str, TensorType] = {"TQ1_0": find("TQ2_0"), "NVFP4": NoZeroAt127()}


def form_of(type: TensorType) -> TensorType:
    """The type that a type's blocks are expanded to before they are packed: most often itself."""
    return FORMS.get(type.name, type)


def _trit_table() -> np.ndarray:
    """uint8 (4, 256): of each byte the trits 0…3 as fields of 2 bits; 4; 0, 2, 4 and 1, 3 at the places from 1 on."""
    t = byte_trits(np.arange(256, dtype=np.uint8)[None], 5).reshape(5, 256)
    return np.stack([t[0] | t[1] << 2 | t[2] << 4 | t[3] << 6, t[4], t[0] << 2 | t[2] << 4 | t[4] << 6,
                     t[1] << 2 | t[3] << 4])  # fmt: skip


TRITS = np.ascontiguousarray(_trit_table())


@kernel
def expand_tq1_0(at, to, blocks, table):
    """Blocks of TQ1_0 -> blocks of TQ2_0; `table` is the address of TRITS."""
    first, fifth, even, odd = table, table + 256, table + 512, table + 768
    for _ in range(blocks):
        for j in range(0, 32, 8):
            word = 0
            for k in range(8):
                word |= get_u8(first + get_u8(at + j + k)) << (8 * k)
            put_i64(to + j, word)
        for j in range(0, 16, 8):
            low, high = 0, 0
            for k in range(8):
                late, last = get_u8(at + 32 + j + k), get_u8(first + get_u8(at + 48 + (j + k) % 4))
                low |= (get_u8(fifth + get_u8(at + j + k)) | get_u8(even + late)) << (8 * k)
                tail = (last >> (2 * ((j + k) // 4)) & 3) << 6
                high |= (get_u8(fifth + get_u8(at + 16 + j + k)) | get_u8(odd + late) | tail) << (8 * k)
            put_i64(to + 32 + j, low)
            put_i64(to + 48 + j, high)
        copy_bytes(to + 64, at + 52, 2)
        at += TQ1_0_NBYTES
        to += TQ2_0_NBYTES


@kernel
def expand_nvfp4(at, blocks):
    """In blocks of NVFP4, scales of 127 become 0, and the highest bit of all others as well."""
    for _ in range(blocks):
        word = get_i64(at)  # four scales and four bytes of codes
        unlike = word ^ 0x7F7F7F7F  # 0 where a scale is 127
        some = (((unlike & 0x7F7F7F7F) + 0x7F7F7F7F) | unlike) & 0x80808080  # where it is not
        kept = (some >> 7) * 0x7F
        put_i64(at, (word & ~0xFFFFFFFF) | (word & kept))
        at += NVFP4_NBYTES
