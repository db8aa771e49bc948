"""What things take of a device's memory, computed beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from ggufkit_formats.blocks import TensorType

from ..cpu.pack import allocate
from . import attention, ops
from .weights import layout_of_type


def weight_nbytes(type: TensorType, rows: int, cols: int, scaled: bool = False) -> int:
    """A packed matrix; `scaled`: times a number of its own, so that its scales are float32."""
    layout = layout_of_type(type)
    if scaled and not layout.is_plain:
        layout = replace(layout, number="f32")
    return allocate((rows, cols), layout, None, lambda shape, dtype: np.broadcast_to(np.zeros((), dtype), shape)).nbytes


def cache_nbytes(n_kv_heads: int, head_dim: int, n_ctx: int) -> int:
    """Keys and values of one layer, with a quarter more while they grow."""
    return 5 * n_kv_heads * head_dim * -(-n_ctx // 8) * 8


def scratch_nbytes(dim: int, n_ffn: int, n_heads: int, n_kv_heads: int, head_dim: int, n_vocab: int, n_ctx: int) -> int:
    """What a prompt takes beside weights and cache at its worst, rotary angles, and something for cuBLAS and code."""
    n = min(ops.CudaOps.n_batch, n_ctx)
    a_token = 4 * (4 * dim + 3 * n_ffn + (2 * n_heads + 2 * n_kv_heads) * head_dim) + 4 * max(dim, n_ffn)
    prompt = attention.prompt_nbytes(n, n_heads, head_dim)
    tables = 4 * n_ctx * head_dim
    slab = ops.SLAB_NBYTES + 2 * max(dim, n_ffn) * 16
    return n * a_token + prompt + tables + slab + 8 * n_vocab + (128 << 20)
