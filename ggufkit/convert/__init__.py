"""A checkpoint or a GGUF file becomes a GGUF file of another file type.

checkpoint.py and requantize.py read a source's headers into a `Job`; `quantize.rules` gives each tensor its type;
everything that can fail is checked; then pipeline.py makes one pass over the source.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ggufkit_formats import blocks, gguf
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.blocks.base import UnknownType
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError
from ggufkit_formats.source import FileSource

from ..compare import Summed
from ..quantize import file_types
from ..quantize import imatrix as importance
from ..quantize.file_types import FileType
from ..quantize.rules import Choice, Overrides, choose, may_quantize, needs_imatrix, order
from ..quantize.ternary import METHODS, TYPES
from . import nf4, outputs
from .job import FILE_TYPE, Input, Job
from .outputs import Output
from .report import Entry, Report

__all__ = ["Entry", "Report", "convert"]

Encode = Callable[..., np.ndarray]  # tensor type, float32 (rows, cols), importance (cols,) or none -> bytes of the rows


def convert(
    source: str | os.PathLike[str],
    type: str,
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    plan: bool = False,
    no_fallback: bool = False,
    allow_requantize: bool = False,
    tensor_types: Sequence[str | tuple[str, str]] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
    pre_tokenizer: str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    ternary: str = "ggml",
    measure: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    started: Callable[[Report], None] | None = None,
) -> Report:
    """Convert a checkpoint or a GGUF file to a file type, byte for byte as llama.cpp's tools do.

    `source`: a checkpoint folder, a .safetensors file with its companions, a GGUF file, or `hf:ORG/REPO`. `type`: a
    file type such as `q4_k_m`. `output`: a file or a folder; by default `<name>-<TYPE>.gguf` in the current folder.
    With `plan` nothing is written, and the report holds the size that the file would have.

    `tensor_types` are "PATTERN=TYPE": a regular expression that is searched in GGUF's tensor names beats the file
    type's rules, but not `output_tensor_type` and `token_embedding_type`; `pure` switches the rules off. Rows that a
    type's blocks do not divide fall back to another type, or with `no_fallback` raise UnsupportedError. Tensors that
    are quantized already need `allow_requantize`. `pre_tokenizer` names the tokenizer's pre-tokenizer where it is not
    recognised. `imatrix` is an importance matrix, from `ggufkit imatrix` or llama-imatrix (in either form): errors in
    columns that matter more count more. Some file types need one. `ternary` is how weights that are not ternary become
    so: as `ggml` does it, with the tensor's mean magnitude as scale (`absmean`, BitNet b1.58), or the best scale of
    each block (`search`); weights that are ternary already stay what they are. With `measure` what is encoded is
    decoded again, and the report holds each tensor's error (relative RMSE, largest difference). `device` is where
    weights are quantized, with the same bytes: `cuda` for the types that a GPU has kernels for, or `cpu`, which `auto`
    is. `progress` is called with (bytes of the source done, bytes in all), `started` with the report before the first
    byte.

    All that can be checked is checked before the first byte is written; NaN and infinities are found on the way and
    raise FormatError naming the tensor. An exception leaves nothing behind. Memory stays bounded whatever the size.
    """
    if ternary not in METHODS:
        raise UsageError(f"--ternary: {ternary!r} is none of {', '.join(METHODS)}")
    if plan and measure:
        raise UsageError("--report measures what is encoded, and with --plan nothing is")
    file_type = _supported(file_types.find(type))
    overrides = Overrides(
        tuple(_override(each) for each in tensor_types),
        output_tensor_type and _encodable(output_tensor_type).name,
        token_embedding_type and _encodable(token_embedding_type).name,
        pure,
    )
    matrix = None if imatrix is None else importance.read(imatrix)
    encoder = None if plan else _encoder(device)
    job = read_source(source, pre_tokenizer)
    try:
        job.inputs.sort(key=lambda each: order(each.name))
        tensors = [(each.name, each.shape) for each in job.inputs]
        choices = choose(file_type, tensors, replace(job.facts, has_imatrix=matrix is not None), overrides)
        _check_choices(job, choices, no_fallback, allow_requantize)
        _check_needed(job, matrix, choices)
        _keep_scales(job, choices)
        made = outputs.of(job, choices, file_type.nested)
        metadata = job.metadata | {FILE_TYPE: np.uint32(max(file_type.id, 0))} | made.metadata
        if file_type.id < 0:
            del metadata[FILE_TYPE]
        if matrix is not None:
            _check_importance(job, matrix, choices, file_type)
            notes = matrix.metadata()
            metadata = {key: value for key, value in metadata.items() if key not in notes} | notes
        planned = gguf.Plan(metadata, made.rows)
        target = _target(output, job.name, file_type)
        report = Report.of(file_type.name, str(target), planned, made.tensors, job.notes)
        if plan:
            return report
        gguf.check_target(target, planned.nbytes, overwrite)
        _check_source(job, target)
        if started is not None:
            started(report)
        errors = _write(made.tensors, planned, target, overwrite, threads, progress, matrix, ternary, measure, encoder)
        return report.with_errors(errors) if measure else report
    finally:
        job.close()


def _write(tensors: list[Output], planned: gguf.Plan, target: Path, overwrite: bool, threads: int | None,
           progress: Callable[[int, int], None] | None, matrix: importance.Imatrix | None,
           ternary: str, measure: bool, encoder: Encode | None) -> list[Summed]:  # fmt: skip
    from ggufkit_kernels.cpu.team import default_threads

    from . import pipeline

    with gguf.Writer(target, planned, overwrite) as writer:
        known = None if matrix is None else matrix.importance
        workers = threads or default_threads()
        return pipeline.write(tensors, planned.tensors, writer, workers, progress, known, ternary, measure, encoder)


def _encoder(device: str) -> Encode | None:
    """What quantizes on that device; None: the CPU's. Raises DeviceError where there is none."""
    if device in ("auto", "cpu"):
        return None
    if device != "cuda":
        raise UsageError(f"unknown device {device!r} (auto, cpu, cuda)")
    from ggufkit_kernels.cuda import cupy_device, encode

    from . import pipeline

    on_device = encode.CudaEncoder(cupy_device.CupyDevice())

    def encoder(kind: TensorType, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        if encode.encodes(kind, importance):
            return on_device.encode(kind, x)
        return pipeline.encode(kind, x, importance)

    return encoder


# -- what to convert -------------------------------------------------------------------------------


def read_source(source: str | os.PathLike[str], pre_tokenizer: str | None = None) -> Job:
    """The source's headers. GgufkitError where there is nothing to convert."""
    name = os.fspath(source)
    if name.startswith("hf:"):
        from .. import sources
        from . import checkpoint

        return checkpoint.read(Path(sources.checkpoint(name)), name.rstrip("/").split("/")[-1], pre_tokenizer)
    path = Path(name)
    if not path.exists():
        hint = f"; for a Hugging Face repository write hf:{name}" if name.count("/") == 1 else ""
        raise GgufkitError(f"{name}: no such file or folder{hint}")
    if path.is_dir() or path.name.endswith((".safetensors", ".safetensors.index.json")):
        from . import checkpoint

        return checkpoint.read(path, None, pre_tokenizer)
    from . import requantize

    return requantize.read(path, None, pre_tokenizer)


def _target(output: str | os.PathLike[str] | None, name: str, file_type: FileType) -> Path:
    default = f"{name}-{file_type.name}.gguf"
    if output is None:
        return Path(default)
    path = Path(output)
    return path / default if path.is_dir() else path


def _check_source(job: Job, target: Path) -> None:
    """Raise UsageError where the new file would take the place of one that it is made from."""
    sources = {each.tensor.source for each in job.inputs if each.tensor is not None}
    files = [source.path for source in sources if isinstance(source, FileSource)]
    if target.exists() and any(target.samefile(path) for path in files):
        raise UsageError(f"{target}: is what the file is made from; give -o another name")


# -- which types -----------------------------------------------------------------------------------

_ACTIVATIONS = ("Q8_1", "Q8_K")  # what matmuls round their inputs to; no file holds weights in them


def _supported(file_type: FileType) -> FileType:
    if file_type.type not in blocks.TYPES:
        raise UnsupportedError(f"file type {file_type.name} cannot be made yet")
    return file_type


def _override(given: str | tuple[str, str]) -> tuple[str, str]:
    """PATTERN=TYPE taken apart."""
    if isinstance(given, str):
        pattern, equals, name = given.rpartition("=")
        if not equals or not pattern or not name:
            raise UsageError(f"--tensor-type: {given!r} should be PATTERN=TYPE, as in attn_v=q8_0")
        given = pattern, name
    return given[0], _encodable(given[1]).name


def _encodable(name: str) -> TensorType:
    """The tensor type, which must be one that weights can be written in."""
    kind = blocks.find(name)
    weights = (kind.is_quantized or kind.name in file_types.PLAIN) and kind.name not in _ACTIVATIONS
    try:
        if weights:
            importance = np.ones(kind.block, np.float32) if kind.needs_importance else None
            kind.encode(np.zeros((0, kind.block), np.float32), importance)
            return kind
    except UnsupportedError:
        pass
    raise UnsupportedError(f"weights cannot be written as {kind.name}")


def _check_choices(job: Job, choices: dict[str, Choice], no_fallback: bool, allow_requantize: bool) -> None:
    """Raise what the chosen types make impossible; resolve those that stay as they are."""
    for each in job.inputs:
        if choices[each.name].type == nf4.NAME:
            choices[each.name] = nf4.fallback(each, choices[each.name])
    fallen = [name for name, choice in choices.items() if choice.fell_back]
    if no_fallback and fallen:
        first = choices[fallen[0]]
        more = f" and {len(fallen) - 1} more" if len(fallen) > 1 else ""
        raise UnsupportedError(
            f"{job.source}: tensor {fallen[0]!r}{more} cannot be {first.asked}: {first.reason} (--no-fallback)"
        )
    again: list[Input] = []
    for each in job.inputs:
        choice = choices[each.name]
        if not job.is_gguf or each.tensor is None:
            choice = choices[each.name] = choice if choice.type else _unquantized(each)
            if each.tensor is not None and each.tensor.type.is_quantized and each.tensor.type.name != choice.type:
                again.append(each)  # by bitsandbytes: there may be no original
        elif not _decodable(each.tensor.type):
            choice = choices[each.name] = Choice(None, None)
        elif choice.type and each.tensor.type.is_quantized and each.tensor.type.name != choice.type:
            again.append(each)
        if choice.type:
            _encodable(choice.type)
    if again and job.is_gguf and not allow_requantize:
        kinds = ", ".join(sorted({each.tensor.type.name for each in again if each.tensor is not None}))
        raise UnsupportedError(
            f"{job.source}: {len(again)} tensors are quantized already ({kinds}), and quantizing again loses "
            "quality; convert from the original, or pass --allow-requantize"
        )
    if again:
        lossy = any(choices[each.name].type not in file_types.PLAIN for each in again)
        end = "are quantized again: quality suffers" if lossy else "become wider: lost precision does not come back"
        job.notes.append(f"{len(again)} tensors that were quantized already {end}")


def _check_importance(job: Job, matrix: importance.Imatrix, choices: dict[str, Choice], file_type: FileType) -> None:
    """Raise FormatError where the matrix is another model's, or lacks a tensor that must have importance."""
    shapes = {each.name: each.shape for each in job.inputs}
    job.notes += importance.check(matrix, shapes, job.source)
    for name, choice in choices.items():
        if needs_imatrix(name, choice.type, file_type) and matrix.importance(name, shapes[name]) is None:
            raise FormatError(f"{matrix.file}: has no importance for {name!r}, which {choice.type} needs")


def _check_needed(job: Job, matrix: importance.Imatrix | None, choices: dict[str, Choice]) -> None:
    """Raise UnsupportedError for a type that is not encoded without importance, where a tensor has none.

    llama-quantize's rules let embedding and output pass, which have no importance as a rule.
    """
    for each in job.inputs:
        kind = blocks.TYPES.get(choices[each.name].type or "")
        if kind is None or not kind.needs_importance:
            continue
        if matrix is None or matrix.importance(each.name, each.shape) is None:
            raise UnsupportedError(f"tensor {each.name!r}: {kind} needs an importance matrix")


def _unquantized(each: Input) -> Choice:
    """What a checkpoint's tensor gets that no file type applies to; matrices that a file type leaves alone: F16."""
    wide = each.tensor is None or each.tensor.type.name not in ("F16", "BF16")
    name = "F32" if wide or not may_quantize(each.name, each.shape) else "F16"
    return Choice(name, name)


def _keep_scales(job: Job, choices: dict[str, Choice]) -> None:
    """Scales that ternary types cannot hold go into tensors of their own; looks at weights, where types are ternary."""
    if any(choice.type in TYPES for choice in choices.values()):
        from . import exact

        exact.keep_scales(job, choices)


def _decodable(kind: TensorType) -> bool:
    """Whether weights can be read from the type; integers and unknown types are carried over as they are."""
    return not isinstance(kind, UnknownType) and (kind.is_quantized or kind.name in (*file_types.PLAIN, "F64"))
