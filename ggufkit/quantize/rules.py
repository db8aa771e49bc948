"""Which tensor gets which type: the file type's rules, the user's overrides, and fallbacks for odd rows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ggufkit_formats.blocks import TYPES
from ggufkit_formats.errors import UnsupportedError, UsageError

from .file_types import FALLBACK, KEPT, NEEDS_IMATRIX, RAISED, SHARED, Case, FileType, ModelFacts, Rule

# Types whose blocks may run across rows.
ANY_ROWS = ("NF4",)

# Roles by what a tensor's name contains, first match. The output matrix and embeddings go by their whole names.
ROLES = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
_WHOLE_NAMES = {
    "output.weight": "output",
    "token_embd.weight": "token_embd",
    "per_layer_token_embd.weight": "token_embd",
}

# Matrices that stay as they are: names that contain one of these. They are small, or tables and not weights.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight",
    *(f"time_mix_{x}.weight" for x in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2",
                                       "decay_w1", "decay_w2", "lerp_fused")),
    "attn_rel_b.weight", ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd",
    ".patch_merger", "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_WHOLE = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the user asked for beside the file type. Type names are those of tensor types."""

    tensor_types: tuple[tuple[str, str], ...] = ()  # (pattern, type): the first pattern found in the name counts
    output: str | None = None
    embedding: str | None = None
    pure: bool = False  # no rules: every matrix gets the file type's default


@dataclass(frozen=True, slots=True)
class Choice:
    """What a tensor gets. `type` of None: it keeps the type it has."""

    type: str | None
    asked: str | None
    reason: str | None = None  # why `type` is not what the rules ask for
    fell_back: bool = False
    instead: str = ""  # what to fall back to, where it is not FALLBACK's


def role(name: str) -> str:
    """attn_v, ffn_down …, or "other"."""
    whole = _WHOLE_NAMES.get(name)
    if whole:
        return whole
    return next((role for part, role in ROLES if part in name), "other")


