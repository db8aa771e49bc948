"""`ggufkit run` between pipes: streams, JSON, stops, prompts, interruptions."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time

import numpy as np
import pytest
import tiny_models
from command_line import Terminal, control_characters, ggufkit, start
from ggufkit_formats import gguf
from ggufkit_runtime import generate, tokenizer
from ggufkit_runtime.sampler import Sampler
from hub_server import Hub

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
LAST_LINE = re.compile(
    r"prompt: \d+ tokens, [\d.]+ tokens/s; generation: (\d+) tokens, [\d.]+ tokens/s, [\d.]+ GB/s of weights"
    r"( \(compiling kernels included\))?"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def raw(folder):
    """A model of noise without a chat template, and with room for long answers."""
    return tiny_models.write(folder / "raw.gguf", type="Q8_0", max_position_embeddings=1 << 17)


@pytest.fixture(scope="module")
def chat(folder):
    return tiny_models.write(folder / "chat.gguf", type="Q8_0", metadata={"tokenizer.chat_template": TEMPLATE})


def words_of(path):
    with gguf.open(path) as file:
        return tokenizer.from_metadata(file.metadata)


def test_json(raw):
    args = ("run", "w1 w2", "-m", raw, "--temp", "0", "-n", "20", "--json")
    done = ggufkit(*args)
    found = done.json
    assert list(found) == ["text", "prompt_tokens", "tokens", "finish_reason", "timings", "logits_hash"]
    keys = ["load_s", "prompt_s", "prompt_tokens_per_s", "generate_s", "generate_tokens_per_s"]
    assert list(found["timings"]) == keys
    assert all(isinstance(found["timings"][key], float) and found["timings"][key] > 0 for key in keys)
    words = words_of(raw)
    assert found["prompt_tokens"] == words.encode("w1 w2", parse_special=True)
    assert len(found["tokens"]) == 20 and all(type(token) is int for token in found["tokens"])
    stream = words.stream()
    assert found["text"] == "".join(map(stream.push, found["tokens"])) + stream.finish()
    assert found["finish_reason"] == "length"
    assert re.fullmatch(r"[0-9a-f]{64}", found["logits_hash"])
    again = ggufkit(*args).json
    assert {k: v for k, v in again.items() if k != "timings"} == {k: v for k, v in found.items() if k != "timings"}


def test_seed(raw):
    args = ("run", "w1", "-m", raw, "--temp", "2", "-n", "24", "--json")
    one, two, other = (ggufkit(*args, "--seed", seed).json["tokens"] for seed in (7, 7, 8))
    assert one == two != other


def test_text_streams_to_stdout_and_the_rest_to_stderr(raw):
    """The bytes on stdout are the text alone; --raw stops at 128 tokens and says so."""
    text = ggufkit("run", "w1 w2", "-m", raw, "--temp", "0", "--json").json
    assert len(text["tokens"]) == 128
    done = ggufkit("run", raw, "w1 w2", "--temp", "0")  # a first word that is a file is the model
    assert done.status == 0 and done.out.rstrip("\n") == text["text"].rstrip("\n")
    lines = done.err.splitlines()
    assert lines[-2] == "stopped at the limit of 128 tokens (-n)"
    assert LAST_LINE.fullmatch(lines[-1])[1] == "128"  # type: ignore[index]


def test_the_end_of_a_turn_and_of_the_context(chat):
    """With a chat template there is no limit but the model's: here the end of the context."""
    found = ggufkit("run", "w1", "-m", chat, "--temp", "0", "-c", "64", "--json").json
    rendered = words_of(chat).encode_chat([{"role": "user", "content": "w1"}])
    assert found["prompt_tokens"] == rendered and found["finish_reason"] in ("length", "stop")
    assert found["finish_reason"] == "stop" or len(rendered) + len(found["tokens"]) in (64, 65)
    with_system = ggufkit("run", "w1", "-m", chat, "-n", "0", "-sys", "w2", "--json").json
    messages = [{"role": "system", "content": "w2"}, {"role": "user", "content": "w1"}]
    assert with_system["prompt_tokens"] == words_of(chat).encode_chat(messages)
    assert (with_system["tokens"], with_system["text"], with_system["finish_reason"]) == ([], "", "length")
    plain = ggufkit("run", "w1", "-m", chat, "-n", "0", "--raw", "--json").json
    assert plain["prompt_tokens"] == words_of(chat).encode("w1")


def test_errors_that_come_after_loading(raw, chat):
    done = ggufkit("run", "w1 " * 60, "-m", chat, "-c", "20")
    assert done.status in (1, 2) and done.out == ""
    assert re.search(r"the prompt has \d+ tokens, more than the context of 20", done.error)
    done = ggufkit("run", "hi", "-m", raw, "--chat")
    assert done.status == 2 and "no chat template" in done.error
    done = ggufkit("run", "hi", "-m", raw, "-sys", "be brief")
    assert done.status == 2 and "--system needs a chat template" in done.error


