"""Packing of types whose codes are points of a grid (IQ1, IQ2, IQ3): numbers of points and signs into bit planes.

No map of bits leads from such a block to its codes (see pack_map.py). What is small stays in NumPy: a type's
`take_apart`, one number for four or eight weights, and the scales. The kernel looks up eight weights at a time in
tables of words, adds their signs, and shifts LANES rows of a chunk into its planes: what NumPy makes of a slab in
several passes over one byte a weight. NumPy's packing of pack.py is the definition.

One thread of a shared Zen 4, processor time, memory to new memory, millions of weights a second (NumPy's packing):
IQ1_S 895 (243), IQ1_M 631 (221), IQ2_XXS 921 (208), IQ2_XS 888 (235), IQ2_S 772 (235), IQ3_XXS 938 (272), IQ3_S 963
(245). Loading 1.1 billion weights of IQ2_XXS: 4.9 s of processor time before, 1.4 now; Q4_0 0.4 to 1.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from ggufkit_formats.blocks import Quants
from ggufkit_formats.blocks.iq import GridType, point_words, sign_words
from ggufkit_formats.tensor import Tensor

from . import pack as numpy_pack
from .jit import lazy
from .memory import Arena
from .pack import Packed, number_arrays
from .simd import LANES, QUAD, get_i32, get_i64, get_u8, load_words, repeat, store_vector
from .team import Team, address

RUN, CHUNK = 8, 32  # weights that a byte of signs belongs to, and that are packed together
SLAB = 1 << 18  # weights that a thread takes at a time: what NumPy makes of them stays in the cache

# The words of the args, as byte offsets.
WORDS = ["numbers", "signs", "points", "minus", "codes", "strip_nbytes", "strips", "runs", "bits", "length", "buffer"]
(NUMBERS, SIGNS, POINTS, MINUS, CODES, STRIP_NBYTES, STRIPS, RUNS, BITS, LENGTH, BUFFER) = (
    8 * k for k in range(len(WORDS))
)


@lazy
def pack_points(args, item, worker):
    """Numbers int32 (rows, runs or 2 runs), signs uint8 (rows, runs) -> the planes of whole strips."""
    numbers, signs = get_i64(args + NUMBERS), get_i64(args + SIGNS)
    points, minus, buffer = get_i64(args + POINTS), get_i64(args + MINUS), get_i64(args + BUFFER)
    runs, length, bits = get_i64(args + RUNS), get_i64(args + LENGTH), get_i64(args + BITS)
    for strip in range(get_i64(args + STRIPS)):
        to = get_i64(args + CODES) + strip * get_i64(args + STRIP_NBYTES)
        for first in range(0, runs, CHUNK // RUN):
            for row in range(LANES):
                at = (strip * LANES + row) * runs + first
                for r in range(CHUNK // RUN):
                    word = get_i64(minus + 8 * get_u8(signs + at + r))
                    if length == 8:
                        word |= get_i64(points + 8 * get_i32(numbers + 4 * (at + r)))
                        low, high = word, word >> 32
                    else:
                        number = numbers + 8 * (at + r)
                        low = word | get_i32(points + 4 * get_i32(number))
                        high = (word >> 32) | get_i32(points + 4 * get_i32(number + 4))
                    place = buffer + 2 * r * QUAD + 4 * row
                    store_vector(place, repeat(low, 1))
                    store_vector(place + QUAD, repeat(high, 1))
            if bits == 4:
                for v in range(4):
                    quad, far = load_words(buffer + v * QUAD, LANES), load_words(buffer + (v + 4) * QUAD, LANES)
                    store_vector(to + v * QUAD, quad | (far << 4))
            else:
                tops = repeat(0, LANES)
                for v in range(2):
                    plane = repeat(0, LANES)
                    for j in range(4):
                        quad = load_words(buffer + (v + 2 * j) * QUAD, LANES)
                        plane = plane | ((quad & 0x03030303) << (2 * j))
                        tops = tops | (((quad >> 2) & 0x01010101) << (v + 2 * j))
                    store_vector(to + v * QUAD, plane)
                store_vector(to + 2 * QUAD, tops)
            to += bits * QUAD


def pack(tensor: Tensor, team: Team, memory: Arena) -> Packed | None:
    """What `pack.pack` makes of a tensor (rows, cols) of a GridType; None where that has to do it."""
    kind, strips = tensor.type, tensor.rows // LANES
    if not isinstance(kind, GridType) or not strips or sys.byteorder != "little":
        return None
    first = numpy_pack.canonical(kind.quants(tensor.read_rows(0, 1).reshape(-1).view(kind.fields)))
    layout = None if first is None else numpy_pack.layout_of(first)
    if first is None or layout is None or layout.bits not in (3, 4) or layout.values != "table":
        return None
    out = numpy_pack.allocate((tensor.rows, tensor.cols), layout, first.codebook, memory.array)
    entry, minus = pack_points.function, sign_words(kind.code_bits - 1)
    points = point_words(kind.grid_name)

    def slab(part: tuple[int, int]) -> bool:
        begin, end = part
        blocks = tensor.read_rows(begin, end).reshape(-1).view(kind.fields)
        numbers, signs, scale = kind.take_apart(blocks)
        numbers, signs = np.ascontiguousarray(numbers, np.int32), np.ascontiguousarray(signs, np.uint8)
        codes = out.codes[begin // LANES : end // LANES]
        buffer = numpy_pack.aligned((8, QUAD), np.dtype(np.uint8))
        words = [address(numbers), address(signs), address(points), address(minus), address(codes), codes[0].nbytes]
        words += [len(codes), tensor.cols // RUN, layout.bits, points.itemsize, address(buffer)]
        args = np.array(words, np.int64)
        entry(address(args), 0, 0)
        return _put_scales(out, kind, first, blocks, scale, part)

    step = max(LANES, SLAB // tensor.cols // LANES * LANES)
    whole = strips * LANES
    parts = [(a, min(a + step, whole)) for a in range(0, whole, step)]
    if team.threads == 1 or len(parts) == 1:
        done = all(map(slab, parts))
    else:
        with ThreadPoolExecutor(team.threads) as pool:
            done = all(pool.map(slab, parts))
    if done and whole < tensor.rows:
        done = numpy_pack.fill(out, tensor, whole, tensor.rows)
    return out if done else None


def _put_scales(
    out: Packed, kind: GridType, like: Quants, blocks: np.ndarray, scale: np.ndarray, part: tuple[int, int]
) -> bool:
    """d and the odd scales of rows, into their strips; False where the layout's float16 does not hold some d."""
    rows, strips = part[1] - part[0], slice(part[0] // LANES, part[1] // LANES)
    numbers = number_arrays(replace(like, d=kind.scaled_d(blocks)), out.layout)
    if numbers is None or numbers[0] is None:
        return False
    out.d[strips] = _strips(numbers[0].reshape(rows, -1))
    out.scale[strips] = _strips(kind.odd(scale).reshape(rows, -1))
    return True


def _strips(x: np.ndarray) -> np.ndarray:
    """(rows, k) -> (strips, k, LANES), rows a multiple of LANES."""
    return x.reshape(-1, LANES, x.shape[1]).transpose(0, 2, 1)
