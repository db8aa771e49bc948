"""Reading GGUF: every rule has a file that breaks it; sound files of all kinds give what was put in."""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from ggufkit_formats import gguf
from ggufkit_formats.blocks import UnknownType
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError
from ggufkit_formats.gguf_strings import walk
from hostile import ARRAY, BOOL, F32, FLOAT32, INT32, STRING, UINT16, UINT32, array, entry, info, string, u32, u64

ORDERS = [pytest.param("<", id="little"), pytest.param(">", id="big")]


def put(folder: Path, data: bytes, name: str = "t.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# -- broken files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", hostile.GGUF, ids=lambda case: case.name)
def test_each_broken_rule_has_its_message(case, tmp_path):
    path = put(tmp_path, case.data)
    with pytest.raises(GgufkitError) as caught:
        gguf.open(path)
    assert str(caught.value) == f"{path}: {case.message}"
    wanted = UnsupportedError if "versions 2 and 3" in case.message else FormatError
    assert type(caught.value) is wanted


def test_hostile_cases_are_distinct():
    assert len({case.name for case in hostile.GGUF}) == len(hostile.GGUF)
    assert len({case.data for case in hostile.GGUF}) == len(hostile.GGUF)


def test_missing_unreadable_and_special_files(tmp_path):
    with pytest.raises(GgufkitError, match="no such file"):
        gguf.open(tmp_path / "none.gguf")
    with pytest.raises(GgufkitError, match="is a folder, not a file"):
        gguf.open(tmp_path)
    with pytest.raises(GgufkitError, match="is not a regular file"):
        gguf.open("/dev/null")
    with pytest.raises(GgufkitError):
        gguf.open("nul\0byte")


def sample(order: str = "<") -> bytes:
    """A small file that has everything: scalars, arrays, nested arrays, four tensors."""
    words = b"".join(string(w, order) for w in ("<s>", "", "ab", "né"))
    inner = array(INT32, 2, struct.pack(order + "2i", 1, -2), order) + array(STRING, 1, string("x", order), order)
    entries = [
        entry("general.architecture", STRING, string("llama", order), order),
        entry("general.alignment", UINT32, u32(64, order), order),
        entry("flag", BOOL, b"\1", order),
        entry("eps", FLOAT32, struct.pack(order + "f", 1e-5), order),
        entry("tokens", ARRAY, array(STRING, 4, words, order), order),
        entry("scores", ARRAY, array(FLOAT32, 3, struct.pack(order + "3f", 1, 2, 3), order), order),
        entry("flags", ARRAY, array(BOOL, 3, b"\1\0\1", order), order),
        entry("deep", ARRAY, array(ARRAY, 2, inner, order), order),
        entry("empty", ARRAY, array(STRING, 0, b"", order), order),
    ]
    infos = [
        info("a", [8, 2], F32, 0, order),
        info("b", [32, 1, 2], hostile.Q4_0, 64, order),
        info("c", [3], 999, 128, order),
        info("d", [4], hostile.F16, 192, order),
    ]
    blocks = b"".join(struct.pack(order + "H", 0x2C00 + i) + bytes(range(16)) for i in range(2))
    data = struct.pack(order + "16f", *range(16)) + blocks + bytes(28) + b"c" * 64
    data += struct.pack(order + "4e", 1, 2, 3, 4)
    return hostile.gguf(entries, infos, data, alignment=64, order=order)


def read_all(path: Path) -> None:
    """Everything that a file offers."""
    with gguf.open(path) as file:
        for key in file.metadata:
            file.metadata.typed(key)
            value = file.metadata[key]
            if isinstance(value, gguf.StringArray):
                list(value), value[:1], value.encoded()
        for tensor in file.tensors.values():
            assert tensor.raw.nbytes == tensor.nbytes
            if not isinstance(tensor.type, UnknownType):
                tensor.read_rows(0, tensor.rows)
                tensor.dequantize()


