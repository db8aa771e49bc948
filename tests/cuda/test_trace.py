"""Whole networks in emulation: against the definition and the CPU backend, one token's graph against separate calls,
what recording must survive, and how many launches a layer takes."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import tiny_models
from ggufkit_formats import gguf
from ggufkit_formats.errors import DeviceMemoryError, UsageError
from ggufkit_kernels.cuda import attention
from ggufkit_kernels.cuda.device import in_a_row
from ggufkit_runtime import devices, evaluate, fit, generate, importance, models

CASES = {
    "llama Q4_K": ("llama", "Q4_K", {}),
    "llama Q6_K, tied": ("llama", "Q6_K", {"optional": False}),
    "llama F16, odd inputs": ("llama", "F16", {"hidden_size": 120, "intermediate_size": 90, "vocab_size": 301}),
    "llama F32": ("llama", "F32", {}),
    "llama MXFP4, without biases": ("llama", "MXFP4", {"optional": False}),
    "qwen2 Q8_0": ("qwen2", "Q8_0", {}),
    "qwen3 BF16, heads of 34": ("qwen3", "BF16", {"num_attention_heads": 6, "head_dim": 34}),
    "qwen3 TQ2_0": ("qwen3", "TQ2_0", {}),
    "bitnet TQ1_0": ("bitnet", "TQ1_0", {"hidden_act": "relu2"}),
    "bitnet Q4_0, scaled": ("bitnet", "Q4_0", {"scales": True, "hidden_act": "relu2"}),
}


@pytest.fixture
def on_device(device, monkeypatch):
    """As a device of few multiprocessors, for which networks as small as these are fused as large ones are."""
    monkeypatch.setattr(device, "n_sm", 4)
    monkeypatch.setattr(devices, "open_gpu", lambda: device)


@pytest.fixture(params=CASES)
def path(request, tmp_path_factory):
    arch, type, settings = CASES[request.param]
    folder = tmp_path_factory.getbasetemp() / "networks"
    folder.mkdir(exist_ok=True)
    path = folder / f"{request.param}.gguf"
    return path if path.exists() else tiny_models.write(path, arch, type, **settings)


@pytest.fixture
def model(path, on_device):
    return generate.load(path, device="cuda")


def separately(model, ids, cache):
    """The forward by separate calls, each launched at once."""
    forward, ops = model.architecture.forward, model.ops
    calls = [forward(model.config, model.weights, ops, np.array([t]), cache) for t in ids]
    return np.concatenate([ops.to_numpy(x) for x in calls])


def distance(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_equals_the_other_backends(model, path):
    """A prompt by cuBLAS and tokens by the graph: as near to the definition as the CPU is, which rounds inputs too."""
    ids = np.random.default_rng(0).integers(0, model.config.n_vocab, 24)
    cache = model.cache()
    ours = np.concatenate([model.forward(ids[:17], cache), *(model.forward([t], cache) for t in ids[17:])])
    expected = generate.load(path, device="reference").logits(ids.tolist())
    cpu = generate.load(path, device="cpu").logits(ids.tolist())
    assert cache.length == len(ids) and ours.shape == expected.shape
    assert distance(ours, expected) < max(2e-3, 1.2 * distance(cpu, expected))


@pytest.mark.parametrize("fused", [True, False])
def test_the_graph_equals_separate_calls(model, fused):
    model.ops.fused = fused
    ids = np.random.default_rng(1).integers(0, model.config.n_vocab, 6)
    ours, theirs = model.cache(), model.cache()
    found = np.concatenate([model.forward([t], ours) for t in ids])
    expected = separately(model, ids, theirs)
    # int8 inputs of equal numbers are equal; norms that are fused add up in another order, so not always bit for bit
    assert distance(found, expected) < 2e-2
    assert ours.length == theirs.length == len(ids)


def test_launches_that_begin_early(model):
    """Results do not depend on it, bit for bit."""
    ids = np.random.default_rng(3).integers(0, model.config.n_vocab, 12)
    device, found = model.ops.device, []
    was = device.early
    for early in (was, False, was):
        device.early, cache = early, model.cache()
        found.append(np.concatenate([model.forward([t], cache) for t in ids]))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


def test_few_tokens_at_once(model):
    """2 to 8 tokens go through the kernels for single ones, with the same arithmetic."""
    ids = np.random.default_rng(2).integers(0, model.config.n_vocab, 8)
    one, many = model.cache(), model.cache()
    expected = separately(model, ids, one)
    found = np.concatenate([model.forward(ids[:3], many), model.forward(ids[3:], many)])
    assert distance(found, expected) < 2e-2


@pytest.fixture
def llama(tmp_path, on_device):
    return generate.load(tiny_models.write(tmp_path / "m.gguf", "llama", "Q4_K"), device="cuda")


def test_after_a_prompt_a_cut_and_another_cache(llama):
    ids = np.random.default_rng(3).integers(0, llama.config.n_vocab, 30)
    first, second, plain = llama.cache(), llama.cache(), llama.cache()
    llama.forward(ids[:10], first)
    llama.forward(ids[:10], plain)
    expected = [llama.forward([t], plain) for t in ids[10:20]]
    kept = llama.forward([ids[10]], first)
    for t in ids[:5]:
        llama.forward([t], second)  # its own graph, the same weights
    for t in ids[20:]:
        llama.forward([t], first)
    first.truncate(11)
    again = [llama.forward([t], first) for t in ids[11:20]]
    assert np.array_equal(np.concatenate([kept, *again]), np.concatenate(expected))


def test_the_cache_grows(llama, monkeypatch):
    """Keys and values move to larger arrays, and the graph is recorded anew."""
    monkeypatch.setattr(attention, "FIRST_POSITIONS", 136)
    ids = np.random.default_rng(4).integers(0, llama.config.n_vocab, 6)
    wide, narrow = llama.cache(), llama.cache()
    wide.reserve(400)
    filler = np.random.default_rng(5).integers(0, llama.config.n_vocab, 133)
    for cache in (wide, narrow):
        llama.forward(filler, cache)
    found = [[llama.forward([t], cache) for t in ids] for cache in (narrow, wide)]
    assert narrow.positions == 2 * 136 < wide.positions
    assert np.array_equal(*map(np.concatenate, found))


def test_wrong_tokens_and_a_full_cache(llama):
    cache = llama.cache(2)
    forward, rest = llama.ops.forward, (llama.architecture.forward, llama.config, llama.weights)
    forward(*rest, np.array([0]), cache)
    with pytest.raises(UsageError, match="token id"):
        forward(*rest, np.array([llama.config.n_vocab]), cache)
    assert cache.length == 1
    llama.forward([0], cache)
    with pytest.raises(UsageError, match="does not fit a context of 2"):
        forward(*rest, np.array([0]), cache)


@pytest.mark.parametrize(("codes", "nearness"), [("Q8_0", 0.1), ("BF16", 2e-3)])  # int8 inputs, and none
def test_a_network_that_fuses_little(device, codes, nearness):
    """Results with several readers, rotations and norms that are read by others, sums of what is no product."""
    from ggufkit_formats.blocks import find
    from ggufkit_kernels.cuda.ops import CudaOps
    from ggufkit_kernels.ops_ref import RefOps
    from memory_tensors import encoded

    rng = np.random.default_rng(6)
    matrices = [encoded(find(t), rng.standard_normal((64, 64)).astype(np.float32) / 8) for t in ("F16", codes, "F32")]
    norm = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    heads = rng.uniform(0.5, 1.5, 32).astype(np.float32)
    freqs = 10000.0 ** (-np.arange(12) / 12)

    def network(config, weights, ops, ids, cache, first=0):
        a, b, c, norm, heads = weights
        start = cache.length
        x = ops.embed(a, ids)
        h = ops.rmsnorm(x, norm, 1e-5)  # read by codes, by plain numbers and by a sum
        y, z = ops.matmul(b, h), ops.matmul(c, h)
        q = ops.rope(ops.rmsnorm(y.reshape(1, 2, 32), heads, 1e-5), start, freqs, False)
        k = ops.rope(z.reshape(1, 2, 32), start, freqs, False, 1.5)  # another factor: not attention's
        x = ops.add(ops.attend(q, k, ops.rope(z.reshape(1, 2, 32), start, freqs, True), cache, 0, start, 0.2), h)
        x = ops.add(x, ops.relu2(ops.matmul(a, x), ops.matmul(b, x)))
        x = ops.add(ops.swiglu(ops.matmul(a, x), x), ops.matmul(b, x))
        cache.length = start + 1
        return ops.rmsnorm(x[first:], norm, 1e-5)

    ours, ref = CudaOps(device, 1), RefOps(np.float16)
    packed = [ours.weight(m) for m in matrices] + [device.upload(norm), device.upload(heads)]
    plain = [ref.weight(m) for m in matrices] + [norm, heads]
    mine, theirs = ours.cache(1, 2, 32, 64), ref.cache(1, 2, 32, 64)
    for token in (3, 60, 7):
        found = ours.to_numpy(ours.forward(network, None, packed, np.array([token]), mine))
        expected = network(None, plain, ref, np.array([token]), theirs)
        assert distance(found, expected) < nearness


@pytest.mark.parametrize("cols", [64, 33])
def test_many_tokens_with_float32_weights(device, monkeypatch, cols):
    """By cuBLAS in float32, in several pieces: nothing is rounded, as on the CPU."""
    from ggufkit_formats.blocks import find
    from ggufkit_kernels.cpu.ops import CpuOps
    from ggufkit_kernels.cpu.simd import LANES
    from ggufkit_kernels.cuda import ops
    from memory_tensors import encoded

    rng = np.random.default_rng(8)
    values = rng.standard_normal((5 * LANES + 3, cols)).astype(np.float32)
    values[2, :2] = 2e37, 1e-40  # which halves do not hold
    bias = rng.standard_normal(len(values)).astype(np.float32)
    monkeypatch.setattr(ops, "SLAB_NBYTES", 4 * cols * 2 * LANES)  # three pieces
    ours, cpu, launched = ops.CudaOps(device, 1), CpuOps(1), []
    weight, other = ours.weight(encoded(find("F32"), values)), cpu.weight(encoded(find("F32"), values))
    real = device.launch
    monkeypatch.setattr(device, "launch", lambda kernel, *rest: (launched.append(kernel.name), real(kernel, *rest)))
    for n in (9, 33):
        x = rng.standard_normal((n, cols)).astype(np.float32)
        x[0, 0] = 1e-39
        exact = x.astype(np.float64) @ values.astype(np.float64).T + bias
        size = np.abs(x).astype(np.float64) @ np.abs(values).astype(np.float64).T + np.abs(bias)
        found = ours.to_numpy(ours.matmul(weight, device.upload(x), device.upload(bias)))
        error = np.abs(found - exact) / size
        assert error.max() < 1e-6 and error.max() <= 1.2 * (np.abs(cpu.matmul(other, x, bias) - exact) / size).max()
        assert np.array_equal(found, ours.to_numpy(ours.matmul(weight, device.upload(x))) + bias)
        x[1, 3] = np.nan
        found = ours.to_numpy(ours.matmul(weight, device.upload(x)))
        assert np.isnan(found[1]).all() and np.isfinite(np.delete(found, 1, axis=0)).all()
    assert set(launched) == {"plain_unpack", "add_rows"} and launched.count("plain_unpack") == 2 * 3 * 3


def test_variants_to_be_measured_compute_the_same(llama):
    """Weights asked for beside attention, and blocks of a matvec that go from strip to strip."""
    ids = [1, 300, 7]
    plain, other = llama.cache(), llama.cache()
    expected = [llama.forward([t], plain) for t in ids]
    llama.ops.prefetched = 1 << 16
    for layer in llama.weights.layers:
        layer.attn_q.blocks = layer.ffn_down.blocks = 4
    assert np.array_equal([llama.forward([t], other) for t in ids], expected)
    names = [launch[0].name for level in other.trace.levels for launch in level]
    assert names.count("prefetch") == 2


def test_memory_is_given_back_at_once(llama):
    """A conversation's cache and graph go with it: no cycle of references keeps them until Python looks for those."""
    if not hasattr(llama.ops.device, "used"):
        pytest.skip("only the emulated device counts every byte")
    llama.forward(np.arange(12), llama.cache())  # what the backend keeps
    llama.forward([1], llama.cache())
    before = llama.ops.device.memory()[0]
    cache = llama.cache()
    llama.forward(np.arange(12), cache)
    for token in range(2):
        llama.forward([token], cache)
    assert llama.ops.device.memory()[0] < before
    gc.disable()
    try:
        del cache
        assert llama.ops.device.memory()[0] == before
    finally:
        gc.enable()


