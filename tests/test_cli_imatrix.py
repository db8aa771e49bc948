"""`ggufkit imatrix`: what the network's inputs add up to, and the command around it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from command_line import Terminal, control_characters, ggufkit
from ggufkit_formats import gguf
from ggufkit_runtime import evaluate, generate, importance
from oracles import imatrix as oracle

from ggufkit.quantize import imatrix

TEXT = "To be, or not to be: that is the question. " * 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.write(tmp_path_factory.mktemp("models") / "tiny.gguf", type="F32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def found(tiny):
    return importance.collect(generate.load(tiny, device="reference"), TEXT, 64, 3)


# -- sums ------------------------------------------------------------------------------------------


def test_every_matrix_of_the_layers_and_nothing_else(tiny, found):
    with gguf.open(tiny) as f:
        shapes = {name: t.shape for name, t in f.tensors.items() if name.startswith("blk.") and len(t.shape) == 2}
    assert {name: (len(sums),) for name, sums in found.sums.items()} == {n: s[1:] for n, s in shapes.items()}
    assert set(found.counts.values()) == {3 * 64} and found.n_chunks == 3


def test_the_output_matrix_is_taken_in_where_asked(tiny, found, tmp_path):
    with_it = importance.collect(generate.load(tiny, device="reference"), TEXT, 64, 3, output=True)
    assert set(with_it.sums) - set(found.sums) == {"output.weight"} and with_it.counts["output.weight"] == 192
    tied = tiny_models.write(tmp_path / "tied.gguf", type="F32", optional=False)
    assert set(importance.collect(generate.load(tied), TEXT, 64, 2, output=True).sums) == set(found.sums)


def test_sums_of_the_first_layer(tiny, found):
    """Squares of the normed embeddings of three windows, each beginning with BOS."""
    model = generate.load(tiny, device="reference")
    ids = np.array(evaluate.windows(model, TEXT, 64, 3)).reshape(-1)
    assert (ids[::64] == model.tokenizer.bos_id).all()
    with gguf.open(tiny) as f:
        x = f.tensors["token_embd.weight"].dequantize()[ids].astype(np.float64)
        norm = f.tensors["blk.0.attn_norm.weight"].dequantize()
    h = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + model.config.eps) * norm
    np.testing.assert_allclose(found.sums["blk.0.attn_q.weight"], (h**2).sum(axis=0), rtol=1e-5)


def test_what_shares_an_input_shares_the_sums(found):
    for i in range(2):
        q, k, v, o, gate, up, down = (
            found.sums[f"blk.{i}.{name}.weight"]
            for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        )
        assert (q == k).all() and (q == v).all() and (gate == up).all()
        assert not np.allclose(q, gate) and not np.allclose(q, o) and len(down) == 512


@pytest.mark.skipif(not oracle.available(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_llama_cpps_own_inputs(arch, tmp_path):
    """An F32 model on the same windows: its sums within 2e-3, its counts."""
    path = tiny_models.write(tmp_path / "tiny.gguf", arch, type="F32")
    model = generate.load(path)
    ours = importance.collect(model, TEXT, 64, 3)
    theirs = oracle.collect(path, evaluate.windows(model, TEXT, 64, 3))
    assert set(theirs) == set(ours.sums) and len(theirs) == 14
    for name, (sums, count) in theirs.items():
        assert ours.counts[name] == count == 192
        assert np.linalg.norm(ours.sums[name] - sums) < 2e-3 * np.linalg.norm(sums), name


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_fast_backend_finds_the_same(arch, tmp_path):
    path = tiny_models.write(tmp_path / "tiny.gguf", arch, type="F32")
    slow, fast = (importance.collect(generate.load(path, device=d), TEXT, 64, 3) for d in ("reference", "cpu"))
    assert fast.counts == slow.counts
    for name, sums in slow.sums.items():
        assert np.linalg.norm(fast.sums[name] - sums) < 1e-3 * np.linalg.norm(sums), name


def test_windows_longer_than_a_batch(tiny, found, monkeypatch):
    """A window in pieces has the same attention, so the same sums."""
    monkeypatch.setattr(importance, "N_BATCH", 24)
    pieces = importance.collect(generate.load(tiny, device="reference"), TEXT, 64, 3)
    assert pieces.counts == found.counts
    for name, sums in found.sums.items():
        np.testing.assert_allclose(pieces.sums[name], sums, rtol=1e-4)


# -- the command -----------------------------------------------------------------------------------


def test_command(tiny, text, tmp_path):
    out = tmp_path / "m.gguf"
    args = ("imatrix", "-m", tiny, "-f", text, "-c", "64", "--chunks", "2")
    done = ggufkit(*args, "-o", out)
    assert done.out == f"{out}: 14 tensors, 128 tokens in 2 windows of 64\n"
    assert "warning: only 128 tokens" in done.err
    made = imatrix.read(out)
    assert (made.datasets, made.chunk_count, made.chunk_size) == ([str(text)], 2, 64)
    expected = importance.collect(generate.load(tiny), TEXT, 64, 2)
    for name, entry in made.entries.items():
        np.testing.assert_allclose(entry.sums, expected.sums[name], rtol=1e-6)
        assert entry.counts.tolist() == [128]
    document = ggufkit(*args, "-o", out, "--json").json
    keys = ["file", "datasets", "n_chunks", "chunk_size", "n_tokens", "tensors"]
    assert list(document) == keys and document["n_tokens"] == 128 and len(document["tensors"]) == 14
    first = document["tensors"][0]
    assert list(first) == ["name", "cols", "matrices", "tokens", "fewest", "covered", "mean", "largest"]
    assert first["name"] == "blk.0.attn_k.weight" and first["covered"] == 1
    made = ggufkit("convert", tiny, "q4_0", "-o", tmp_path / "q4.gguf", "--imatrix", out)
    assert made.status == 0, made.err
    with gguf.open(tmp_path / "q4.gguf") as f:
        assert f.metadata["quantize.imatrix.entries_count"] == 14


def test_show_and_merge(tiny, text, tmp_path):
    one, two, both = (tmp_path / name for name in ("one.gguf", "two.gguf", "both.gguf"))
    for path, chunks in ((one, 2), (two, 3)):
        ggufkit("imatrix", "-m", tiny, "-f", text, "-c", "64", "--chunks", chunks, "-o", path)
    done = ggufkit("imatrix", "--in-file", one, "--in-file", two, "-o", both, "--show")
    lines = done.out.splitlines()
    assert lines[0].split() == ["tensor", "matrices", "columns", "tokens", "covered", "mean", "square", "largest"]
    assert lines[1].split()[:6] == ["blk.0.attn_k.weight", "1", "256", "320", "100.0", "%"]
    assert lines[-1] == f"{both}: 14 tensors, 320 tokens in 5 windows of 64"
    sums = [imatrix.read(path).entries["blk.1.ffn_down.weight"].sums for path in (one, two, both)]
    np.testing.assert_array_equal(sums[0] + sums[1], sums[2])
    shown = ggufkit("imatrix", "--in-file", both, "--show")
    assert shown.out.splitlines()[:-1] == lines[:-1]


def test_on_a_terminal(tiny, text, tmp_path):
    args = ("imatrix", "-m", tiny, "-f", text, "-c", "64", "-o", tmp_path / "m.gguf")
    with Terminal(*args, columns=60) as terminal:
        assert terminal.end() == 0
    assert "importance" in terminal.shown and not control_characters(terminal.shown, "\n\r\b")


def test_refusals(tiny, text, tmp_path):
    out = tmp_path / "m.gguf"
    done = ggufkit("imatrix", "-m", tiny, "-f", text, "-o", out)
    assert done.status in (1, 2) and "at least 1024 are needed" in done.error
    done = ggufkit("imatrix", "-m", tiny, "-o", out)
    assert done.status == 2 and "give -f TEXT, or --in-file FILE" in done.error
    done = ggufkit("imatrix", "-m", tiny, "-f", text)
    assert done.status == 2 and "give -o FILE, or --show" in done.error
    done = ggufkit("imatrix", "--in-file", tiny, "-o", out)
    assert done.status == 1 and "tiny.gguf: not an importance matrix" in done.error
    before = tiny.read_bytes()
    done = ggufkit("imatrix", "-m", tiny, "-f", text, "-c", "64", "-o", tiny, "--process-output")
    assert done.status == 2 and "exists, and is no importance matrix" in done.error
    assert tiny.read_bytes() == before and not out.exists()
    done = ggufkit("convert", tiny, "q4_0", "-o", out, "--imatrix", text)
    assert done.status == 1 and "text.txt: not an importance matrix" in done.error
