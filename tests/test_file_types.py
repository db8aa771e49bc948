"""File types and their rules against llama.cpp's own answers (tests/data/file_types.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ggufkit_formats.errors import UnsupportedError, UsageError

from ggufkit.quantize import file_types, rules
from ggufkit.quantize.file_types import FILE_TYPES, ModelFacts
from ggufkit.quantize.rules import Overrides, choose

ANSWERS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "file_types.json").read_text())
SHAPES = [name for name in ANSWERS if name != "about"]
# llama.cpp gives these answers to --dry-run, but writes no file without an importance matrix
NEEDS_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}


def tensors(dim: int, layers: int, heads: int, kv: int, ffn: int, tied: bool, **_: Any) -> list[Any]:
    n_kv = dim // heads * kv
    listed: list[Any] = [("token_embd.weight", (49152, dim)), ("output_norm.weight", (dim,))]
    if not tied:
        listed.append(("output.weight", (49152, dim)))
    for i in range(layers):
        listed += [
            (f"blk.{i}.{name}.weight", shape)
            for name, shape in (
                ("attn_norm", (dim,)), ("attn_q", (dim, dim)), ("attn_k", (n_kv, dim)), ("attn_v", (n_kv, dim)),
                ("attn_output", (dim, dim)), ("ffn_norm", (dim,)), ("ffn_gate", (ffn, dim)), ("ffn_up", (ffn, dim)),
                ("ffn_down", (dim, ffn)),
            )
        ]  # fmt: skip
    return listed


def facts(arch: str, layers: int, heads: int, kv: int, **_: Any) -> ModelFacts:
    return ModelFacts(arch, layers, heads, kv)


@pytest.mark.parametrize("shape_name", SHAPES)
@pytest.mark.parametrize("name", list(ANSWERS[SHAPES[0]]["file_types"]))
def test_llama_cpp_answers(shape_name: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ANSWERS[shape_name]["shape"]
    expected = ANSWERS[shape_name]["file_types"][name]
    if name in NEEDS_IMATRIX:
        monkeypatch.setattr(rules, "NEEDS_IMATRIX", set())
    if expected is None:
        with pytest.raises(UnsupportedError, match="not divisible by 128"):
            choose(FILE_TYPES[name], tensors(**shape), facts(**shape))
        return
    choices = choose(FILE_TYPES[name], tensors(**shape), facts(**shape))
    for tensor, dims in tensors(**shape):
        choice = choices[tensor]
        if len(dims) == 1:
            assert choice == rules.Choice(None, None)
            continue
        answer = expected["others"].get(tensor, expected["most"]).upper()
        assert choice.type == answer, tensor
        assert (choice.reason is None) == (choice.asked == choice.type) == (not choice.fell_back)


@pytest.mark.parametrize("name", sorted(NEEDS_IMATRIX))
def test_types_that_need_an_importance_matrix(name: str) -> None:
    shape = ANSWERS["llama3_8b"]["shape"]
    with pytest.raises(UnsupportedError, match="needs an importance matrix"):
        choose(FILE_TYPES[name], tensors(**shape), facts(**shape))


def test_ids() -> None:
    ids = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11,
           "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18,
           "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25,
           "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "TQ1_0": 36,
           "TQ2_0": 37, "MXFP4_MOE": 38, "MXFP4": 38, "NVFP4": 39, "Q1_0": 40, "Q2_0": 41, "NF4": -1,
           "NF4_DQ": -1}  # fmt: skip
    assert {t.name: t.id for t in FILE_TYPES.values()} == ids
    assert file_types.by_id(15) is FILE_TYPES["Q4_K_M"]
    assert file_types.by_id(38) is FILE_TYPES["MXFP4_MOE"]  # llama.cpp's name for the number
    assert file_types.by_id(4) is None and file_types.by_id(-1) is None


def test_names() -> None:
    assert file_types.find("q4_k").name == "Q4_K_M"
    assert file_types.find("Q4-k-m").name == "Q4_K_M"
    assert file_types.find("q3_k").name == "Q3_K_M"
    assert file_types.find("q5_k").name == "Q5_K_M"
    with pytest.raises(UnsupportedError, match="unknown file type 'q4_kk'; did you mean Q4_K"):
        file_types.find("q4_kk")


# -- rules that the four shapes do not reach -------------------------------------------------------


def types(name: str, model: ModelFacts, role: str, n: int | None = None, **overrides: Any) -> list[str | None]:
    """The types of blk.i.<role>.weight, rows of 4096."""
    listed = [(f"blk.{i}.{role}.weight", (1024, 4096)) for i in range(n or model.n_layers)]
    choices = choose(FILE_TYPES[name], [*listed, ("output.weight", (100, 4096))], model, Overrides(**overrides))
    return [choices[tensor].type for tensor, _ in listed]


def test_70b() -> None:
    big = ModelFacts("llama", 80, 64, 8)
    assert set(types("Q4_K_M", big, "attn_v")) == {"Q5_K", "Q6_K"}
    assert set(types("Q3_K_S", big, "attn_v")) == {"Q5_K"}
    assert set(types("Q3_K_S", ModelFacts("llama", 80, 64, 64), "attn_v")) == {"Q3_K"}  # the 65B of Llama 1
    assert set(types("Q3_K_S", ModelFacts("qwen3", 80, 64, 8), "attn_v")) == {"Q3_K"}


def test_eight_experts() -> None:
    mixtral = ModelFacts("llama", 32, 32, 8, 8)
    assert set(types("Q4_K_M", mixtral, "attn_v")) == set(types("Q4_K_M", mixtral, "attn_k")) == {"Q8_0"}
    assert set(types("Q3_K_M", mixtral, "attn_output")) == {"Q5_K"}
    assert set(types("Q3_K_L", mixtral, "attn_output")) == {"Q3_K"}


def test_experts_are_counted_by_layer() -> None:
    model = ModelFacts("qwen3moe", 16, 32, 4, 128)
    listed = [
        (f"blk.{i}.{part}.weight", (8, 512, 256)) for i in range(16) for part in ("ffn_down_exps", "ffn_down_shexp")
    ]
    choices = choose(FILE_TYPES["Q4_K_M"], [*listed, ("output.weight", (8, 256))], model)
    raised = {
        rules.layer(name) for name, choice in choices.items() if choice.type == "Q6_K" and name != "output.weight"
    }
    assert raised == {0, 1, 4, 7, 10, 13, 14, 15}


def test_falcon() -> None:
    model = ModelFacts("falcon", 32, 64, 8)
    choices = choose(FILE_TYPES["Q4_K_M"], [("output.weight", (10, 4096)), ("token_embd.weight", (10, 4096))], model)
    assert choices["output.weight"].type == "Q8_0" and choices["output.weight"].reason is None
    assert types("Q4_K_M", model, "ffn_down")[:3] == ["Q6_K", "Q6_K", "Q5_K"]
    assert set(types("Q2_K", model, "attn_output")) == {"Q2_K"}


def test_importance_matrix_changes_rules() -> None:
    model = ModelFacts("llama", 16, 32, 8, has_imatrix=True)
    assert types("Q4_0", model, "ffn_down")[:3] == ["Q4_1", "Q4_1", "Q4_0"]
    assert set(types("IQ4_XS", model, "ffn_down")) == {"IQ4_XS"}
    assert set(types("IQ3_XXS", ModelFacts("llama", 16, 8, 8, has_imatrix=True), "attn_v")) == {"IQ3_XXS"}


def test_mxfp4_is_for_stacked_experts() -> None:
    model = ModelFacts("gpt-oss", 2, 64, 8, 32)
    listed = [
        ("blk.0.ffn_up_exps.weight", (32, 64, 64)),
        ("blk.0.attn_q.weight", (64, 64)),
        ("token_embd.weight", (9, 64)),
    ]
    choices = choose(FILE_TYPES["MXFP4_MOE"], listed, model)
    assert [choices[name].type for name, _ in listed] == ["MXFP4", "Q8_0", "Q8_0"]


def test_mxfp4_moe_of_a_dense_model_is_q8_0() -> None:
    shape = ANSWERS["llama3_8b"]["shape"]
    choices = choose(file_types.find("mxfp4_moe"), tensors(**shape), facts(**shape))
    assert {choices[name].type for name, dims in tensors(**shape) if len(dims) > 1} == {"Q8_0"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_4_bit_floats_in_every_matrix_but_the_ends(name: str, tied: bool) -> None:
    shape = ANSWERS["llama3_8b"]["shape"] | {"tied": tied}
    choices = choose(file_types.find(name.lower()), tensors(**shape), facts(**shape))
    for tensor, dims in tensors(**shape):
        if len(dims) > 1:
            ends = tensor in ("token_embd.weight", "output.weight")
            assert choices[tensor].type == choices[tensor].asked == ("Q8_0" if ends else name)


def test_rows_that_4_bit_floats_do_not_divide() -> None:
    listed = [("blk.0.attn_q.weight", (8, 96)), ("blk.0.attn_k.weight", (8, 80)), ("output.weight", (8, 96))]
    assert [c.type for c in choose(FILE_TYPES["NVFP4"], listed, MODEL).values()] == ["Q8_0", "F16", "Q4_0"]
    assert [c.type for c in choose(FILE_TYPES["MXFP4"], listed, MODEL).values()] == ["Q8_0", "F16", "MXFP4"]


def test_what_is_not_quantized() -> None:
    kept = ["blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.0.ssm_conv1d.weight", "blk.0.attn_q.bias",
            "position_embd.weight", "blk.0.time_mix_w1.weight", "rope_freqs.weight"]  # fmt: skip
    assert not any(rules.may_quantize(name, (512, 512)) for name in kept if name != "rope_freqs.weight")
    assert not rules.may_quantize("rope_freqs.weight", (64,))
    assert not rules.may_quantize("blk.0.x.weight", (1, 64))  # one row is one dimension in GGUF
    assert rules.may_quantize("blk.0.x.weight", (64, 1))


# -- overrides -------------------------------------------------------------------------------------

MODEL = ModelFacts("llama", 8, 32, 8)


def small(**overrides: Any) -> dict[str, rules.Choice]:
    listed = [(f"blk.{i}.{role}.weight", (512, 512)) for i in range(8) for role in ("attn_q", "attn_v", "ffn_down")]
    listed += [("output.weight", (100, 512)), ("token_embd.weight", (100, 512))]
    return choose(FILE_TYPES["Q4_K_M"], listed, MODEL, Overrides(**overrides))


def test_overrides_beat_the_mix_and_not_the_options_for_output() -> None:
    choices = small(
        tensor_types=((r"attn_v", "Q8_0"), (r"\.[01]\.attn", "F16"), ("output|embd", "Q5_0")), output="Q4_0"
    )
    assert choices["blk.0.attn_v.weight"].type == "Q8_0"  # the first pattern counts
    assert choices["blk.1.attn_q.weight"].type == "F16"
    assert choices["blk.2.attn_q.weight"].type == "Q4_K"
    assert choices["output.weight"].type == "Q4_0"
    assert choices["token_embd.weight"].type == "Q5_0"
    assert choices["blk.0.attn_v.weight"].reason == "--tensor-type attn_v=Q8_0"


def test_overridden_tensors_are_not_counted() -> None:
    choices = small(tensor_types=((r"blk\.0\.ffn_down", "Q8_0"),))
    raised = [i for i in range(8) if choices[f"blk.{i}.ffn_down.weight"].type == "Q6_K"]
    assert raised == [1, 4, 7]  # positions 0, 3, 6 of the seven that are left (of n = 8)


def test_pure_and_embedding() -> None:
    choices = small(pure=True, embedding="Q8_0")
    assert {c.type for name, c in choices.items() if name != "token_embd.weight"} == {"Q4_K"}
    assert choices["token_embd.weight"].type == "Q8_0"


def test_output_type_goes_to_a_tied_embedding() -> None:
    listed = [("token_embd.weight", (100, 512)), ("blk.0.attn_q.weight", (512, 512))]
    choices = choose(FILE_TYPES["Q4_K_M"], listed, MODEL, Overrides(output="Q8_0"))
    assert choices["token_embd.weight"].type == "Q8_0"


def test_a_pattern_must_match() -> None:
    with pytest.raises(UsageError, match=r"'attn_w' matches no tensor that is quantized; did you mean attn_[qv]"):
        small(tensor_types=(("attn_w", "Q8_0"),))
    with pytest.raises(UsageError, match="no regular expression"):
        small(tensor_types=(("attn_(", "Q8_0"),))
    with pytest.raises(UsageError, match="F16 has none"):
        choose(FILE_TYPES["F16"], [], MODEL, Overrides(tensor_types=(("a", "Q8_0"),)))


def test_fallback_of_an_override() -> None:
    listed = [("blk.0.attn_q.weight", (8, 80)), ("blk.0.attn_v.weight", (8, 96)), ("output.weight", (8, 96))]
    choices = choose(FILE_TYPES["Q8_0"], listed, MODEL, Overrides(tensor_types=((r"attn_v", "Q4_K"),)))
    assert choices["blk.0.attn_q.weight"] == rules.Choice(
        "F16", "Q8_0", "rows of 80 are not divisible by 32", fell_back=True
    )
    assert choices["blk.0.attn_v.weight"].type == "Q5_0"
