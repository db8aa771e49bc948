"""`ggufkit perplexity` and `ggufkit bench` as commands, and the progress that commands show."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import time

import numpy as np
import pytest
import tiny_models
from command_line import Terminal, control_characters, ggufkit, start
from ggufkit_formats.errors import UsageError
from ggufkit_runtime import evaluate, generate
from ggufkit_runtime.recorded import Recorded

from ggufkit.cli import progress, screen


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.write(tmp_path_factory.mktemp("models") / "tiny.gguf", type="Q8_0")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("To be, or not to be: that is the question. " * 12)
    return path


def test_perplexity(tiny, text):
    args = ("perplexity", "-m", tiny, "-f", text, "-c", "64", "--chunks", "3")
    done = ggufkit(*args, "--json")
    found = done.json
    assert list(found) == ["perplexity", "stderr", "n_tokens", "n_chunks"]
    assert found["n_chunks"] == 3 and found["n_tokens"] == 3 * 31
    expected = evaluate.perplexity(generate.load(tiny), text.read_text(), 64, 3)
    assert math.isclose(found["perplexity"], expected.perplexity, rel_tol=1e-6) and found["stderr"] > 0
    plain = ggufkit(*args)
    assert plain.out == (
        f"perplexity {found['perplexity']:.4f} ± {found['stderr']:.4f} ({3 * 31} tokens in 3 windows of 64)\n"
    )


def test_perplexity_against_a_reference(tiny, text, tmp_path):
    reference = tiny_models.write(tmp_path / "f32.gguf", type="F32")
    args = ("perplexity", "-m", tiny, "-f", text, "-c", "64", "--chunks", "2", "--against", reference)
    found = ggufkit(*args, "--json").json
    keys = ["perplexity", "stderr", "n_tokens", "n_chunks", "kl_mean", "kl_stderr", "kl_p99", "same_top", "n_bytes",
            "bits_per_weight"]  # fmt: skip
    assert list(found) == keys and all(isinstance(found[k], float) for k in keys if not k.startswith("n_"))
    assert 0 < found["kl_mean"] < found["kl_p99"] < 0.1 and 0.8 < found["same_top"] <= 1
    summary = ggufkit("inspect", tiny, "--json").json["summary"]
    assert found["n_bytes"] == summary["n_bytes"] and 8.4 < found["bits_per_weight"] < 9
    assert round(found["bits_per_weight"], 4) == summary["bits_per_weight"]
    lines = ggufkit(*args).out.splitlines()
    kl, spread = found["kl_mean"], 1.96 * found["kl_stderr"]
    shown = [float(n) for n in re.findall(r"\d+\.\d+", lines[1])]
    assert len(lines) == 4 and lines[1].startswith("KL divergence") and "95 % confidence" in lines[1]
    assert np.allclose(shown, [kl, kl - spread, kl + spread, found["kl_p99"]], atol=2e-6)
    assert lines[2] == f"same top token {100 * found['same_top']:.2f} %"
    assert lines[3].startswith(f"weights {found['n_bytes']} bytes (") and "bits per weight" in lines[3]


def test_a_recorded_reference_says_what_the_model_said(tiny, text, tmp_path):
    """Whatever the windows' lengths; another text was not recorded."""
    reference = generate.load(tiny_models.write(tmp_path / "f32.gguf", type="F32"))
    model = generate.load(tiny)
    for n_ctx in (64, 41):
        expected = evaluate.against(model, reference, text.read_text(), n_ctx, 3)
        recorded = Recorded(reference, tmp_path / "logits")
        told: list[int] = []
        recorded.record(text.read_text(), n_ctx, 3, lambda done, total, told=told: told.append(done))
        assert told == [1, 2, 3]
        for _ in range(2):
            assert evaluate.against(model, recorded, text.read_text(), n_ctx, 3) == expected
        assert evaluate.perplexity(recorded, text.read_text(), n_ctx, 3) == evaluate.perplexity(
            reference, text.read_text(), n_ctx, 3
        )
        with pytest.raises(UsageError, match="another text"):
            evaluate.against(model, recorded, "Not to be. " * 40, n_ctx, 3)


def test_recording_in_several_batches(tiny, text, tmp_path, monkeypatch):
    for module in (evaluate, generate):
        monkeypatch.setattr(module, "N_BATCH", 24)
    model = generate.load(tiny)
    recorded = Recorded(model, tmp_path / "logits")
    recorded.record(text.read_text(), 64, 2)
    _, divergence = evaluate.against(model, recorded, text.read_text(), 64, 2)
    assert divergence.kl_mean == 0 and divergence.same_top == 1 and divergence.kl_interval == (0, 0)


def test_perplexity_of_too_little(tiny, text, tmp_path):
    done = ggufkit("perplexity", "-m", tiny, "-f", text, "-c", "512")
    assert done.status in (1, 2) and "at least 1024 are needed" in done.error
    done = ggufkit("perplexity", "-m", tiny, "-f", text, "-c", "513")
    assert done.status in (1, 2) and "513" in done.error
    done = ggufkit("perplexity", "-m", tiny, "-f", text, "-c", "64", "--against", tmp_path / "missing.gguf")
    assert done.status == 1 and "missing.gguf: no such file" in done.error