@pytest.mark.parametrize("fused", [True, False])
def test_launches_a_layer(tmp_path, on_device, fused):
    """What docs/cuda.md says: a layer of Llama is 5 launches in 5 levels; 12 in 9 where little is fused."""
    llama = generate.load(tiny_models.write(tmp_path / "m.gguf", "llama", "Q4_K", optional=False), device="cuda")
    llama.ops.fused = fused
    cache = llama.cache()
    llama.forward([1], cache)
    kinds = [[launch[0].name for launch in level] for level in cache.trace.levels]
    early = [may for _, may in in_a_row(cache.trace.levels)]
    assert early == [False, *[True] * (cache.trace.n_launches - 1)]  # all but the first wait by themselves
    if fused:
        layer = [["matvecs"], ["attend"], ["matvec_norm"], ["matvec_gated"], ["matvec_norm"]]
        assert kinds == [["embed"], ["norm_quantize"], *layer, *layer, ["matvec"]]
    else:
        layer = [
            ["norm_quantize"], ["matvec"] * 3, ["attend"], ["quantize"], ["matvec"],
            ["norm_quantize"], ["matvec"] * 2, ["gate_quantize"], ["matvec"],
        ]  # fmt: skip
        assert kinds == [["embed"], *layer, *layer, ["norm_quantize"], ["matvec"]]


