"""Files that break one rule each, built from raw bytes: the project's own writer has no part in them.

`GGUF` and `SAFETENSORS` list (name of the case, the file's bytes, the message after the path). A message is complete:
what is wrong, where, what was read, what is allowed.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0 = 0, 1, 2


class Case(NamedTuple):
    name: str
    data: bytes
    message: str


# -- GGUF from parts ---------------------------------------------------------------------------------


def u32(n: int, order: str = "<") -> bytes:
    return struct.pack(order + "I", n)


def u64(n: int, order: str = "<") -> bytes:
    return struct.pack(order + "Q", n)


def string(text: str | bytes, order: str = "<") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw), order) + raw


def entry(key: str | bytes, kind: int, value: bytes, order: str = "<") -> bytes:
    return string(key, order) + u32(kind, order) + value


def array(item: int, count: int, items: bytes, order: str = "<") -> bytes:
    return u32(item, order) + u64(count, order) + items


def info(name: str | bytes, dims: list[int], kind: int, offset: int, order: str = "<") -> bytes:
    packed = b"".join(u64(d, order) for d in dims)
    return string(name, order) + u32(len(dims), order) + packed + u32(kind, order) + u64(offset, order)


def gguf(
    entries: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_entries: int | None = None,
    alignment: int = 32,
    order: str = "<",
) -> bytes:
    """A file of these entries, tensor infos and tensor bytes; the counts can lie."""
    entries, infos = entries or [], infos or []
    counts = u64(len(infos) if n_tensors is None else n_tensors, order)
    counts += u64(len(entries) if n_entries is None else n_entries, order)
    head = magic + u32(version, order) + counts + b"".join(entries) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) * bool(infos) + data


def one(
    name: str | bytes = "a", dims: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0, nbytes: int = 32
) -> bytes:
    """A file of one tensor. Its info is at 24."""
    return gguf(infos=[info(name, list(dims), kind, offset)], data=bytes(nbytes))


def two(first: tuple[str, list[int], int, int], second: tuple[str, list[int], int, int], nbytes: int) -> bytes:
    return gguf(infos=[info(*first), info(*second)], data=bytes(nbytes))


def nested(depth: int) -> bytes:
    value = array(UINT8, 0, b"")
    for _ in range(depth - 1):
        value = array(ARRAY, 1, value)
    return value


HUGE = (1 << 64) - 1

GGUF = [
    Case("empty", b"", "not a GGUF file: the file is empty"),
    Case("magic", b"NOPE" + bytes(60), "not a GGUF file: the file begins with b'NOPE', not b'GGUF'"),
    Case("half a magic", b"GG", "not a GGUF file: the file begins with b'GG', not b'GGUF'"),
    Case("zeros", bytes(64), "not a GGUF file: the file is full of zero bytes (an unfinished download?)"),
    Case(
        "lfs pointer",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "not a GGUF file: the file is a Git LFS pointer, not the file it stands for",
    ),
    Case(
        "pytorch",
        b"PK\x03\x04" + bytes(60),
        "not a GGUF file: the file is a zip archive (a PyTorch checkpoint?)",
    ),
    Case("web page", b"<!DOCTYPE html><html>", "not a GGUF file: the file is a web page"),
    Case("safetensors", u64(2) + b"{}", "not a GGUF file: the file is a safetensors file"),
    Case("no version", b"GGUF\x03", "the version needs 4 bytes at 4, but the file ends at 5"),
    Case("version 0", gguf(version=0), "GGUF version 0 at 4; versions 2 and 3 can be read"),
    Case("version 1", gguf(version=1), "GGUF version 1 at 4; versions 2 and 3 can be read"),
    Case("version 4", gguf(version=4), "GGUF version 4 at 4; versions 2 and 3 can be read"),
    Case("big-endian version 4", gguf(version=4, order=">"), "GGUF version 4 at 4; versions 2 and 3 can be read"),
    Case("no counts", b"GGUF" + u32(3), "the number of tensors needs 8 bytes at 8, but the file ends at 8"),
    Case(
        "no entry count",
        b"GGUF" + u32(3) + u64(0),
        "the number of metadata entries needs 8 bytes at 16, but the file ends at 16",
    ),
    Case(
        "tensor count",
        gguf(n_tensors=HUGE, data=bytes(100)),
        f"says it has {HUGE} tensors at 8, but the 108 bytes left hold at most 4",
    ),
    Case(
        "entry count",
        gguf(n_entries=1 << 40, data=bytes(100)),
        f"says it has {1 << 40} metadata entries at 16, but the 100 bytes left hold at most 7",
    ),
    Case(
        "one entry too few",
        gguf([entry("k", UINT8, b"\0")], n_entries=2, data=bytes(14)),
        "metadata key 1 at 38 is empty",
    ),
    # metadata
    Case("empty key", gguf([entry("", UINT32, bytes(8))]), "metadata key 0 at 24 is empty"),
    Case(
        "long key",
        gguf([entry("k" * 65536, UINT32, bytes(4))]),
        "metadata key 0 at 24 is 65536 bytes long; at most 65535 are allowed",
    ),
    Case(
        "key beyond the end",
        gguf([u64(5000) + bytes(20)]),
        "metadata key 0 needs 5000 bytes at 32, but the file ends at 52",
    ),
    Case("key not UTF-8", gguf([entry(b"k\xff", UINT32, bytes(4))]), r"metadata key 0 at 24 is not UTF-8: 'k\\xff'"),
    Case(
        "key twice",
        gguf([entry("k", UINT32, bytes(4))] * 2),
        "metadata key 'k' at 41 stands there a second time",
    ),
    Case(
        "value type",
        gguf([entry("k", 13, bytes(4))]),
        "metadata 'k' has value type 13 at 33; 0 to 12 are allowed",
    ),
    Case(
        "no value",
        gguf([entry("kkkkkkkkk", UINT64, bytes(4))]),
        "metadata 'kkkkkkkkk' needs 8 bytes at 45, but the file ends at 49",
    ),
    Case(
        "bool",
        gguf([entry("k", BOOL, b"\x02")]),
        "metadata 'k' is a BOOL with value 2 at 37; 0 and 1 are allowed",
    ),
    Case(
        "string beyond the end",
        gguf([entry("k", STRING, u64(HUGE) + b"abc")]),
        f"metadata 'k' needs {HUGE} bytes at 45, but the file ends at 48",
    ),
    Case(
        "item type",
        gguf([entry("k", ARRAY, array(99, 0, b""))]),
        "items of metadata 'k' has value type 99 at 37; 0 to 12 are allowed",
    ),
    Case(
        "array length",
        gguf([entry("k", ARRAY, array(UINT32, 1 << 62, bytes(8)))]),
        f"metadata 'k' says it has {1 << 62} items of UINT32 at 37, but the 8 bytes left hold at most 2",
    ),
    Case(
        "string array length",
        gguf([entry("k", ARRAY, array(STRING, 1 << 60, bytes(16)))]),
        f"metadata 'k' says it has {1 << 60} items of STRING at 37, but the 16 bytes left hold at most 2",
    ),
    Case(
        "string of an array",
        gguf([entry("k", ARRAY, array(STRING, 3, string("ab") + u64(1000) + bytes(12)))]),
        "string 1 of metadata 'k' needs 1000 bytes at 67, but the file ends at 79",
    ),
    Case(
        "last string of an array",
        gguf([entry("k", ARRAY, array(STRING, 2, string("ab") + u64(3) + b"xy"))]),
        "string 1 of metadata 'k' needs 3 bytes at 67, but the file ends at 69",
    ),
    Case(
        "bool of an array",
        gguf([entry("k", ARRAY, array(BOOL, 3, b"\0\1\7"))]),
        "item 2 of metadata 'k' is a BOOL with value 7 at 51; 0 and 1 are allowed",
    ),
    Case(
        "nesting",
        gguf([entry("k", ARRAY, nested(9))]),
        "metadata 'k' nests arrays more than 8 deep at 133",
    ),
    Case(
        "nested array length",
        gguf([entry("k", ARRAY, array(ARRAY, 1, array(INT8, 9, b"123")))]),
        "metadata 'k' says it has 9 items of INT8 at 49, but the 3 bytes left hold at most 3",
    ),
    Case(
        "alignment type",
        gguf([entry("general.alignment", UINT64, u64(32))]),
        "metadata 'general.alignment' is UINT64; it must be UINT32",
    ),
    Case(
        "alignment 0",
        gguf([entry("general.alignment", UINT32, u32(0))]),
        "metadata 'general.alignment' is 0 at 53; it must be a power of two",
    ),
    Case(
        "alignment 48",
        gguf([entry("general.alignment", UINT32, u32(48))]),
        "metadata 'general.alignment' is 48 at 53; it must be a power of two",
    ),
    # tensors
    Case("empty name", one(name=""), "the name of tensor 0 at 24 is empty"),
    Case("name not UTF-8", one(name=b"\xc3("), r"the name of tensor 0 at 24 is not UTF-8: '\\xc3('"),
    Case(
        "long name",
        one(name="n" * 70000),
        "the name of tensor 0 at 24 is 70000 bytes long; at most 65535 are allowed",
    ),
    Case(
        "name twice",
        two(("a", [8], F32, 0), ("a", [8], F32, 32), 64),
        "tensor 'a' at 57 stands there a second time",
    ),
    Case("five dimensions", one(dims=(2, 2, 2, 2, 2)), "tensor 'a' has 5 dimensions at 33; at most 4 are allowed"),
    Case(
        "dimensions cut off",
        gguf(infos=[string("a") + u32(4) + u64(8)], data=bytes(4))[:64],
        "dimension 3 of tensor 'a' needs 8 bytes at 61, but the file ends at 64",
    ),
    Case(
        "huge dimension",
        one(dims=(HUGE,)),
        f"tensor 'a' has dimensions [{HUGE}] at 37; their product must be less than 2**63",
    ),
    Case(
        "product overflow",
        one(dims=(1 << 32, 1 << 32)),
        f"tensor 'a' has dimensions [{1 << 32}, {1 << 32}] at 37; their product must be less than 2**63",
    ),
    Case(
        "product overflow behind a 0",
        one(dims=(0, 1 << 62, 4)),
        f"tensor 'a' has dimensions [0, {1 << 62}, 4] at 37; their product must be less than 2**63",
    ),
    Case(
        "row and block",
        one(dims=(48, 2), kind=Q4_0),
        "tensor 'a' of type Q4_0 has rows of 48 at 37; they must be divisible by 32",
    ),
    Case("misaligned", one(offset=16, nbytes=64), "tensor 'a' has data offset 16 at 49, no multiple of 32"),
    Case("truncated data", one(nbytes=31), "tensor 'a' needs 32 bytes at 64, but the file ends at 95"),
    Case("huge tensor", one(dims=(1 << 60,)), f"tensor 'a' needs {1 << 62} bytes at 64, but the file ends at 96"),
    Case(
        "offset beyond the end",
        one(offset=1 << 63),
        f"tensor 'a' needs 32 bytes at {(1 << 63) + 64}, but the file ends at 96",
    ),
    Case(
        "overlap",
        two(("a", [16], F32, 0), ("b", [8], F32, 32), 64),
        "tensor 'b' begins at 128, inside tensor 'a', which ends at 160",
    ),
    Case(
        "same place",
        two(("b", [8], F32, 0), ("a", [4], F32, 0), 64),
        "tensor 'b' begins at 96, inside tensor 'a', which ends at 112",
    ),
    Case(
        "unknown type beyond the end",
        one(kind=999, offset=64, nbytes=32),
        "tensor 'a' begins at 128, but the file ends at 96",
    ),
    Case(
        "unknown type without bytes",
        two(("a", [8], 999, 0), ("b", [8], F32, 0), 32),
        "tensor 'a' of type 999 has no bytes between 96 and 96",
    ),
    Case(
        "unknown type inside another",
        two(("a", [16], F32, 0), ("b", [8], 999, 32), 64),
        "tensor 'b' begins at 128, inside tensor 'a', which ends at 160",
    ),
]


# -- safetensors from parts ----------------------------------------------------------------------------


def tensor(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets) if isinstance(offsets, tuple) else offsets,
    }


def safetensors(header: dict[str, Any] | bytes, nbytes: int = 8, length: int | None = None) -> bytes:
    """A file with that header and `nbytes` of tensor data; the header's length can lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return u64(len(raw) if length is None else length) + raw + bytes(nbytes)


_TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2)

SAFETENSORS = [
    Case("empty", b"", "not a safetensors file: 0 bytes are too few for the header's length"),
    Case("seven bytes", bytes(7), "not a safetensors file: 7 bytes are too few for the header's length"),
    Case(
        "header beyond the end",
        safetensors(b"{}", 0, length=9),
        "the header should be 9 bytes long; the 2 bytes after its length and a limit of 100000000 allow less",
    ),
    Case(
        "huge header",
        safetensors(b"{}", 0, length=HUGE),
        f"the header should be {HUGE} bytes long; the 2 bytes after its length and a limit of 100000000 allow less",
    ),
    Case("a GGUF file", gguf(data=bytes(20)), "not a safetensors file: the file is a GGUF file"),
    Case("no brace", safetensors(b" {}", 0), "the header begins with b' ' at 8, not with b'{'"),
    Case("no header", safetensors(b"", 0), "the header begins with b'' at 8, not with b'{'"),
    Case("not JSON", safetensors(b'{"a":}', 0), "the header is not JSON: Expecting value: line 1 column 6 (char 5)"),
    Case("not UTF-8", safetensors(b'{"\xff":1}', 0), "the header is not UTF-8 at its byte 2"),
    Case("deep", safetensors(b'{"a":' + b"[" * 100_000, 0), "the header is nested too deeply"),
    Case("name twice", safetensors(_TWICE), "the header has the name 'a' twice"),
    Case(
        "dtype twice",
        safetensors(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}'),
        "the header has the name 'dtype' twice",
    ),
    Case("metadata", safetensors({"__metadata__": {"a": 1}}, 0), "__metadata__ must map names to strings"),
    Case(
        "no tensor",
        safetensors({"a": 3}, 0),
        "tensor 'a' must have dtype, shape and data_offsets, and nothing else",
    ),
    Case(
        "no dtype",
        safetensors({"a": {"shape": [], "data_offsets": [0, 0]}}, 0),
        "tensor 'a' must have dtype, shape and data_offsets, and nothing else",
    ),
    Case("dtype", safetensors({"a": tensor(dtype=5)}), "tensor 'a' has dtype 5; a name is wanted"),
    Case(
        "shape",
        safetensors({"a": tensor(shape="2")}),
        "tensor 'a' has shape 2; a list of integers, none negative, is wanted",
    ),
    Case(
        "negative dimension",
        safetensors({"a": tensor(shape=(-2, -1))}),
        "tensor 'a' has shape [-2, -1]; a list of integers, none negative, is wanted",
    ),
    Case(
        "bool dimension",
        safetensors({"a": tensor(shape=(True, 2))}),
        "tensor 'a' has shape [True, 2]; a list of integers, none negative, is wanted",
    ),
    Case(
        "65 dimensions",
        safetensors({"a": tensor(shape=(1,) * 65)}),
        "tensor 'a' has 65 dimensions; at most 64 are allowed",
    ),
    Case(
        "overflow",
        safetensors({"a": tensor(shape=(1 << 40, 1 << 40))}),
        f"tensor 'a' has shape [{1 << 40}, {1 << 40}]; the product must be less than 2**63",
    ),
    Case(
        "offsets",
        safetensors({"a": tensor(offsets=(0, 8.0))}),
        "tensor 'a' has data_offsets [0, 8.0]; two integers, none negative, are wanted",
    ),
    Case(
        "three offsets",
        safetensors({"a": tensor(offsets=(0, 4, 8))}),
        "tensor 'a' has data_offsets [0, 4, 8]; two integers, none negative, are wanted",
    ),
    Case(
        "offsets reversed",
        safetensors({"a": tensor(offsets=(8, 0))}),
        "tensor 'a' has data_offsets [8, 0], which end before they begin",
    ),
    Case(
        "size",
        safetensors({"a": tensor(shape=(3,))}),
        "tensor 'a', F32 of shape [3], takes 12 bytes, not 8",
    ),
    Case(
        "size of a dtype of ours",
        safetensors({"a": tensor(dtype="U8")}),
        "tensor 'a', U8 of shape [2], takes 2 bytes, not 8",
    ),
    Case(
        "overlap",
        safetensors({"a": tensor(), "b": tensor(offsets=(4, 12))}, 12),
        "tensor 'b' overlaps the tensor before it: begins at 4, not at 8",
    ),
    Case(
        "hole",
        safetensors({"a": tensor(), "b": tensor(offsets=(12, 20))}, 20),
        "tensor 'b' leaves a gap: begins at 12, not at 8",
    ),
    Case(
        "hole at the start",
        safetensors({"a": tensor(offsets=(8, 16))}, 16),
        "tensor 'a' leaves a gap: begins at 8, not at 0",
    ),
    Case(
        "truncated",
        safetensors({"a": tensor()}, 7),
        "tensor 'a' needs 8 bytes at 62, but the file ends at 69",
    ),
    Case("bytes behind", safetensors({"a": tensor()}, 9), "the tensors end at 70, but the file ends at 71"),
]
