"""One pass over the source, in slabs of rows: read, decode, reorder, encode on threads; written in order.

Each worker takes a slab through all its steps alone, so threads share nothing, and memory is bounded by the number of
slabs in flight. Slabs are read with pread: mapped pages would count as the process's memory.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.errors import FormatError, GgufkitError
from ggufkit_formats.gguf import Planned, Writer
from ggufkit_formats.tensor import Tensor
from ggufkit_runtime.models import permuted_rows

from ..compare import Summed
from ..quantize import ternary
from .job import Input
from .outputs import Output

MEMORY = 320 << 20  # bytes that slabs in flight may take, all together
PER_WEIGHT = 16  # bytes that a weight takes on its way: as read, as float32 twice, as written
LARGEST = 1 << 22  # weights in a slab; more gains nothing

_LARGEST_FINITE = {"F16": 0x7BFF, "BF16": 0x7F7F}  # bits without the sign

K = TypeVar("K")
Progress = Callable[[int, int], None]  # bytes of the source done, bytes in all
Made = Callable[[], np.ndarray]
Step = Callable[[Summed | None], np.ndarray]  # adds, where asked to, what it encoded beside what that was made from
Importance = Callable[[str, tuple[int, ...]], np.ndarray | None]  # name, shape -> (matrices, cols), if there is any
Encode = Callable[..., np.ndarray]  # as `encode` below


def write(
    outputs: list[Output],
    planned: list[Planned],
    writer: Writer,
    threads: int,
    progress: Progress | None,
    importance: Importance | None = None,
    method: str = "ggml",
    measure: bool = False,
    encoder: Encode | None = None,
) -> list[Summed]:
    """Write all tensors, in the plan's order. Raises FormatError naming a tensor whose values cannot be written.

    `method` is one of ternary.METHODS, for ternary types. With `measure` what was encoded is decoded again, slab by
    slab, and its errors are returned, for each output; without, they are empty. `encoder` takes the place of `encode`.
    """
    total = sum(_nbytes(each.input) for each in outputs)
    done = 0
    # with importance a weight takes as much again, for the weights of its errors; measuring takes no more than that
    weights = slab_weights(threads) if importance is None and not measure else slab_weights(threads) // 2
    errors = [Summed() for _ in outputs]

    def steps() -> Iterator[tuple[tuple[int, Planned, Summed | None], int, Made]]:
        for k, plan, nbytes, step in _steps(outputs, planned, weights, importance, method, measure, encoder or encode):
            error = Summed() if measure else None
            yield (k, plan, error), nbytes, partial(step, error)

    with contextlib.closing(in_order(steps(), threads)) as made:
        for (k, plan, error), nbytes, data in made:
            if data.size:
                writer.write(plan.name, data)
            if error is not None:
                errors[k].merge(error)
            done += nbytes
            if progress is not None:
                progress(done, total)
    return errors


def in_order(steps: Iterable[tuple[K, int, Made]], threads: int) -> Generator[tuple[K, int, np.ndarray], None, None]:
    """(key, bytes of the source, what the step made) of each step, in their order; threads work ahead, a little."""
    waiting: deque[tuple[K, int, Future[np.ndarray]]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="convert")
    try:
        for key, nbytes, step in steps:
            waiting.append((key, nbytes, pool.submit(step)))
            while len(waiting) > threads + 1:
                key, nbytes, future = waiting.popleft()
                yield key, nbytes, future.result()
        for key, nbytes, future in waiting:
            yield key, nbytes, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def slab_weights(threads: int) -> int:
    """Weights in a slab, such that all slabs in flight stay within MEMORY."""
    return max(1 << 14, min(LARGEST, MEMORY // PER_WEIGHT // (threads + 2)))


def _nbytes(each: Input) -> int:
    return each.tensor.nbytes if each.tensor is not None else 4 * each.n_elements


def _steps(
    outputs: list[Output],
    planned: list[Planned],
    weights: int,
    importance: Importance | None,
    method: str,
    measure: bool,
    encoder: Encode,
) -> Iterator[tuple[int, Planned, int, Step]]:
    """(output, tensor, bytes of the source, what makes its next bytes), in order."""
    plans = iter(planned)
    for k, each in enumerate(outputs):
        parts = list(itertools.islice(plans, len(each.rows)))
        if each.nf4 is not None:
            for plan, nbytes, step in each.nf4.steps(parts, weights, measure):
                yield k, plan, nbytes, _named(each.input, step)
            continue
        columns = None
        if importance is not None and len(each.input.shape) > 1 and parts[0].type.uses_importance:
            columns = importance(each.input.name, each.input.shape)
        for nbytes, step in _of(each.input, parts[0].type, weights, columns, method, encoder):
            yield k, parts[0], nbytes, _named(each.input, step)


def _of(
    each: Input, kind: TensorType, weights: int, importance: np.ndarray | None, method: str, encoder: Encode
) -> Iterator[tuple[int, Step]]:
    tensor = each.tensor
    if tensor is None:
        yield 4 * each.n_elements, partial(_computed, each, kind)
    elif kind.id == tensor.type.id and kind.name == tensor.type.name and not each.head_rows and not each.scale:
        yield from _copies(tensor, weights)
    else:
        rows, cols = (tensor.rows, tensor.cols) if len(each.shape) > 1 else (1, each.n_elements)
        unit = max(1, each.head_rows) if rows > 1 else 1
        step = max(unit, weights // max(1, cols) // unit * unit)
        if each.scale:
            how = lambda x: encode(kind, np.sign(x))  # noqa: E731
        else:
            how = ternary.encoder(method, kind, lambda: chunks(tensor, weights)) or partial(encoder, kind)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield share(tensor, start, stop), _slab(each, kind, start, stop, how, importance)


def _computed(each: Input, kind: TensorType, error: Summed | None) -> np.ndarray:
    assert each.values is not None
    x = each.values.reshape(1, -1)
    raw = encode(kind, x)
    if error is not None:
        error.add_encoded(kind, raw, x)
    return raw


def chunks(tensor: Tensor, weights: int) -> Iterator[np.ndarray]:
    """All of a tensor's rows as float32, about that many weights at a time."""
    for start, stop in tensor.slabs(4 * weights):
        yield tensor.type.decode(tensor.read_rows(start, stop))