# -- the runtime on it -----------------------------------------------------------------------------


def test_generating_fetches_few_logits(llama, monkeypatch):
    """Greedy and top-k sampling draw the same tokens from the largest logits as from all of them."""
    ids = [1, 300, 17, 42]
    downloads = []
    download = llama.ops.device.download
    monkeypatch.setattr(llama.ops.device, "download", lambda x: downloads.append(x.nbytes) or download(x))
    for settings in ({"temperature": 0}, {"seed": 5}, {"seed": 6, "top_k": 64, "temperature": 1.5}):
        session = llama.session()
        downloads.clear()
        few = list(session.stream(ids, generate.Sampler(**settings), 12))
        assert max(downloads) <= 8 * 64
        hashed = session.logits_hash
        other = llama.session()
        other._n_top = 0
        assert few == list(other.stream(ids, generate.Sampler(**settings), 12)) and hashed == other.logits_hash
    session = llama.session()
    list(session.stream(ids, generate.Sampler(seed=1, repeat_penalty=1.3), 4))  # needs all logits
    assert max(downloads) > 8 * 64


def test_perplexity_and_bench(llama):
    text = "w1 w2 w3 " * 20
    ours = evaluate.perplexity(llama, text, n_ctx=16, n_chunks=2)
    cpu = evaluate.perplexity(generate.load(llama.info.path, device="cpu"), text, n_ctx=16, n_chunks=2)
    assert np.log(ours.perplexity) == pytest.approx(np.log(cpu.perplexity), rel=0.02)
    assert all(r.tokens_per_s > 0 for r in evaluate.bench(llama, 12, 3, 1))


