"""Files opened for reading: bytes by mapping (`view`, no copy) or by pread (`read`, memory of its own)."""

from __future__ import annotations

import mmap
import os
import stat
import threading
import weakref
from pathlib import Path

import numpy as np

from .errors import FormatError, GgufkitError, UsageError


class FileSource:
    """One regular file. Nothing is mapped before the first `view`; `read` never maps.

    Safe to use from several threads. Raises GgufkitError where the file is missing, unreadable or no regular file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.nbytes = 0
        self._map: np.ndarray | None = None
        self._lock = threading.Lock()
        try:
            info = self.path.stat()  # before opening: opening a pipe would wait for a writer
            if stat.S_ISDIR(info.st_mode):
                raise FormatError(f"{self.path}: is a folder, not a file")
            if not stat.S_ISREG(info.st_mode):
                raise FormatError(f"{self.path}: is not a regular file")
            self._fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError:
            raise GgufkitError(f"{self.path}: no such file") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise GgufkitError(f"{self.path}: {reason(error)}") from None
        self._close_fd = weakref.finalize(self, os.close, self._fd)
        self.nbytes = os.fstat(self._fd).st_size

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 (nbytes,), a read-only view of the mapped file, no copy."""
        self._check(offset, nbytes)
        with self._lock:
            if self._map is None:
                self._map = self._mapped()
        return self._map[offset : offset + nbytes]

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """uint8 (nbytes,), read with pread into memory of its own: pages of the file are not mapped."""
        self._check(offset, nbytes)
        out = np.empty(nbytes, dtype=np.uint8)
        left = out.data
        while left:
            try:
                n = self._read_into(left, offset)
            except OSError as error:
                raise GgufkitError(f"{self.path}: {reason(error)} at {offset}") from None
            if n == 0:
                raise FormatError(f"{self.path}: ended at {offset} while it was read; it had {self.nbytes} bytes")
            left = left[n:]
            offset += n
        return out

    def fileno(self) -> int:
        """The descriptor, for code that reads by itself. Raises UsageError once the file was closed."""
        self._check(0, 0)
        return self._fd

    def close(self) -> None:
        """Close the file. Views that are still in use stay valid; asking for further bytes raises UsageError."""
        self._map = None
        self._close_fd()

    @property
    def closed(self) -> bool:
        return not self._close_fd.alive

    def _check(self, offset: int, nbytes: int) -> None:
        if self.closed:
            raise UsageError(f"{self.path}: the file was closed")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise FormatError(f"{self.path}: {nbytes} bytes wanted at {offset}, but the file ends at {self.nbytes}")

    def _mapped(self) -> np.ndarray:
        if not self.nbytes:
            return np.empty(0, dtype=np.uint8)  # an empty file cannot be mapped
        try:
            mapped = mmap.mmap(self._fd, self.nbytes, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise GgufkitError(f"{self.path}: cannot be mapped: {reason(error)}") from None
        return np.frombuffer(mapped, dtype=np.uint8)  # keeps the mapping alive as long as any view

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [buffer], offset)
        with self._lock:  # no pread on this system
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, min(len(buffer), 1 << 24))
        buffer[: len(data)] = data
        return len(data)


def exists(path: Path) -> bool:
    """Whether there is such a file; a name that the system cannot have (too long, say) is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def reason(error: Exception) -> str:
    """What the system said, in lower case and without the file's name: `permission denied`."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]


def looks_like(head: bytes) -> str | None:
    """What a file seems to be by its first bytes, for messages: `a safetensors file`. None where nothing fits."""
    if not head:
        return "empty"
    for magic, what in _MAGICS:
        if head.startswith(magic):
            return what
    if len(head) >= 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "a safetensors file"
    if not head.strip(b"\0"):
        return "full of zero bytes (an unfinished download?)"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "a web page"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    return None


_MAGICS = [
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)"),
    (b"\x80\x04", "a Python pickle (a PyTorch checkpoint?)"),
    (b"\x1f\x8b", "gzip-compressed"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
    (b"tjgg", "an old GGJT file, from before GGUF"),
    (b"lmgg", "an old GGML file, from before GGUF"),
    (b"fmgg", "an old GGMF file, from before GGUF"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF", "an HDF5 file"),
]
