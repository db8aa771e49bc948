"""The decoder that Llama and its kin share: rotary grouped-query attention and a gated feed-forward, pre-normed.

What differs between them is a feature of the Config (which pairs rotate together, biases, more norms, the activation),
so there is one forward. An architecture file names the features, its Hugging Face classes and its tensors.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ggufkit_formats.errors import FormatError, UnsupportedError

from .base import Keys, TensorSpec, plain, shown
from .rope import Rope

# Settings of config.json that change the network and that no architecture here has, with the harmless values.
_REFUSED_HF: dict[str, tuple[Any, ...]] = {
    "is_causal": (None, True),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "quantization_config": (None,),
    "use_sliding_window": (None, False),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "use_qk_norm": (None, False),
}


# A setting of config.json, and the matrices that have a bias where it is true
_HF_BIASES = {
    "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
    "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
}

# Bounds on what a file may claim, far above any real network: they keep tables and frequencies small.
_MAX_LAYERS, _MAX_HEADS, _MAX_HEAD_DIM = 10_000, 65_536, 65_536


@dataclass(frozen=True, slots=True)
class Config:
    """A network of this family, in GGUF's words. All counts are positive; n_heads is a multiple of n_kv_heads."""

    arch: str
    n_layers: int
    n_ctx_train: int  # positions it was trained on
    dim: int  # embedding_length
    n_ffn: int  # feed_forward_length
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    eps: float  # of the RMS norms
    rope: Rope
    explicit_head_dim: bool = False  # the checkpoint names head_dim, so key_length is written
    interleaved: bool = False  # dimensions 2i and 2i+1 rotate together (llama), else i and i + head_dim/2
    qk_norm: bool = False  # RMS norm of every head of q and k before rotating (qwen3)
    qkv_bias: bool | None = None  # True: q, k, v have biases; None: they may have
    other_bias: bool | None = None  # likewise the attention's output and the feed-forward
    scales: bool = False  # matrices may have a number beside them, ….scale, that multiplies them
    sub_norms: bool = False  # RMS norm of what goes into the attention's output and into ffn_down (bitnet)
    activation: str = "silu"  # of the gate: "silu", or "relu2", max(x, 0)²
    notes: tuple[str, ...] = ()  # what convert should tell the user

    # -- reading ---------------------------------------------------------------------------------

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], arch: str, activations: tuple[str, ...] = ("silu",),
                      **features: Any) -> Config:  # fmt: skip
        """From GGUF metadata; FormatError for a missing or absurd key, UnsupportedError for an unknown one.

        `activations` are those of the gate that the architecture knows, the first where the file says nothing.
        """
        keys = Keys(metadata, "metadata", f"{arch}.")
        dim, n_heads = keys.integer("embedding_length"), keys.integer("attention.head_count", high=_MAX_HEADS)
        head_dim = keys.integer("attention.key_length", dim // n_heads, high=_MAX_HEAD_DIM)
        n_ctx = keys.integer("context_length")
        n_vocab = keys.integer("vocab_size", 0)
        tokens = metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Sequence) and not isinstance(tokens, str):
            n_vocab = len(tokens)  # as in llama.cpp, whatever vocab_size says: some files' says less
        config = cls(
            arch=arch,
            n_layers=keys.integer("block_count", high=_MAX_LAYERS),
            n_ctx_train=n_ctx,
            dim=dim,
            n_ffn=keys.integer("feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=keys.integer("attention.head_count_kv", n_heads, high=_MAX_HEADS),
            head_dim=head_dim,
            n_vocab=n_vocab,
            eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope=Rope.from_keys(keys, head_dim, n_ctx),
            activation=_activation(keys, "hidden_activation", activations, activations[0]),
            explicit_head_dim=f"{arch}.attention.key_length" in metadata,
            **features,
        )
        keys.must_be("attention.value_length", head_dim, default=head_dim)
        keys.must_be("attention.causal", True, default=True)
        keys.must_be("expert_count", 0, default=0)
        keys.must_be("expert_used_count", 0, default=0)
        keys.must_be("use_parallel_residual", False, True, default=True)
        keys.refuse_rest(harmless=("tensor_data_layout", "attention.sliding_window", "pooling_type"))
        config.check("metadata")
        return config

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], arch: str, notes: tuple[str, ...] = (),
                activations: tuple[str, ...] = ("silu", "swish"), **features: Any) -> Config:  # fmt: skip
        """From the dictionary of a config.json; `activations` as in `from_metadata`."""
        keys = Keys(hf, "config.json")
        dim, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads", high=_MAX_HEADS)
        explicit = keys.integer("head_dim", None, high=_MAX_HEAD_DIM)
        head_dim = explicit or dim // n_heads
        n_ctx = keys.integer("max_position_embeddings")
        activation = _activation(keys, "hidden_act", activations, activations[0])
        for key, allowed in _REFUSED_HF.items():
            keys.must_be(key, *allowed)
        kinds = keys.get("layer_types", None) or ["full_attention"]
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise UnsupportedError(f"config.json: layer_types {shown(kinds)} are not supported (only full_attention)")
        if (
            keys.get("sliding_window", None)
            and not keys.get("use_sliding_window", None)
            and "use_sliding_window" not in hf
        ):
            window = keys.integer("sliding_window")
            notes += (f"sliding_window = {window} is not carried over: attention reaches all positions",)
        config = cls(
            arch=arch,
            n_layers=keys.integer("num_hidden_layers", high=_MAX_LAYERS),
            n_ctx_train=n_ctx,
            dim=dim,
            n_ffn=keys.integer("intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=keys.integer("num_key_value_heads", n_heads, high=_MAX_HEADS),
            head_dim=head_dim,
            n_vocab=keys.integer("vocab_size"),
            eps=keys.number("rms_norm_eps", 1e-6),
            rope=Rope.from_hf(keys, head_dim, n_ctx),
            activation=activation,
            explicit_head_dim=explicit is not None,
            notes=notes,
            **features,
        )
        config.check("config.json")
        return config

    def check(self, where: str) -> None:
        """Relations between the numbers."""
        if self.n_heads % self.n_kv_heads:
            raise FormatError(f"{where}: {self.n_heads} heads are not a multiple of {self.n_kv_heads} key-value heads")
        if not 2 <= self.head_dim <= _MAX_HEAD_DIM or self.head_dim % 2:
            raise FormatError(f"{where}: head size {self.head_dim} is not even, or out of 2 to {_MAX_HEAD_DIM}")
        if self.n_vocab < 1:
            raise FormatError(f"{where}: the vocabulary is empty")

    # -- writing ---------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """The architecture's GGUF keys, typed and ordered as llama.cpp's converter writes them."""
        u32, f32 = np.uint32, np.float32
        keys: dict[str, Any] = {
            "block_count": u32(self.n_layers),
            "context_length": u32(self.n_ctx_train),
            "embedding_length": u32(self.dim),
            "feed_forward_length": u32(self.n_ffn),
            "attention.head_count": u32(self.n_heads),
            "attention.head_count_kv": u32(self.n_kv_heads),
            **self.rope.metadata(),
            "rope.freq_base": f32(self.rope.base),
            "attention.layer_norm_rms_epsilon": f32(self.eps),
        }
        if self.explicit_head_dim:
            keys["attention.key_length"] = keys["attention.value_length"] = u32(self.head_dim)
        return {f"{self.arch}.{key}": value for key, value in keys.items()}

    def hf_settings(self, hf_class: str, model_type: str, names: Container[str]) -> dict[str, Any]:
        """The settings of a config.json that mean this network. `names` are the tensors that its file holds.

        UnsupportedError for what transformers has no setting for: biases at some matrices of a group only, and some
        ways to stretch the context.
        """
        out: dict[str, Any] = {
            "architectures": [hf_class],
            "model_type": model_type,
            "hidden_size": self.dim,
            "intermediate_size": self.n_ffn,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
        }
        if self.explicit_head_dim or self.head_dim * self.n_heads != self.dim:
            out["head_dim"] = self.head_dim
        return out | {
            "hidden_act": self.activation,
            "max_position_embeddings": self.n_ctx_train,
            "rms_norm_eps": plain(self.eps),
            **self.rope.hf_settings(),
            "vocab_size": self.n_vocab,
            "tie_word_embeddings": "output.weight" not in names,
            **self._hf_biases(names),
        }

    def _hf_biases(self, names: Container[str]) -> dict[str, bool]:
        """Whether there are biases, where an architecture may have them or not."""
        optional = (self.qkv_bias is None, self.other_bias is None)
        out: dict[str, bool] = {}
        for key, matrices, asked in zip(_HF_BIASES, _HF_BIASES.values(), optional, strict=True):
            if not asked:
                continue
            all_of = [f"blk.{i}.{name}.bias" for i in range(self.n_layers) for name in matrices]
            found = [name for name in all_of if name in names]
            if found and len(found) < len(all_of):
                missing = next(name for name in all_of if name not in names)
                raise UnsupportedError(
                    f"{found[0]!r} is there and {missing!r} is not: config.json has one {key} for all"
                )
            out[key] = bool(found)
        return out


def _activation(keys: Keys, key: str, known: tuple[str, ...], default: str) -> str:
    """The gate's activation, under one name: swish is silu."""
    keys.must_be(key, *known, default=default)
    name = keys.get(key, default)
    return "silu" if name == "swish" else name


def tensors(config: Config) -> list[TensorSpec]:
    """All tensors of the network, in the order of a forward pass."""
    c = config
    n_q, n_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    specs = [
        TensorSpec("token_embd.weight", ("model.embed_tokens.weight",), (c.n_vocab, c.dim)),
        TensorSpec("output_norm.weight", ("model.norm.weight",), (c.dim,)),
        TensorSpec("output.weight", ("lm_head.weight",), (c.n_vocab, c.dim), optional=True),
    ]
    factors = c.rope.llama3_factors()
    specs.append(TensorSpec("rope_freqs.weight", (), (c.rope.n_rot // 2,), optional=factors is None, values=factors))
    q_pairs, k_pairs = (c.n_heads, c.n_kv_heads) if c.interleaved else (0, 0)
    # name in GGUF, name in Hugging Face, rows, cols, bias (True, False, None: may have one), heads to permute
    matrices = (
        ("attn_q", "self_attn.q_proj", n_q, c.dim, c.qkv_bias, q_pairs),
        ("attn_k", "self_attn.k_proj", n_kv, c.dim, c.qkv_bias, k_pairs),
        ("attn_v", "self_attn.v_proj", n_kv, c.dim, c.qkv_bias, 0),
        ("attn_output", "self_attn.o_proj", c.dim, n_q, c.other_bias, 0),
        ("ffn_gate", "mlp.gate_proj", c.n_ffn, c.dim, c.other_bias, 0),
        ("ffn_up", "mlp.up_proj", c.n_ffn, c.dim, c.other_bias, 0),
        ("ffn_down", "mlp.down_proj", c.dim, c.n_ffn, c.other_bias, 0),
    )
    norms = [("attn_norm", "input_layernorm", c.dim), ("ffn_norm", "post_attention_layernorm", c.dim)]
    if c.qk_norm:
        norms += [
            ("attn_q_norm", "self_attn.q_norm", c.head_dim),
            ("attn_k_norm", "self_attn.k_norm", c.head_dim),
        ]
    if c.sub_norms:
        norms += [
            ("attn_sub_norm", "self_attn.attn_sub_norm", n_q),
            ("ffn_sub_norm", "mlp.ffn_sub_norm", c.n_ffn),
        ]
    for i in range(c.n_layers):
        gguf, hf = f"blk.{i}", f"model.layers.{i}"
        for name, theirs, size in norms:
            specs.append(TensorSpec(f"{gguf}.{name}.weight", (f"{hf}.{theirs}.weight",), (size,)))
        for name, theirs, rows, cols, bias, heads in matrices:
            specs.append(
                TensorSpec(f"{gguf}.{name}.weight", (f"{hf}.{theirs}.weight",), (rows, cols), permute_heads=heads)
            )
            if c.scales:
                specs.append(TensorSpec(f"{gguf}.{name}.scale", (), (1,), optional=True))
            if bias is not False:
                specs.append(TensorSpec(f"{gguf}.{name}.bias", (f"{hf}.{theirs}.bias",), (rows,),
                                        optional=bias is None, permute_heads=heads))  # fmt: skip
    return specs


def forward(config: Config, weights: Any, ops: Any, ids: np.ndarray, cache: Any, first: int = 0) -> Any:
    """Logits of the tokens ids[first:], (n - first, n_vocab), after ids (n,) are appended to the cache.

    `weights` has the global tensors and `layers` as attributes in GGUF's names (`attn_q`, `attn_q_bias`; None
    where absent), packed by the same `ops`.
    """
    n, start = len(ids), cache.length
    freqs, mscale = weights.freqs
    scale = config.head_dim**-0.5
    x = ops.embed(weights.token_embd, ids)  # (n, dim): the residual stream
    for i, layer in enumerate(weights.layers):
        h = ops.rmsnorm(x, layer.attn_norm, config.eps)
        q = ops.matmul(layer.attn_q, h, layer.attn_q_bias).reshape(n, config.n_heads, config.head_dim)
        k = ops.matmul(layer.attn_k, h, layer.attn_k_bias).reshape(n, config.n_kv_heads, config.head_dim)
        v = ops.matmul(layer.attn_v, h, layer.attn_v_bias).reshape(n, config.n_kv_heads, config.head_dim)
        if config.qk_norm:
            q = ops.rmsnorm(q, layer.attn_q_norm, config.eps)
            k = ops.rmsnorm(k, layer.attn_k_norm, config.eps)
        q = ops.rope(q, start, freqs, config.interleaved, mscale)
        k = ops.rope(k, start, freqs, config.interleaved, mscale)
        h = ops.attend(q, k, v, cache, i, start, scale)
        if config.sub_norms:
            h = ops.rmsnorm(h, layer.attn_sub_norm, config.eps)
        x = ops.add(x, ops.matmul(layer.attn_output, h, layer.attn_output_bias))

        h = ops.rmsnorm(x, layer.ffn_norm, config.eps)
        gate = ops.matmul(layer.ffn_gate, h, layer.ffn_gate_bias)
        up = ops.matmul(layer.ffn_up, h, layer.ffn_up_bias)
        h = ops.relu2(gate, up) if config.activation == "relu2" else ops.swiglu(gate, up)
        if config.sub_norms:
            h = ops.rmsnorm(h, layer.ffn_sub_norm, config.eps)
        x = ops.add(x, ops.matmul(layer.ffn_down, h, layer.ffn_down_bias))
    cache.length = start + n
    x = ops.rmsnorm(x[first:], weights.output_norm, config.eps)
    return ops.matmul(weights.output, x)
