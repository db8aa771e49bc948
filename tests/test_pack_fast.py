"""The quick packing against the NumPy one, bit for bit; the maps that it runs by; the memory that it packs into."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from ggufkit_formats.blocks import TYPES, Quants, TensorType, find
from ggufkit_formats.blocks.iq import GridType
from ggufkit_formats.errors import FormatError, UsageError
from ggufkit_formats.source import FileSource
from ggufkit_formats.tensor import Tensor
from ggufkit_kernels.cpu import pack as numpy_pack
from ggufkit_kernels.cpu import pack_fast, pack_grid, prepare
from ggufkit_kernels.cpu.memory import SEGMENT, Arena
from ggufkit_kernels.cpu.pack import Packed
from ggufkit_kernels.cpu.pack_expand import FORMS, form_of
from ggufkit_kernels.cpu.pack_map import map_of
from ggufkit_kernels.cpu.simd import FAMILY, LANES, SETTING
from ggufkit_kernels.cpu.team import team
from memory_tensors import MadeUp, from_raw, random_blocks

# Types whose packing is no moving of bits: codes out of grids.
WITHOUT_MAP = {name for name in TYPES if name.startswith(("IQ1", "IQ2", "IQ3"))}
QUANTIZED = [name for name, type in TYPES.items() if type.is_quantized and name not in WITHOUT_MAP]
ARRAYS = ("codes", "d", "scale", "dmin", "minimum", "levels", "table")
RNG = np.random.default_rng(11)
NF4 = np.linspace(-1, 1, 16).astype(np.float32) ** 3

# Types that are no registered type's like, each with a map.
MAPPED = {
    **{f"{bits} bits": MadeUp(bits, 32, 32, offset=1 << (bits - 1)) for bits in range(1, 9)},
    "16 in a block of 64": MadeUp(4, 64, 16, scale="u1"),
    "signed scales": MadeUp(6, 256, 16, offset=32, scale="i1"),
    "minima": MadeUp(3, 256, 32, scale="u1", dmin=True, minimum=True),
    "dmin alone": MadeUp(5, 96, 32, dmin=True),
    "codebook": MadeUp(4, 64, 64, codebook=NF4),
    "float32 d": MadeUp(4, 32, 32, offset=8, d="<f4"),
}


def same(fast: Packed, slow: Packed, but_for_nan: bool = False) -> None:
    assert fast.layout == slow.layout
    assert (fast.shape, fast.table_step) == (slow.shape, slow.table_step)
    for name in ARRAYS:
        a, b = getattr(fast, name), getattr(slow, name)
        assert a.dtype == b.dtype and a.shape == b.shape, name
        equal = a == b
        if but_for_nan and name in ("d", "dmin") and a.itemsize > 1:
            floats = np.float32 if slow.layout.wide else np.float16
            equal |= np.isnan(a.view(floats)) & np.isnan(b.view(floats))
        assert equal.all(), (name, np.argwhere(~equal)[:3])


def both(tensor: Tensor, threads: int = 1, **options: bool) -> Packed:
    """Packed quickly, and compared; that the kernels did it is asserted."""
    fast = pack_fast._pack(tensor, team(threads), Arena())
    assert fast is not None
    same(fast, numpy_pack.pack(tensor), **options)
    return fast


@pytest.mark.parametrize("name", [*QUANTIZED, "F32", "F16", "BF16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_numpy(name: str, threads: int) -> None:
    type, rng = find(name), np.random.default_rng(1)
    for rows, blocks in ((LANES, 1), (5 * LANES + 3, 2), (40 * LANES, 5), (3 * LANES - 1, 7)):
        both(random_blocks(type, rows, blocks * max(32, type.block), rng), threads)


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_bit_random(name: str) -> None:
    """d and dmin are denormal, infinite or NaN here and there; a NaN only has to stay one."""
    type = find(name)
    raw = np.random.default_rng(2).integers(0, 256, 64 * type.row_nbytes(1024), dtype=np.uint8)
    both(from_raw(type, raw, (64, 1024)), but_for_nan=True)


@pytest.mark.parametrize("name", MAPPED)
def test_types_nobody_wrote_a_kernel_for(name: str) -> None:
    type, rng = MAPPED[name], np.random.default_rng(3)
    for rows, blocks in ((2 * LANES + 1, 1), (LANES, 5)):
        tensor = random_blocks(type, rows, blocks * type.block, rng)
        if type.block % 32:
            assert map_of(type) is None
        else:
            both(tensor)


def test_all_quantized_types_but_those_with_grids_have_a_map() -> None:
    for name in QUANTIZED:
        bitmap = map_of(form_of(find(name)))
        assert bitmap is not None, name
        assert bitmap is map_of(form_of(find(name)))
        assert len(bitmap.table) == len(bitmap.pieces) + sum(2 + 4 * len(terms) for terms in bitmap.terms)


@pytest.mark.parametrize("name", [name for name, type in TYPES.items() if isinstance(type, GridType)])
def test_grids_equal_numpy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bit random; rows that fill no strip, several slabs, one thread and two."""
    type, rng = find(name), np.random.default_rng(7)
    monkeypatch.setattr(pack_grid, "SLAB", 2 * LANES * 512)
    for rows, cols, threads in ((LANES, 256, 1), (5 * LANES + 3, 512, 2), (9 * LANES, 512, 1)):
        raw = rng.integers(0, 256, rows * type.row_nbytes(cols), dtype=np.uint8)
        tensor = from_raw(type, raw, (rows, cols))
        with np.errstate(all="ignore"):
            fast = pack_grid.pack(tensor, team(threads), Arena())
            slow = numpy_pack.pack(tensor)
        assert fast is not None
        same(fast, slow, but_for_nan=True)
    assert pack_grid.pack(random_blocks(type, LANES - 1, 256, rng), team(1), Arena()) is None
    assert pack_grid.pack_points in prepare.of_types([type])


