"""Tensors without a file: encoded numbers, random blocks, and a type made of whatever `Quants` a test wants."""

from __future__ import annotations

import numpy as np
from ggufkit_formats.blocks import Quants, TensorType
from ggufkit_formats.tensor import Tensor


class Memory:
    """A `Source` over an array; it counts the bytes of the largest read."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.largest = 0

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        return self.data[offset : offset + nbytes]

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        self.largest = max(self.largest, nbytes)
        return self.data[offset : offset + nbytes].copy()


def from_raw(type: TensorType, raw: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    flat = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
    return Tensor("t", type, shape, flat.nbytes, 0, Memory(flat))


def encoded(type: TensorType, x: np.ndarray) -> Tensor:
    """x (rows, cols) encoded as `type`."""
    return from_raw(type, type.encode(x), x.shape)


def random_blocks(type: TensorType, rows: int, cols: int, rng: np.random.Generator) -> Tensor:
    """Every bit random, except that floats are small numbers: codes and scales that no encoder writes."""
    nbytes = rows * type.row_nbytes(cols)
    blocks = rng.integers(0, 256, nbytes, dtype=np.uint8).view(type.fields)
    if type.fields.names is None:
        if type.fields.kind == "f" or type.name == "BF16":
            return encoded(type, rng.standard_normal((rows, cols)).astype(np.float32))
    else:
        for name in type.fields.names:
            field = blocks[name]
            if name == "e":  # an exponent: as small as the floats
                field[...] = rng.integers(118, 124, field.shape)
            if field.dtype.kind == "f":
                field[...] = rng.uniform(-0.1, 0.1, field.shape)
        if type.name == "IQ1_M":  # the upper bits of its d are those of the last scales: from -0.12 to 0.12
            blocks["scales"][:, 3] = blocks["scales"][:, 3] & 0x8FFF | 0x2000
    return from_raw(type, blocks, (rows, cols))


def decoded(tensor: Tensor) -> np.ndarray:
    """The weights, float64 (rows, cols)."""
    return tensor.type.decode(tensor.read_rows(0, tensor.rows)).astype(np.float64)


class MadeUp(TensorType):
    """A type whose blocks hold codes and scales plainly; not registered."""

    def __init__(
        self,
        bits: int,
        block: int,
        group: int,
        offset: int = 0,
        scale: str = "",
        dmin: bool = False,
        minimum: bool = False,
        codebook: np.ndarray | None = None,
        d: str = "<f2",
    ):
        self.name, self.block = f"MADE_UP_{bits}", block
        self.bits, self.group, self.offset, self.codebook = bits, group, offset, codebook
        fields: list[tuple] = [("d", d), ("codes", "u1", (block,))]
        fields += [("scale", scale, (block // group,))] if scale else []
        fields += [("dmin", d)] if dmin else []
        fields += [("minimum", "u1", (block // group,))] if minimum else []
        self.fields = np.dtype(fields)

    def quants(self, blocks: np.ndarray) -> Quants:
        def optional(name: str) -> np.ndarray | None:
            return blocks[name] if name in (self.fields.names or ()) else None

        dmin = optional("dmin")
        return Quants(
            blocks["codes"] & np.uint8((1 << self.bits) - 1),
            self.bits,
            self.offset,
            self.group,
            blocks["d"].astype(np.float32),
            optional("scale"),
            None if dmin is None else dmin.astype(np.float32),
            optional("minimum"),
            self.codebook,
        )
