"""What a conversion did, or would do: every tensor's type, and why it has not the one asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ggufkit_formats.gguf import Plan

from ..quantize.rules import Choice


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the new file."""

    name: str
    shape: tuple[int, ...]  # in the file's order: fastest dimension first, as `inspect` shows it
    type: str
    asked: str  # what the file type's rules, or an option, ask for
    reason: str | None  # None where the type is the one that the rules ask for
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """`n_bytes` is the exact size of the file, `bits_per_weight` that of the tensors."""

    file_type: str
    output: str
    n_bytes: int
    bits_per_weight: float
    tensors: list[Entry]
    notes: list[str] = field(default_factory=list)  # what the user should know

    @classmethod
    def of(cls, file_type: str, output: str, plan: Plan, choices: Mapping[str, Choice], notes: list[str]) -> Report:
        entries = []
        for each in plan.tensors:
            choice, name = choices[each.name], each.type.name
            entries.append(Entry(each.name, each.shape[::-1], name, choice.asked or name, choice.reason, each.nbytes))
        weights = sum(math.prod(each.shape) for each in plan.tensors)
        nbytes = sum(each.nbytes for each in plan.tensors)
        return cls(file_type, output, plan.nbytes, 8 * nbytes / weights if weights else 0.0, entries, notes)

    @property
    def fallbacks(self) -> list[Entry]:
        """Tensors that could not have the type asked for."""
        return [entry for entry in self.tensors if entry.type != entry.asked]

    def as_json(self) -> dict[str, Any]:
        tensors = [asdict(entry) for entry in self.tensors]
        for each in tensors:
            del each["nbytes"]
        return {
            "file_type": self.file_type,
            "output": self.output,
            "n_bytes": self.n_bytes,
            "bits_per_weight": self.bits_per_weight,
            "tensors": tensors,
        }