@pytest.mark.parametrize("order", ORDERS)
def test_damaged_files_raise_only_our_errors(order, tmp_path):
    """A few thousand byte flips and all truncations of a small file: an error of ours, or a file that can be read."""
    whole, rng = sample(order), random.Random(0)
    header = whole.index(b"c" * 64) - 128  # where the tensors' bytes begin
    path = tmp_path / "t.gguf"
    refused = 0
    cases = [whole[:n] for n in range(0, len(whole), 3)]
    for _ in range(1200):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            damaged[rng.randrange(header)] = rng.choice([0, 1, 2, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        cases.append(bytes(damaged))
    for data in cases:
        path.write_bytes(data)
        try:
            with np.errstate(all="ignore"):
                read_all(path)
        except GgufkitError as error:
            refused += 1
            assert "\n" not in str(error).replace(str(path), "")
    assert refused > 300


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_hostile_counts_allocate_nothing(tmp_path):
    """Each case is refused with 64 MB of address space above what the interpreter has."""
    for case in hostile.GGUF:
        put(tmp_path, case.data, f"{case.name}.gguf")
    script = (
        "import resource, sys, pathlib\n"
        "from ggufkit_formats import gguf\nfrom ggufkit_formats.errors import GgufkitError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).glob('*.gguf')):\n"
        "    try: gguf.open(path)\n"
        "    except GgufkitError: continue\n"
        "    raise SystemExit(f'{path} was read')\n"
    )
    assert resource.RLIMIT_AS is not None
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- sound files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_everything_in_a_small_file(order, tmp_path):
    path = put(tmp_path, sample(order))
    with gguf.open(path) as f:
        assert (f.version, f.byte_order, f.alignment) == (3, "little" if order == "<" else "big", 64)
        assert (f.nbytes, f.paths) == (path.stat().st_size, [path])
        m = f.metadata
        assert list(m)[:3] == ["general.architecture", "general.alignment", "flag"] and len(m) == 9
        assert m["general.architecture"] == "llama" and m["general.alignment"] == 64 and m["flag"] is True
        assert type(m["general.alignment"]) is int and m["eps"] == np.float32(1e-5)
        assert m["tokens"] == ["<s>", "", "ab", "né"] and m["tokens"][-1] == "né" and m["tokens"][1:3] == ["", "ab"]
        assert m["scores"].tolist() == [1, 2, 3] and m["flags"].tolist() == [True, False, True]
        assert m["deep"][0].tolist() == [1, -2] and m["deep"][1] == ["x"] and len(m["empty"]) == 0
        assert "nope" not in m and m.get("nope") is None
        with pytest.raises(KeyError):
            m["nope"]
        assert [m.type_name(k) for k in ("flag", "tokens", "deep")] == ["BOOL", "ARRAY[STRING]", "ARRAY[ARRAY]"]
        a, b, c, d = f.tensors.values()
        assert a.shape == (2, 8) and a.dequantize().tolist() == np.arange(16).reshape(2, 8).tolist()
        assert b.shape == (2, 1, 32) and b.raw.shape == (2, 1, 18) and b.read_rows(1, 2).shape == (1, 18)
        assert c.type == "999" and c.nbytes == 64 and bytes(c.raw) == b"c" * 64
        assert d.dequantize().tolist() == [1, 2, 3, 4] and d.read_rows(0, 1).tobytes() == d.raw.tobytes()
        assert not a.raw.flags.writeable or order == ">"


@pytest.mark.parametrize("order", ORDERS)
def test_version_2(order, tmp_path):
    path = put(tmp_path, hostile.gguf([entry("k", UINT32, u32(7, order), order)], version=2, order=order))
    with gguf.open(path) as f:
        assert f.version == 2 and dict(f.metadata) == {"k": 7} and not f.tensors


def test_scalars_and_empty_tensors(tmp_path):
    infos = [info("s", [], F32, 0), info("e", [32, 0, 5], hostile.Q4_0, 32), info("z", [0], F32, 32)]
    path = put(tmp_path, hostile.gguf(infos=infos, data=struct.pack("<f", 2.5) + bytes(28)))
    with gguf.open(path) as f:
        assert f.tensors["s"].shape == () and f.tensors["s"].dequantize() == np.float32(2.5)
        assert f.tensors["e"].shape == (5, 0, 32) and f.tensors["e"].nbytes == 0
        assert f.tensors["e"].dequantize().shape == (5, 0, 32) and f.tensors["z"].dequantize().shape == (0,)


def test_tensors_out_of_order_and_gaps(tmp_path):
    infos = [info("late", [2], F32, 128), info("early", [2], F32, 0), info("odd", [2], 77, 32)]
    with gguf.open(put(tmp_path, hostile.gguf(infos=infos, data=bytes(136)))) as f:
        assert list(f.tensors) == ["late", "early", "odd"]
        assert [t.nbytes for t in f.tensors.values()] == [8, 8, 96]


def test_text_that_is_not_utf8_is_refused_when_asked_for(tmp_path):
    words = string("ok") + string(b"\xff\xfe")
    entries = [entry("s", STRING, string(b"\xe4")), entry("w", ARRAY, array(STRING, 2, words))]
    path = put(tmp_path, hostile.gguf(entries))
    with gguf.open(path) as f:
        with pytest.raises(FormatError, match=r"t.gguf: metadata 's' is not UTF-8: '\\\\xe4'"):
            f.metadata["s"]
        assert f.metadata.typed("s") == b"\xe4"
        words = f.metadata["w"]
        assert words[0] == "ok" and words.raw(1) == b"\xff\xfe"
        with pytest.raises(FormatError, match=r"string 1 of .*t.gguf: metadata 'w' is not UTF-8"):
            list(words)


def test_closed_files_say_so(tmp_path):
    f = gguf.open(put(tmp_path, sample()))
    view, tensor = f.tensors["a"].raw, f.tensors["a"]
    f.close()
    f.close()
    assert view.sum() >= 0  # views that were taken stay valid
    for use in (lambda: tensor.raw, lambda: tensor.read_rows(0, 1)):
        with pytest.raises(UsageError, match="the file was closed"):
            use()


def test_reading_a_file_that_shrank(tmp_path):
    path = put(tmp_path, sample())
    f = gguf.open(path)
    with path.open("r+b") as file:
        file.truncate(f.tensors["a"].offset + 4)
    with pytest.raises(FormatError, match="while it was read"):
        f.tensors["a"].read_rows(0, 2)


# -- string arrays -----------------------------------------------------------------------------------


def _strings(kind: str, n: int, rng: random.Random) -> list[bytes]:
    make = {
        "short": lambda: b"x" * rng.randint(1, 12),
        "zeros": lambda: bytes(rng.choices([0, 1, 2], k=rng.randint(0, 20))),
        "empty": lambda: rng.choice([b"", b"ab"]),
        "mixed": lambda: bytes(rng.randint(0, 3)) if rng.random() < 0.9 else b"y" * rng.randint(200, 3000),
        "long": lambda: b"q" * (rng.randint(1, 9) if rng.random() < 0.999 else 300_000),
    }[kind]
    return [make() for _ in range(n)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["short", "zeros", "empty", "mixed", "long"])
def test_walk_over_strings(kind, order):
    """Against the plain walk, with sizes around the windows' edges."""
    rng = random.Random(kind)
    for n in (0, 1, 63, 64, 65, 700, 3000, 30000):
        items = _strings(kind, n, rng)
        data = b"pre" + b"".join(string(item, order) for item in items)
        starts = np.empty(n, dtype=np.int64)
        tail = bytes(rng.choice([0, 5, 100]))
        assert walk(memoryview(data + tail), 3, n, order, starts) == len(data)
        ends = np.cumsum([8 + len(item) for item in items], dtype=np.int64)
        assert starts.tolist() == [3, *(3 + ends[:-1]).tolist()][:n]
        if n:
            assert walk(memoryview(data[:-1]), 3, n, order) is None


def test_a_large_vocabulary_stays_bytes(tmp_path):
    """262,144 tokens: opened without building them, any of them readable."""
    n = 262_144
    words = [f"▁token{i}" for i in range(n)]
    items = b"".join(map(string, words))
    path = put(tmp_path, hostile.gguf([entry("tokenizer.ggml.tokens", ARRAY, array(STRING, n, items))]))
    before = sys.getallocatedblocks()
    began = time.process_time()
    with gguf.open(path) as f:
        took = time.process_time() - began
        tokens = f.metadata["tokenizer.ggml.tokens"]
        assert sys.getallocatedblocks() - before < 2000
        assert (
            len(tokens) == n and tokens[0] == words[0] and tokens[-1] == words[-1] and tokens[123456] == words[123456]
        )
        assert tokens == words
    assert took < 1.0  # 0.03 s on an idle machine


# -- split files -------------------------------------------------------------------------------------


def shard(i: int, n: int, names: str, total: int, order: str = "<", **counts: int) -> bytes:
    entries = [entry("general.name", STRING, string("whole", order), order)] if i == 0 else []
    entries += [
        entry("split.no", UINT16, struct.pack(order + "H", counts.get("no", i)), order),
        entry("split.count", UINT16, struct.pack(order + "H", counts.get("count", n)), order),
        entry("split.tensors.count", INT32, struct.pack(order + "i", total), order),
    ]
    infos = [info(name, [8], F32, 32 * k, order) for k, name in enumerate(names)]
    values = [float(ord(name)) for name in names for _ in range(8)]
    return hostile.gguf(entries, infos, struct.pack(f"{order}{len(values)}f", *values), order=order)


def put_split(folder: Path, *shards: bytes) -> list[Path]:
    return [put(folder, data, f"m-{i + 1:05d}-of-{len(shards):05d}.gguf") for i, data in enumerate(shards)]


def test_any_shard_means_the_whole(tmp_path):
    paths = put_split(tmp_path, shard(0, 3, "ab", 4), shard(1, 3, "c", 4), shard(2, 3, "d", 4))
    for path in paths:
        with gguf.open(path) as f:
            assert f.paths == paths and list(f.tensors) == ["a", "b", "c", "d"]
            assert [t.dequantize()[0] for t in f.tensors.values()] == [97, 98, 99, 100]
            assert f.metadata["general.name"] == "whole" and f.metadata["split.count"] == 3
            assert f.nbytes == sum(p.stat().st_size for p in paths)
            assert list(f.metadata.copy()) == ["general.name"]


def test_broken_splits(tmp_path):
    def refused(message: str, *shards: bytes | None, open_: int = 0, name: str | None = None) -> None:
        folder = tmp_path / message.split()[0].strip(":")
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        paths = put_split(folder, *[s or b"" for s in shards])
        for path, data in zip(paths, shards, strict=True):
            if data is None:
                path.unlink()
        path = paths[open_].rename(folder / name) if name else paths[open_]
        with pytest.raises(GgufkitError) as caught:
            gguf.open(path)
        assert message in str(caught.value)

    a, b = shard(0, 2, "a", 2), shard(1, 2, "b", 2)
    refused("m-00002-of-00002.gguf: no such file; it is shard 2 of 2 of m-00001-of-00002.gguf", a, None)
    refused("says it is shard 1 of 2, but should be shard 2 of 2", a, a)
    refused("says it is shard 2 of 5, but should be shard 2 of 2", a, shard(1, 2, "b", 2, count=5))
    refused("should have 3 tensors, but its 2 shards hold 2", shard(0, 2, "a", 3), b)
    refused("tensor 'a' stands in an earlier shard, too", a, shard(1, 2, "a", 2))
    refused("its byte order differs", a, shard(1, 2, "b", 2, order=">"))
    refused("is shard 1 of 2, but is not called NAME-00001-of-00002.gguf", a, b, name="other.gguf")
    refused("is shard 2 of 2, but is not called NAME-00002-of-00002.gguf", b, a)
    refused("metadata 'split.no' is 7, but 'split.count' is 2", shard(0, 2, "a", 2, no=7), b)
    refused("not a GGUF file: the file is empty", a, b"")
    lone = hostile.gguf([entry("split.count", UINT16, struct.pack("<H", 2))])
    refused("is a shard of a split file, but has no metadata 'split.no'", lone, b)
    worded = hostile.gguf([entry("split.count", STRING, string("2"))])
    refused("metadata 'split.count' is STRING; it must be an integer, not negative", worded, b)
    many = hostile.gguf([entry("split.count", hostile.UINT64, u64(1 << 60)), entry("split.no", UINT32, u32(0))])
    refused("is not called NAME-00001-of-", many, b)


# -- real files --------------------------------------------------------------------------------------


def test_the_default_model_against_gguf(default_model_path):
    """The `gguf` package's reader as the oracle for all keys and tensors."""
    reader = pytest.importorskip("gguf").GGUFReader(default_model_path)
    with gguf.open(default_model_path) as f:
        theirs = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert list(f.metadata) == list(theirs)
        for key, field in theirs.items():
            if len(field.data) > 1000 and isinstance(f.metadata[key], gguf.StringArray):
                picks = [0, 1, 100, len(field.data) - 1]
                assert [f.metadata[key].raw(i) for i in picks] == [bytes(field.parts[field.data[i]]) for i in picks]
                assert len(f.metadata[key]) == len(field.data)
            else:
                value = f.metadata[key]
                assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
        assert list(f.tensors) == [t.name for t in reader.tensors]
        for ours, other in zip(f.tensors.values(), reader.tensors, strict=True):
            assert (ours.offset, ours.nbytes, ours.type.id) == (other.data_offset, other.n_bytes, other.tensor_type)
            assert list(reversed(ours.shape)) == other.shape.tolist()
            assert np.array_equal(ours.read_rows(0, ours.rows).reshape(-1), other.data.reshape(-1).view(np.uint8))


def test_raw_bytes_of_an_empty_tensor_of_unknown_type(tmp_path):
    path = put(tmp_path, hostile.gguf(infos=[info("a", [0, 4], 999, 0)]))
    with gguf.open(path) as f:
        assert f.tensors["a"].raw.shape == (0,)
