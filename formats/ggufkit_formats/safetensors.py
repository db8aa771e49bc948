"""safetensors checkpoints: one file, or a folder of shards with an index. Read by pread, one tensor at a time.

A file is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes without gaps. Source: the
format section of the safetensors README; its rules are enforced here, each with a message of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from . import bitsandbytes
from .blocks import TensorType, UnknownType, find
from .errors import FormatError, GgufkitError
from .gguf_strings import quote
from .source import FileSource, exists, looks_like, reason
from .tensor import Tensor

MAX_HEADER = 100_000_000  # bytes, from the reference implementation
MAX_INDEX = 100_000_000
MAX_DIMS = 64  # NumPy's
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# dtypes that GGUF has, too; the others are listed under their own name and can be copied, not decoded
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8"}
_BITS = dict.fromkeys(["U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"], 8)
_BITS |= {"U16": 16, "U32": 32, "U64": 64, "C64": 64, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


class SafetensorsFile:
    """An open checkpoint. Also a context manager. Tensors come shard by shard, in the order of their bytes.

    `stored` are the tensors that the files list, `tensors` what they mean: the parts of a matrix that bitsandbytes
    quantized are one there.
    """

    def __init__(self, path: Path, sources: list[FileSource], tensors: dict[str, Tensor], metadata: dict[str, str]):
        self.path = path
        self.sources = sources
        self.paths: list[Path] = [source.path for source in sources]
        self.nbytes: int = sum(source.nbytes for source in sources)
        self.stored = tensors
        self.tensors = _meant(path, tensors)
        self.metadata = metadata  # `__metadata__` of the first file that has one

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SafetensorsFile({str(self.path)!r}, {len(self.tensors)} tensors in {len(self.paths)} files)"


def open(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Open a .safetensors file, an index (`*.safetensors.index.json`), or a folder that holds either.

    Raises FormatError where a file does not hold what it says, GgufkitError where one is missing or unreadable.
    """
    path = Path(path)
    try:
        found = _in_folder(path) if path.is_dir() else path
    except OSError as error:
        raise GgufkitError(f"{path}: {reason(error)}") from None
    weight_map = _index(found) if found.name.endswith(".json") else None
    files = [found] if weight_map is None else [found.with_name(name) for name in sorted(set(weight_map.values()))]
    for file in files:
        if weight_map is not None and not exists(file):
            n = sum(name == file.name for name in weight_map.values())
            raise GgufkitError(f"{file}: no such file; {found.name} says it holds {n} tensors")
    sources: list[FileSource] = []
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    try:
        for file in files:
            sources.append(FileSource(file))
            held, said = _read(sources[-1])
            metadata = metadata or said
            wanted = held if weight_map is None else [n for n in held if weight_map.get(n) == file.name]
            tensors.update((name, held[name]) for name in wanted)
        if weight_map is not None and len(tensors) < len(weight_map):
            name = next(name for name in weight_map if name not in tensors)
            raise FormatError(f"{found}: tensor {quote(name)} is not in {weight_map[name]}, where the index says it is")
        return SafetensorsFile(path, sources, tensors, metadata)
    except BaseException:
        for source in sources:
            source.close()
        raise


