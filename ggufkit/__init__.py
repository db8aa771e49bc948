"""ggufkit: read, write, convert and run GGUF model files.

    f = ggufkit.open("model.gguf")             # lazy: f.metadata, f.tensors, f.tokenizer
    q = ggufkit.quantize(array, "q4_k")        # the bytes that llama.cpp writes
    x = ggufkit.dequantize(q, "q4_k")
    m = ggufkit.load("model.gguf")             # m.generate, m.chat, m.logits, m.tokenizer
    ggufkit.convert("checkpoint/", "q4_k", "out.gguf")
    ggufkit.export("out.gguf", "folder/")      # and back: safetensors, config.json, tokenizer
    a = ggufkit.affine.quantize(array, bits=8) # the textbook's scale and zero point

Importing this package loads none of its parts, and not NumPy; they come when they are called.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from ggufkit_runtime.generate import Model

    from . import affine
    from .convert import Report
    from .export import Report as Exported
    from .file import File

__version__ = "0.1.0"
__all__ = [
    "FormatError", "GgufkitError", "UnsupportedError", "UsageError",
    "affine", "convert", "dequantize", "export", "load", "open", "quantize",
]  # fmt: skip


def open(path: str | os.PathLike[str]) -> File:
    """Open a GGUF file, lazily: nothing but its header is read.

    `.metadata` is a mapping, `.tensors` a mapping from name to tensor, `.tokenizer` the file's tokenizer. Any
    shard of a split file opens the whole. Raises FormatError where the file is not what it says.
    """
    from ggufkit_formats import gguf

    from .file import File

    return gguf.open(path, File)


def load(
    model: str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    n_ctx: int | None = None,
    pre_tokenizer: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a model to run: a path, `hf:ORG/REPO[:TYPE]`, or None for $GGUFKIT_MODEL or the default model.

    `n_ctx` is the most positions a conversation may take (default: what the model was trained on). `progress`
    is called with (bytes loaded, bytes in all). Raises UnsupportedError for an unknown architecture or device.
    """
    from ggufkit_runtime import generate

    from . import sources

    path = sources.model(None if model is None else os.fspath(model))
    return generate.load(path, device=device, threads=threads, n_ctx=n_ctx, pre=pre_tokenizer, progress=progress)


def quantize(array: Any, type: str, importance: Any = None, threads: int | None = None) -> np.ndarray:
    """Float array (…, cols) -> uint8 array (…, bytes per row): what ggml_quantize_chunk writes for that type.

    `importance` is one weight per column, (cols,), or None. Raises FormatError where the type's blocks do not
    divide the rows, or where the values have no finite scale.
    """
    import numpy as np
    from ggufkit_formats import blocks
    from ggufkit_kernels.cpu.encode import encode

    return encode(blocks.find(type), np.asarray(array), importance=importance, threads=threads)


def dequantize(raw: Any, type: str) -> np.ndarray:
    """uint8 array (…, bytes per row) -> float32 array (…, cols), bit for bit as ggml decodes it."""
    import numpy as np
    from ggufkit_formats import blocks

    return blocks.find(type).decode(np.asarray(raw))


def convert(
    source: str | os.PathLike[str], type: str, output: str | os.PathLike[str] | None = None, **options: Any
) -> Report:
    """Convert a checkpoint (safetensors file or folder, `hf:ORG/REPO`) or a GGUF file to a file type.

    Options as on the command line: overwrite, plan, pure, allow_requantize, no_fallback, tensor_types … See
    `ggufkit.convert.convert`. Returns the report: the type of each tensor, and why.
    """
    from .convert import convert as run

    return run(source, type, output, **options)


def export(
    file: str | os.PathLike[str], output: str | os.PathLike[str], dtype: str = "bf16", **options: Any
) -> Exported:
    """Write the model in a GGUF file to the folder `output` as a Hugging Face checkpoint.

    `dtype`: bf16, f16, f32, nf4, nf4_dq, fp4, fp4_dq or packed. Options: overwrite, shard_size, threads, progress. See
    `ggufkit.export.export`. Returns the report: what each tensor became.
    """
    from .export import export as run

    return run(file, output, dtype, **options)


def __getattr__(name: str) -> Any:
    """`ggufkit.affine`, loaded when it is asked for."""
    if name == "affine":
        import importlib

        return importlib.import_module("ggufkit.affine")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(types.ModuleType):
    """Keeps `convert`, `export` and `quantize` functions: importing subpackages of these names would replace them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("convert", "export", "quantize") or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
