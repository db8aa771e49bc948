"""The checkpoint's folder: checked before, made under a hidden name, and renamed when all is in it."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from pathlib import Path

from ggufkit_formats.errors import GgufkitError
from ggufkit_formats.gguf_writer import check_room
from ggufkit_formats.source import reason

# What an export writes, and so all that one with `overwrite` may take away
_OURS = re.compile(
    r"config\.json|generation_config\.json|tokenizer(_config)?\.json|tokenizer\.model|chat_template\.jinja"
    r"|special_tokens_map\.json|added_tokens\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def check(target: Path, nbytes: int, overwrite: bool) -> None:
    """Raise GgufkitError where the folder cannot be made: it exists, there is no place for it, or no room.

    An empty folder may be there. With `overwrite` a folder is replaced that holds nothing but a checkpoint's files.
    """
    parent = target.absolute().parent
    try:
        if os.path.lexists(target) and not target.is_dir():
            raise GgufkitError(f"{target}: is there already, and is no folder")
        held = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
        if held and not overwrite:
            raise GgufkitError(f"{target} exists already, and is not empty; --overwrite (overwrite=True) replaces it")
        others = [name for name in held if not _OURS.fullmatch(name)]
        if others:
            raise GgufkitError(f"{target}: holds {others[0]!r}, which no export writes: the folder is not replaced")
        if not parent.is_dir():
            raise GgufkitError(f"{target}: there is no folder {parent}")
        check_room(target, parent, nbytes)
    except (OSError, ValueError) as error:
        raise GgufkitError(f"{target}: {reason(error)}") from None


class Folder:
    """A context manager: `path` is the hidden folder to write to. An exception (also KeyboardInterrupt) removes it."""

    def __init__(self, target: Path, overwrite: bool):
        self.target, self.overwrite = target, overwrite
        base = target.absolute()
        self.path = base.with_name(f".{base.name[:200]}.{secrets.token_hex(4)}.part")

    def __enter__(self) -> Folder:
        try:
            self.path.mkdir()
        except OSError as error:
            raise GgufkitError(f"{self.target}: {reason(error)}") from None
        except BaseException:  # Ctrl-C as soon as it is there
            self._discard()
            raise
        return self

    def write(self, name: str, content: bytes) -> None:
        try:
            with (self.path / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise GgufkitError(f"{self.target / name}: {reason(error)}") from None

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _discard(self) -> None:
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def _finish(self) -> None:
        check(self.target, 0, self.overwrite)  # another program may have made the folder meanwhile
        old = self.path.with_suffix(".old")
        try:
            if self.target.exists():
                self.target.rename(old)
            try:
                self.path.rename(self.target)
            except OSError:
                with contextlib.suppress(OSError):
                    old.rename(self.target)
                raise
        except OSError as error:
            raise GgufkitError(f"{self.target}: {reason(error)}") from None
        shutil.rmtree(old, ignore_errors=True)
