"""What an architecture file is made of: tensor tables, and settings read as required, optional or must-be."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.errors import FormatError, UnsupportedError
from ggufkit_formats.gguf_strings import quote

_MISSING = object()
_LARGEST = float(np.finfo(np.float32).max)  # of a setting: GGUF and the kernels hold them as float32

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def shown(value: Any) -> str:
    """A setting's value as error messages show it: at most a line, however large it is."""
    return _repr.repr(value)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an architecture: convert reads the row from Hugging Face to GGUF, the runtime back."""

    gguf: str  # full name in GGUF: "blk.0.attn_q.weight"
    hf: tuple[str, ...]  # full names it may have in a checkpoint; () if it is computed, not stored
    shape: tuple[int, ...]  # NumPy order
    optional: bool = False
    permute_heads: int = 0  # > 0: rows of each of that many heads go from halves to pairs, see `permuted_rows`
    values: np.ndarray | None = None  # a computed tensor's values, float32

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1


def permuted_rows(n_rows: int, n_heads: int) -> np.ndarray:
    """Order in which a checkpoint's rows are written for architectures whose GGUF form rotates pairs.

    Hugging Face keeps the two halves of a head's rotary dimensions apart (row i and row i + head_dim/2 rotate
    together), GGUF's `llama` puts them side by side. Row j of the GGUF tensor is row `permuted_rows(…)[j]`.
    """
    if n_rows % (2 * n_heads):
        raise FormatError(f"{n_rows} rows cannot be split into {n_heads} heads of pairs")
    return np.arange(n_rows).reshape(n_heads, 2, n_rows // n_heads // 2).swapaxes(1, 2).reshape(-1)


def restored_rows(n_rows: int, n_heads: int) -> np.ndarray:
    """The way back of `permuted_rows`: row j of the checkpoint's tensor is row `restored_rows(…)[j]` of GGUF's."""
    return np.argsort(permuted_rows(n_rows, n_heads))


def plain(value: float) -> float:
    """A setting that was held as float32 as people write it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class Keys:
    """Reads settings from GGUF metadata or a config.json; everything that is read is checked and remembered."""

    def __init__(self, source: Mapping[str, Any], where: str, prefix: str = ""):
        self.source, self.where, self.prefix = source, where, prefix
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = _MISSING) -> Any:
        full = self.prefix + key
        self.seen.add(full)
        value = self.source.get(full)
        if value is None:
            if default is _MISSING:
                raise FormatError(f"{self.where}: {full!r} is missing")
            return default
        return value

    def integer(self, key: str, default: Any = _MISSING, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        if value is default and default is not _MISSING:
            return value
        if isinstance(value, (np.ndarray, list, tuple)):
            raise UnsupportedError(
                f"{self.where}: {self.prefix + key!r} differs between layers, which is not supported"
            )
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise FormatError(f"{self.where}: {self.prefix + key!r} should be an integer, not {shown(value)}")
        if not low <= value <= high:
            raise FormatError(f"{self.where}: {self.prefix + key!r} is {shown(value)}, allowed are {low} to {high}")
        return int(value)

    def number(self, key: str, default: Any = _MISSING, positive: bool = True) -> float:
        value = self.get(key, default)
        if value is default and default is not _MISSING:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise FormatError(f"{self.where}: {self.prefix + key!r} should be a number, not {shown(value)}")
        if not -_LARGEST <= value <= _LARGEST or (positive and value <= 0):
            raise FormatError(f"{self.where}: {self.prefix + key!r} is {shown(value)}, which makes no sense")
        return float(value)

    def must_be(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Refuse by name a setting that would change the network."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) or value not in allowed:
            names = " or ".join(repr(a) for a in allowed if a is not None)
            raise UnsupportedError(
                f"{self.where}: {self.prefix + key} = {shown(value)} is not supported (only {names})"
            )

    def refuse_rest(self, harmless: Iterable[str] = ()) -> None:
        """Refuse keys under the prefix that nobody asked for: a setting unknown here may change the network."""
        known = self.seen | {self.prefix + key for key in harmless}
        for key in self.source:
            if key.startswith(self.prefix) and key not in known:
                raise UnsupportedError(f"{self.where}: unknown setting {quote(key)} for this architecture")
