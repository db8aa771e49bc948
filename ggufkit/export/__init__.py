"""A GGUF file becomes a Hugging Face checkpoint: the way back of `convert`.

parts.py reads the file's headers by its architecture's table; dtypes.py says what each tensor becomes, outputs.py makes
its bytes; settings.py and the runtime's `tokenizer.to_hf` write what stands beside the weights.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ggufkit_formats import gguf
from ggufkit_formats.errors import FormatError, GgufkitError
from ggufkit_formats.safetensors_writer import Planned, Writer, shards

from . import dtypes, folder, parts, settings
from .outputs import Output, Piece

__all__ = ["Entry", "Report", "export"]

SHARD = 5_000_000_000  # bytes in a file of tensors, at most, as transformers has it
Progress = Callable[[int, int], None]  # bytes of the source done, bytes in all


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]  # rows, cols
    dtype: str  # of safetensors; NF4 or FP4 where several tensors stand for it
    nbytes: int
    source: str  # the tensor in the file
    source_type: str


@dataclass(frozen=True, slots=True)
class Report:
    """`n_bytes` is the size of the files of tensors."""

    output: str
    dtype: str
    n_bytes: int
    files: list[str]
    tensors: list[Entry]
    notes: list[str] = field(default_factory=list)  # what the user should know

    def as_json(self) -> dict[str, Any]:
        tensors = [
            {"name": each.name, "shape": each.shape, "dtype": each.dtype, "nbytes": each.nbytes,
             "source": each.source, "source_type": each.source_type}
            for each in self.tensors
        ]  # fmt: skip
        head = {"output": self.output, "dtype": self.dtype, "n_bytes": self.n_bytes, "files": self.files}
        return head | {"notes": self.notes, "tensors": tensors}


def export(
    file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    dtype: str = "bf16",
    *,
    overwrite: bool = False,
    shard_size: int = SHARD,
    threads: int | None = None,
    progress: Progress | None = None,
    started: Callable[[Report], None] | None = None,
) -> Report:
    """Write the model in a GGUF file as a Hugging Face checkpoint: safetensors, config.json and tokenizer.

    `output` is a folder that is not there yet, or empty; with `overwrite` one that holds a checkpoint is replaced.
    `dtype`: bf16, f16 or f32; nf4, nf4_dq, fp4 or fp4_dq make the matrices inside the blocks those of bitsandbytes (dq:
    with nested maxima; NF4 tensors keep their codes), packed makes ternary ones packed BitNet matrices. A file of
    tensors has at most `shard_size` bytes, if no tensor is larger. `progress` is called with (bytes of the source done,
    bytes in all), `started` with the report before the first byte.

    Raises UnsupportedError for an architecture, tokenizer or setting that cannot be written, FormatError where the file
    is not what it says, or weights are not finite or too large. An exception leaves nothing behind; memory is bounded.
    """
    kind = dtypes.find(dtype)
    target = Path(output)
    folder.check(target, 0, overwrite)
    with gguf.open(file) as opened:
        source = parts.read(opened)
        made, notes = kind.outputs(source.parts)
        texts = _texts(source, kind, str(file))
        files = shards([each.planned for each in made], shard_size)
        report = _report(target, kind.name, made, len(files), texts, notes)
        folder.check(target, report.n_bytes, overwrite)
        if started is not None:
            started(report)
        with folder.Folder(target, overwrite) as new:
            place, n_bytes = _tensors(new.path, made, files, threads, progress)
            if len(files) > 1:
                index = {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(place.items()))}
                texts["model.safetensors.index.json"] = _json(index)
            for name, content in texts.items():
                new.write(name, content)
    return replace(report, n_bytes=n_bytes)  # JSON texts may be shorter than their room


def _texts(source: parts.Source, kind: dtypes.Dtype, where: str) -> dict[str, bytes]:
    """All files but those of tensors."""
    from ggufkit_runtime.tokenizer import to_hf

    out = {"config.json": _json(settings.config(source, kind, where))}
    try:
        out["generation_config.json"] = _json(settings.generation(source.metadata))
        return out | to_hf.files(source.metadata, source.config.n_ctx_train)
    except GgufkitError as error:
        raise type(error)(f"{where}: {error}") from None


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def _names(n: int) -> list[str]:
    if n == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]


def _report(target: Path, dtype: str, made: Sequence[Output], n_files: int, texts: dict[str, bytes],
            notes: list[str]) -> Report:  # fmt: skip
    entries = [
        Entry(each.part.name, each.part.shape, each.dtype, sum(t.nbytes for t in each.planned), each.part.tensor.name,
              each.part.tensor.type.name)
        for each in made
    ]  # fmt: skip
    names = _names(n_files) + (["model.safetensors.index.json"] if n_files > 1 else [])
    n_bytes = sum(each.nbytes for each in entries)
    return Report(str(target), dtype, n_bytes, [*names, *texts], entries, notes)


def _tensors(path: Path, made: Sequence[Output], files: list[list[Planned]], threads: int | None,
             progress: Progress | None) -> tuple[dict[str, str], int]:  # fmt: skip
    """Write the files of tensors; tensor -> file, and the bytes of all tensors."""
    from ggufkit_kernels.cpu.team import default_threads

    from ..convert import pipeline

    threads = threads or default_threads()
    total, done = sum(each.part.tensor.nbytes for each in made), 0
    place: dict[str, str] = {}
    n_bytes = 0
    left = list(made)
    for name, planned in zip(_names(len(files)), files, strict=True):
        held = {tensor.name for tensor in planned}
        place |= dict.fromkeys(held, name)
        here = [each for each in left if each.part.name in held]
        left = [each for each in left if each.part.name not in held]
        pieces = (piece for each in here for piece in _named(each, pipeline.slab_weights(threads)))
        with (
            Writer(path / name, planned, {"format": "pt"}) as writer,
            contextlib.closing(pipeline.in_order(pieces, threads)) as steps,
        ):
            for tensor, nbytes, data in steps:
                writer.write(tensor, data)
                n_bytes += data.nbytes
                done += nbytes
                if progress is not None:
                    progress(done, total)
    return place, n_bytes


def _named(each: Output, n_weights: int) -> Iterator[Piece]:
    """The pieces, whose errors name the tensor."""
    for name, nbytes, step in each.pieces(n_weights):

        def run(step: Callable[[], Any] = step) -> Any:
            try:
                return step()
            except FormatError as error:
                raise FormatError(f"{each.part.label}: {error}") from None

        yield name, nbytes, run