def may_quantize(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a matrix of weights, which file types apply to; norms, biases and tables are not."""
    n_dims = len(shape) - next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return (
        n_dims >= 2 and name.endswith("weight") and name not in _KEPT_WHOLE and not any(part in name for part in _KEPT)
    )


def order(name: str) -> tuple[int, bytes]:
    """Sorting key of llama-quantize: by layer, those of no layer first, then by name. Rules count in this order."""
    return layer(name), name.encode()


def layer(name: str) -> int:
    """The number after `blk.`, or -1."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def block_of(type_name: str) -> int:
    """Weights in a block of that type."""
    known = TYPES.get(type_name)
    return known.block if known is not None else 1


def choose(
    file_type: FileType,
    tensors: Iterable[tuple[str, tuple[int, ...]]],
    model: ModelFacts,
    overrides: Overrides | None = None,
) -> dict[str, Choice]:
    """The type of every tensor (name, shape in NumPy order), by name, in llama-quantize's order.

    Raises UsageError for an override that applies to nothing, UnsupportedError where a type has no fallback for
    the rows of a tensor, or needs an importance matrix that there is not.
    """
    overrides = overrides or Overrides()
    listed = sorted(tensors, key=lambda t: order(t[0]))
    patterns = _compile(overrides, file_type, [name for name, shape in listed if may_quantize(name, shape)])
    picker = _Picker(file_type, model, [name for name, _ in listed])
    choices: dict[str, Choice] = {}
    for name, shape in listed:
        if not may_quantize(name, shape):
            choices[name] = Choice(None, None)
            continue
        choice = _pick(name, shape, picker, overrides, patterns)
        if choice.type is not None:
            choice = _fallback(choice, name, shape[-1])
        if not model.has_imatrix and needs_imatrix(name, choice.type, file_type):
            raise UnsupportedError(
                f"tensor {name!r}: {choice.type} needs an importance matrix in {file_type.name}; make one with "
                "`ggufkit imatrix -m MODEL -f TEXT -o FILE.gguf` and pass it with --imatrix FILE.gguf"
            )
        choices[name] = choice
    return choices


def _pick(name: str, shape: tuple[int, ...], picker: _Picker, overrides: Overrides, patterns: _Patterns) -> Choice:
    """The type before fallbacks, in llama-quantize's order of precedence."""
    kind = role(name)
    named = next((p for p in patterns if p[0].search(name)), None)
    if overrides.embedding and kind == "token_embd" and not (named and name.startswith("per_layer")):
        return Choice(overrides.embedding, overrides.embedding, f"--token-embedding-type {overrides.embedding}")
    if overrides.output and kind == "output":
        return Choice(overrides.output, overrides.output, f"--output-tensor-type {overrides.output}")
    default = picker.file_type.type
    if not picker.file_type.is_quantized:
        return Choice(default, default)
    if named:
        return Choice(named[1], named[1], f"--tensor-type {named[0].pattern}={named[1]}")
    if overrides.pure:
        return Choice(default, default)
    if overrides.output and kind == "token_embd" and picker.tied:
        return Choice(overrides.output, overrides.output, f"--output-tensor-type {overrides.output}")
    asked = picker.ask(name, shape, kind)
    if asked == KEPT:
        return Choice(None, None)
    # the output matrix never falls below 8 bits
    return Choice(asked, asked, instead="Q8_0" if picker.is_output(kind) else "")


class _Picker:
    """A file type's rules applied to the tensors of one model, in order: positions are counted as they come."""

    def __init__(self, file_type: FileType, model: ModelFacts, names: Sequence[str]):
        self.file_type, self.model = file_type, model
        self.tied = "output.weight" not in names
        self.seen: dict[str, int] = {}
        # llama.cpp expects one ffn matrix of a kind a layer, and counts the attn_v there are
        self.totals = {
            "attn_v": sum(role(name) == "attn_v" for name in names),
            **dict.fromkeys(("ffn_down", "ffn_gate", "ffn_up"), model.n_layers),
        }

    def ask(self, name: str, shape: tuple[int, ...], kind: str) -> str:
        """What the rules ask for, never mind whether it fits."""
        file_type = self.file_type
        case = Case(self._position(name, kind), self.totals.get(kind, 0), kind, shape, self.model)
        if self.is_output(kind):
            return "Q8_0" if self.model.arch == "falcon" and file_type.output != KEPT else file_type.output
        type_name = _first(file_type.rules + (SHARED if file_type.shared else ()), case) or file_type.type
        if file_type.shared:
            for of, only, to, condition in RAISED:
                if of == kind and (not only or type_name in only) and condition(case):
                    type_name = to
        return type_name

    def is_output(self, kind: str) -> bool:
        """Whether the tensor makes the logits: without an output matrix the embedding does."""
        return kind == "output" or (kind == "token_embd" and self.tied)

    def _position(self, name: str, kind: str) -> int:
        i = self.seen.get(kind, 0)
        self.seen[kind] = i + 1
        # experts of a layer are several tensors: only the name tells the layer (but not to the one- and two-bit types)
        if self.model.n_experts > 1 and kind.startswith("ffn_") and self.file_type.shared and layer(name) >= 0:
            return layer(name)
        return i


def _first(rules: Iterable[Rule], case: Case) -> str:
    for kind, type_name, *conditions in rules:
        if kind in ("*", case.role) and all(condition(case) for condition in conditions):
            return type_name
    return ""


def _fallback(choice: Choice, name: str, cols: int) -> Choice:
    """The nearest type whose blocks divide rows of `cols`."""
    asked = choice.type
    assert asked is not None
    block = block_of(asked)
    if cols % block == 0 or asked in ANY_ROWS:
        return choice
    used = choice.instead or FALLBACK.get(asked, "")
    if not used and block > 32:
        raise UnsupportedError(f"tensor {name!r} cannot be {asked}: its rows of {cols} are not divisible by {block}")
    if not used or cols % block_of(used):
        used = "F16"
    reason = f"rows of {cols} are not divisible by {block}"
    if used == "F16" and block > 32:
        reason += " nor by 32"
    return replace(choice, type=used, reason=reason, fell_back=True)


def needs_imatrix(name: str, type_name: str | None, file_type: FileType) -> bool:
    """Whether a tensor of that type is garbage without an importance matrix, in a file of that file type."""
    if role(name) in ("output", "token_embd"):
        return False
    return type_name in NEEDS_IMATRIX or (type_name, file_type.name) in NEEDS_IMATRIX


_Patterns = list[tuple[re.Pattern[str], str]]


def _compile(overrides: Overrides, file_type: FileType, names: list[str]) -> _Patterns:
    """The patterns of --tensor-type, each checked to match a tensor that may be quantized."""
    patterns: _Patterns = []
    if overrides.tensor_types and not file_type.is_quantized:
        raise UsageError(f"--tensor-type changes quantized file types; {file_type.name} has none")
    for text, type_name in overrides.tensor_types:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise UsageError(f"--tensor-type: {text!r} is no regular expression: {error}") from None
        if not any(pattern.search(name) for name in names):
            near = difflib.get_close_matches(text, _parts(names), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f" (tensors are named like {names[-1]!r})"
            raise UsageError(f"--tensor-type: {text!r} matches no tensor that is quantized{hint}")
        patterns.append((pattern, type_name))
    return patterns


def _parts(names: Iterable[str]) -> list[str]:
    """Names and the pieces that people write in patterns: blk.0.attn_v.weight, attn_v.weight, attn_v."""
    parts: dict[str, None] = {}
    for name in names:
        short = re.sub(r"^blk\.\d+\.", "", name)
        parts.update(dict.fromkeys((short.removesuffix(".weight"), short, name)))
    return list(parts)
