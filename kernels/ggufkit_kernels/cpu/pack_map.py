"""A type's way from raw block to compute layout as a map of bits, found by asking the type's own `quants`.

Packing moves bits: every bit of the packed codes, scales, minima and float16 d is one raw bit of the block, perhaps
inverted, or a constant; one raw bit may go to several places, as the sign of Q3_K's scale does. So nobody writes a
packing kernel for a type. A block of zeros, and a dozen blocks that have every raw bit set in a pattern of its own, go
through the NumPy packing of pack.py; what changes says which raw bit drives each packed bit. For each packed word that
becomes

    constant ^ (w << left >> right & mask) ^ …        w: four raw bytes from some byte of the block on

with as few terms as the choice of w's alignment allows; `pack_fast` runs that table. The map is then checked against
the NumPy packing on random blocks, and on some in which every byte takes all 256 values. A type whose packing is no
such map (a codebook of more than 16 values, numbers that float16 does not hold, d that has to be multiplied out,
blocks that 32 does not divide) has none, and is packed by NumPy.

A map takes 1 to 8 ms to make, once a process and type.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from ggufkit_formats.blocks import Quants, TensorType

from .pack import Layout, canonical, layout_of, number_arrays, pack_codes, scale_arrays
from .simd import GROUP, LANES, QUAD

PIECE = 4  # words that are gathered at a time


@dataclass(frozen=True)
class Part:
    """One array of the packed matrix: how many elements a block and row, and their bytes."""

    name: str  # "codes", "d", "scale", "dmin", "minimum"
    nbytes: int  # 4, 2 or 1
    count: int


@dataclass(frozen=True, eq=False)
class BitMap:
    """How the packed words of a block are made of its raw bits."""

    layout: Layout
    codebook: np.ndarray | None
    parts: tuple[Part, ...]
    pieces: np.ndarray  # int64: the bytes of the block from which PIECE words are gathered
    constants: np.ndarray  # uint32, one a packed word: the parts one after the other
    terms: list[np.ndarray]  # int64 (terms, 4) of each packed word: which gathered word, left, right, mask

    @cached_property
    def table(self) -> np.ndarray:
        """int32: the pieces; then of each packed word the constant, the number of terms, and the terms."""
        words = self.pieces.tolist()
        for constant, terms in zip(self.constants.tolist(), self.terms, strict=True):
            words += [constant, len(terms)]
            for word, left, right, mask in terms.tolist():
                words += [GROUP * QUAD * word, left, right, mask]
        return np.array(words, np.int64).astype(np.uint32).view(np.int32)

    def apply(self, raw: np.ndarray) -> np.ndarray:
        """What the table means: raw blocks uint8 (n, block_nbytes) -> packed words uint32 (n, words)."""
        padded = np.pad(raw, ((0, 0), (0, 4 * PIECE)))
        at = (self.pieces[:, None] + 4 * np.arange(PIECE)).reshape(-1)
        gathered = np.ascontiguousarray(padded[:, at[:, None] + np.arange(4)]).view("<u4")[:, :, 0]
        gathered = np.asfortranarray(gathered)
        out = np.empty((len(self.terms), len(raw)), np.uint32)
        for k, terms in enumerate(self.terms):
            out[k] = self.constants[k]
            for word, left, right, mask in terms.tolist():
                moved = gathered[:, word] << np.uint32(left) if left else gathered[:, word] >> np.uint32(right)
                out[k] ^= moved & np.uint32(mask)
        return out.T


@lru_cache(maxsize=64)
def map_of(type: TensorType) -> BitMap | None:
    """The type's map, or None where its packing is none."""
    if type.block % 32 or type.block_nbytes < 4 or type.fields.names is None:
        return None
    # Raw bit i, counted from 1, is set in probe 1 + j where bit j of i is: what changes spells out i.
    raw_bits = np.arange(1, 8 * type.block_nbytes + 1)
    n = int(raw_bits[-1]).bit_length()
    probes = np.zeros((1 + n, type.block_nbytes), np.uint8)
    probes[1:] = np.packbits(raw_bits >> np.arange(n)[:, None] & 1, axis=1, bitorder="little")
    quants = _quants(type, probes)
    layout = None if quants is None else layout_of(quants)
    if quants is None or layout is None:
        return None
    found = _words(quants, layout, len(probes))
    if found is None:
        return None
    parts, words = found
    changed = (words[1:] ^ words[0])[:, :, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    drives = np.tensordot(1 << np.arange(n), changed.astype(np.int64), 1) - 1
    if drives.max() >= len(raw_bits):
        return None
    pieces, terms = _terms(drives, len(raw_bits))
    bitmap = BitMap(layout, quants.codebook, parts, pieces, words[0], terms)
    return bitmap if _holds(bitmap, type) else None


def _quants(type: TensorType, raw: np.ndarray) -> Quants | None:
    with np.errstate(all="ignore"):
        quants = type.quants(np.ascontiguousarray(raw).reshape(-1).view(type.fields))
        return None if quants is None else canonical(quants)


def _words(quants: Quants, layout: Layout, n: int) -> tuple[tuple[Part, ...], np.ndarray] | None:
    """n blocks as NumPy packs them: the parts, and their words uint32 (n, words). None where d does not fit."""
    strips = pack_codes(quants.codes.reshape(n, -1), layout.bits).view("<u4")
    rows = strips.reshape(len(strips), -1, LANES).transpose(0, 2, 1)
    columns = [rows.reshape(-1, rows.shape[2])[:n]]
    parts = [Part("codes", 4, columns[0].shape[1])]
    numbers = number_arrays(quants, layout)
    if numbers is None:
        return None
    (d, dmin), (scale, minimum) = numbers, scale_arrays(quants, layout)
    for name, values in (("d", d), ("scale", scale), ("dmin", dmin), ("minimum", minimum)):
        if values is None:
            continue
        values = np.ascontiguousarray(values).view(f"<u{values.itemsize}").reshape(n, -1)
        columns.append(values.astype(np.uint32))
        parts.append(Part(name, values.itemsize, values.shape[1]))
    return tuple(parts), np.concatenate(columns, axis=1)


def _terms(drives: np.ndarray, raw_bits: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """From the raw bit that drives each packed bit (words, 32), -1 for none, to pieces and terms (see BitMap)."""
    word, bit = np.nonzero(drives >= 0)
    raw_bit = drives[word, bit]
    # The gathered words may begin at any byte: those of one packed word at multiples of four from 0, 1, 2 or 3 on.
    choices, counts = [], []
    for phase in range(4):
        at = np.maximum((raw_bit // 8 - phase) // 4 * 4 + phase, 0)
        left = bit - (raw_bit - 8 * at)
        key = (word * raw_bits + at) * 64 + left + 32
        choices.append((at, left, key))
        once, _ = np.unique(key, return_index=True)  # without the index it would import numpy.ma, for 40 ms
        counts.append(np.bincount(once // 64 // raw_bits, minlength=len(drives)))
    totals = np.array([count.sum() for count in counts])  # among equals, what suits most words
    best = np.argmin(np.array(counts) * (1 + totals.max()) + totals[:, None], axis=0)
    at, left, key = (np.choose(best[word], [choice[k] for choice in choices]) for k in range(3))
    _, first, group = np.unique(key, return_index=True, return_inverse=True)
    mask = np.zeros(len(first), np.int64)
    np.bitwise_or.at(mask, group, 1 << bit)
    pieces, gathered = _cover(at[first])
    columns = (gathered, np.maximum(left[first], 0), np.maximum(-left[first], 0), mask)
    table = np.stack(columns, axis=1)
    return pieces, np.split(table, np.searchsorted(word[first], np.arange(1, len(drives))))


def _cover(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of four words that hold the words at the bytes `at`, and which of the gathered words each one is."""
    pieces: list[int] = []
    index: dict[int, int] = {}
    for byte in sorted(set(at.tolist()), key=lambda byte: (byte % 4, byte)):
        if not pieces or byte % 4 != pieces[-1] % 4 or byte >= pieces[-1] + 4 * PIECE:
            pieces.append(byte)
        index[byte] = PIECE * (len(pieces) - 1) + (byte - pieces[-1]) // 4
    return np.array(pieces, np.int64), np.array([index[byte] for byte in at.tolist()], np.int64)


def _holds(bitmap: BitMap, type: TensorType) -> bool:
    """Whether the map does what NumPy does: on random blocks, and on blocks in which every byte takes every value."""
    rng, nbytes = np.random.default_rng(0), type.block_nbytes
    every = np.arange(256)[:, None] * (rng.integers(0, 128, nbytes) * 2 + 1) ^ rng.integers(0, 256, nbytes)
    raw = np.concatenate([every.astype(np.uint8), rng.integers(0, 256, (256, nbytes), np.uint8)])
    quants = _quants(type, raw)
    if quants is None or layout_of(quants) != bitmap.layout:
        return False
    found = _words(quants, bitmap.layout, len(raw))
    if found is None:
        return False
    parts, words = found
    ours = bitmap.apply(raw)
    at = 0
    for part in parts:
        a, b = words[:, at : at + part.count], ours[:, at : at + part.count]
        same = a == b
        if part.nbytes > 1 and part.name in ("d", "dmin"):  # NaN may come back as another NaN
            infinity, magnitude = (0x7F800000, 0x7FFFFFFF) if part.nbytes == 4 else (0x7C00, 0x7FFF)
            same |= (a & np.uint32(magnitude) > infinity) & (b & np.uint32(magnitude) > infinity)
        if not same.all():
            return False
        at += part.count
    return True
