"""Small random models as GGUF files, for any architecture that runs. Their text is noise, their logits are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats import blocks, gguf
from ggufkit_runtime import models

HF = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu",
}  # fmt: skip


def vocabulary(n: int) -> dict[str, Any]:
    """A SentencePiece-kind vocabulary: three control tokens, 256 bytes, and made-up words."""
    words = [f"▁w{i}" for i in range(n - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words],
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(i) for i in range(len(words))], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.unknown_token_id": np.uint32(0),
    }


def write(
    path: Path,
    arch: str = "llama",
    type: str = "F32",
    seed: int = 0,
    optional: bool = True,
    scales: bool = False,
    metadata: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a random model. `settings` are those of a config.json; `optional` also writes biases and the
    output, `scales` numbers that multiply the layers' matrices."""
    architecture = models.by_arch(arch)
    config = architecture.config_from_hf({**HF, **settings})
    random = np.random.default_rng(seed)
    values, plan = {}, []
    for spec in architecture.tensors(config):
        if spec.gguf.endswith(".scale"):
            if not scales:
                continue
        elif (spec.optional and not optional) or (spec.gguf == "rope_freqs.weight" and spec.values is None):
            continue
        if spec.values is not None:
            value = spec.values
        elif spec.gguf.endswith(("norm.weight", ".scale")):
            value = 1 + 0.2 * random.standard_normal(spec.shape)
        elif spec.is_matrix:
            value = random.standard_normal(spec.shape) * (
                1.0 if spec.gguf == "token_embd.weight" else spec.shape[1] ** -0.5
            )
        else:
            value = 0.3 * random.standard_normal(spec.shape)
        kind = blocks.find(type if spec.is_matrix else "F32")
        values[spec.gguf] = kind.encode(value.astype(np.float32))
        plan.append((spec.gguf, kind, spec.shape))
    head = {"general.architecture": arch, "general.name": f"tiny {arch}", **architecture.metadata(config)}
    plan = gguf.Plan({**head, **vocabulary(config.n_vocab), **(metadata or {})}, plan)
    with gguf.Writer(path, plan, overwrite=True) as writer:
        for name, value in values.items():
            writer.write(name, value.reshape(-1))
    return path
