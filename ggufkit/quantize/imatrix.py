"""Importance matrices: how much each column of a weight matters, as llama.cpp's tools store and use it.

A tensor's entry holds the sums of its squared inputs, a value a column, and the number of input rows that were added
up; their quotient, the mean square, is what the encoders take as importance. Matrices of several experts (three
dimensions) have a row of sums for each.

GGUF form (`general.type` "imatrix"): F32 tensors `NAME.in_sum2` (matrices, cols) and `NAME.counts` (matrices, 1) or
(1, 1). Older form (.dat), little endian: int32 entries; for each int32 length, name, int32 calls, int32 values,
float32 mean squares * calls; then, where the file goes on, int32 chunks, int32 length, name of the dataset.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ggufkit_formats import gguf
from ggufkit_formats.errors import FormatError, GgufkitError
from ggufkit_formats.gguf_strings import quote
from ggufkit_formats.tensor import Tensor

from . import rules

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
LEGACY_CHUNK = 512  # tokens in a call of the older form, which does not say
FEW_TOKENS = 10_000  # fewer make a noisy estimate: llama.cpp's own matrices are usually made from 50,000 and more
MAX_VALUE = 127  # bytes of a text that llama-quantize notes in a file


@dataclass(slots=True)
class Entry:
    """What went into one tensor: sums of squares (n,) float32, all matrices' one after the other, and rows added."""

    sums: np.ndarray  # float32 (matrices * cols,)
    counts: np.ndarray  # int64 (matrices,), or (1,) for all together

    def importance(self) -> np.ndarray:
        """Mean squares, float32 (matrices * cols,); ones where nothing was counted, as in llama-quantize."""
        sums = self.sums.reshape(len(self.counts), -1)
        counts = self.counts.astype(np.float32)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(counts > 0, sums / counts, np.float32(1)).reshape(-1)


