"""Architectures: settings read and refused, tables of tensors, and logits equal to llama.cpp's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_models
from ggufkit_formats import gguf
from ggufkit_formats.blocks import UnknownType
from ggufkit_formats.errors import FormatError, GgufkitError, UnsupportedError
from ggufkit_runtime import generate, models
from ggufkit_runtime.models.rope import Rope
from oracles.llama import Llama

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
CASES = {
    "llama": ("llama", {}),
    "llama-tied-no-bias": ("llama", {"optional": False}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-head-dim": ("llama", {"head_dim": 32}),
    "llama3-rope": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama-yarn-rope": (
        "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
    "llama-yarn-attention-factor": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
                          "attention_factor": 0.8}},
    ),
    "llama-attn-factor": ("llama", {"metadata": {"llama.rope.scaling.attn_factor": np.float32(1.3)}}),
    "llama-yarn-attn-factor-unused": (
        "llama",
        {"metadata": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                      "llama.rope.scaling.yarn_attn_factor": 3.0}},
    ),
    "llama-vocab-size-too-small": ("llama", {"metadata": {"llama.vocab_size": 300}}),
    "qwen2": ("qwen2", {"rope_theta": 1e6}),
    "qwen3": ("qwen3", {"head_dim": 64, "rope_theta": 1e6}),
    "qwen3-head-dim": ("qwen3", {"head_dim": 128, "optional": False}),
    "bitnet-silu": ("bitnet", {"optional": False}),
    "llama-scales": ("llama", {"optional": False, "scales": True}),
    "qwen3-scales": ("qwen3", {"optional": False, "scales": True}),
    "bitnet-scales": ("bitnet", {"optional": False, "scales": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_logits_equal_llama_cpp(case, device, tmp_path):
    arch, settings = CASES[case]
    path = tiny_models.write(tmp_path / "tiny.gguf", arch, **settings)
    ids = np.random.default_rng(1).integers(3, 320, 200).tolist()
    with Llama(path, n_ctx=256, n_threads=2) as oracle:
        theirs = oracle.logits(ids)
    ours = generate.load(path, device=device).logits(ids)
    assert ours.shape == theirs.shape
    scale = theirs.std()
    # llama.cpp keeps keys and values in float16: about 1e-3 of the logits' spread
    assert np.abs(ours - theirs).max() < 0.03 * scale
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.004 * scale


@pytest.mark.parametrize("arch", [m.ARCH for m in models.MODELS])
def test_metadata_round_trip(arch):
    module = models.by_arch(arch)
    settings = {**tiny_models.HF, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}}
    config = module.config_from_hf(settings)
    again = module.config_from_metadata({**module.metadata(config), "tokenizer.ggml.tokens": ["a"] * 320})
    assert again.rope.beta_fast == 16.0
    assert (
        module.metadata(again).items()
        >= {k: v for k, v in module.metadata(config).items() if "length" not in k}.items()
    )
    assert [s.shape for s in module.tensors(again)] == [s.shape for s in module.tensors(config)]


BAD_HF = {
    "hidden_act": ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act = 'gelu'"),
    "experts": ({"num_local_experts": 8}, UnsupportedError, "num_local_experts"),
    "quantized": ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "quantization_config"),
    "rope": ({"rope_scaling": {"rope_type": "longrope"}}, UnsupportedError, "longrope"),
    "partial": ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
    "layers": ({"layer_types": ["sliding_attention"]}, UnsupportedError, "sliding_attention"),
    "window": ({"use_sliding_window": True}, UnsupportedError, "use_sliding_window"),
    "missing": ({"hidden_size": None}, FormatError, "'hidden_size' is missing"),
    "zero": ({"num_hidden_layers": 0}, FormatError, "num_hidden_layers"),
    "huge": ({"num_hidden_layers": 2**40}, FormatError, "num_hidden_layers"),
    "layers-claimed": ({"num_hidden_layers": 10**6}, FormatError, "num_hidden_layers"),
    "head-claimed": ({"head_dim": 2**30}, FormatError, "head_dim"),
    "text": ({"hidden_size": "256"}, FormatError, "should be an integer"),
    "heads": ({"num_key_value_heads": 3}, FormatError, "not a multiple"),
    "eps": ({"rms_norm_eps": float("nan")}, FormatError, "makes no sense"),
    "theta": ({"rope_theta": 0.5}, FormatError, "rope base"),
    "theta-integer": ({"rope_theta": 10**400}, FormatError, "rope_theta"),
    "theta-huge": ({"rope_theta": 1e38}, FormatError, "rope base"),
    "eps-huge": ({"rms_norm_eps": 1e39}, FormatError, "rms_norm_eps"),
    "layers-number": ({"layer_types": 5}, UnsupportedError, "layer_types 5"),
    "layers-nested": ({"layer_types": [["a"], None]}, UnsupportedError, "layer_types"),
    "factor-tiny": ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, FormatError, "rope factor"),
    "llama3-tiny": ({"rope_scaling": {"type": "llama3", "low_freq_factor": 1e-300}}, FormatError, "llama3"),
}


@pytest.mark.parametrize("case", BAD_HF)
@pytest.mark.parametrize("arch", [m.ARCH for m in models.MODELS])
def test_bad_settings_are_refused_by_name(arch, case):
    change, error, message = BAD_HF[case]
    with pytest.raises(error, match=message):
        models.by_arch(arch).config_from_hf({**tiny_models.HF, **change})


def test_unknown_metadata_and_architecture():
    module = models.by_arch("llama")
    good = {**module.metadata(module.config_from_hf(tiny_models.HF))}
    module.config_from_metadata(good)
    for key, value in {
        "llama.logit_scale": 2.0, "llama.expert_count": 8, "llama.rope.scaling.type": "longrope",
        "llama.attention.head_count": np.array([4, 4]), "llama.rope.dimension_count": 32,
    }.items():  # fmt: skip
        with pytest.raises(
            GgufkitError, match=key.split(".")[-1].replace("dimension_count", "dimensions").replace("type", "longrope")
        ):
            module.config_from_metadata({**good, key: value})
    with pytest.raises(UnsupportedError, match="llama, qwen2, qwen3, bitnet"):
        models.by_arch("mamba")
    with pytest.raises(UnsupportedError, match="did you mean LlamaForCausalLM"):
        models.by_hf_class("LlamaForCausalLMs")


BAD_METADATA = {
    "an array": ({"attention.causal": np.array([1, 2])}, UnsupportedError, "attention.causal"),
    "array of experts": ({"expert_count": np.array([1, 2])}, UnsupportedError, "expert_count"),
    "array of scalings": ({"rope.scaling.type": np.array([1, 2])}, UnsupportedError, "rope scaling"),
    "megabytes": ({"attention.causal": "x" * 1_000_000}, UnsupportedError, "attention.causal"),
    "megabytes of number": ({"feed_forward_length": "x" * 1_000_000}, FormatError, "feed_forward_length"),
    "more heads than dimensions": ({"embedding_length": 1, "rope.dimension_count": None}, FormatError, "head size 0"),
    "tokens": ({"vocab_size": None}, FormatError, "the vocabulary is empty"),
    "beta_fast": ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 1e38}, FormatError, "rope beta_fast"),
    "beta_slow": ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_slow": 1e-38}, FormatError, "rope beta_slow"),
    "ext_factor": ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 1e38}, FormatError, "ext_factor"),
    "eps": ({"attention.layer_norm_rms_epsilon": 1e300}, FormatError, "makes no sense"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_hostile_metadata_is_refused_in_a_short_line(case):
    change, error, message = BAD_METADATA[case]
    module = models.by_arch("llama")
    good = module.metadata(module.config_from_hf(tiny_models.HF))
    with pytest.raises(error, match=message) as caught:
        module.config_from_metadata(
            {**good, "tokenizer.ggml.tokens": 5, **{f"llama.{key}": value for key, value in change.items()}}
        )
    assert len(str(caught.value)) < 300
    with pytest.raises(UnsupportedError) as caught:
        models.by_arch("x" * 1_000_000)
    assert len(str(caught.value)) < 300


def test_an_attention_factor_is_the_whole_factor():
    """As in transformers, where it replaces 1 + 0.1 ln(factor)."""
    module = models.by_arch("llama")
    for given, expected in ((None, 1 + 0.1 * np.log(4)), (1 + 0.1 * np.log(4), 1 + 0.1 * np.log(4)), (0.8, 0.8)):
        scaling = {"rope_type": "yarn", "factor": 4.0, "attention_factor": given}
        config = module.config_from_hf({**tiny_models.HF, "rope_scaling": scaling})
        written = module.metadata(config)
        assert ("llama.rope.scaling.attn_factor" in written) == (given == 0.8)
        again = module.config_from_metadata({**written, "tokenizer.ggml.tokens": ["a"] * 320})
        for rope in (config.rope, again.rope):
            assert rope.frequencies()[1] == pytest.approx(expected)


def test_missing_extra_and_misshapen_tensors(tmp_path):
    path = tiny_models.write(tmp_path / "tiny.gguf", num_hidden_layers=1)
    from ggufkit_formats import gguf

    with gguf.open(path) as file:
        module = models.by_arch("llama")
        specs = module.tensors(module.config_from_metadata(file.metadata))
        from ggufkit_runtime import weights

        tensors = dict(file.tensors)
        weights.check(specs, tensors, "x.gguf")
        with pytest.raises(UnsupportedError, match=r"'blk.0.attn_q.shift' does not belong .*nearest: blk.0.attn_q"):
            weights.check(specs, {**tensors, "blk.0.attn_q.shift": tensors["output_norm.weight"]}, "x.gguf")
        with pytest.raises(FormatError, match="has shape"):
            weights.check(specs, {**tensors, "output.weight": tensors["blk.0.attn_q.weight"]}, "x.gguf")
        unknown = dataclasses.replace(tensors["output_norm.weight"], type=UnknownType(99))
        with pytest.raises(UnsupportedError, match=r"'output_norm.weight' has the unknown type 99"):
            weights.check(specs, {**tensors, "output_norm.weight": unknown}, "x.gguf")
        del tensors["blk.0.ffn_up.weight"]
        with pytest.raises(FormatError, match=r"'blk.0.ffn_up.weight' is missing"):
            weights.check(specs, tensors, "x.gguf")


def test_permuted_rows_by_hand():
    # one head of 4 dimensions: halves (0, 1) and (2, 3) become pairs (0, 2), (1, 3)
    assert models.permuted_rows(4, 1).tolist() == [0, 2, 1, 3]
    assert models.permuted_rows(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    with pytest.raises(FormatError):
        models.permuted_rows(6, 2)


def test_rope_frequencies_by_hand():
    freqs, mscale = Rope(4, 10000.0).frequencies()
    assert freqs.tolist() == [1.0, 0.01] and mscale == 1.0
    freqs, _ = Rope(4, 10000.0).frequencies(np.array([1.0, 8.0]))
    assert freqs.tolist() == [1.0, 0.00125]
    # wavelengths 2π and 200π against 128/4 = 32 and 128/1: kept, and stretched by the whole factor
    assert Rope(4, 10000.0, llama3=(8.0, 1.0, 4.0, 128)).llama3_factors().tolist() == [1.0, 8.0]


# -- bitnet ------------------------------------------------------------------------------------------


def bitnet_forward(w, ids, heads, kv, eps, act):
    """Logits (n, n_vocab) of a BitNet with the base 10,000, in float64 and plain loops over heads and positions."""

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight

    def turn(x, position):  # (dim,): dimension i with i + dim / 2
        half = len(x) // 2
        angle = position * 10000.0 ** (-np.arange(half) / half)
        a, b = x[:half], x[half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])

    x = w["token_embd"][ids]
    dim = x.shape[1] // heads
    for i in range(2):
        at = {name.removeprefix(f"blk.{i}."): value for name, value in w.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, at["attn_norm"])
        q, k, v = ((h @ at[f"attn_{p}"].T).reshape(len(ids), -1, dim) for p in "qkv")
        out = np.zeros((len(ids), heads, dim))
        for p in range(len(ids)):
            for head in range(heads):
                theirs = head // (heads // kv)
                score = [turn(q[p, head], p) @ turn(k[o, theirs], o) / dim**0.5 for o in range(p + 1)]
                share = np.exp(score - np.max(score))
                out[p, head] = share @ v[: p + 1, theirs] / share.sum()
        x = x + norm(out.reshape(len(ids), -1), at["attn_sub_norm"]) @ at["attn_output"].T
        h = norm(x, at["ffn_norm"])
        x = x + norm(act(h @ at["ffn_gate"].T) * (h @ at["ffn_up"].T), at["ffn_sub_norm"]) @ at["ffn_down"].T
    return norm(x, w["output_norm"]) @ w["token_embd"].T


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("act", ["relu2", "silu"])
def test_bitnet_is_the_plain_network(act, device, tmp_path):
    path = tiny_models.write(tmp_path / "tiny.gguf", "bitnet", hidden_act=act, optional=False)
    with gguf.open(path) as f:
        w = {name.removesuffix(".weight"): t.dequantize().astype(np.float64) for name, t in f.tensors.items()}
        assert f.metadata.get("bitnet.hidden_activation") == (None if act == "silu" else "relu2")
    ids = np.random.default_rng(1).integers(3, 320, 24).tolist()
    activation = (lambda x: np.maximum(x, 0) ** 2) if act == "relu2" else (lambda x: x / (1 + np.exp(-x)))
    want = bitnet_forward(w, ids, 4, 2, 1e-5, activation)
    network = generate.load(path, device=device)
    got = network.logits(ids)
    assert np.abs(got - want).max() < (1e-3 if device == "reference" else 0.01) * want.std()
    assert "output.weight" not in w
    if act == "relu2":
        assert any("llama.cpp" in note for note in models.by_arch("bitnet").config_from_hf(
            {**tiny_models.HF, "hidden_act": act}).notes)  # fmt: skip


def test_ternary_bitnet_decodes_as_it_reads(tmp_path):
    """One token at a time, the recorded way, gives the logits of the whole text."""
    path = tiny_models.write(tmp_path / "tiny.gguf", "bitnet", "TQ2_0", hidden_act="relu2", optional=False)
    ids = np.random.default_rng(2).integers(3, 320, 12)
    network = generate.load(path, device="cpu")
    want = network.logits(ids.tolist())
    reference = generate.load(path, device="reference").logits(ids.tolist())
    assert np.corrcoef(want.ravel(), reference.ravel())[0, 1] > 0.999
    cache = network.cache()
    got = [network.forward(ids[k : k + 1], cache) for k in range(len(ids))]
    assert np.allclose(np.concatenate(got), want, rtol=0, atol=0.02 * want.std())
