"""What a checkpoint's tensors can be written as, one row each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ggufkit_formats.errors import UsageError
from ggufkit_formats.four_bit import FourBitTensor

from .outputs import FourBit, Output, Packed, Plain
from .parts import Part

TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

# Matrices inside the blocks -> what each becomes, and what the user should know
Made = tuple[Sequence[Output], list[str]]
Inner = Callable[[list[Part]], Made]


@dataclass(frozen=True, slots=True)
class Dtype:
    """`plain` is the type of what stays numbers, `inner` makes the matrices inside the blocks something else."""

    name: str
    plain: str = "BF16"
    inner: Inner | None = None
    quantization: dict[str, Any] = field(default_factory=dict)  # quantization_config of config.json

    def outputs(self, parts: list[Part]) -> Made:
        """What each part becomes, in their order, and notes."""
        if self.inner is None:
            return [Plain(part, self.plain) for part in parts], []
        made, notes = self.inner([part for part in parts if part.is_inner])
        inner = iter(made)
        return [next(inner) if part.is_inner else Plain(part, self.plain) for part in parts], notes


def _four_bit(kind: str, nested: bool, parts: list[Part]) -> Made:
    # Where a file has NF4 tensors with maxima of both sorts, the F32 ones are those that were kept for their exactness.
    keep = any(isinstance(part.tensor, FourBitTensor) and part.tensor.maxima.is_nested for part in parts)
    made = [FourBit.of(part, kind, nested, keep) for part in parts]
    notes = []
    kept = sum(nested and not each.nested for each in made)
    if kept:
        notes.append(f"{kept} tensors keep the maxima of their blocks as F32, unchanged")
    again = sum(isinstance(each.part.tensor, FourBitTensor) and not each.copied for each in made)
    if again:
        notes.append(f"{again} matrices that were NF4 already are quantized again")
    return made, notes


def _packed(parts: list[Part]) -> Made:
    return [Packed.of(part) for part in parts], []


def _bitsandbytes(kind: str, nested: bool) -> dict[str, Any]:
    """As transformers writes it for a model that BitsAndBytesConfig quantized."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


_BITNET = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}

DTYPES = {
    each.name: each
    for each in (
        Dtype("bf16"),
        Dtype("f16", "F16"),
        Dtype("f32", "F32"),
        *(
            Dtype(kind + end, inner=partial(_four_bit, kind, bool(end)), quantization=_bitsandbytes(kind, bool(end)))
            for kind in ("nf4", "fp4")
            for end in ("", "_dq")
        ),
        Dtype("packed", inner=_packed, quantization=_BITNET),
    )
}
ALIASES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "fp16": "f16", "fp32": "f32"}


def find(name: str) -> Dtype:
    """The row of that name, in any case and with - or _; UsageError names those there are."""
    key = name.lower().replace("-", "_")
    found = DTYPES.get(ALIASES.get(key, key))
    if found is None:
        near = difflib.get_close_matches(key, DTYPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(DTYPES)}"
        raise UsageError(f"unknown dtype {name!r}; {hint}")
    return found
