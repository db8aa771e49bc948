"""Writing GGUF: the bytes that the `gguf` package writes, exact sizes, and nothing left behind when it fails."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import hostile
import numpy as np
import pytest
from ggufkit_formats import gguf
from ggufkit_formats.blocks import UnknownType
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError
from ggufkit_formats.gguf_writer import encode_value
from hostile import ARRAY, FLOAT32, INT32, STRING, array, entry, info, string, u32
from test_gguf_read import ORDERS, put, sample

peer = pytest.importorskip("gguf")
RNG = np.random.default_rng(0)
TENSORS = {
    "token_embd.weight": RNG.standard_normal((5, 8)).astype(np.float32),
    "blk.0.attn_norm.weight": RNG.standard_normal(7).astype(np.float16),
    "three.d": RNG.standard_normal((2, 3, 4)).astype(np.float64),
    "ints": np.arange(3, dtype=np.int8),
    "long": np.arange(4, dtype=np.int64),
}
TYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int8": "I8", "int64": "I64"}
METADATA = {
    "general.architecture": "llama",
    "general.name": "naïve “name”\n",
    "a.uint32": 7,
    "a.int32": -7,
    "a.uint64": 1 << 40,
    "a.int64": -(1 << 40),
    "a.float": 1e-5,
    "a.double": np.float64(1e-5),
    "a.bool": True,
    "a.uint8": np.uint8(200),
    "a.int16": np.int16(-300),
    "list.str": ["a", "", "né"],
    "list.int": [1, -2, 3],
    "list.float": [0.5, -0.25],
    "list.bool": [True, False],
    "array.u2": np.array([1, 2, 65535], dtype=np.uint16),
    "array.f8": np.array([1.5, np.inf]),
}


def plan(alignment: int | None = None, metadata: dict | None = None) -> gguf.Plan:
    tensors = [(name, TYPES[x.dtype.name], x.shape) for name, x in TENSORS.items()]
    return gguf.Plan(METADATA if metadata is None else metadata, tensors, alignment)


def write(path: Path, planned: gguf.Plan, **options) -> None:
    with gguf.Writer(path, planned, **options) as w:
        for name, x in TENSORS.items():
            w.write(name, x)


def peer_bytes(path: Path, alignment: int | None) -> bytes:
    """The same file by the `gguf` package."""
    kinds = peer.GGUFValueType
    w = peer.GGUFWriter(path, "llama")
    simple = {"a.uint32": kinds.UINT32, "a.int32": kinds.INT32, "a.uint64": kinds.UINT64, "a.int64": kinds.INT64}
    simple |= {"a.float": kinds.FLOAT32, "a.double": kinds.FLOAT64, "a.bool": kinds.BOOL, "a.uint8": kinds.UINT8}
    simple |= {"a.int16": kinds.INT16, "general.name": kinds.STRING}
    items = {"array.u2": kinds.UINT16, "array.f8": kinds.FLOAT64}
    for key, value in METADATA.items():
        if key in simple:
            w.add_key_value(key, value, simple[key])
        elif key in items:
            w.add_key_value(key, value.tolist(), kinds.ARRAY, items[key])
        elif key != "general.architecture":
            w.add_array(key, value)
    if alignment:
        w.add_custom_alignment(alignment)
    for name, x in TENSORS.items():
        w.add_tensor(name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path.read_bytes()


@pytest.mark.parametrize("alignment", [None, 64, 8, 4096])
def test_same_bytes_as_the_gguf_package(alignment, tmp_path):
    planned = plan(alignment)
    write(tmp_path / "ours.gguf", planned)
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == peer_bytes(tmp_path / "theirs.gguf", alignment)
    assert len(ours) == planned.nbytes
    reader = peer.GGUFReader(tmp_path / "ours.gguf")
    for theirs, (name, x) in zip(reader.tensors, TENSORS.items(), strict=True):
        assert theirs.name == name and np.array_equal(theirs.data.reshape(x.shape), x)
    with gguf.open(tmp_path / "ours.gguf") as f:
        assert f.alignment == (alignment or 32)
        for t, place in zip(f.tensors.values(), planned.tensors, strict=True):
            assert (t.name, t.offset, t.nbytes, t.shape) == (place.name, place.offset, place.nbytes, place.shape)
            assert np.array_equal(t.raw.reshape(-1), TENSORS[t.name].reshape(-1).view(np.uint8))


@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_keeps_types_and_bytes(order, tmp_path):
    """Everything a file may hold, read from either byte order, written, and read again."""
    first, second = put(tmp_path, sample(order), "a.gguf"), tmp_path / "b.gguf"
    with gguf.open(first) as f:
        tensors: list = list(f.tensors.values())
        if order == ">":
            with pytest.raises(UnsupportedError, match="tensor 'c': type 999 is unknown, so its big-endian bytes"):
                gguf.Plan({}, tensors)
            tensors[2] = ("c", tensors[2].type, tensors[2].shape, tensors[2].nbytes)  # as bytes of no order
        with gguf.Writer(second, gguf.Plan(f.metadata.copy(), tensors)) as w:
            for name, tensor in f.tensors.items():
                w.write(name, tensor.raw)
        with gguf.open(second) as g:
            assert g.byte_order == "little" and g.alignment == 64
            assert [g.metadata.type_name(k) for k in g.metadata] == [f.metadata.type_name(k) for k in f.metadata]
            for key in f.metadata:
                assert encode_value(g.metadata.typed(key)) == encode_value(f.metadata.typed(key))
            for a, b in zip(f.tensors.values(), g.tensors.values(), strict=True):
                assert (a.name, a.type.id, a.shape) == (b.name, b.type.id, b.shape)
                assert np.array_equal(a.raw, b.raw)
    little = (tmp_path / "b.gguf").read_bytes()
    expected = sample("<")
    assert little[: len(expected)] == expected and not any(little[len(expected) :])  # padded behind the last tensor


def test_the_default_model_copies_byte_for_byte(default_model_path, tmp_path):
    with gguf.open(default_model_path) as f:
        planned = gguf.Plan(f.metadata.copy(), f.tensors.values())
        assert planned.nbytes == f.nbytes and planned.header == f.sources[0].read(0, len(planned.header)).tobytes()
        assert [t.offset for t in planned.tensors] == [t.offset for t in f.tensors.values()]


# -- metadata values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (gguf.StringArray.of([]), array(STRING, 0, b"")),
        (gguf.StringArray.of(["a", b"\xff"]), array(STRING, 2, string("a") + string(b"\xff"))),
        (np.empty(0, np.float32), array(FLOAT32, 0, b"")),
        ([1, 1 << 31], array(hostile.INT64, 2, struct.pack("<qq", 1, 1 << 31))),
        ([1, 2.5], array(FLOAT32, 2, struct.pack("<ff", 1, 2.5))),
        (np.array([1, 2], dtype=">u2"), array(hostile.UINT16, 2, struct.pack("<HH", 1, 2))),
        ([[1], [2, 3]], array(ARRAY, 2, array(INT32, 1, u32(1)) + array(INT32, 2, u32(2) + u32(3)))),
        (gguf.ArrayOfArrays(), array(ARRAY, 0, b"")),
        ((np.uint32(4),), array(INT32, 1, u32(4))),
    ],
    ids=repr,
)
def test_arrays(value, encoded):
    assert encode_value(value) == u32(ARRAY) + encoded


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        ("", u32(STRING) + string("")),
        (b"\xff", u32(STRING) + string(b"\xff")),
        (np.str_("x"), u32(STRING) + string("x")),
        (np.True_, u32(hostile.BOOL) + b"\1"),
        ((1 << 32) - 1, u32(hostile.UINT32) + b"\xff" * 4),
        (1 << 32, u32(hostile.UINT64) + struct.pack("<Q", 1 << 32)),
        (-(1 << 31) - 1, u32(hostile.INT64) + struct.pack("<q", -(1 << 31) - 1)),
        (float("nan"), u32(FLOAT32) + struct.pack("<f", float("nan"))),
    ],
    ids=repr,
)
def test_scalars(value, encoded):
    assert encode_value(value) == encoded


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "an empty list has no GGUF type"),
        (None, "a NoneType has no GGUF type"),
        ({}, "a dict has no GGUF type"),
        (1 << 64, "does not fit 64 bits"),
        (1e39, "does not fit FLOAT32"),
        ([1, "a"], "a list of int, str"),
        ([True, 1], "a list of bool, int"),
        ([1 << 70], "an item does not fit int64"),
        (np.zeros((2, 2)), "an array of 2 dimensions"),
        (np.float16(1), "dtype float16 has no GGUF type"),
        (np.array(["a"]), "has no GGUF type"),
        ("\ud800", "cannot be written as UTF-8"),
    ],
    ids=repr,
)
def test_values_that_gguf_cannot_hold(value, message):
    with pytest.raises(UsageError, match=r"^metadata 'the\.key': ") as caught:
        encode_value(value, "the.key")
    assert message in str(caught.value)


# -- plans -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "tensors", "alignment", "error", "message"),
    [
        ({}, [("a", "F32", (1,))] * 2, None, UsageError, "tensor 'a' is planned twice"),
        ({}, [("", "F32", (1,))], None, UsageError, "the name '' is 0 bytes long"),
        ({"k" * 65536: 1}, [], None, UsageError, "is 65536 bytes long; 1 to 65535 are allowed"),
        ({}, [("a", "F32", (1, 1, 1, 1, 1))], None, UsageError, "tensor 'a' has 5 dimensions; GGUF allows 4"),
        ({}, [("a", "F32", (-1,))], None, UsageError, "tensor 'a' has shape"),
        ({}, [("a", "F32", (1 << 40, 1 << 40))], None, UsageError, "tensor 'a' has shape"),
        ({}, [("a", "Q4_0", (2, 33))], None, FormatError, "tensor 'a': Q4_0 needs rows divisible by 32, not 33"),
        ({}, [("a", UnknownType(99), (2,))], None, GgufkitError, "tensor 'a': the size of tensor type 99 is unknown"),
        ({}, [("a", UnknownType("U8"), (2,), 2)], None, UsageError, "tensor 'a': type U8 has no number in GGUF"),
        ({}, [], 33, UsageError, "alignment 33 is no power of two"),
        ({}, [], 0, UsageError, "alignment 0 is no power of two"),
        ({"general.alignment": 64}, [], 32, UsageError, "alignment 32 asked for, but metadata 'general.alignment'"),
        ({"split.count": 2}, [], None, UsageError, "leave out the metadata keys that begin with split."),
    ],
)  # fmt: skip
def test_plans_that_cannot_be(metadata, tensors, alignment, error, message):
    with pytest.raises(error) as caught:
        gguf.Plan(metadata, tensors, alignment)
    assert message in str(caught.value)


def test_files_without_tensors_and_with_empty_ones(tmp_path):
    none = gguf.Plan({"general.architecture": "llama"}, [])
    with gguf.Writer(tmp_path / "vocab.gguf", none):
        pass
    assert (tmp_path / "vocab.gguf").stat().st_size == none.nbytes
    empties = gguf.Plan({}, [("a", "F32", (0,)), ("b", "F32", ()), ("c", "Q4_0", (3, 0, 32)), ("d", "F32", (0, 4))])
    with gguf.Writer(tmp_path / "e.gguf", empties) as w:
        w.write("b", np.float32([4]))
    with gguf.open(tmp_path / "e.gguf") as f:
        assert [t.nbytes for t in f.tensors.values()] == [0, 4, 0, 0] and f.nbytes == empties.nbytes


# -- writing -----------------------------------------------------------------------------------------


def left_behind(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_bytes_must_come_in_order_and_exactly(tmp_path):
    target = tmp_path / "t.gguf"

    def refused(message: str, *writes: tuple[str, int]) -> None:
        planned = gguf.Plan({}, [("a", "F32", (4,)), ("b", "F32", (2, 2))])
        with pytest.raises(UsageError) as caught, gguf.Writer(target, planned) as w:
            for name, n in writes:
                w.write(name, bytes(n))
        assert message in str(caught.value)
        assert left_behind(tmp_path) == []

    refused("tensor 'b' is out of order: 'a' is next", ("b", 16))
    refused("tensor 'b' is out of order: 'a' (8 of 16 bytes written) is next", ("a", 8), ("b", 16))
    refused("tensor 'a' has 16 bytes; 17 were given", ("a", 17))
    refused("tensor 'a' has 16 bytes; 24 were given", ("a", 8), ("a", 16))
    refused("tensor 'b' got 0 of its 16 bytes", ("a", 16))
    refused("tensor 'b' got 15 of its 16 bytes", ("a", 16), ("b", 15))
    refused("tensor 'b': all planned tensors are written", ("a", 16), ("b", 16), ("b", 1))


def test_chunks_of_any_kind(tmp_path):
    planned = gguf.Plan({}, [("a", "F32", (4, 4))])
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    with gguf.Writer(tmp_path / "t.gguf", planned) as w:
        w.write("a", x[0])
        w.write("a", b"")
        w.write("a", x[1].tobytes())
        w.write("a", memoryview(x[2]))
        w.write("a", np.asfortranarray(x)[3:, :].view(np.float32))
    with gguf.open(tmp_path / "t.gguf") as f:
        assert np.array_equal(f.tensors["a"].dequantize(), x)


def test_targets_that_cannot_be_written(tmp_path):
    planned = plan()
    target = tmp_path / "t.gguf"
    target.write_text("precious")
    with pytest.raises(GgufkitError, match="exists already; --overwrite"):
        write(target, planned)
    assert target.read_text() == "precious" and left_behind(tmp_path) == ["t.gguf"]
    write(target, planned, overwrite=True)
    assert target.stat().st_size == planned.nbytes and left_behind(tmp_path) == ["t.gguf"]
    for path, message in [
        (tmp_path / "none" / "t.gguf", "there is no folder"),
        (target / "t.gguf", "there is no folder|not a directory"),
        (tmp_path, "is a folder, not a file"),
        (Path("/dev/null"), "is a device or pipe, not a file"),
        (tmp_path / ("n" * 300), "file name too long"),
    ]:
        with pytest.raises(GgufkitError, match=message):
            write(path, planned, overwrite=True)
    assert left_behind(tmp_path) == ["t.gguf"]


def test_a_target_larger_than_the_disk_is_refused_before_writing(tmp_path):
    huge = gguf.Plan({}, [("a", "F32", (1 << 50,))])
    with pytest.raises(GgufkitError, match=r"but only \d+ are free"), gguf.Writer(tmp_path / "t.gguf", huge):
        pytest.fail("entered")
    assert left_behind(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE")
def test_a_disk_that_fills_up(tmp_path):
    """A limit on file sizes stands for the full disk: the same failing write."""
    planned = gguf.Plan({}, [("a", "F32", (1 << 16,))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with (
            pytest.raises(GgufkitError, match=r"t\.gguf: file too large"),
            gguf.Writer(tmp_path / "t.gguf", planned) as w,
        ):
            w.write("a", bytes(1 << 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert left_behind(tmp_path) == []


def test_a_read_only_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(GgufkitError, match="cannot be written to"):
        write(tmp_path / "t.gguf", plan())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_run_leaves_what_was_there(error, tmp_path):
    target = tmp_path / "t.gguf"
    target.write_text("old")
    with pytest.raises(error), gguf.Writer(target, plan(), overwrite=True) as w:
        w.write("token_embd.weight", TENSORS["token_embd.weight"])
        raise error
    assert target.read_text() == "old" and left_behind(tmp_path) == ["t.gguf"]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    target = tmp_path / "t.gguf"
    with pytest.raises(GgufkitError, match="exists already"), gguf.Writer(target, gguf.Plan({}, [])):
        target.write_text("other")
    assert target.read_text() == "other" and left_behind(tmp_path) == ["t.gguf"]


def test_the_file_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "t.gguf"
    with gguf.Writer(target, plan()) as w:
        for name, x in TENSORS.items():
            w.write(name, x)
            assert not target.exists()
    assert target.exists()
    mask = os.umask(0)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~mask


def test_reading_what_is_replaced_stays_possible(tmp_path):
    """A converter may replace the file that it reads: the open mapping keeps the old bytes."""
    target = tmp_path / "t.gguf"
    write(target, plan())
    with gguf.open(target) as f:
        with gguf.Writer(target, gguf.Plan({}, f.tensors.values()), overwrite=True) as w:
            for name, tensor in f.tensors.items():
                w.write(name, tensor.raw)
        assert np.array_equal(f.tensors["ints"].dequantize(), [0, 1, 2])
    with gguf.open(target) as f:
        assert not f.metadata and np.array_equal(f.tensors["ints"].dequantize(), [0, 1, 2])


def test_llama_cpp_reads_the_header(tmp_path):
    """llama.cpp's own GGUF reader (in a process of its own, since it aborts on what it does not like)."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))
    write(tmp_path / "t.gguf", plan())
    script = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