def test_a_broken_template_is_the_models_fault(folder):
    path = tiny_models.write(folder / "broken.gguf", metadata={"tokenizer.chat_template": "{% for %}\x1b[31m"})
    done = ggufkit("run", "hi", "-m", path)
    assert done.status == 1 and "chat template" in done.error and not control_characters(done.err)


def test_prompts(raw):
    """From stdin; a file that is not there; the environment."""
    env = {"GGUFKIT_MODEL": str(raw)}
    args = ("--temp", "0", "-n", "1", "--json")
    found = ggufkit("run", "-", *args, stdin="w1 é\n".encode(), env=env).json
    assert found["prompt_tokens"] == words_of(raw).encode("w1 é\n")
    done = ggufkit("run", "missing.gguf", *args, env=env)
    assert done.json["prompt_tokens"] == words_of(raw).encode("missing.gguf")
    assert done.err == "note: there is no file missing.gguf, so that is the prompt\n"
    done = ggufkit("run", "missing.gguf", "hi", env=env)
    assert done.status == 1 and "missing.gguf: no such file" in done.error


def test_a_model_of_a_repository(raw, folder):
    with Hub({"org/noise": {"noise-Q8_0.gguf": raw.read_bytes(), "noise-Q4_0.gguf": b"GGUF"}}) as hub:
        env = {"HF_HOME": str(folder / "hub"), "HF_ENDPOINT": hub.endpoint, "NO_PROXY": "*"}
        args = ("--temp", "0", "-n", "2", "--json")
        found = ggufkit("run", "w1", "-hf", "org/noise:Q8_0", *args, env=env).json
        assert found["text"] == ggufkit("run", "w1", "-m", raw, *args).json["text"]
        done = ggufkit("run", "w1", "-m", "hf:org/nothing", env=env)
        assert done.status == 1 and "no such repository" in done.error


def test_a_cache_that_cannot_be_written(raw, folder):
    """Kernels are compiled all the same, and kept under the temporary folder."""
    file = folder / "file"
    file.write_text("")
    done = ggufkit("run", "w1", "-m", raw, "-n", "1", "--json", env={"GGUFKIT_CACHE_DIR": str(file / "cache")})
    assert len(done.json["tokens"]) == 1
    assert "Traceback" not in done.err and len(done.err.splitlines()) <= 1


def test_the_default_model(default_model_path):
    """A chat answer to its end, which the model marks."""
    env = {"GGUFKIT_MODEL": str(default_model_path)}
    done = ggufkit("run", "What is 2+2?", "--temp", "0", "-n", "40", env=env)
    assert (done.status, done.out) == (0, "The answer to this classic math problem is 4.\n")
    assert "stopped" not in done.err and LAST_LINE.fullmatch(done.err.splitlines()[-1])
    found = ggufkit("run", "What is 2+2?", "--temp", "0", "-n", "40", "--json", env=env).json
    assert (found["finish_reason"], found["text"]) == ("stop", "The answer to this classic math problem is 4.")


def test_a_reader_that_leaves_early(raw):
    """`ggufkit run … | head -1`: it stops soon, and without a word."""
    with start("run", "w1", "-m", raw, "--temp", "0", "-n", "-1") as process:
        assert process.stdout and process.stderr and process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert [line for line in err.splitlines() if not line.startswith("compiling")] == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(raw, number, status):
    with start("run", "w1", "-m", raw, "--temp", "0", "-n", "-1") as process:
        assert process.stdout and process.stderr and process.stdout.read(1)
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == status and out
    assert [line for line in err.decode().splitlines() if line and not line.startswith("compiling")] == []


def test_interrupted_while_loading(default_model_path):
    noise = ("--raw", "--temp", 9, "--top-k", 0, "--top-p", 1, "--min-p", 0, "-s", 3)  # no turn ends within seconds
    for delay in (0.5, 1.0):
        with start("run", "Count to 1000.", "-m", default_model_path, *noise, "-n", 5000) as process:
            time.sleep(delay)
            os.kill(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert [line for line in err.decode().splitlines() if line and not line.startswith("compiling")] == []


def test_generated_text_does_not_drive_a_terminal(raw):
    """Noise holds escape characters: a pipe gets them as they are, a terminal sees them escaped."""
    args = ("run", "w1", "-m", raw, "--temp", "9", "--top-k", 0, "--top-p", 1, "--min-p", 0, "-s", 3, "-n", 300)
    text = ggufkit(*args, "--json").json["text"]
    assert control_characters(text, "\n\t\r")
    with Terminal(*args) as terminal:
        assert terminal.end() == 0
    assert not control_characters(terminal.shown, "\n\t\r")
    assert re.search(r"\\x[01]", terminal.shown)


def test_hash_is_of_the_last_logits(raw):
    """The hash in the report is what the library computes from the same tokens."""
    found = ggufkit("run", "w1", "-m", raw, "--temp", "0", "-n", "3", "-t", "1", "--json").json
    session = generate.load(raw, threads=1).session()
    assert list(session.stream(found["prompt_tokens"], Sampler(0), 3)) == found["tokens"]
    assert session.last_logits is not None
    assert found["logits_hash"] == hashlib.sha256(session.last_logits.astype(np.dtype("<f4")).tobytes()).hexdigest()