@dataclass(slots=True)
class Imatrix:
    """An importance matrix: entries by the names of weights, and what they were made from."""

    entries: dict[str, Entry]
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = LEGACY_CHUNK  # tokens
    file: str = "importance matrix"  # for messages

    def importance(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """float32 (matrices, cols) for the tensor of that name and shape (NumPy order); None without an entry.

        A token embedding whose entry has another size counts as one without: llama.cpp ignores those, too.
        Raises FormatError for another tensor of another size.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        cols, matrices = shape[-1], shape[-3] if len(shape) > 2 else 1
        if entry.sums.size != cols * matrices:
            if rules.role(name) == "token_embd":
                return None
            stack = f" in {matrices} matrices" if matrices > 1 else ""
            raise FormatError(
                f"{self.file}: holds {entry.sums.size} values for {quote(name)}, which has {cols} columns{stack}: "
                "it was made for another model"
            )
        return entry.importance().reshape(matrices, cols)

    def metadata(self) -> dict[str, Any]:
        """What llama-quantize notes in a file that it makes with this matrix, typed."""
        notes: dict[str, Any] = {"quantize.imatrix.file": _short(self.file)}
        if self.datasets:
            notes["quantize.imatrix.dataset"] = _short(self.datasets[0])
        notes["quantize.imatrix.entries_count"] = np.uint32(len(self.entries))
        if self.chunk_count > 0:
            notes["quantize.imatrix.chunks_count"] = np.uint32(self.chunk_count)
        return notes


def _short(text: str) -> str:
    return os.fsencode(text)[:MAX_VALUE].decode("utf-8", "ignore")


# -- reading ---------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Imatrix:
    """Read a file of either form. Raises FormatError where it is broken or holds something else."""
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise GgufkitError(f"{name}: {error.strerror or error}") from None
    found = _read_gguf(name) if magic == b"GGUF" else _read_legacy(name)
    for tensor, entry in found.entries.items():
        if not (np.isfinite(entry.sums) & (entry.sums >= 0)).all():
            raise FormatError(f"{name}: the values of {quote(tensor)} are not all finite and positive")
        if not len(entry.counts) or entry.sums.size % len(entry.counts) or not entry.sums.size:
            raise FormatError(
                f"{name}: {quote(tensor)} has {entry.sums.size} values and {len(entry.counts)} counts: they do not fit"
            )
    return found


def _read_gguf(name: str) -> Imatrix:
    with gguf.open(name) as file:
        keys = (DATASETS, CHUNK_COUNT, CHUNK_SIZE)
        missing = [key for key in keys if key not in file.metadata]
        names = {s: [t.removesuffix(s) for t in file.tensors if t.endswith(s)] for s in (SUMS, COUNTS)}
        if missing or not names[SUMS]:
            what = f"metadata {missing[0]!r} is missing" if missing else f"no tensor is named *{SUMS}"
            raise FormatError(f"{name}: not an importance matrix: {what}")
        lone = sorted(set(names[SUMS]) ^ set(names[COUNTS]))
        if lone:
            raise FormatError(f"{name}: {quote(lone[0])} has {SUMS} or {COUNTS}, and both are needed")
        entries = {}
        for tensor in names[SUMS]:
            sums, counts = (_values(name, file.tensors[tensor + suffix]) for suffix in (SUMS, COUNTS))
            if not (np.isfinite(counts) & (counts >= 0) & (counts < 2**62)).all():
                raise FormatError(f"{name}: the counts of {quote(tensor)} are no counts")
            entries[tensor] = Entry(sums, np.floor(counts.astype(np.float64) + 0.5).astype(np.int64))
        datasets = file.metadata[DATASETS]
        if not isinstance(datasets, gguf.StringArray):
            raise FormatError(f"{name}: metadata {DATASETS!r} is {file.metadata.type_name(DATASETS)}, not strings")
        count, size = (file.metadata[key] for key in (CHUNK_COUNT, CHUNK_SIZE))
        if type(count) is not int or type(size) is not int or count < 0 or size < 1:
            raise FormatError(f"{name}: {CHUNK_COUNT} and {CHUNK_SIZE} are {count} and {size}, not two counts")
        return Imatrix(entries, list(datasets), count, size, name)


def _values(name: str, tensor: Tensor) -> np.ndarray:
    if tensor.type != "F32":
        raise FormatError(f"{name}: {quote(tensor.name)} is {tensor.type}; it must be F32")
    return np.array(tensor.dequantize(), np.float32).reshape(-1)


def _read_legacy(name: str) -> Imatrix:
    """The older form; values become sums, as llama-imatrix reads them."""
    with Path(name).open("rb") as file:
        return _parse_legacy(name, file, os.fstat(file.fileno()).st_size)


def _parse_legacy(name: str, file: BinaryIO, size: int) -> Imatrix:
    at = 0

    def take(n: int, what: str) -> bytes:
        """The next n bytes; anything may be given as a matrix, so no more is read than makes sense."""
        nonlocal at
        data = file.read(n) if 0 <= n <= size - at else b""
        if n < 0 or len(data) != n:
            raise FormatError(f"{name}: not an importance matrix: {what} at {at} needs {n} bytes of {size}")
        at += n
        return data

    def number(what: str) -> int:
        return struct.unpack("<i", take(4, what))[0]

    entries: dict[str, Entry] = {}
    n_entries = number("the number of entries")
    if not 1 <= n_entries <= size // 16:
        raise FormatError(f"{name}: not an importance matrix: says it has {n_entries} entries in {size} bytes")
    for i in range(n_entries):
        tensor = take(number(f"the length of name {i}"), f"name {i}").decode("utf-8", "replace")
        calls, n_values = number(f"the calls of entry {i}"), number(f"the size of entry {i}")
        values = np.frombuffer(take(4 * n_values, f"the values of {quote(tensor)}"), "<f4").astype(np.float32)
        count = np.array([max(calls, 1) * LEGACY_CHUNK], np.int64)
        entries[tensor] = Entry(values * np.float32(LEGACY_CHUNK), count)
    chunks, datasets = 0, []
    if at < size:
        chunks = number("the number of chunks")
        length = number("the length of the dataset's name") if at < size else 0
        if length > 0:
            datasets.append(take(length, "the dataset's name").decode("utf-8", "replace"))
    return Imatrix(entries, datasets, max(chunks, 0), LEGACY_CHUNK, name)


# -- making, merging and writing -------------------------------------------------------------------


def of_activations(
    sums: Mapping[str, np.ndarray], counts: Mapping[str, int], n_chunks: int, chunk_size: int, dataset: str
) -> Imatrix:
    """From sums of squared inputs (cols,) and counts by the names of weights, and the name of the text."""
    entries = {name: Entry(each.astype(np.float32), np.array([counts[name]], np.int64)) for name, each in sums.items()}
    return Imatrix(entries, [dataset], n_chunks, chunk_size)


def merged(matrices: Iterable[Imatrix], chunk_size: int | None = None) -> Imatrix:
    """Sums and counts of several matrices added up, in their order. Raises FormatError where sizes differ."""
    listed = list(matrices)
    out = Imatrix({}, [], 0, chunk_size or listed[-1].chunk_size, listed[0].file)
    for matrix in listed:
        for name, entry in matrix.entries.items():
            known = out.entries.get(name)
            if known is None:
                out.entries[name] = Entry(entry.sums.copy(), entry.counts.copy())
                continue
            counts = [known.counts, entry.counts]
            n = max(map(len, counts))
            if known.sums.size != entry.sums.size or any(len(c) not in (1, n) for c in counts):
                raise FormatError(
                    f"{matrix.file}: {quote(name)} has {entry.sums.size} values for {len(entry.counts)} matrices, and "
                    f"{known.sums.size} for {len(known.counts)} in {out.file}: not of one model"
                )
            known.sums += entry.sums
            known.counts = np.broadcast_to(counts[0], n) + np.broadcast_to(counts[1], n)
        out.datasets += matrix.datasets
    most = max((int(entry.counts.max()) for entry in out.entries.values()), default=0)
    out.chunk_count = most // out.chunk_size
    return out


def plan(matrix: Imatrix) -> gguf.Plan:
    """The plan of the GGUF form: keys and tensors in the order in which llama-imatrix writes them."""
    metadata = {
        "general.type": "imatrix",
        DATASETS: gguf.StringArray.of(matrix.datasets),
        CHUNK_COUNT: np.uint32(matrix.chunk_count),
        CHUNK_SIZE: np.uint32(matrix.chunk_size),
    }
    tensors = []
    for name in sorted(matrix.entries, key=str.encode):
        entry = matrix.entries[name]
        n = len(entry.counts)
        cols = entry.sums.size // n
        # ggml writes no trailing dimension of 1
        tensors.append((name + SUMS, "F32", (n, cols) if n > 1 else (cols,)))
        tensors.append((name + COUNTS, "F32", (n, 1) if n > 1 else (1,)))
    return gguf.Plan(metadata, tensors)


def write(matrix: Imatrix, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write the GGUF form. An existing file is refused without `overwrite`."""
    planned = plan(matrix)
    gguf.check_target(Path(path), planned.nbytes, overwrite)
    with gguf.Writer(Path(path), planned, overwrite) as writer:
        for name in sorted(matrix.entries, key=str.encode):
            entry = matrix.entries[name]
            writer.write(name + SUMS, entry.sums.astype("<f4").view(np.uint8))
            writer.write(name + COUNTS, entry.counts.astype("<f4").view(np.uint8))


# -- does it fit a model? --------------------------------------------------------------------------


def check(matrix: Imatrix, shapes: Mapping[str, tuple[int, ...]], model: str) -> list[str]:
    """Compare with a model's tensors (name -> shape in NumPy order). Returns notes on what has no importance.

    Raises FormatError where the matrix was made for another model: entries that the model lacks, entries of another
    size, layers that it knows nothing of. (llama-quantize would go on in the first and the last case.)
    """
    wrong = f"{matrix.file}: was made for another model than {model}"
    for name in matrix.entries:
        if name.startswith("blk.") and name not in shapes:
            raise FormatError(f"{wrong}, which has no tensor {quote(name)}")
    matrices = {name: shape for name, shape in shapes.items() if rules.may_quantize(name, shape)}
    for name, shape in matrices.items():
        matrix.importance(name, shape)
    in_layers = [name for name in matrices if name.startswith("blk.")]
    without = [name for name in in_layers if name not in matrix.entries]
    # layers that predict further tokens are not run where a matrix is made
    layers = {rules.layer(name) for name in in_layers} - {rules.layer(name) for name in shapes if ".nextn." in name}
    unknown = sorted(layers - {rules.layer(name) for name in matrix.entries})
    if unknown or not matrix.entries:
        raise FormatError(f"{wrong}: it knows nothing of layer {unknown[0] if unknown else 0}")
    if not without:
        return []
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    return [f"{matrix.file} has no importance for {without[0]}{more}: quantized without"]


# -- how good is it? -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much one tensor's importance is built on."""

    name: str
    cols: int
    matrices: int
    tokens: int  # rows of the matrix that has most
    fewest: int  # of the matrix that has fewest
    covered: float  # share of columns, of all matrices, that had any input but zeros
    mean: float  # of the mean squares
    largest: float


def coverage(matrix: Imatrix) -> list[Coverage]:
    """A row for each tensor, by layer and name."""
    rows = []
    for name, entry in sorted(matrix.entries.items(), key=lambda item: rules.order(item[0])):
        matrices = len(entry.counts)
        values = entry.importance().astype(np.float64)
        covered = float(np.mean(entry.sums > 0))
        rows.append(Coverage(
            name, entry.sums.size // matrices, matrices, int(entry.counts.max()), int(entry.counts.min()), covered,
            float(values.mean()), float(values.max()),
        ))  # fmt: skip
    return rows


def warnings(matrix: Imatrix) -> list[str]:
    """What makes the matrix doubtful, one line each."""
    rows = coverage(matrix)
    lines = []
    tokens = max((row.tokens for row in rows), default=0)
    if tokens < FEW_TOKENS:
        lines.append(f"only {tokens} tokens: below {FEW_TOKENS} importance is noisy; take a longer text")
    empty = [row for row in rows if row.fewest == 0]
    if empty:
        n = sum(int((matrix.entries[row.name].counts == 0).sum()) for row in empty)
        lines.append(f"{n} matrices in {len(empty)} tensors had no input at all, {empty[0].name} the first")
    few = [row for row in rows if 0 < row.fewest < FEW_TOKENS / 10 and row.matrices > 1]
    if few:
        lines.append(f"{len(few)} tensors have experts that saw few tokens, {few[0].name} the first: {few[0].fewest}")
    bare = [row for row in rows if row.covered < 0.99 and row.fewest > 0]
    if bare:
        share = math.floor(1000 * (1 - bare[0].covered)) / 10
        lines.append(f"{len(bare)} tensors have columns without input, {bare[0].name} the first: {share} % of them")
    return lines
