"""Ternary weights of BitNet: packed in safetensors checkpoints (transformers), and in GGUF files of bitnet.cpp.

In a checkpoint, four rows share a byte:

::

    X.weight        uint8 [rows / 4, cols]   byte (r, c):  | row r + 3n : 2 | r + 2n : 2 | r + n : 2 | r : 2 |, column c
                                             n = rows / 4: four bands of rows, not four neighbours
    X.weight_scale  one number               w = (code - 1) * s, code 0, 1 or 2; 3 is not used

s is the scale, or 1 / scale: the checkpoint's configuration tells, which is for whoever reads it.
Source: transformers, integrations/bitnet.py.
"""

from __future__ import annotations

import numpy as np

from .blocks import TensorType, find
from .errors import FormatError, UnsupportedError
from .tensor import Tensor


class Rows:
    """A `Source` of float32 rows that are made when they are read, instead of bytes in a file."""

    def __init__(self, rows: int, cols: int):
        self.rows, self.cols = rows, cols

    def make(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop, float32 (stop - start, cols)."""
        raise NotImplementedError

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 (nbytes,); offset and nbytes are those of whole rows."""
        row = 4 * self.cols
        if not nbytes or not row:
            return np.zeros(nbytes, np.uint8)
        start, stop = offset // row, -(-(offset + nbytes) // row)
        made = np.ascontiguousarray(self.make(start, stop), np.float32).view(np.uint8).reshape(-1)
        return made[offset - start * row : offset - start * row + nbytes]

    view = read

    def tensor(self, name: str) -> Tensor:
        """The rows as a tensor of type F32."""
        kind: TensorType = find("F32")
        return Tensor(name, kind, (self.rows, self.cols), 4 * self.rows * self.cols, 0, self)


class PackedTernary(Rows):
    """The weights of `packed`, a tensor of bytes (rows / 4, cols), with the scale s."""

    def __init__(self, packed: Tensor, scale: float):
        if packed.type.name != "U8" or len(packed.shape) != 2:
            raise UnsupportedError(f"tensor {packed.name!r} is no matrix of bytes, as packed ternary weights are")
        super().__init__(4 * packed.shape[0], packed.shape[1])
        self.packed, self.scale = packed, np.float32(scale)

    def make(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop, float32. FormatError where a code is 3."""
        out = np.empty((stop - start, self.cols), np.float32)
        band = self.rows // 4
        row = start
        while row < stop:
            shift, first = np.uint8(2 * (row // band)), row % band
            n = min(stop - row, band - first)
            raw = self.packed.source.read(self.packed.offset + first * self.cols, n * self.cols)
            codes = raw.reshape(n, self.cols) >> shift & np.uint8(3)
            if codes.max(initial=0) > 2:
                raise FormatError("a code of packed ternary weights is 3; only 0, 1 and 2 are allowed")
            out[row - start : row - start + n] = (codes.astype(np.float32) - np.float32(1)) * self.scale
            row += n
        return out


def pack(codes: np.ndarray) -> np.ndarray:
    """-1, 0 and 1, int8 (4 n, cols) -> uint8 (n, cols): the four bands of n rows, the first in the lowest bits."""
    bands = (codes + 1).astype(np.uint8).reshape(4, len(codes) // 4, codes.shape[1])
    return bands[0] | bands[1] << np.uint8(2) | bands[2] << np.uint8(4) | bands[3] << np.uint8(6)


class I2S(Rows):
    """bitnet.cpp's I2_S, as its converter writes it for x86: ternary codes of a whole tensor, and one scale.

    ::

        32 bytes for 128 weights   byte j:  | x[j] : 2 | x[j + 32] : 2 | x[j + 64] : 2 | x[j + 96] : 2 |
        32 bytes at the end        the scale s, f32, then nothing

    w = (code - 1) * s, code 0, 1 or 2. Read only: the id is that fork's own, and upstream's is another type, removed.
    Files for other processors order the weights differently, and nothing in them says so.
    """

    ID = 36
    TAIL = 32  # bytes

    def __init__(self, tensor: Tensor):
        super().__init__(tensor.rows, tensor.cols)
        self.packed, self.scale = tensor, self._scale(tensor)

    @classmethod
    def holds(cls, tensor: Tensor) -> bool:
        """Whether id, size and scale are those of I2_S, with rows of whole groups."""
        if tensor.type.id != cls.ID or tensor.cols % 128 or len(tensor.shape) != 2 or tensor.byte_order != "<":
            return False
        scale = cls._scale(tensor) if tensor.nbytes == tensor.n_elements // 4 + cls.TAIL else np.float32(0)
        return bool(np.isfinite(scale) and scale > 0)

    @classmethod
    def _scale(cls, tensor: Tensor) -> np.float32:
        return tensor.source.read(tensor.offset + tensor.n_elements // 4, 4).view("<f4")[0]

    def make(self, start: int, stop: int) -> np.ndarray:
        """Rows start…stop, float32. FormatError where a code is 3."""
        row = self.cols // 4
        raw = self.packed.source.read(self.packed.offset + start * row, (stop - start) * row).reshape(-1, 1, 32)
        codes = raw >> np.array([6, 4, 2, 0], np.uint8)[:, None] & np.uint8(3)
        if codes.max(initial=0) > 2:
            raise FormatError("a code of I2_S is 3; only 0, 1 and 2 are allowed")
        return ((codes.astype(np.float32) - np.float32(1)) * self.scale).reshape(stop - start, self.cols)
