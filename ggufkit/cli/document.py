"""JSON documents on stdout."""

from __future__ import annotations

import json
import math
import sys
from typing import Any


def print_json(document: Any) -> None:
    """One JSON document on stdout; numbers that JSON lacks become null."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(_Layout(ensure_ascii=not utf8).text(_finite(document), "") + "\n")
    sys.stdout.flush()


class _Layout:
    """JSON a person can read: a list of numbers takes one line, as does each item of a list of small objects."""

    def __init__(self, ensure_ascii: bool):
        self.flat = json.JSONEncoder(ensure_ascii=ensure_ascii).encode

    def text(self, value: Any, margin: str) -> str:
        deeper = margin + "  "
        if isinstance(value, dict) and value:
            items = [f"{self.flat(k)}: {self.text(v, deeper)}" for k, v in value.items()]
        elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
            items = [self.flat(v) if _depth(v) < 3 else self.text(v, deeper) for v in value]
        else:
            return self.flat(value)
        start, end = "{}" if isinstance(value, dict) else "[]"
        return f"{start}\n{deeper}" + f",\n{deeper}".join(items) + f"\n{margin}{end}"


def _depth(value: Any) -> int:
    """0 for a number or string, 1 for a list of them."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0) if isinstance(value, (dict, list)) else 0


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