def _meant(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        return bitsandbytes.join(tensors)
    except GgufkitError as error:
        raise type(error)(f"{path}: {error}") from None


# -- folders ---------------------------------------------------------------------------------------


def _in_folder(folder: Path) -> Path:
    for name in (INDEX, SINGLE):
        if (folder / name).exists():
            return folder / name
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return indexes[0]
    if files:
        raise FormatError(
            f"{folder}: holds {len(files)} .safetensors files and no {INDEX} that says which belong together"
        )
    others = [p.name for p in sorted(folder.glob("*.bin")) if p.name.startswith("pytorch_model")]
    hint = f"; {others[0]} is a PyTorch file, which ggufkit does not read" if others else ""
    raise GgufkitError(f"{folder}: holds no .safetensors file{hint}")


def _index(path: Path) -> dict[str, str]:
    """The weight map of an index: tensor name -> file name, each a plain name in the same folder."""
    source = FileSource(path)
    try:
        if source.nbytes > MAX_INDEX:
            raise FormatError(f"{path}: is {source.nbytes} bytes long; an index of at most {MAX_INDEX} is allowed")
        index = _json(path, source.read(0, source.nbytes).tobytes(), "the index")
    finally:
        source.close()
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: has no weight_map of tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise FormatError(f"{path}: weight_map has {file!r} for tensor {quote(name)}; a file name is wanted")
        plain = PurePosixPath(file).name == file and not set(file) & set("\\:\0")
        if not plain or file in ("", ".", ".."):
            raise FormatError(f"{path}: weight_map leads out of the folder for tensor {quote(name)}: {quote(file)}")
    return weight_map


# -- one file --------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    begin: int
    end: int
    name: str
    type: TensorType
    shape: tuple[int, ...]


def _read(source: FileSource) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = source.path
    if source.nbytes < 8:
        raise FormatError(f"{path}: not a safetensors file: {source.nbytes} bytes are too few for the header's length")
    length = int.from_bytes(source.read(0, 8).tobytes(), "little")
    if length > min(MAX_HEADER, source.nbytes - 8):
        what = looks_like(source.read(0, min(256, source.nbytes)).tobytes())
        if what and "safetensors" not in what:
            raise FormatError(f"{path}: not a safetensors file: the file is {what}")
        raise FormatError(
            f"{path}: the header should be {length} bytes long; "
            f"the {source.nbytes - 8} bytes after its length and a limit of {MAX_HEADER} allow less"
        )
    raw = source.read(8, length).tobytes()
    if raw[:1] != b"{":
        raise FormatError(f"{path}: the header begins with {raw[:1]!r} at 8, not with b'{{'")
    header = _json(path, raw, "the header")
    metadata = _metadata(path, header.pop("__metadata__", {}))
    start = 8 + length
    tensors: dict[str, Tensor] = {}
    position = 0
    for entry in sorted(_entry(path, name, value) for name, value in header.items()):
        if entry.begin != position:
            fault = "overlaps the tensor before it" if entry.begin < position else "leaves a gap"
            raise FormatError(f"{path}: tensor {quote(entry.name)} {fault}: begins at {entry.begin}, not at {position}")
        position = entry.end
        if start + position > source.nbytes:
            raise FormatError(
                f"{path}: tensor {quote(entry.name)} needs {entry.end - entry.begin} bytes at {start + entry.begin}, "
                f"but the file ends at {source.nbytes}"
            )
        size = entry.end - entry.begin
        tensors[entry.name] = Tensor(entry.name, entry.type, entry.shape, size, start + entry.begin, source)
    if start + position != source.nbytes:
        raise FormatError(f"{path}: the tensors end at {start + position}, but the file ends at {source.nbytes}")
    return tensors, metadata


def _entry(path: Path, name: str, value: Any) -> _Entry:
    what = f"{path}: tensor {quote(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{what} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise FormatError(f"{what} has dtype {dtype!r}; a name is wanted")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise FormatError(f"{what} has shape {_short(shape)}; a list of integers, none negative, is wanted")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise FormatError(f"{what} has data_offsets {_short(offsets)}; two integers, none negative, are wanted")
    begin, end = offsets
    if begin > end:
        raise FormatError(f"{what} has data_offsets {offsets}, which end before they begin")
    if len(shape) > MAX_DIMS:
        raise FormatError(f"{what} has {len(shape)} dimensions; at most {MAX_DIMS} are allowed")
    if math.prod(max(n, 1) for n in shape) >= 1 << 63:
        raise FormatError(f"{what} has shape {_short(shape)}; the product must be less than 2**63")
    kind: TensorType = find(dtype) if dtype in _TYPES else UnknownType(dtype)
    bits = 8 * kind.block_nbytes if dtype in _TYPES else _BITS.get(dtype)
    wanted = None if bits is None else -(-math.prod(shape) * bits // 8)
    if wanted is not None and wanted != end - begin:
        raise FormatError(f"{what}, {dtype} of shape {_short(shape)}, takes {wanted} bytes, not {end - begin}")
    return _Entry(begin, end, name, kind, tuple(shape))


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(f"{path}: __metadata__ must map names to strings")
    return value


def _json(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object whose objects have no key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise FormatError(f"{path}: {what} has the name {quote(twice)} twice")
        return out

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: {what} is not UTF-8 at its byte {error.start}") from None
    except RecursionError:
        raise FormatError(f"{path}: {what} is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"{path}: {what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {what} is not a JSON object")
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"
