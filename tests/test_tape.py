"""The recorded forward of one token against the separate calls, bit for bit, and what recording must survive."""

from __future__ import annotations

import gc

import memory_tensors
import numpy as np
import pytest
import tiny_models
from ggufkit_formats import blocks
from ggufkit_formats.errors import UsageError
from ggufkit_kernels.cpu.attention import SPLIT
from ggufkit_kernels.cpu.ops import CpuOps
from ggufkit_kernels.cpu.tape import Recorder
from ggufkit_runtime import generate

CASES = {
    "llama Q4_K": ("llama", "Q4_K", {}),
    "llama Q6_K, one thread": ("llama", "Q6_K", {"threads": 1}),
    "llama, odd inputs": ("llama", "F16", {"hidden_size": 120, "intermediate_size": 90, "vocab_size": 301}),
    "qwen2 Q8_0": ("qwen2", "Q8_0", {}),
    "qwen3 BF16": ("qwen3", "BF16", {"num_attention_heads": 6, "head_dim": 34}),
}


@pytest.fixture(params=CASES, scope="module")
def model(request, tmp_path_factory):
    arch, type, settings = CASES[request.param]
    settings = dict(settings)
    threads = settings.pop("threads", 3)
    path = tiny_models.write(tmp_path_factory.mktemp("tape") / "m.gguf", arch, type, **settings)
    return generate.load(path, threads=threads)


def separately(model, ids, cache):
    """The forward by separate calls, each run at once."""
    forward, ops = model.architecture.forward, model.ops
    return np.concatenate([forward(model.config, model.weights, ops, np.array([t]), cache) for t in ids])


def recorded(model, ids, cache):
    return np.concatenate([model.forward([t], cache) for t in ids])


def test_equals_the_separate_calls(model):
    ids = np.random.default_rng(0).integers(0, model.config.n_vocab, SPLIT + 40)  # the cache grows on the way
    ours, theirs = model.cache(), model.cache()
    found, expected = recorded(model, ids, ours), separately(model, ids, theirs)
    assert np.array_equal(found, expected)
    assert ours.length == theirs.length == len(ids)


def test_after_a_prompt_a_cut_and_another_cache(model):
    ids = np.random.default_rng(1).integers(0, model.config.n_vocab, 40)
    first, second, plain = model.cache(), model.cache(), model.cache()
    model.forward(ids[:20], first)
    model.forward(ids[:20], plain)
    expected = separately(model, ids[20:], plain)
    kept = model.forward([int(ids[20])], first)
    recorded(model, ids, second)  # its own tape, the same weights
    assert np.array_equal(kept, expected[:1])  # an answer is not overwritten by the next
    recorded(model, ids[5:15], first)
    first.truncate(21)
    gc.collect()
    assert np.array_equal(recorded(model, ids[21:], first), expected[1:])


def test_buffers_are_shared_out_again(model):
    recorder = Recorder(model.ops)
    a = recorder._array(3, 4)
    part = a.reshape(12)[4:]
    where = part.base.ctypes.data
    del a
    gc.collect()
    b = recorder._array(3, 4)
    assert b.ctypes.data != where  # a view still refers to the first
    del part, b
    gc.collect()
    again = {recorder._array(3, 4).ctypes.data for _ in range(3)}
    assert len(recorder.keep) == 2 and again <= {x.ctypes.data for x in recorder.keep}


def test_wrong_tokens_and_a_full_cache(model):
    cache = model.cache(2)
    model.ops.forward(model.architecture.forward, model.config, model.weights, [0], cache)
    with pytest.raises(UsageError, match="token id"):
        model.ops.forward(model.architecture.forward, model.config, model.weights, [model.config.n_vocab], cache)
    assert cache.length == 1
    model.forward([0], cache)
    with pytest.raises(UsageError, match="does not fit a context of 2"):
        model.ops.forward(model.architecture.forward, model.config, model.weights, [0], cache)


@pytest.mark.parametrize("read", ["q", "k", None])
def test_rotated_queries_and_keys_are_there_for_others_too(read):
    """Attention rotates by the way; who reads a rotated query or key afterwards finds it rotated."""
    ops, rng = CpuOps(2), np.random.default_rng(5)
    freqs = np.float64(10000.0) ** -np.linspace(0, 1, 16)
    f32, numbers = blocks.TYPES["F32"], rng.standard_normal((4, 64, 64), dtype=np.float32)
    weights = {name: ops.weight(memory_tensors.encoded(f32, x)) for name, x in zip("eqkv", numbers, strict=True)}

    def network(config, weights, ops, ids, cache, first=0):
        x = ops.embed(weights["e"], ids)
        q, k, v = (ops.matmul(weights[name], x).reshape(len(ids), 2, 32) for name in "qkv")
        q, k = (ops.rope(y, cache.length, freqs, interleaved=False) for y in (q, k))
        out = ops.attend(q, k, v, cache, 0, cache.length, 0.2)
        if read:
            out = ops.add(out, {"q": q, "k": k}[read].reshape(len(ids), 64))
        return out

    cache, other = ops.cache(1, 2, 32, 64), ops.cache(1, 2, 32, 64)
    for token in (3, 9, 11, 9):
        ids = np.array([token])
        wanted = network(None, weights, ops, ids, other)
        other.length += 1
        assert np.array_equal(ops.forward(network, None, weights, ids, cache), wanted)
