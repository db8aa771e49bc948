"""The chat of `ggufkit run` on a pseudo-terminal."""

from __future__ import annotations

import re

import pytest
import tiny_models
from command_line import Terminal, control_characters, ggufkit

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'w13' %}{{ raise_exception('unlucky') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)
EVIL = "\x1b]0;owned\x07"
TURN = r"prompt: (\d+) tokens(?: \(and (\d+) from the cache\))?,[^;]*; generation: (\d+) tokens"


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A model of noise with a chat template, whose name is hostile."""
    metadata = {"tokenizer.chat_template": TEMPLATE, "general.name": f"n{EVIL}"}
    path = tmp_path_factory.mktemp("models") / "chat.gguf"
    return tiny_models.write(path, type="Q8_0", metadata=metadata, max_position_embeddings=1 << 16)


def without_readline(text: str) -> str:
    """What was shown less the sequences of the line editor."""
    return re.sub(r"\x1b\[\?2004[hl]|\r|\x1b\[K|\x08|\x1b\[C|\x07", "", text)


def numbers(found: re.Match[str]) -> list[int]:
    return [int(n or 0) for n in found.groups()]


def test_turns_share_the_cache(noise):
    """Two turns, a turn that fails, /clear, /help, /bye."""
    with Terminal("run", "-m", noise, "--temp", "0", "-n", "5", "-sys", "w9", env={"TERM": "dumb"}) as terminal:
        terminal.expect(r"/bye ends the chat.*> ")
        assert EVIL not in terminal.shown and "n\\x1b]0;owned\\x07" in terminal.shown
        terminal.type("w1\n")
        read, cached, made = numbers(terminal.expect(TURN))
        assert cached == 0 and made == 5
        whole = read
        terminal.expect("> ")
        terminal.type("w2\n")
        read, cached, made = numbers(terminal.expect(TURN))
        assert cached >= whole and read > 0 and made == 5
        terminal.expect("> ")
        terminal.type("w13\n")
        terminal.expect("error: .*unlucky.*> ")
        terminal.type("w3\n")  # what failed is not remembered
        assert numbers(terminal.expect(TURN))[1] >= cached + read
        terminal.expect("> ")
        terminal.type("/help\n")
        terminal.expect("/clear.*> ")
        terminal.type("/clear\n")
        terminal.expect("forgotten.*> ")
        terminal.type("w1\n")
        assert sum(numbers(terminal.expect(TURN))[:2]) == whole  # and the history is short again
        terminal.expect("> ")
        terminal.type("\n")
        terminal.expect("> ")
        terminal.type("/bye\n")
        assert terminal.end() == 0
    assert not control_characters(without_readline(terminal.shown), "\n\t")


def test_ctrl_c_stops_the_answer_and_not_the_program(noise):
    with Terminal("run", "-m", noise, "--temp", "0", columns=40, env={"NO_COLOR": "1"}) as terminal:
        terminal.expect("> ")
        terminal.interrupt(r"\(/bye or Ctrl-D ends the chat\).*> ")
        terminal.type("w1\n")
        terminal.expect("w1\n.{40}")  # the answer is under way
        terminal.interrupt(r"\(stopped\).*> ")
        terminal.type("w2\n")
        terminal.expect(".{40}")
        terminal.interrupt(r"\(stopped\).*> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.shown


def test_a_full_context_forgets_the_oldest_turns(noise):
    with Terminal("run", "-m", noise, "-c", "160", "-n", "20", "--temp", "0", "-sys", "w1") as terminal:
        terminal.expect("> ")
        for _ in range(6):
            terminal.type("w1 w2 w3\n")
            assert numbers(terminal.expect(TURN))[2] > 0
            terminal.expect("> ")
        assert "(the context of 160 tokens is full: the oldest " in terminal.shown
        terminal.type("w4 " * 100 + "\n")
        terminal.expect(r"error: this message takes \d+ tokens, and the context has 160.*> ")
        terminal.type("w5\n")
        terminal.expect(TURN)
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_answers_go_where_stdout_goes(noise, tmp_path):
    """Questions on the terminal, answers in a file: the prompt sign is not in it."""
    path = tmp_path / "answers.txt"
    with path.open("wb") as out, Terminal("run", "-m", noise, "--temp", "0", "-n", "4", stdout=out) as terminal:
        terminal.expect("> ")
        terminal.type("w1\n")
        terminal.expect(TURN)
        terminal.expect("> ")
        terminal.type("/bye\n")
        assert terminal.end() == 0
    assert path.read_bytes() and not path.read_bytes().startswith(b"> ")


def test_a_model_without_template(tmp_path):
    path = tiny_models.write(tmp_path / "raw.gguf", type="Q8_0")
    with Terminal("run", path, "-n", "3") as terminal:
        terminal.expect("without a chat template.*> ")
        terminal.type("w1\n")
        first = numbers(terminal.expect(TURN))
        terminal.expect("> ")
        terminal.type("w1\n")
        assert sum(numbers(terminal.expect(TURN))[:2]) == first[0]
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.end() == 0


def test_no_terminal_no_chat(noise):
    done = ggufkit("run", "-m", noise, stdin=b"w1\n")
    assert (done.status, done.out) == (2, "") and "nothing to do" in done.error