class Params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]
lib.gguf_init_from_file.restype = ctypes.c_void_p
lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
f = lib.gguf_init_from_file(sys.argv[2].encode(), Params(True, None))
for name in ("gguf_get_n_tensors", "gguf_get_n_kv", "gguf_get_data_offset", "gguf_get_alignment"):
    getattr(lib, name).restype = ctypes.c_int64
    getattr(lib, name).argtypes = [ctypes.c_void_p]
    print(getattr(lib, name)(f))
lib.gguf_get_tensor_offset.restype = ctypes.c_size_t
lib.gguf_get_tensor_offset.argtypes = [ctypes.c_void_p, ctypes.c_int64]
print(lib.gguf_get_tensor_offset(f, 4))
"""
    args = [sys.executable, "-c", script, str(library), str(tmp_path / "t.gguf")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    planned = plan()
    start = len(planned.header)
    expected = [len(TENSORS), len(METADATA), start, 32, planned.tensors[4].offset - start]
    assert [int(line) for line in done.stdout.split()] == expected


def test_unknown_types_copy(tmp_path):
    source = put(
        tmp_path, hostile.gguf(infos=[info("x", [5], 4321, 0)], data=b"secret codes of 32 bytes, padded"), "a.gguf"
    )
    with gguf.open(source) as f, gguf.Writer(tmp_path / "b.gguf", gguf.Plan({}, f.tensors.values())) as w:
        w.write("x", f.tensors["x"].raw)
    assert (tmp_path / "b.gguf").read_bytes() == source.read_bytes()


def test_entry_builder_agrees():
    """The tests' own builder and the writer say the same: neither is tested by itself alone."""
    assert hostile.gguf([entry("k", STRING, string("v"))]) == gguf.Plan({"k": "v"}, []).header.rstrip(b"\0")
