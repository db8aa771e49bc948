"""Small random checkpoints in Hugging Face's form, made as tests need them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
           "bitnet": "BitNetForCausalLM"}  # fmt: skip
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards boil black quartz in old jars of glass"


def make(
    folder: Path,
    arch: str = "llama",
    *,
    dim: int = 256,
    ffn: int = 512,
    layers: int = 2,
    heads: int = 4,
    kv: int = 2,
    head_dim: int | None = None,
    tied: bool = False,
    dtype: Any = ml_dtypes.bfloat16,
    shards: int = 1,
    seed: int = 1,
    config: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    n_vocab: int | None = None,
) -> Path:
    """Write config.json, a SentencePiece tokenizer (unless the folder has a tokenizer) and random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
        write_sentencepiece(folder)
        n_vocab = n_vocab or 320
    assert n_vocab
    settings: dict[str, Any] = {
        "architectures": [CLASSES[arch]], "model_type": arch, "hidden_size": dim, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": n_vocab,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    if head_dim:
        settings["head_dim"] = head_dim
    settings |= config or {}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}, indent=1))
    tensors = weights(arch, dim, ffn, layers, heads, kv, head_dim or dim // heads, n_vocab, tied, seed)
    tensors = {name: x.astype(dtype) for name, x in tensors.items() if name not in drop} | (extra or {})
    write_tensors(folder, tensors, shards)
    return folder


def weights(arch: str, dim: int, ffn: int, layers: int, heads: int, kv: int, head_dim: int, n_vocab: int, tied: bool,
            seed: int) -> dict[str, np.ndarray]:  # fmt: skip
    """Float32 tensors by their Hugging Face names, some of them with outliers."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, cols: int) -> np.ndarray:
        x = rng.standard_normal((rows, cols), np.float32) * np.float32(0.04)
        x[:: max(1, rows // 7), :: max(1, cols // 5)] *= 20
        x[rows // 2, : cols // 4] = 0
        return x

    def norm(n: int) -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(n)).astype(np.float32)

    out = {"model.embed_tokens.weight": matrix(n_vocab, dim), "model.norm.weight": norm(dim)}
    if not tied:
        out["lm_head.weight"] = matrix(n_vocab, dim)
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {
            f"{at}input_layernorm.weight": norm(dim),
            f"{at}post_attention_layernorm.weight": norm(dim),
            f"{at}self_attn.q_proj.weight": matrix(heads * head_dim, dim),
            f"{at}self_attn.k_proj.weight": matrix(kv * head_dim, dim),
            f"{at}self_attn.v_proj.weight": matrix(kv * head_dim, dim),
            f"{at}self_attn.o_proj.weight": matrix(dim, heads * head_dim),
            f"{at}mlp.gate_proj.weight": matrix(ffn, dim),
            f"{at}mlp.up_proj.weight": matrix(ffn, dim),
            f"{at}mlp.down_proj.weight": matrix(dim, ffn),
        }
        if arch == "qwen2":
            sizes = {"q": heads * head_dim, "k": kv * head_dim, "v": kv * head_dim}
            out |= {f"{at}self_attn.{p}_proj.bias": norm(n) for p, n in sizes.items()}
        if arch == "qwen3":
            out |= {f"{at}self_attn.{p}_norm.weight": norm(head_dim) for p in "qk"}
        if arch == "bitnet":
            out |= {f"{at}self_attn.attn_sub_norm.weight": norm(heads * head_dim)}
            out |= {f"{at}mlp.ffn_sub_norm.weight": norm(ffn)}
    return out


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


_MODEL: list[bytes] = []


def write_sentencepiece(folder: Path) -> None:
    """A SentencePiece model of 320 pieces (BPE, byte fallback), trained once in a process."""
    if not _MODEL:
        import sentencepiece

        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([WORDS] * 20), model_writer=out, vocab_size=320, model_type="bpe",
            byte_fallback=True, hard_vocab_limit=True, minloglevel=2, character_coverage=1.0,
        )  # fmt: skip
        _MODEL.append(out.getvalue())
    (folder / "tokenizer.model").write_bytes(_MODEL[0])
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            }
        )
    )  # fmt: skip


def write_smollm_tokenizer(folder: Path, model: Path) -> int:
    """tokenizer.json and tokenizer_config.json of SmolLM2, rebuilt from its GGUF file; returns n_vocab."""
    from ggufkit_formats import gguf

    with gguf.open(model) as f:
        tokens, types = list(f.metadata["tokenizer.ggml.tokens"]), list(f.metadata["tokenizer.ggml.token_type"])
        merges, template = list(f.metadata["tokenizer.ggml.merges"]), f.metadata.get("tokenizer.chat_template")
    special = [i for i, kind in enumerate(types) if kind == 3]
    added = [
        {"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i in special
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
        "chat_template": template, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {"content": tokens[i], "special": True, "lstrip": False, "rstrip": False,
                                          "normalized": False, "single_word": False} for i in special},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    return len(tokens)