@pytest.mark.parametrize("name", FORMS)
def test_what_is_expanded_first_has_no_map_itself(name: str) -> None:
    assert map_of(find(name)) is None
    assert map_of(form_of(find(name))).layout == numpy_pack.pack(random_blocks(find(name), 2, 256, RNG)).layout  # type: ignore


@pytest.mark.parametrize("name", FORMS)
def test_every_byte_is_expanded_as_defined(name: str) -> None:
    """Each byte of a block takes all 256 values."""
    type = find(name)
    blocks = np.arange(256)[:, None] * (2 * RNG.integers(0, 128, type.block_nbytes) + 1)
    blocks ^= RNG.integers(0, 256, type.block_nbytes)
    both(from_raw(type, blocks.astype(np.uint8), (64, 4 * type.block)), but_for_nan=True)


class Xor(MadeUp):
    """Codes that are the exclusive or of two raw bits each: linear, but no moving of bits."""

    def quants(self, blocks: np.ndarray) -> Quants:
        quants = super().quants(blocks)
        quants.codes[...] ^= quants.codes >> 1
        return quants


class Rare(MadeUp):
    """A code that is another one where a certain byte has a certain value."""

    def quants(self, blocks: np.ndarray) -> Quants:
        quants = super().quants(blocks)
        quants.codes[:, 0] ^= (blocks["codes"][:, 1] == 200).astype(np.uint8)
        return quants


@pytest.mark.parametrize("name", sorted(WITHOUT_MAP))
def test_types_with_grids_go_through_numpy(name: str) -> None:
    type = find(name)
    assert map_of(type) is None
    tensor = random_blocks(type, 3 * LANES + 5, 512, np.random.default_rng(8))
    packed = pack_fast.pack(tensor, team(2), Arena())
    same(packed, numpy_pack.pack(tensor))
    assert packed.layout.values == "table" and packed.layout == prepare.layout_of_zeros(type)
    assert packed.layout.bits == (4 if name.startswith("IQ3") else 3)


@pytest.mark.parametrize(
    "type",
    [
        Xor(4, 32, 32, offset=8),
        Rare(4, 32, 32, offset=8),
        MadeUp(5, 32, 32, codebook=(np.arange(32) ** 2 % 127).astype(np.int8)),
        MadeUp(4, 48, 48, offset=8),
        MadeUp(4, 32, 8),
        MadeUp(8, 32, 32, offset=0),
    ],
    ids=["exclusive or", "rare", "codebook of 32", "block of 48", "groups of 8", "bytes without a sign"],
)
def test_what_is_no_map_goes_through_numpy(type: TensorType) -> None:
    assert map_of(type) is None
    tensor = random_blocks(type, 20, 2 * type.block, np.random.default_rng(4))
    assert pack_fast._pack(tensor, team(1), Arena()) is None
    same(pack_fast.pack(tensor, team(2), Arena()), numpy_pack.pack(tensor))


