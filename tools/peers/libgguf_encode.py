"""libgguf as a contender: it encodes and runs nothing."""

from __future__ import annotations

import hashlib
import importlib.metadata
from typing import Any

from . import wire
from .data import weights


class Encoder:
    def __init__(self) -> None:
        import libgguf  # pyright: ignore[reportMissingImports]

        self.libgguf = libgguf

    def about(self) -> dict[str, Any]:
        return {"version": f"libgguf {importlib.metadata.version('libgguf')}"}

    def encode(self, type: str, type_id: int, seconds: float) -> dict[str, Any]:
        """As `Ours.encode`."""
        x = weights()
        raw = self.libgguf.quantize_rows(x, type_id)
        calls, taken = wire.repeat(lambda: self.libgguf.quantize_rows(x, type_id), seconds)
        return {"rate": calls * x.size / taken, "digest": hashlib.sha256(raw.tobytes()).hexdigest()}


if __name__ == "__main__":
    wire.serve(Encoder())
