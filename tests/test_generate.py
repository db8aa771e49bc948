"""Sessions: stops, the cache between turns, streaming; and a model's logits in pieces equal to logits at once."""

from __future__ import annotations

import importlib.util
import threading

import numpy as np
import pytest
import tiny_models
from ggufkit_formats.errors import DeviceError, FormatError, UnsupportedError, UsageError
from ggufkit_runtime import evaluate, generate
from ggufkit_runtime.sampler import Sampler

GREEDY = Sampler(temperature=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.write(tmp_path_factory.mktemp("models") / "tiny.gguf", type="Q8_0")


@pytest.fixture(scope="module", params=["reference", "cpu"])
def model(request, path):
    return generate.load(path, device=request.param)


def test_pieces_equal_the_whole(model):
    ids = np.random.default_rng(0).integers(3, 320, 70)
    whole = model.logits(ids)
    cache = model.cache()
    parts = [model.forward(ids[a:b], cache) for a, b in ((0, 1), (1, 2), (2, 40), (40, 70))]
    scale = whole.std()
    assert np.abs(np.concatenate(parts) - whole).max() < 0.05 * scale
    last = model.forward(ids, model.cache(), first=69)
    assert last.shape == (1, 320) and np.abs(last[0] - whole[-1]).max() < 0.05 * scale


def test_greedy_is_argmax_of_logits(model):
    ids = [1, 300, 301]
    session = model.session()
    out = list(session.stream(ids, GREEDY, 12))
    assert len(out) == 12 and session.finish_reason == "length" and not session.context_full
    logits = model.logits(ids + out)
    top = np.sort(logits, axis=1)
    clear = top[:, -1] - top[:, -2] > 0.05 * logits.std()
    for i, token in enumerate(out):
        if clear[len(ids) - 1 + i]:
            assert token == logits[len(ids) - 1 + i].argmax()


def test_stops(model, monkeypatch):
    ids = [1, 300, 301]
    free = list(model.session().stream(ids, GREEDY, 10))
    monkeypatch.setattr(model.tokenizer, "eog_ids", frozenset({free[4]}))
    session = model.session()
    got = list(session.stream(ids, GREEDY, 10))
    assert got == free[: free.index(free[4])] and session.finish_reason == "stop"
    monkeypatch.setattr(model.tokenizer, "eog_ids", frozenset())
    session = model.session(n_ctx=8)
    got = list(session.stream(ids, GREEDY))
    # the last token is sampled from a full cache: 8 positions hold 3 + 5, and a sixth follows
    assert len(got) == 6 and session.finish_reason == "length" and session.context_full
    assert list(model.session().stream(ids, GREEDY, 0)) == []


def test_a_second_turn_reuses_the_cache(model):
    session = model.session()
    first = list(session.stream([1, 300, 301], GREEDY, 4))
    longer = [1, 300, 301, *first, 310, 311]
    again = list(session.stream(longer, GREEDY, 4))
    assert session.timings.prompt_tokens == 3  # the last generated token, and the two new ones
    fresh = model.session()
    assert list(fresh.stream(longer, GREEDY, 4)) == again
    assert list(session.stream([1, 300], GREEDY, 1)) == list(model.session().stream([1, 300], GREEDY, 1))


def test_equal_runs_have_equal_hashes(model):
    hashes = set()
    for _ in range(2):
        session = model.session()
        list(session.stream([1, 300, 301], GREEDY, 5))
        hashes.add(session.logits_hash)
    assert len(hashes) == 1 and len(hashes.pop()) == 64


def test_wrong_use_is_refused(model):
    with pytest.raises(UsageError, match="empty"):
        next(model.session().stream([], GREEDY))
    with pytest.raises(UsageError, match="more than the context"):
        next(model.session(4).stream([1] * 5, GREEDY))
    with pytest.raises(UsageError, match="0 to 319"):
        model.logits([320])
    with pytest.raises(UsageError, match="0 to 319"):
        model.logits([-1])
    with pytest.raises(UsageError, match="at least one"):
        model.logits([])
    with pytest.raises(UsageError, match="None means no limit"):
        next(model.generate("w1", max_tokens=-1))


def test_two_threads_generate_at_once(path):
    model = generate.load(path, device="cpu")
    expected = list(model.session().stream([1, 300], GREEDY, 20))
    results: dict[int, list[int]] = {}

    def work(i):
        results[i] = list(model.session().stream([1, 300], GREEDY, 20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: expected, 1: expected}


def test_perplexity_by_hand(model):
    text = "w1 w2 w3 " * 60
    ids = model.tokenizer.encode(text)
    result = evaluate.perplexity(model, text, n_ctx=64)
    total, count = 0.0, 0
    for i in range(len(ids) // 64):
        window = [1, *ids[i * 64 + 1 : (i + 1) * 64]]
        log_p = evaluate.log_softmax(model.logits(window))
        for j in range(32, 63):
            total, count = total - log_p[j, window[j + 1]], count + 1
    assert result.n_tokens == count and result.n_chunks == len(ids) // 64
    assert result.perplexity == pytest.approx(np.exp(total / count), rel=1e-3)
    same, divergence = evaluate.against(model, model, text, n_ctx=64, n_chunks=2)
    assert divergence.kl_mean == 0 and divergence.same_top == 1 and same.n_chunks == 2
    with pytest.raises(UsageError, match="at least 1024 are needed"):
        evaluate.perplexity(model, "short")


def test_odd_windows_and_all_chunks(model):
    text = "w1 w2 w3 " * 10
    assert evaluate.perplexity(model, text, n_ctx=5, n_chunks=3).n_tokens == 3 * 2  # half of 5 is 2; 3 and 4 are scored
    everything = evaluate.perplexity(model, text, n_ctx=16)
    assert evaluate.perplexity(model, text, n_ctx=16, n_chunks=-1) == everything


def test_a_window_of_several_batches(model, monkeypatch):
    text = "w1 w2 w3 " * 30
    whole = evaluate.perplexity(model, text, n_ctx=45, n_chunks=2)
    for batch in (7, 22, 23, 44):
        monkeypatch.setattr(evaluate, "N_BATCH", batch)
        parts = evaluate.perplexity(model, text, n_ctx=45, n_chunks=2)
        assert parts.n_tokens == whole.n_tokens == 2 * 22
        assert np.log(parts.perplexity) == pytest.approx(np.log(whole.perplexity), rel=0.02)


def changed(source, target, change):
    """A copy of the file with other bytes: change(name, float32 values, writable)."""
    from ggufkit_formats import gguf

    with gguf.open(source) as file:
        plan = gguf.Plan(file.metadata.copy(), list(file.tensors.values()))
        with gguf.Writer(target, plan, overwrite=True) as writer:
            for name, tensor in file.tensors.items():
                raw = tensor.raw.copy().reshape(-1)
                if tensor.type == "F32":
                    change(name, raw.view(np.float32))
                writer.write(name, raw)
    return target


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the reference backend
@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_broken_weights_are_an_error(path, tmp_path, device, value):
    def spoil(name, x):
        if name == "output_norm.weight":
            x[:] = value

    model = generate.load(changed(path, tmp_path / "bad.gguf", spoil), device=device)
    session = model.session()
    for sampler in (GREEDY, Sampler(seed=1)):
        with pytest.raises(FormatError, match="its weights are broken"):
            list(session.stream([1, 300], sampler, 4))
        assert session.cache.length == len(session.tokens) == 0
    with pytest.raises(FormatError, match="its weights are broken"):
        evaluate.perplexity(model, "w1 w2 " * 30, n_ctx=16)


def test_a_hopeless_model_has_infinite_perplexity(path, tmp_path):
    def enlarge(name, x):
        if name == "output_norm.weight":
            x *= 1e5

    model = generate.load(changed(path, tmp_path / "loud.gguf", enlarge), device="cpu")
    assert evaluate.perplexity(model, "w1 w2 " * 30, n_ctx=16, n_chunks=2).perplexity == np.inf


def test_rope_factors_are_checked(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}
    path = tiny_models.write(tmp_path / "llama3.gguf", rope_scaling=scaling)

    def spoil(name, x):
        if name == "rope_freqs.weight":
            x[3] = 0

    with pytest.raises(FormatError, match=r"rope_freqs.weight"):
        generate.load(changed(path, tmp_path / "bad.gguf", spoil), device="reference")


def test_odd_names_and_file_types(tmp_path):
    odd = {"general.name": np.array([1, 2]), "general.file_type": np.array([1, 2])}
    info = generate.load(tiny_models.write(tmp_path / "odd.gguf", metadata=odd), device="reference").info
    assert (info.name, info.file_type) == ("odd", None)


def test_fewer_tokens_than_rows_are_refused(tmp_path):
    """llama.cpp refuses such files, too; a token without a text could be generated."""
    path = tiny_models.write(tmp_path / "few.gguf", metadata=tiny_models.vocabulary(300))
    with pytest.raises(FormatError, match="has shape"):
        generate.load(path, device="reference")


def test_a_reference_with_another_tokenizer_is_refused(model, tmp_path):
    words = tiny_models.vocabulary(320)["tokenizer.ggml.tokens"]
    words[-1] = "zz"
    path = tiny_models.write(tmp_path / "other.gguf", metadata={"tokenizer.ggml.tokens": words})
    other = generate.load(path, device="reference")
    text = "w1 w2 w3 " * 30 + "zz w60 " * 30
    with pytest.raises(UnsupportedError, match="other tokens"):
        evaluate.against(model, other, text, n_ctx=16)


def test_bench_reports(model):
    results = evaluate.bench(model, n_prompt=16, n_generate=4, repetitions=2)
    assert [r.test for r in results] == ["pp16", "tg4"]
    assert all(r.tokens_per_s > 0 and r.gb_per_s > 0 for r in results)


def test_devices(path):
    if importlib.util.find_spec("cupy") is None:
        with pytest.raises(DeviceError, match="needs CuPy"):
            generate.load(path, device="cuda")
    with pytest.raises(UsageError, match="unknown device"):
        generate.load(path, device="tpu")


def test_not_a_model(tmp_path):
    from ggufkit_formats import gguf

    plan = gguf.Plan({"general.type": "adapter"}, [])
    with gguf.Writer(tmp_path / "a.gguf", plan):
        pass
    with pytest.raises(FormatError, match=r"general.architecture is missing"):
        generate.load(tmp_path / "a.gguf")