def test_an_importance_matrix(llama):
    text = "w1 w2 w3 " * 20
    ours, cpu = (importance.collect(m, text, 16, 2) for m in (llama, generate.load(llama.info.path, device="cpu")))
    assert ours.counts == cpu.counts
    for name, sums in cpu.sums.items():
        assert np.linalg.norm(ours.sums[name] - sums) < 2e-2 * np.linalg.norm(sums), name


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("n_batch", [512, 15])
def test_an_importance_matrix_of_a_split_model(llama, n, n_batch):
    """Each side's own matrices; a batch is never a single token, which would be replayed past the recorder."""
    text, path = "w1 w2 w3 " * 20, llama.info.path
    model = generate.load(path, device="cuda", n_gpu_layers=n)
    model.ops.n_batch = n_batch
    assert model.ops.name == "cuda+cpu"
    found = importance.collect(model, text, 16, 2, output=True)
    cpu = importance.collect(generate.load(path, device="cpu"), text, 16, 2, output=True)
    assert list(found.counts.items()) == list(cpu.counts.items()) and "output.weight" in cpu.counts
    for name, sums in cpu.sums.items():
        assert np.linalg.norm(found.sums[name] - sums) < 2e-2 * np.linalg.norm(sums), name
    first = f"blk.{2 - n}.attn_q.weight"  # what is before the GPU's part is the CPU's, to the bit
    before = [name for name in cpu.sums if name.startswith("blk.") and name < first[:6]]
    assert n_batch != 512 or all(np.array_equal(found.sums[name], cpu.sums[name]) for name in before)
    assert bool(before) == (n == 1)


