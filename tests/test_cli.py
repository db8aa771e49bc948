"""The command line as a whole: help, usage, errors, streams, and `tokenize`; no network is run here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
from command_line import MAIN, Terminal, control_characters, environment, ggufkit, start
from ggufkit_formats import gguf

from ggufkit.cli import COMMANDS

HEAVY = ["numpy", "numba", "llvmlite", "tokenizers", "sentencepiece", "jinja2", "rich", "huggingface_hub", "gguf"]
WORDS = ["▁w", "▁w1", "▁w2", "▁", "w", "1", "2"]  # ids from 259 on; the parts of a word come as tokens of their own
VOCABULARY = {"general.architecture": "llama", **tiny_models.vocabulary(259 + len(WORDS))}
VOCABULARY["tokenizer.ggml.tokens"] = [*VOCABULARY["tokenizer.ggml.tokens"][:259], *WORDS]


def put(path, metadata):
    with gguf.Writer(path, gguf.Plan(metadata, []), overwrite=True):
        pass
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.write(tmp_path_factory.mktemp("models") / "tiny.gguf", type="Q8_0")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return put(tmp_path_factory.mktemp("models") / "vocabulary.gguf", VOCABULARY)


@pytest.fixture
def strange(tmp_path):
    """A byte-level vocabulary whose pre-tokenizer nobody knows."""
    letters = [chr(c) for c in range(33, 127)]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollmm",
        "tokenizer.ggml.tokens": [*letters, "Ġ", "ab"],
        "tokenizer.ggml.token_type": np.ones(len(letters) + 2, np.int32),
        "tokenizer.ggml.merges": ["a b"],
    }
    return put(tmp_path / "strange.gguf", metadata)


# -- help and usage ---------------------------------------------------------------------------


def loaded_by(*args: str) -> tuple[int, str, list[str]]:
    """Exit status, stdout, and the heavy packages that the command imported."""
    code = (
        "import sys, json, atexit\n"
        f"atexit.register(lambda: sys.stderr.write(json.dumps([m for m in {HEAVY} if m in sys.modules])))\n" + MAIN
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment(), timeout=60
    )
    return done.returncode, done.stdout, json.loads(done.stderr.splitlines()[-1])


def test_help_is_light():
    status, out, heavy = loaded_by("--help")
    assert (status, heavy) == (0, [])
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_is_light(name):
    status, out, heavy = loaded_by(name, "--help")
    assert status == 0 and out.startswith("Usage: ggufkit") and "--json" in out
    assert heavy == []


def test_importing_the_library_is_light():
    code = f"import sys, ggufkit; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_version():
    import ggufkit as package

    assert ggufkit("--version")[:2] == (0, f"ggufkit {package.__version__}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "error: no command 'rnu'; did you mean run?"),
        (["zzz"], "error: no command 'zzz' (commands: convert, run, inspect, "),
        (["--jsno"], "--jsno"),
        (["run", "hi", "--tmep", "0"], "--tmep"),
        (["run", "hi", "--temp", "-1"], "--temp"),
        (["run", "hi", "--temp", "nan"], "is not between 0"),
        (["run", "hi", "--temp", "warm"], "warm"),
        (["run", "hi", "-n", "-5"], "-n"),
        (["run", "hi", "-c", "0"], "-c"),
        (["run", "hi", "-t", "0"], "-t"),
        (["run", "hi", "--top-p", "2"], "--top-p"),
        (["run", "hi", "--min-p", "-0.1"], "--min-p"),
        (["run", "hi", "--top-k", "-1"], "--top-k"),
        (["run", "hi", "--repeat-penalty", "0"], "--repeat-penalty"),
        (["run", "hi", "--device", "tpu"], "tpu"),
        (["run", "one", "two"], "error: one PROMPT, not 2 words: put it in quotes"),
        (["run"], "error: nothing to do: give a PROMPT, or - to read it from stdin"),
        (["run", "--json"], "error: nothing to do"),
        (["run", "hi", "--raw", "-sys", "be brief"], "error: --system needs --chat"),
        (["run", "hi", "-m", "x.gguf", "-hf", "org/repo"], "error: -m and -hf both name a model"),
        (["run", "hi", "-m", ""], "error: -m names no model"),
        (["run", "hi", "-hf", "nothing"], "error: 'hf:nothing': a repository is written hf:ORG/REPO"),
        (["tokenize"], "TEXT"),
        (["perplexity"], "-f"),
        (["perplexity", "-f", "x", "-c", "3"], "-c"),
        (["perplexity", "-f", "x", "--chunks", "0"], "--chunks"),
        (["bench", "-p", "-1"], "-p"),
        (["bench", "-p", "0", "-n", "0"], "error: nothing to measure"),
        (["bench", "-r", "0"], "-r"),
        (["inspect"], "FILE"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_exit_2(args, message):
    done = ggufkit(*args)
    assert (done.status, done.out) == (2, "")
    assert done.err.count("\n") == 1 and message in done.error


# -- files that cannot be used ------------------------------------------------------------------


def bad_files(folder, tiny):
    """(what, file, part of the message)"""
    whole = tiny.read_bytes()
    (folder / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "header.gguf").write_bytes(whole[:100])
    (folder / "text.gguf").write_bytes(b"not a model at all, just some text")
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "folder.gguf").mkdir()
    put(folder / "lama.gguf", VOCABULARY | {"general.architecture": "lama"})
    put(folder / "nothing.gguf", {})
    return [
        ("missing", folder / "missing.gguf", "missing.gguf: no such file"),
        ("folder", folder / "folder.gguf", "a folder, not a GGUF file"),
        ("truncated", folder / "truncated.gguf", "truncated.gguf: "),
        ("cut in the header", folder / "header.gguf", "header.gguf: "),
        ("text", folder / "text.gguf", "not a GGUF file"),
        ("empty", folder / "empty.gguf", "empty.gguf: "),
        ("architecture", folder / "lama.gguf", "lama"),
        ("no architecture", folder / "nothing.gguf", "general.architecture is missing"),
    ]


def test_bad_files_are_one_line_and_exit_1(tmp_path, tiny):
    text = tmp_path / "text.txt"
    text.write_text("w1 " * 5000)
    for what, path, message in bad_files(tmp_path, tiny):
        done = ggufkit("run", "hi", "-m", path)
        assert (done.status, done.out) == (1, ""), what
        assert message in done.error and done.err.count("\n") == 1, what
    for path, message in ((tmp_path / "missing.gguf", "no such file"), (tmp_path / "truncated.gguf", "truncated.gguf")):
        for command in (["tokenize", "hi"], ["perplexity", "-f", text], ["bench"]):
            done = ggufkit(*command, "-m", path)
            assert (done.status, done.out) == (1, ""), command
            assert message in done.error and done.err.count("\n") == 1, command


def test_debug_shows_where(tmp_path):
    done = ggufkit("run", "hi", "-m", tmp_path / "missing.gguf", env={"GGUFKIT_DEBUG": "1"})
    assert done.status == 1 and "Traceback" in done.err and done.err.splitlines()[-1].startswith("error: ")


def test_a_vocabulary_does_not_run(vocabulary):
    done = ggufkit("run", "hi", "-m", vocabulary)
    assert done.status == 1 and done.error


@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is here")
def test_no_cupy(tiny):
    """--device cuda is one line that says what to install; auto takes the CPU, and layers asked for are a note."""
    done = ggufkit("run", "hi", "-m", tiny, "--device", "cuda")
    assert done.status == 1 and "ggufkit[cuda13]" in done.error and done.out == ""
    for device in ("auto", "cpu"):
        done = ggufkit("run", "hi", "-m", tiny, "--device", device, "-ngl", "99", "-n", "1", "--raw")
        assert done.status == 0 and "the CPU runs all layers" in done.err
    done = ggufkit("run", "hi", "-m", tiny, "--device", "cuda", "-ngl", "0", "-n", "1", "--raw")
    assert done.status == 0
    assert ggufkit("run", "hi", "-m", tiny, "-ngl", "some").status == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"caf\xe9 " * 2000, "not UTF-8 text (byte 3)"), ("folder", "Is a directory")],
)
def test_texts_that_cannot_be_read(tmp_path, tiny, content, message):
    path = tmp_path / "text.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    done = ggufkit("perplexity", "-m", tiny, "-f", path)
    assert (done.status, done.out) == (1, "") and message in done.error and "text.txt" in done.error


# -- streams --------------------------------------------------------------------------------------


def test_a_reader_that_leaves_early(tiny):
    with start("inspect", tiny) as process:
        assert process.stdout and process.stderr
        process.stdout.close()  # as `| head -0` does
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk(vocabulary):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        done = ggufkit("tokenize", "w1 w2", "-m", vocabulary, stdout=full)
    assert done.status == 1 and "No space left" in done.error and done.err.count("\n") == 1


def test_closed_streams(vocabulary):
    command = [sys.executable, "-c", MAIN, "tokenize", "w1", "-m", str(vocabulary)]
    code = f"import os; [os.close(n) for n in (0, 1, 2)]; os.execv({sys.executable!r}, {command})"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_hostile_strings_do_not_drive_the_terminal(tmp_path):
    evil = "\x1b]0;owned\x07\x9b31m\u202e"
    for metadata in (
        {"general.architecture": evil},
        VOCABULARY | {"tokenizer.ggml.pre": evil, "tokenizer.ggml.model": "gpt2"},
        VOCABULARY | {"tokenizer.ggml.model": evil},
    ):
        done = ggufkit("tokenize" if len(metadata) > 1 else "run", "hi", "-m", put(tmp_path / "evil.gguf", metadata))
        assert done.status == 1 and done.error
        assert not control_characters(done.err) and "\u202e" not in done.err
    path = put(tmp_path / "e\x1b[31mvil.gguf", VOCABULARY | {"general.name": evil})
    with Terminal("inspect", path) as terminal:
        assert terminal.end() == 0
    assert "owned" in terminal.shown and not control_characters(terminal.shown)
    done = ggufkit("run", "hi", "-m", tmp_path / evil)
    assert done.status == 1 and not control_characters(done.err)


# -- tokenize -------------------------------------------------------------------------------------


def test_tokenize_a_vocabulary_without_weights(vocabulary):
    found = ggufkit("tokenize", "w1 w2é", "-m", vocabulary, "--json").json
    # BOS, two words, the two bytes of é
    assert found == {"ids": [1, 260, 261, 3 + 0xC3, 3 + 0xA9], "pieces": ["<s>", " w1", " w2", "\ufffd", "\ufffd"]}
    assert ggufkit("tokenize", "w1 w2é", "-m", vocabulary).out == (
        "  1  '<s>'\n260  ' w1'\n261  ' w2'\n198  b'\\xc3'\n172  b'\\xa9'\n"
    )


def test_tokenize_special_tokens(vocabulary):
    with_special = ggufkit("tokenize", "</s>w1", "-m", vocabulary, "--json").json["ids"]
    without = ggufkit("tokenize", "</s>w1", "-m", vocabulary, "--no-special", "--json").json["ids"]
    assert with_special == [1, 2, 260]
    assert not {1, 2} & set(without) and len(without) > 3


def test_tokenize_stdin_and_environment(vocabulary):
    done = ggufkit("tokenize", "-", "--json", stdin=b"w1\xff w2", env={"GGUFKIT_MODEL": str(vocabulary)})
    assert "".join(done.json["pieces"]).startswith("<s> w1") and done.err == ""
    assert ggufkit("tokenize", "", "-m", vocabulary, "--no-special", "--json").json == {"ids": [], "pieces": []}


def test_json_in_a_narrow_encoding(tmp_path):
    """Where stdout cannot hold a character, JSON's own escapes stand for it."""
    words = [*VOCABULARY["tokenizer.ggml.tokens"][:-1], "😀"]
    path = put(tmp_path / "smile.gguf", VOCABULARY | {"tokenizer.ggml.tokens": words})
    done = ggufkit("tokenize", "😀", "-m", path, "--json", env={"PYTHONIOENCODING": "latin-1"})
    assert done.json["pieces"][-1] == "😀" and done.out.isascii()


def test_unknown_pre_tokenizer_names_the_nearest(strange):
    done = ggufkit("tokenize", "ab", "-m", strange)
    assert done.status == 1 and done.out == ""
    assert "unknown pre-tokenizer 'smollmm' (nearest known: smollm" in done.error and "--pre-tokenizer" in done.error
    found = ggufkit("tokenize", "abc", "-m", strange, "--pre-tokenizer", "smollm", "--json").json
    assert found["pieces"] == ["ab", "c"]
    done = ggufkit("tokenize", "ab", "-m", strange, "--pre-tokenizer", "gpt2")
    assert done.status == 1 and "gpt-2" in done.error


def test_tokenize_the_default_model(default_model_path):
    found = ggufkit("tokenize", "Hello<|im_end|>", "-m", default_model_path, "--json").json
    assert found == {"ids": [19556, 2], "pieces": ["Hello", "<|im_end|>"]}
