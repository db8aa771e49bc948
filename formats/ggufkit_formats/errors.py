"""The errors ggufkit raises on purpose. The command line prints their one line and exits 1 (usage: 2)."""

from __future__ import annotations


class GgufkitError(Exception):
    """Base of all errors that are the input's or the user's fault: `str(error)` is one clear line."""


class FormatError(GgufkitError):
    """A file does not hold what it says. The message names file, offset, what was read, what was allowed."""


class UnsupportedError(GgufkitError):
    """The file is sound, but ggufkit does not know this architecture, type, tokenizer or setting."""


class UsageError(GgufkitError):
    """The caller asked for something that cannot be: a wrong option, name or combination."""


class DeviceError(GgufkitError):
    """A GPU, its driver or what drives it from Python is missing, too old, or failed."""


class DeviceMemoryError(DeviceError):
    """The GPU has not as much free memory as is needed."""
