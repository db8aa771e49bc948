"""Write a Llama model of a known shape with random weights, in any file type: speed can be measured at real sizes.

    python tools/make_model.py 1b q4_k_m /tmp/1b-q4_k_m.gguf
    python tools/make_model.py 135m f16 135m-f16.gguf --seed 1 --overwrite

Shapes: 135m (SmolLM2-135M), 1b (TinyLlama-1.1B), 3b (Llama-3.2-3B), 8b (Llama-3-8B), tiny (for tests). Each tensor
has the type that llama.cpp's rules give it in that file type. The context is at least 8,192 tokens in all but tiny.

The text that such a model makes is noise. Encoding a billion random numbers would take minutes, and no kernel's speed
depends on them, so about a million numbers (normal, standard deviation 0.02; norms are 1) are encoded for each type
and row length, and every tensor is filled with rows drawn from that pool. The vocabulary is synthetic: three control
tokens, 256 bytes and made-up words, which llama.cpp and ggufkit both load. Memory: 200 MB, whatever the shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ggufkit_formats import blocks, gguf, nf4_tensors
from ggufkit_formats.blocks import TensorType
from ggufkit_formats.blocks.nf4 import dynamic_map
from ggufkit_formats.errors import GgufkitError, UnsupportedError
from ggufkit_runtime.models import llama

from ggufkit.cli import screen
from ggufkit.quantize import file_types
from ggufkit.quantize.rules import choose, order

STD = 0.02
POOL = 1 << 20  # weights that are encoded for each type and row length
PIECE = 16 << 20  # bytes that are written at a time

_LLAMA = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "architectures": ["LlamaForCausalLM"]}
_LLAMA_3_2_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def _shape(dim: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool, context: int,
           **more: Any) -> dict[str, Any]:  # fmt: skip
    """Settings as they stand in a config.json."""
    return _LLAMA | {
        "hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": ffn, "vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": context,
    } | more  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape(256, 3, 4, 2, 512, 512, True, 1024, rope_theta=10000.0),
    "135m": _shape(576, 30, 9, 3, 1536, 49152, True, 8192, rope_theta=100000.0),
    "1b": _shape(2048, 22, 32, 4, 5632, 32000, False, 8192, rope_theta=10000.0),
    "3b": _shape(3072, 28, 24, 8, 8192, 128256, True, 131072, rope_theta=500000.0, rope_scaling=_LLAMA_3_2_ROPE),
    "8b": _shape(4096, 32, 32, 8, 14336, 128256, False, 8192, rope_theta=500000.0),
}


def vocabulary(n: int) -> dict[str, Any]:
    """A SentencePiece-kind vocabulary of n tokens: three control tokens, 256 bytes, and made-up words."""
    words = [f"▁w{i}" for i in range(n - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words],
        "tokenizer.ggml.scores": np.concatenate([np.zeros(259), -np.arange(len(words))]).astype(np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
        "tokenizer.ggml.unknown_token_id": np.uint32(0),
    }


class Rows:
    """Encoded random rows, one pool for each type and row length."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.pools: dict[tuple[str, int], np.ndarray] = {}

    def draw(self, kind: TensorType, cols: int, n: int) -> np.ndarray:
        """n rows, uint8 (n, bytes per row)."""
        pool = self.pools.get((kind.name, cols))
        if pool is None:
            pool = self.pools[kind.name, cols] = self._pool(kind, cols)
        return pool[self.random.integers(0, len(pool), n)]

    def _pool(self, kind: TensorType, cols: int) -> np.ndarray:
        x = self.random.standard_normal((max(POOL // cols, 64), cols), dtype=np.float32) * np.float32(STD)
        if not kind.is_quantized:
            return kind.encode(x)
        from ggufkit_kernels.cpu.encode import encode

        return encode(kind, x, np.ones(cols, np.float32) if kind.needs_importance else None)


def write(shape: str, type: str, path: Path, seed: int = 0, overwrite: bool = False,
          progress: Callable[[int, int], Any] | None = None) -> gguf.Plan:  # fmt: skip
    """Write the model of that shape and file type; `progress` is told (bytes written, bytes in all).

    Raises UnsupportedError for an unknown or unwritable type, GgufkitError for an existing file without `overwrite`.
    """
    if shape not in SHAPES:
        raise UnsupportedError(f"unknown shape {shape!r} (known: {', '.join(SHAPES)})")
    file_type = file_types.find(type)
    if file_type.type not in blocks.TYPES:
        raise UnsupportedError(f"file type {file_type.name} cannot be written")
    settings = SHAPES[shape]
    config = llama.config_from_hf(settings)
    facts = file_types.ModelFacts(llama.ARCH, config.n_layers, config.n_heads, config.n_kv_heads)
    facts = replace(facts, has_imatrix=blocks.TYPES[file_type.type].needs_importance)
    specs = {spec.gguf: spec for spec in llama.tensors(config) if _wanted(spec, settings["tie_word_embeddings"])}
    names = sorted(specs, key=order)
    choices = choose(file_type, [(name, specs[name].shape) for name in names], facts)
    metadata = {"general.architecture": llama.ARCH, "general.name": f"random {shape}", **llama.metadata(config)}
    metadata |= {
        "general.quantization_version": np.uint32(file_types.QUANTIZATION_VERSION),
        **vocabulary(config.n_vocab),
    }
    if file_type.id >= 0:
        metadata["general.file_type"] = np.uint32(file_type.id)
    else:
        metadata |= nf4_tensors.metadata(nested_levels=dynamic_map() if file_type.nested else None)
    stored: dict[str, list[nf4_tensors.Row]] = {}
    for name in names:
        shape_of = specs[name].shape
        kind = choices[name].type or ("F16" if len(shape_of) > 1 else "F32")  # as from a checkpoint in BF16
        is_nf4 = kind == "NF4"
        stored[name] = nf4_tensors.rows(name, shape_of, file_type.nested) if is_nf4 else [(name, kind, shape_of)]
    plan = gguf.Plan(metadata, [row for name in names for row in stored[name]])
    rows, done, planned = Rows(seed), 0, {tensor.name: tensor for tensor in plan.tensors}
    with gguf.Writer(path, plan, overwrite) as writer:
        for name in names:
            if len(parts := stored[name]) > 1:
                pieces = _nf4_pieces([part[0] for part in parts], specs[name].shape, rows, file_type.nested)
            else:
                pieces = ((name, piece) for piece in _pieces(planned[name], specs[name].values, rows))
            for part, piece in pieces:
                writer.write(part, piece)
                done += piece.nbytes
                if progress is not None:
                    progress(done, plan.nbytes)
    return plan


def _wanted(spec: Any, tied: bool) -> bool:
    """Whether the shape's file holds that tensor of the architecture: no biases, the output where it is untied."""
    if spec.gguf == "output.weight":
        return not tied
    return not spec.optional or spec.values is not None


def _pieces(tensor: gguf.Planned, values: np.ndarray | None, rows: Rows) -> Any:
    """The tensor's bytes in pieces: the values given, ones for a norm, random rows for a matrix."""
    if len(tensor.shape) < 2:
        yield np.ones(tensor.shape, np.float32) if values is None else values.astype(np.float32)
        return
    n_rows, cols = tensor.shape
    step = max(1, PIECE // tensor.type.row_nbytes(cols))
    for start in range(0, n_rows, step):
        yield rows.draw(tensor.type, cols, min(step, n_rows - start))


def _nf4_pieces(names: list[str], shape: tuple[int, ...], rows: Rows, nested: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The bytes of the stored tensors `names` of an NF4 matrix."""
    kind = blocks.TYPES["NF4"]
    drawn = rows.draw(kind, shape[1], shape[0]).reshape(-1).view(kind.fields)
    yield names[0], np.ascontiguousarray(drawn["qs"]).reshape(-1)
    yield from zip(names[1:], nf4_tensors.encode_absmax(np.ascontiguousarray(drawn["d"]), nested), strict=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("type", metavar="TYPE", help="a file type: q4_k_m, q4_0, q6_k, q8_0, f16 …")
    parser.add_argument("output", metavar="OUT.gguf", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.gguf where it exists")
    args = parser.parse_args()
    try:
        with screen.Progress(f"writing {args.output.name}", 1, unit=screen.size) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar(done)

            plan = write(args.shape, args.type, args.output, args.seed, args.overwrite, progress)
    except GgufkitError as error:
        print(f"error: {screen.describe(error)}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(plan.tensors)} tensors, {screen.size(plan.nbytes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
