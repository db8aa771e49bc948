"""File types: what `general.file_type` says, and the rules by which each tensor of such a file gets its type.

The rules are llama.cpp's (llama-quantize, 2026-10). Each file type is a row: its default type, the type of the
output matrix, and exceptions by role, of which the first that applies is taken. `rules.py` reads them. MXFP4 and NVFP4
are our own, since llama.cpp makes neither: every matrix that type, embedding and output Q8_0, under the ids that come
nearest (MXFP4_MOE's; NVFP4's, for checkpoints that it repacks).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ggufkit_formats.blocks.base import normal
from ggufkit_formats.errors import UnsupportedError

QUANTIZATION_VERSION = 2  # general.quantization_version


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules want to know of a model. Counts are 0 where the file does not say."""

    arch: str = ""
    n_layers: int = 0
    n_heads: int = 0  # of the first layer
    n_kv_heads: int = 0
    n_experts: int = 0
    has_imatrix: bool = False

    @property
    def n_gqa(self) -> int:
        """Query heads that share a key head."""
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp takes the model for one of 70 B parameters, which it does by the number of layers."""
        if self.arch == "llama" and self.n_heads == self.n_kv_heads:
            return False
        return self.n_layers == _LAYERS_OF_70B.get(self.arch)


_LAYERS_OF_70B = {"llama": 80, "deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}


@dataclass(frozen=True, slots=True)
class Case:
    """One tensor in front of the rules: the i-th of n of its role."""

    i: int
    n: int
    role: str
    shape: tuple[int, ...]  # NumPy order
    model: ModelFacts


Condition = Callable[[Case], bool]
Rule = tuple[str, str, *tuple[Condition, ...]]  # role, type, conditions that must all hold


# -- conditions ------------------------------------------------------------------------------------


def more_bits(c: Case) -> bool:
    """The first and the last eighth, and every third between."""
    return c.i < c.n // 8 or c.i >= 7 * c.n // 8 or (c.i - c.n // 8) % 3 == 2


def first_eighth(c: Case) -> bool:
    return c.i < c.n // 8


def first_sixteenth(c: Case) -> bool:
    return c.i < c.n // 16


def first_two(c: Case) -> bool:
    return c.i < 2


def first_four(c: Case) -> bool:
    return c.i < 4


def middle(c: Case) -> bool:
    return c.n // 8 <= c.i < 7 * c.n // 8


def gqa(c: Case) -> bool:
    return c.model.n_gqa >= 4


def many_experts(c: Case) -> bool:
    return c.model.n_experts >= 4


def eight_experts(c: Case) -> bool:
    return c.model.n_experts == 8


def imatrix(c: Case) -> bool:
    return c.model.has_imatrix


def no_imatrix(c: Case) -> bool:
    return not c.model.has_imatrix


def falcon(c: Case) -> bool:
    return c.model.arch == "falcon"


def stacked_experts(c: Case) -> bool:
    if len(c.shape) < 3 or c.shape[-3] < 2:
        return False
    return c.model.arch != "bailingmoe3" or c.role.startswith("ffn_")


# -- file types ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileType:
    """A row of the table: names are those of tensor types, in the registry's spelling."""

    name: str
    id: int  # general.file_type; -1: none, and the key is left out
    type: str  # what a matrix gets where no rule applies
    output: str = "Q6_K"  # what the output matrix, or the embedding in its place, gets
    rules: tuple[Rule, ...] = ()
    shared: bool = True  # whether SHARED and RAISED apply, too
    nested: bool = False  # whether the maxima of NF4 blocks are quantized again

    @property
    def is_quantized(self) -> bool:
        return self.type not in PLAIN

    def __str__(self) -> str:
        return self.name


PLAIN = ("F32", "F16", "BF16")
KEPT = "="  # in place of a type: the tensor is left as it is, and not quantized

# Roles are those of rules.ROLES; "*" is any. attn_v stands for attn_qkv and attn_kv_b, too.
_LOW_ATTENTION: tuple[Rule, ...] = (("attn_v", "Q4_K", gqa), ("attn_v", "Q4_K", many_experts))
_EXPERT_ATTENTION: tuple[Rule, ...] = (("attn_k", "Q4_K", eight_experts), ("attn_output", "Q5_K", eight_experts))