def _slab(each: Input, kind: TensorType, start: int, stop: int, how: Callable[..., np.ndarray],
          importance: np.ndarray | None) -> Step:  # fmt: skip
    """Rows start…stop of the tensor as `how` encodes them. With `head_rows`, slabs are whole heads."""
    tensor, head_rows = each.tensor, each.head_rows
    assert tensor is not None

    def encoded(x: np.ndarray) -> np.ndarray:
        if importance is None:
            return how(x)
        # a stack of matrices has an importance for each: rows of several stand in a slab
        rows = each.shape[-2]
        parts = [
            how(x[max(i * rows - start, 0) : (i + 1) * rows - start], importance[i])
            for i in range(start // rows, -(-stop // rows))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def run(error: Summed | None) -> np.ndarray:
        x = decoded(tensor, start, stop, head_rows)
        raw = encoded(x)
        if error is not None:
            error.add_encoded(kind, raw, x, each.scale or 1.0)
        return raw

    return run


def decoded(tensor: Tensor, start: int, stop: int, head_rows: int) -> np.ndarray:
    """Rows start…stop in the order of the new file, float32 (stop - start, cols)."""
    x = tensor.type.decode(tensor.read_rows(start, stop))
    if head_rows and len(tensor.shape) == 1:
        return x[:, permuted_rows(x.shape[1], x.shape[1] // head_rows)]
    if head_rows:
        return x[permuted_rows(stop - start, (stop - start) // head_rows)]
    return x


def share(tensor: Tensor, start: int, stop: int) -> int:
    """Bytes of the source that rows start…stop take."""
    return tensor.nbytes * stop // tensor.rows - tensor.nbytes * start // tensor.rows


def encode(kind: TensorType, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 (rows, cols) -> uint8 (rows, bytes per row). FormatError for what no file should hold.

    `importance` (cols,) is used by the types that can.
    """
    if kind.is_quantized:
        from ggufkit_kernels.cpu.encode import encode as fast

        return fast(kind, x, importance, threads=1)
    raw = kind.encode(x)
    check_plain(kind, raw, x)
    return raw


def check_plain(kind: TensorType, raw: np.ndarray, x: np.ndarray | None = None) -> None:
    """Refuse NaN and infinities among plain numbers (uint8 bytes of `kind`)."""
    if kind.name in _LARGEST_FINITE:
        magnitudes = raw.view(np.uint16) & np.uint16(0x7FFF)  # ten times as fast as isfinite on halves
        if not magnitudes.size or magnitudes.max() <= _LARGEST_FINITE[kind.name]:
            return
    elif kind.name not in ("F32", "F64") or np.isfinite(raw.view(kind.fields)).all():
        return
    if x is not None and np.isfinite(x).all():
        raise FormatError(f"weights up to {np.abs(x).max():.6g} are too large for {kind.name}")
    raise FormatError("NaN or infinite weights")


def _copies(tensor: Tensor, weights: int) -> Iterator[tuple[int, Step]]:
    """The tensor's own bytes, little endian, in pieces."""
    try:
        row = tensor.row_nbytes
    except GgufkitError:  # a type of unknown size
        row = 0
    if not row or row * tensor.rows != tensor.nbytes:
        if tensor.byte_order != "<":
            raise FormatError(f"type {tensor.type} in a big-endian file: its byte order is unknown")
        step = 4 * weights
        for start in range(0, tensor.nbytes, step):
            n = min(step, tensor.nbytes - start)
            yield n, lambda _, start=start, n=n: tensor.source.read(tensor.offset + start, n)
        return
    step = max(1, weights // max(1, tensor.cols))
    for start in range(0, tensor.rows, step):
        stop = min(start + step, tensor.rows)
        yield (stop - start) * row, partial(_copied, tensor, start, stop)


def _copied(tensor: Tensor, start: int, stop: int, error: Summed | None) -> np.ndarray:
    raw = tensor.read_rows(start, stop)
    if error is not None and tensor.type.fields.kind != "i":  # no error, but it counts in that of all weights
        x = tensor.type.decode(raw)
        error.add(x, x)
    if tensor.type.is_quantized:
        tensor.type.check_scales(raw.reshape(-1).view(tensor.type.fields))
    else:
        check_plain(tensor.type, raw)
    return raw


def _named(each: Input, step: Step) -> Step:
    def run(error: Summed | None) -> np.ndarray:
        try:
            return step(error)
        except FormatError as reason:
            raise FormatError(f"{each.label}: {reason}") from None

    return run
