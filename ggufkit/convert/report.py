"""What a conversion did, or would do: every tensor's type, and why it has not the one asked for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ggufkit_formats.gguf import Plan

from ..compare import Distance, Summed
from .outputs import Output


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the new file."""

    name: str
    shape: tuple[int, ...]  # in the file's order: fastest dimension first, as `inspect` shows it
    type: str
    asked: str  # what the file type's rules, or an option, ask for
    reason: str | None  # None where the type is the one that the rules ask for
    nbytes: int = 0
    rel_rmse: float | None = None  # measured where that was asked for: as `ggufkit diff` has them
    max_error: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """`n_bytes` is the exact size of the file, `bits_per_weight` that of the tensors."""

    file_type: str
    output: str
    n_bytes: int
    bits_per_weight: float
    tensors: list[Entry]
    notes: list[str] = field(default_factory=list)  # what the user should know
    total: Distance | None = None  # of all weights from those of the source, where that was measured

    @classmethod
    def of(cls, file_type: str, output: str, plan: Plan, outputs: list[Output], notes: list[str]) -> Report:
        entries = []
        stored = iter(plan.tensors)
        for each in outputs:
            nbytes = sum(part.nbytes for part in itertools.islice(stored, len(each.rows)))
            name, shape, choice = each.input.name, each.input.shape[::-1], each.choice
            entries.append(Entry(name, shape, each.type, choice.asked or each.type, choice.reason, nbytes))
        weights = sum(each.n_elements for each in outputs)
        nbytes = sum(each.nbytes for each in plan.tensors)
        return cls(file_type, output, plan.nbytes, 8 * nbytes / weights if weights else 0.0, entries, notes)

    @property
    def fallbacks(self) -> list[Entry]:
        """Tensors that could not have the type asked for."""
        return [entry for entry in self.tensors if entry.type != entry.asked]

    def with_errors(self, errors: Sequence[Summed]) -> Report:
        """With the error of each tensor, and of all."""
        total = Summed()
        entries = []
        for entry, each in zip(self.tensors, errors, strict=True):
            total.merge(each)
            off = each.distance
            entries.append(replace(entry, rel_rmse=off.relative_rmse, max_error=off.max_difference))
        return replace(self, tensors=entries, total=total.distance)

    def as_json(self) -> dict[str, Any]:
        tensors = [asdict(entry) for entry in self.tensors]
        for each in tensors:
            del each["nbytes"]
            if self.total is None:
                del each["rel_rmse"], each["max_error"]
        total = self.total
        measured = {} if total is None else {"rel_rmse": total.relative_rmse, "max_error": total.max_difference}
        return {
            "file_type": self.file_type,
            "output": self.output,
            "n_bytes": self.n_bytes,
            "bits_per_weight": self.bits_per_weight,
            **measured,
            "tensors": tensors,
        }
