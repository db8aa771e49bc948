"""Packing at the speed of memory: the table of a BitMap, applied by one kernel to all types that have one.

An item is a few strips of rows. Their raw bytes, which lie together in the file, are read with pread into a buffer
of the worker that stays in its L2 cache: the file is never mapped, and no copy of it is made. Then, for each strip and
each block, the raw words that the table wants are gathered from LANES rows at once (a transpose), and each packed word
is made of them by shifts and masks on whole vectors, LANES rows at a time. What each type costs is its terms.
F32, F16 and BF16 are transposed alone.

Types of grids have a kernel of their own (pack_grid.py). Rows beyond the last whole strip, big-endian files, and what
has no map otherwise go through the NumPy packing of pack.py, which
is also the definition that this is tested against. A file that cannot be read ends there too, and gets its message.

Measured on one thread of a shared Zen 3 (AVX2), processor time, file in the page cache to new memory, reading and page
faults included, in billions of weights a second, beside the NumPy packing:

    Q4_0 4.7 (0.32)   Q4_1 6.1 (0.39)   Q5_0 4.3 (0.20)   Q5_1 2.9 (0.18)   Q8_0 3.8 (0.70)   F16 2.2 (0.56)
    Q2_K 12 (0.43)    Q3_K 4.9 (0.14)   Q4_K 7.4 (0.31)   Q5_K 4.2 (0.18)   Q6_K 3.5 (0.18)   F32 1.1 (0.45)

and of a shared Zen 4 (AVX-512): TQ1_0 5.4 (0.26), TQ2_0 28 (0.48), Q1_0 18 (0.60), Q2_0 13 (0.24), MXFP4 9.7 (0.46),
NVFP4 7.5 (0.36), Q4_0 7.6 (0.18).

Out of the cache and into it the kernel alone does 8 to 20: what is left is memory. Tried: one block at a time instead
of GROUP, the table being read once for each (5 to 11); touching new pages beforehand, lest two threads clear the same
one (no difference); mapping the file instead of pread (filling the page tables costs what the copy costs).
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from ggufkit_formats.blocks import ScaledType, TensorType
from ggufkit_formats.tensor import Tensor

from . import pack as numpy_pack
from . import pack_grid
from .jit import Entry, kernel, lazy
from .memory import Arena
from .pack import PLAIN, SLAB_NBYTES, Layout, Packed
from .pack_expand import TRITS, expand_nvfp4, expand_tq1_0, form_of
from .pack_map import map_of
from .simd import (
    GROUP,
    LANES,
    QUAD,
    add_term,
    copy_bytes,
    get_i32,
    get_i64,
    put_i64,
    read_at,
    splat_words,
    store_low,
    turn_halves,
    turn_words,
)
from .team import Team, address

BUFFER_NBYTES = 128 << 10  # raw bytes of an item, about
SLACK = 64  # bytes that may be read behind the last row
PAGE = 4096
PIECE_NBYTES = 16  # of a row, transposed at a time
WORDS_NBYTES = GROUP * QUAD

# The words of the args, as byte offsets: what is read, how it is cut, and the parts (base, bytes of a strip, bytes
# of a block, bytes of an element, elements of a block).
WORDS = ["source", "descriptor", "file_offset", "row_nbytes", "strips", "per_item", "blocks", "block_nbytes"]
WORDS += ["buffers", "buffer_nbytes", "turned_nbytes", "table", "pieces", "failed", "expansion", "n_parts"]
AT = {name: 8 * k for k, name in enumerate(WORDS)}
(SOURCE, DESCRIPTOR, FILE_OFFSET, ROW_NBYTES, STRIPS, PER_ITEM, BLOCKS, BLOCK_NBYTES) = (AT[name] for name in WORDS[:8])
(BUFFERS, BUFFER, TURNED, TABLE, PIECES, FAILED, EXPANSION, N_PARTS) = (AT[name] for name in WORDS[8:])
PARTS = 8 * len(WORDS)


@kernel
def fetch(args, item, buffer):
    """Read the rows of an item: where they are, their first strip, the one behind the last (the first, on failure)."""
    per_item, nbytes = get_i64(args + PER_ITEM), get_i64(args + ROW_NBYTES) * LANES
    first = item * per_item
    last = min(first + per_item, get_i64(args + STRIPS))
    source, descriptor = get_i64(args + SOURCE), get_i64(args + DESCRIPTOR)
    left, at = (last - first) * nbytes, first * nbytes + get_i64(args + FILE_OFFSET)
    # As far into a page as in the file: Zen copies at a quarter of its speed where the target is up to 31 bytes ahead.
    rows = (buffer + PAGE - 1) // PAGE * PAGE + at % PAGE
    to = rows
    if descriptor < 0:
        copy_bytes(to, source + at, left)
        left = 0
    while left > 0:
        n = read_at(descriptor, to, left, at)
        if n <= 0:
            put_i64(get_i64(args + FAILED), 1)
            return rows, first, first
        left, at, to = left - n, at + n, to + n
    return rows, first, last


@kernel
def pack_strip(args, strip, rows, row_nbytes, turned):
    """One strip of blocks, the rows of which lie at `rows`, by a table (see BitMap.table)."""
    block_nbytes, table = get_i64(args + BLOCK_NBYTES), get_i64(args + TABLE)
    blocks, pieces, n_parts = get_i64(args + BLOCKS), get_i64(args + PIECES), get_i64(args + N_PARTS)
    for block in range(0, blocks, GROUP):
        rest = blocks - 1 - block  # where fewer than GROUP are left, the last one is done several times
        for k in range(GROUP):
            raw = rows + (block + min(k, rest)) * block_nbytes
            to = turned + QUAD * k
            for piece in range(pieces):
                turn_words(raw + get_i32(table + 4 * piece), row_nbytes, to, WORDS_NBYTES)
                to += 4 * WORDS_NBYTES
        entry = table + 4 * pieces
        for k in range(n_parts):
            part = args + PARTS + 40 * k
            stride = get_i64(part + 16)
            to = get_i64(part) + strip * get_i64(part + 8) + block * stride
            nbytes = get_i64(part + 24)
            for _ in range(get_i64(part + 32)):
                word = splat_words(get_i32(entry))
                terms = get_i32(entry + 4)
                entry += 8
                for _ in range(terms):
                    word = add_term(word, turned, entry)
                    entry += 16
                if nbytes == 4:
                    store_low(to, stride, rest, word, 4)
                elif nbytes == 2:
                    store_low(to, stride, rest, word, 2)
                else:
                    store_low(to, stride, rest, word, 1)
                to += nbytes * LANES


@lazy
def pack_words(args, item, worker):
    """Strips of blocks by a table (see BitMap.table)."""
    row_nbytes = get_i64(args + ROW_NBYTES)
    turned = get_i64(args + BUFFERS) + worker * get_i64(args + BUFFER)
    read, first, last = fetch(args, item, turned + get_i64(args + TURNED))
    for strip in range(first, last):
        pack_strip(args, strip, read + (strip - first) * LANES * row_nbytes, row_nbytes, turned)


@lazy
def pack_tq1_0(args, item, worker):
    """Strips of TQ1_0, each expanded to TQ2_0 in a buffer before the rows."""
    blocks, row_nbytes = get_i64(args + BLOCKS), get_i64(args + ROW_NBYTES)
    turned = get_i64(args + BUFFERS) + worker * get_i64(args + BUFFER)
    expanded = turned + get_i64(args + TURNED)
    to_nbytes = blocks * get_i64(args + BLOCK_NBYTES)
    read, first, last = fetch(args, item, expanded + LANES * to_nbytes + SLACK)
    for strip in range(first, last):
        rows = read + (strip - first) * LANES * row_nbytes
        expand_tq1_0(rows, expanded, LANES * blocks, get_i64(args + EXPANSION))
        pack_strip(args, strip, expanded, to_nbytes, turned)


@lazy
def pack_nvfp4(args, item, worker):
    """Strips of NVFP4, whose scales are put in order where they lie."""
    blocks, row_nbytes = get_i64(args + BLOCKS), get_i64(args + ROW_NBYTES)
    turned = get_i64(args + BUFFERS) + worker * get_i64(args + BUFFER)
    read, first, last = fetch(args, item, turned + get_i64(args + TURNED))
    for strip in range(first, last):
        rows = read + (strip - first) * LANES * row_nbytes
        expand_nvfp4(rows, LANES * blocks)
        pack_strip(args, strip, rows, row_nbytes, turned)


EXPANDING = {"TQ1_0": pack_tq1_0, "NVFP4": pack_nvfp4}  # those of pack_expand.FORMS


def kernel_of(type: TensorType) -> Entry:
    """The kernel that packs a type with scales."""
    return EXPANDING.get(type.name, pack_words)


@kernel
def turn_rows(args, item, worker, halves):
    """Strips of plain numbers: transposed, PIECE_NBYTES of each row at a time."""
    row_nbytes = get_i64(args + ROW_NBYTES)
    rows, first, last = fetch(args, item, get_i64(args + BUFFERS) + worker * get_i64(args + BUFFER))
    to = get_i64(args + PARTS) + first * LANES * row_nbytes
    for strip in range(last - first):
        raw = rows + strip * LANES * row_nbytes
        for at in range(0, row_nbytes, PIECE_NBYTES):
            if halves:
                turn_halves(raw + at, row_nbytes, to)
            else:
                turn_words(raw + at, row_nbytes, to, QUAD)
            to += LANES * PIECE_NBYTES


@lazy
def pack_floats(args, item, worker):
    """Strips of 32-bit numbers."""
    turn_rows(args, item, worker, False)


@lazy
def pack_halves(args, item, worker):
    """Strips of 16-bit numbers."""
    turn_rows(args, item, worker, True)


def pack(tensor: Tensor, team: Team, memory: Arena, scale: float = 1.0) -> Packed:
    """Pack a tensor (rows, cols), times `scale`, on a team's threads into memory of the arena: what `pack.pack` does,
    sooner."""
    scaled = ScaledType(tensor.type, scale)
    out = _pack(tensor, team, memory) if scale == 1.0 or packed_as(scaled) is not None else None
    if out is None and scale == 1.0:
        out = pack_grid.pack(tensor, team, memory)
    if out is not None:
        return out if scale == 1.0 else _scaled(out, scale, memory)
    if scale != 1.0:
        tensor = replace(tensor, type=scaled)
    if team.threads == 1 or 4 * tensor.n_elements <= SLAB_NBYTES:
        return numpy_pack.pack(tensor, new=memory.array)
    with ThreadPoolExecutor(team.threads) as pool:
        return numpy_pack.pack(tensor, pool.map, memory.array)


def packed_as(type: TensorType) -> TensorType | None:
    """The type without its scale, where matrices are packed as that and d is multiplied afterwards; else None."""
    if not isinstance(type, ScaledType) or not type.kind.is_quantized:
        return None
    found = map_of(form_of(type.kind))
    return type.kind if found is not None and found.layout.number == "f16" else None


def _scaled(out: Packed, scale: float, memory: Arena) -> Packed:
    """The matrix with its d and dmin times a scale, as float32: float16 does not hold every product."""
    out.layout = replace(out.layout, number="f32")
    for name in ("d", "dmin"):
        halves = getattr(out, name)
        if halves.size:
            wide = memory.array(halves.shape, np.dtype(np.float32))
            np.multiply(halves.view(np.float16), np.float32(scale), out=wide)
            setattr(out, name, wide)
    return out


def _pack(tensor: Tensor, team: Team, memory: Arena) -> Packed | None:
    """The packed matrix, or None where the kernels cannot make it."""
    strips = tensor.rows // LANES
    if not strips or tensor.byte_order != "<" or sys.byteorder != "little":
        return None
    bitmap, form = None, tensor.type
    if tensor.type.name in PLAIN:
        if tensor.row_nbytes % PIECE_NBYTES:
            return None
        layout, codebook, table, pieces = Layout(PLAIN[tensor.type.name]), None, np.empty(0, np.int32), 0
        kernel = pack_floats if tensor.type.block_nbytes == 4 else pack_halves
    else:
        form = form_of(tensor.type)
        bitmap = map_of(form)
        if bitmap is None:
            return None
        layout, codebook, table, pieces = bitmap.layout, bitmap.codebook, bitmap.table, len(bitmap.pieces)
        kernel = kernel_of(tensor.type)
    out = numpy_pack.allocate((tensor.rows, tensor.cols), layout, codebook, memory.array)
    blocks = tensor.cols // tensor.type.block
    parts = [address(out.codes)]
    if bitmap is not None:
        parts = []
        for part in bitmap.parts:
            array, nbytes = getattr(out, part.name), part.nbytes * LANES
            assert array[0].nbytes == blocks * part.count * nbytes, part
            parts += [address(array), array[0].nbytes, part.count * nbytes, part.nbytes, part.count]
    failed = np.zeros(1, np.int64)
    row_nbytes = tensor.row_nbytes
    per_item = max(1, min(BUFFER_NBYTES // (LANES * row_nbytes), strips // (4 * team.threads)))
    turned = 4 * WORDS_NBYTES * pieces
    buffer = turned + per_item * LANES * row_nbytes + 2 * PAGE + SLACK
    if form is not tensor.type:
        buffer += LANES * blocks * form.block_nbytes + SLACK
    buffer = -(-buffer // 64) * 64
    source, descriptor, offset, keep = _source(tensor)
    with team.lock:
        words = [source, descriptor, offset, row_nbytes, strips, per_item, blocks, form.block_nbytes]
        words += [team.scratch(buffer * team.threads), buffer, turned, address(table), pieces, address(failed)]
        words += [address(TRITS), len(parts) // 5, *parts]
        team.run([(kernel.address, -(-strips // per_item))], words)
    del keep
    if failed[0]:
        return None
    if tensor.rows % LANES and not numpy_pack.fill(out, tensor, strips * LANES, tensor.rows):
        return None
    return out


def _source(tensor: Tensor) -> tuple[int, int, int, object]:
    """Address of the bytes in memory, or file and place in it; and what has to live meanwhile."""
    number = getattr(tensor.source, "fileno", None)
    if number is not None and hasattr(os, "pread") and tensor.in_one_piece:
        return 0, number(), tensor.offset, tensor.source
    if tensor.in_one_piece:
        raw = np.ascontiguousarray(tensor.source.view(tensor.offset, tensor.nbytes))
    else:
        raw = tensor.read_rows(0, tensor.rows)
    return address(raw), -1, 0, raw