def test_a_wide_d_that_float16_holds_is_packed_wide() -> None:
    """The layout follows from the type, not from the numbers that one file holds."""
    blocks = np.zeros(LANES, MAPPED["float32 d"].fields)
    blocks["d"] = 0.5
    packed = pack_fast.pack(from_raw(MAPPED["float32 d"], blocks, (LANES, 32)), team(1), Arena())
    assert packed.layout.wide and (packed.d == np.float32(0.5)).all()


@pytest.mark.parametrize("name", ["F64", "I8", "I32"])
def test_other_numbers(name: str) -> None:
    tensor = from_raw(find(name), np.arange(40 * 32).astype(find(name).fields), (40, 32))
    same(pack_fast.pack(tensor, team(2), Arena()), numpy_pack.pack(tensor))


def test_columns_that_no_piece_divides() -> None:
    tensor = random_blocks(find("F16"), 2 * LANES, 37, np.random.default_rng(5))
    same(pack_fast.pack(tensor, team(1), Arena()), numpy_pack.pack(tensor))


def test_big_endian() -> None:
    little = random_blocks(find("Q4_K"), 2 * LANES, 256, np.random.default_rng(6))
    swapped = little.source.data.view(little.type.fields).astype(little.type.fields.newbyteorder(">"))  # type: ignore
    raw = from_raw(little.type, swapped, little.shape)
    big = Tensor("t", little.type, little.shape, raw.nbytes, 0, raw.source, ">")
    same(pack_fast.pack(big, team(1), Arena()), numpy_pack.pack(little))


def test_empty_is_refused() -> None:
    with pytest.raises(UsageError, match="'t' is empty"):
        pack_fast.pack(from_raw(find("F32"), np.zeros(0, np.float32), (0, 32)), team(1), Arena())


@pytest.fixture
def in_file(tmp_path: Path):
    """A tensor of Q6_K in a file, behind 1,000 other bytes, and that file."""
    tensor = random_blocks(find("Q6_K"), 30 * LANES + 2, 1024, np.random.default_rng(7))
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000) + tensor.source.data.tobytes())  # type: ignore[attr-defined]
    return Tensor("t", tensor.type, tensor.shape, tensor.nbytes, 1000, FileSource(path)), path


@pytest.mark.parametrize("threads", [1, 2])
def test_reads_a_file(in_file: tuple[Tensor, Path], threads: int) -> None:
    both(in_file[0], threads)


def test_a_file_cut_short_is_an_error(in_file: tuple[Tensor, Path]) -> None:
    tensor, path = in_file
    os.truncate(path, tensor.nbytes // 2)
    with pytest.raises(FormatError, match="ended at"):
        pack_fast.pack(tensor, team(2), Arena())


def test_a_closed_file_is_an_error(in_file: tuple[Tensor, Path]) -> None:
    tensor, _ = in_file
    tensor.source.close()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="closed"):
        pack_fast.pack(tensor, team(1), Arena())


def test_other_lanes() -> None:
    """The same with vectors of another length, in a process of its own."""
    other = "avx2" if FAMILY.lanes == 16 else "avx512"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_CPU")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "equals_numpy and 1-"],
        env=environment | {SETTING: other},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout[-2000:]


# -- memory ---------------------------------------------------------------------------------------------


def test_arrays_of_an_arena() -> None:
    arena = Arena()
    arrays = [arena.array((3, n), np.dtype(np.uint16)) for n in (1, 100, 5)]
    for array in arrays:
        assert array.ctypes.data % 64 == 0 and not array.any()
        array[...] = 1
    assert [array.sum() for array in arrays] == [3, 300, 15]
    assert arrays[1].ctypes.data - arrays[0].ctypes.data == 64  # one after the other
    large = arena.array((SEGMENT + 1,), np.dtype(np.uint8))
    assert len(large) == SEGMENT + 1 and large.ctypes.data % 64 == 0


def test_a_segment_goes_with_its_last_array() -> None:
    arena = Arena()
    arrays = [arena.array((SEGMENT // 2,), np.dtype(np.uint8)) for _ in range(3)]
    base = arrays[0]
    while isinstance(base.base, np.ndarray):
        base = base.base
    gone = weakref.ref(base)
    del base, arrays[0]
    gc.collect()
    assert gone() is not None
    del arrays[0]
    gc.collect()
    assert gone() is None