# -- part of the layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_part_of_the_layers(path, on_device, n):
    """The same numbers as the CPU's, as near as the GPU's own are."""
    both = generate.load(path, device="cuda", n_gpu_layers=n)
    cpu = generate.load(path, device="cpu")
    assert both.ops.name == "cuda+cpu" and both.ops.cpu_layers == 2 - n
    ids = np.random.default_rng(7).integers(0, cpu.config.n_vocab, 20)
    ours, theirs = both.cache(), cpu.cache()
    for part in (ids[:11], ids[11:12], ids[12:13], ids[13:14], ids[14:17], ids[17:18]):
        found, expected = both.forward(part, ours), cpu.forward(part, theirs)
        assert found.shape == expected.shape and distance(found, expected) < 5e-2
        assert ours.length == theirs.length
    ours.truncate(12)
    theirs.truncate(12)
    assert distance(both.forward([5], ours), cpu.forward([5], theirs)) < 5e-2
    last = both.forward(ids[:3], ours, first=2)
    assert last.shape == (1, cpu.config.n_vocab) and distance(last, cpu.forward(ids[:3], theirs, first=2)) < 5e-2
    which, values = both.top(last, 5)
    assert which.tolist() == np.argsort(-last[0], kind="stable")[:5].tolist() and np.array_equal(values, last[0, which])


def test_as_many_layers_as_fit(tmp_path, device, monkeypatch):
    """What is computed beforehand is not less than what is taken."""
    if not hasattr(device, "used"):
        pytest.skip("only the emulated device counts every byte")
    path = tiny_models.write(tmp_path / "m.gguf", "llama", "Q4_K", optional=False)
    monkeypatch.setattr(devices, "open_gpu", lambda: device)
    with gguf.open(path) as file:
        config = models.by_arch("llama").config_from_metadata(file.metadata)
        needs = fit.needs(fit.Plan(models.by_arch("llama"), config, file.tensors, None))
    for n, name in ((0, None), (1, "cuda+cpu"), (2, "cuda+cpu"), (3, "cuda")):
        free = needs.total(n) if n else needs.total(1) - 1
        monkeypatch.setattr(device, "memory", lambda free=free: (free, free))
        if name is None:
            with pytest.raises(DeviceMemoryError, match="--ctx-size"):
                generate.load(path, device="cuda")
            continue
        before = device.used
        model = generate.load(path, device="cuda")
        assert model.ops.name == name and getattr(model.ops, "n_gpu_layers", 3) == n
        cache = model.cache()
        for part in np.split(np.arange(300) % 320, [140, 280]):
            model.forward(part, cache)
        model.forward([1], cache)
        assert device.used - before <= free
        del model, cache
        gc.collect()


def test_part_of_the_layers_generates(tmp_path, on_device):
    path = tiny_models.write(tmp_path / "m.gguf", "llama", "Q8_0", optional=False)
    texts = [
        list(generate.load(path, device=device, n_gpu_layers=n).generate("w1 w2", 8, temperature=0))
        for device, n in (("cpu", None), ("cuda", 1), ("cuda", 2), ("cuda", 3))
    ]
    assert len(set(map(tuple, texts))) == 1


def test_the_command_line(tmp_path, on_device, capsys):
    """run and bench on the device, and on both sides, which a line on stderr says."""
    from ggufkit.cli import main

    path = str(tiny_models.write(tmp_path / "m.gguf", "llama", "Q8_0", optional=False))

    def ran(*words):
        with pytest.raises(SystemExit) as ended:
            main([*words, "-m", path, "--device", "cuda", "--json"])
        out, err = capsys.readouterr()
        assert ended.value.code in (0, None), err
        return json.loads(out), err

    run = ("run", "w1 w2", "-n", "5", "--raw", "--temp", "0")
    (all_there, err), (some, note) = ran(*run), ran(*run, "-ngl", "1")
    assert all_there["tokens"] == some["tokens"] and all_there["logits_hash"]
    assert "1 of 2 layers on the GPU" in note and "layers" not in err
    document, _ = ran("bench", "-p", "12", "-n", "2", "-r", "1", "-ngl", "99")
    assert document["device"] == "cuda" and len(document["results"]) == 2
    (tmp_path / "t.txt").write_text("w1 w2 w3 " * 20)
    imatrix = "imatrix", "-f", str(tmp_path / "t.txt"), "-c", "16", "--chunks", "1", "--show"
    (one, _), (two, note) = ran(*imatrix), ran(*imatrix, "-ngl", "1")
    assert "1 of 2 layers on the GPU" in note
    assert [t["name"] for t in one["tensors"]] == [t["name"] for t in two["tensors"]] and one["n_tokens"] == 16
