"""Where models come from: a path, a Hugging Face repository, or the default model.

    model("tiny.gguf")                  that file
    model("hf:ORG/REPO:Q8_0")           a GGUF file of a repository, through huggingface_hub's cache
    model(None)                         $GGUFKIT_MODEL, else SmolLM2-135M-Instruct, fetched once
    checkpoint("hf:ORG/REPO")           a folder with config, safetensors and tokenizer, to convert

huggingface_hub and rich are imported only where they are needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from ggufkit_formats.errors import GgufkitError, UsageError

__all__ = ["checkpoint", "model"]

Progress = Callable[[int, int], None]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def model(spec: str | os.PathLike[str] | None = None, *, progress: Progress | None = None) -> Path:
    """The path of the GGUF file that `spec` means: a path, or `hf:ORG/REPO[:TYPE]`; of a split file, the first shard.

    TYPE picks the file of a repository by its name (`Q8_0`, or a whole file name); without it, Q4_K_M. None or ""
    means $GGUFKIT_MODEL, else the default model. `progress(done, total)` is told bytes while the default model is
    fetched; without it there is a progress bar on stderr. Raises GgufkitError where the model cannot be had.
    """
    text = os.fspath(spec) if spec is not None else ""
    text = text or os.environ.get("GGUFKIT_MODEL", "")
    if not text:
        from . import default

        return default.path(progress)
    if text.startswith("hf:"):
        from . import hub

        repo, _, kind = text[3:].partition(":")
        return hub.gguf_file(_repository(repo, text), kind)
    path = _existing(text)
    if path.is_dir():
        raise GgufkitError(f"{path}: a folder, not a GGUF file (ggufkit convert makes one from a checkpoint)")
    return path


def fetches(spec: str | os.PathLike[str] | None = None) -> bool:
    """Whether `model` may have to fetch something, which takes a while."""
    text = os.fspath(spec) if spec is not None else ""
    text = text or os.environ.get("GGUFKIT_MODEL", "")
    if text:
        return text.startswith("hf:")
    from . import default

    return default.installed() is None and not (default.cache_folder() / default.FILE).exists()


def checkpoint(spec: str | os.PathLike[str]) -> Path:
    """The path of what is to be converted: `spec` itself, or the folder of `hf:ORG/REPO`.

    Of a repository only config, safetensors, tokenizer and chat template are fetched. Raises GgufkitError.
    """
    text = os.fspath(spec)
    if text.startswith("hf:"):
        from . import hub

        return hub.checkpoint_folder(_repository(text[3:], text))
    return _existing(text)


def _repository(name: str, spec: str) -> str:
    if not _REPOSITORY.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError(f"{spec!r}: a repository is written hf:ORG/REPO, and a model in it hf:ORG/REPO:TYPE")
    return name


def _existing(text: str) -> Path:
    path = Path(text)
    try:
        path = path.expanduser()
        path.stat()
        return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null character, a home nobody has
        reason = error.strerror if isinstance(error, OSError) else error
        raise GgufkitError(f"{text[:200]!r}: cannot be read ({reason})") from None
    hint = ""
    if _REPOSITORY.fullmatch(text.partition(":")[0]) and not text.endswith((".gguf", ".safetensors")):
        hint = f"; a Hugging Face repository is written hf:{text}"
    raise GgufkitError(f"{path}: no such file{hint}")