def test_bench(tiny):
    args = ("bench", "-m", tiny, "-p", "32", "-n", "8", "-r", "2", "-t", "1")
    found = ggufkit(*args, "--json").json
    assert list(found) == ["model", "type", "n_parameters", "n_bytes", "device", "threads", "results"]
    assert (found["model"], found["device"], found["threads"]) == ("tiny llama", "cpu", 1)
    assert [sorted(r) for r in found["results"]] == [["gb_per_s", "stdev", "test", "tokens_per_s"]] * 2
    assert [r["test"] for r in found["results"]] == ["pp32", "tg8"]
    assert all(r["tokens_per_s"] > 0 for r in found["results"])
    with Terminal(*args, columns=40) as terminal:
        assert terminal.end() == 0
    assert "pp32" in terminal.shown and not control_characters(terminal.shown, "\n\r\b")
    done = ggufkit("bench", "-m", tiny, "-p", "1000")
    assert done.status in (1, 2) and "1000 tokens do not fit" in done.error


@pytest.mark.parametrize("command", ["perplexity", "bench", "imatrix"])
def test_interrupted(command, default_model_path, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("To be, or not to be: that is the question. " * 4000)
    out_file = tmp_path / "m.gguf"
    args = {"perplexity": ["-f", long], "bench": ["-r", "50"], "imatrix": ["-f", long, "-o", out_file]}[command]
    with start(command, "-m", default_model_path, *args) as process:
        time.sleep(2.5)
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert "Traceback" not in err.decode() and "error" not in err.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["long.txt"]


# -- progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [10, 19, 30, 39, 60, 79, 200])
@pytest.mark.parametrize("what", ["x", "loading SmolLM2-135M-Instruct.Q4_1.gguf", "日本語" * 20, "[/x]"])
def test_a_bar_fits_its_line(room, what):
    for share in (0.0, 0.005, 0.5, 1.0):
        line = progress.layout(what, share, "542.2 MB/s", "0:07 left", room)
        assert progress.columns(line) <= room
        assert "%" in line
    assert "0:07 left" in progress.layout("x", 0.5, "542.2 MB/s", "0:07 left", 79)


def test_a_bar_makes_way_for_lines(monkeypatch):
    """What others print while a bar stands on the terminal gets a line of its own; nothing of the bar stays."""
    screen_of = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", screen_of)
    with screen.Progress("one", 10, patience=0) as bar:
        bar(1)
        print("a line", file=sys.stderr)
        bar(5)
        screen.say("another")
        bar(10)
    assert sys.stderr is screen_of
    shown = ["".join(row).rstrip() for row in screen_of.rows()]
    assert shown == ["a line", "another", ""]


class FakeTerminal(io.StringIO):
    """Knows carriage return, backspace and newline."""

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[list[str]]:
        rows, at = [[]], 0
        for c in self.getvalue():
            if c == "\n":
                rows.append([])
                at = 0
            elif c in "\r\b":
                at = 0 if c == "\r" else at - 1
            else:
                rows[-1][at : at + 1] = [c]
                at += 1
        return rows


def test_progress_without_a_terminal(capsys, monkeypatch):
    """A plain line every five seconds, no more."""
    monkeypatch.delenv("GGUFKIT_NO_PROGRESS", raising=False)
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with screen.Progress("writing", 100, unit=screen.size) as bar:
        for i in range(100):
            now[0] += 0.25
            bar(i + 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"writing: {n}%, 4 B/s, 0:{25 - n // 4:02} left" for n in (20, 40, 60, 80, 100)]


def test_printable():
    assert screen.printable("héllo\t世界\n👩‍💻 \u3000\u00a0") == "héllo\t世界\n👩‍💻 \u3000\u00a0"
    assert screen.printable("a\x1b[0m\x07\x7f\x9b\r\u202e\ud800") == "a\\x1b[0m\\x07\\x7f\\x9b\\r\\u202e\\ud800"
    assert screen.one_line(" a\nb\t c\x1b ") == "a b c\\x1b"


def test_json_layout(capsys):
    document = {"a": [1, 2.5, float("nan")], "b": [{"n": "x", "shape": [1, 2]}], "c": {}, "d": [], "e": {"f": "é"}}
    screen.print_json(document)
    out = capsys.readouterr().out
    assert json.loads(out) == {**document, "a": [1, 2.5, None]}
    assert out.splitlines()[1:5] == ['  "a": [1, 2.5, null],', '  "b": [', '    {"n": "x", "shape": [1, 2]}', "  ],"]


@pytest.mark.parametrize(("seconds", "shown"), [(7, "0:07"), (754, "12:34"), (10921, "3:02:01"), (1e12, "1000:00:00")])
def test_duration(seconds, shown):
    assert progress.duration(seconds) == shown