def _low(embedding: str, first: str, rest: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules of the types of one and two bits: `first` is for attn_v and the first eighth of ffn_down."""
    return (("token_embd", embedding), *_LOW_ATTENTION, ("attn_v", first), *_EXPERT_ATTENTION,
            ("ffn_down", first, first_eighth), *rest)  # fmt: skip


_EXPERT_OUTPUT: Rule = ("attn_output", "Q5_K", eight_experts)
_KEEP_OUTPUT: Rule = ("attn_output", "", eight_experts)  # "": the default type, whatever rules follow
_IQ2_OUTPUT: tuple[Rule, ...] = (("attn_output", "IQ3_S"),)
_IQ1_OUTPUT: tuple[Rule, ...] = (("attn_output", "IQ2_XXS"),)
_IQ4: tuple[Rule, ...] = (("attn_v", "Q5_K", gqa), ("ffn_down", "Q5_K", first_eighth, no_imatrix), _EXPERT_OUTPUT)

_ENDS_Q8_0: tuple[Rule, ...] = (("token_embd", "Q8_0"),)

_TABLE = (
    FileType("F32", 0, "F32"),
    FileType("F16", 1, "F16"),
    FileType("BF16", 32, "BF16"),
    FileType("Q4_0", 2, "Q4_0", rules=(("ffn_down", "Q4_1", imatrix, first_eighth),)),
    FileType("Q4_1", 3, "Q4_1"),
    FileType("Q5_0", 8, "Q5_0", rules=(("ffn_down", "Q5_1", imatrix, first_eighth),)),
    FileType("Q5_1", 9, "Q5_1"),
    FileType("Q8_0", 7, "Q8_0", output="Q8_0"),
    FileType("Q2_K", 10, "Q2_K", rules=(
        ("attn_v", "Q4_K", gqa), ("attn_v", "Q3_K"), ("ffn_down", "Q3_K"),
        ("attn_output", "", falcon), _EXPERT_OUTPUT, ("attn_output", "Q3_K"),
    )),
    FileType("Q2_K_S", 21, "Q2_K", rules=(("attn_v", "Q4_K", gqa), ("ffn_down", "Q4_K", first_eighth))),
    FileType("Q3_K_S", 11, "Q3_K", rules=(_EXPERT_OUTPUT,)),
    FileType("Q3_K_M", 12, "Q3_K", rules=(
        ("attn_v", "Q5_K", first_two), ("attn_v", "Q4_K"),
        ("ffn_down", "Q5_K", first_sixteenth), ("ffn_down", "Q4_K", more_bits), ("ffn_down", "", falcon),
        ("ffn_down", "Q4_K"), ("attn_output", "", falcon), _EXPERT_OUTPUT, ("attn_output", "Q4_K"),
    )),
    FileType("Q3_K_L", 13, "Q3_K", rules=(
        ("attn_v", "Q5_K"), ("ffn_down", "Q4_K", falcon), ("ffn_down", "Q5_K"),
        ("attn_output", "Q4_K", falcon), _KEEP_OUTPUT, ("attn_output", "Q5_K"),
    )),
    FileType("Q4_K_S", 14, "Q4_K", rules=(
        ("attn_v", "Q5_K", first_four), ("ffn_down", "", falcon), ("ffn_down", "Q5_K", first_eighth), _EXPERT_OUTPUT,
    )),
    FileType("Q4_K_M", 15, "Q4_K", rules=(
        ("attn_v", "Q6_K", more_bits),
        ("ffn_down", "Q6_K", falcon, first_sixteenth), ("ffn_down", "Q5_K", falcon, more_bits),
        ("ffn_down", "", falcon), ("ffn_down", "Q6_K", more_bits), _EXPERT_OUTPUT,
    )),
    FileType("Q5_K_S", 16, "Q5_K"),
    FileType("Q5_K_M", 17, "Q5_K", rules=(("attn_v", "Q6_K", more_bits), ("ffn_down", "Q6_K", more_bits))),
    FileType("Q6_K", 18, "Q6_K"),
    FileType("IQ1_S", 24, "IQ1_S", "Q5_K", _low("Q2_K", "Q2_K", _IQ1_OUTPUT), shared=False),
    FileType("IQ1_M", 31, "IQ1_M", "Q5_K", _low("Q2_K", "Q2_K", _IQ1_OUTPUT), shared=False),
    FileType("IQ2_XXS", 19, "IQ2_XXS", "Q5_K", _low("Q2_K", "Q2_K", ()), shared=False),
    FileType("IQ2_XS", 20, "IQ2_XS", "Q5_K", _low("Q2_K", "Q2_K", ()), shared=False),
    FileType("IQ2_S", 28, "IQ2_XS", "Q5_K", _low("IQ3_S", "IQ3_S", _IQ2_OUTPUT), shared=False),
    FileType("IQ2_M", 29, "IQ2_S", "Q5_K", _low("IQ3_S", "IQ3_S", _IQ2_OUTPUT), shared=False),
    FileType("IQ3_XXS", 23, "IQ3_XXS", "Q5_K", rules=(
        ("token_embd", "IQ3_S"), ("attn_v", "Q4_K", gqa), ("attn_v", "IQ3_S", no_imatrix),
        ("attn_q", "IQ2_S"), ("attn_k", "Q8_0", eight_experts), ("attn_k", "IQ2_S"),
        ("ffn_down", "Q4_K", no_imatrix, first_eighth), ("ffn_down", "Q3_K", no_imatrix),
        ("attn_output", "", falcon), _EXPERT_OUTPUT, ("attn_output", "IQ3_S"),
    )),
    FileType("IQ3_XS", 22, "IQ3_S", rules=(
        ("attn_v", "Q4_K", gqa), ("attn_q", "IQ3_XXS"), ("attn_k", "Q8_0", eight_experts), ("attn_k", "IQ3_XXS"),
        ("ffn_gate", "IQ3_XXS", middle), ("ffn_up", "IQ3_XXS", middle), _EXPERT_OUTPUT,
    )),
    FileType("IQ3_S", 26, "IQ3_S", rules=(("attn_v", "Q4_K", gqa), _EXPERT_OUTPUT)),
    FileType("IQ3_M", 27, "IQ3_S", rules=(
        ("attn_v", "Q4_K"), ("ffn_down", "Q4_K", first_eighth), ("ffn_down", "Q4_K", eight_experts, more_bits),
        ("attn_output", "", falcon), _EXPERT_OUTPUT, ("attn_output", "Q4_K"),
    )),
    FileType("IQ4_NL", 25, "IQ4_NL", rules=_IQ4),
    FileType("IQ4_XS", 30, "IQ4_XS", rules=_IQ4),
    FileType("TQ1_0", 36, "TQ1_0", rules=(("token_embd", "Q4_K"),)),
    FileType("TQ2_0", 37, "TQ2_0", rules=(("token_embd", "Q4_K"),)),
    FileType("MXFP4_MOE", 38, "MXFP4", "Q8_0", (("*", "MXFP4", stacked_experts), ("*", "Q8_0")), shared=False),
    FileType("MXFP4", 38, "MXFP4", "Q8_0", _ENDS_Q8_0, shared=False),
    FileType("NVFP4", 39, "NVFP4", "Q8_0", _ENDS_Q8_0, shared=False),
    FileType("Q1_0", 40, "Q1_0"),
    FileType("Q2_0", 41, "Q2_0", rules=(("token_embd", "Q4_K"),)),
    FileType("NF4", -1, "NF4", KEPT, (("token_embd", KEPT),), shared=False),
    FileType("NF4_DQ", -1, "NF4", KEPT, (("token_embd", KEPT),), shared=False, nested=True),
)  # fmt: skip

# After a file type's own rules.
SHARED: tuple[Rule, ...] = (("attn_k", "Q8_0", eight_experts),)

# Changes to what the rules gave: role, types it applies to (() is all), new type, condition.
RAISED: tuple[tuple[str, tuple[str, ...], str, Condition], ...] = (
    ("attn_v", ("Q3_K", "Q4_K"), "Q5_K", lambda c: c.model.is_70b),
    ("attn_v", (), "Q8_0", eight_experts),
)

FILE_TYPES: dict[str, FileType] = {t.name: t for t in _TABLE}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32"}

# What a type falls back to where its blocks do not divide the rows; F16 where those of the fallback do not, either.
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "NVFP4": "Q4_0",  # not llama.cpp's, which has none
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# Types whose blocks are garbage without an importance matrix; (type, file type) where only in that file type.
NEEDS_IMATRIX = {"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S", ("Q2_K", "Q2_K_S")}


def find(name: str | FileType) -> FileType:
    """The file type of that name, in any case; UnsupportedError names the nearest."""
    if isinstance(name, FileType):
        return name
    key = normal(name)
    found = FILE_TYPES.get(ALIASES.get(key, key))
    if found is None:
        names = [*FILE_TYPES, *ALIASES]
        near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else f" (known: {', '.join(FILE_TYPES)})"
        raise UnsupportedError(f"unknown file type {name!r}{hint}")
    return found


def by_id(number: int) -> FileType | None:
    """The file type with that `general.file_type`."""
    return next((t for t in _TABLE if t.id == number and number >= 0), None)
