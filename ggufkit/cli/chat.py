"""The chat of `ggufkit run`: lines from the terminal, answers to it, one session for all turns."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from ggufkit_formats.errors import UsageError

from . import screen
from .run import closing, stream

HELP = """\
/bye, Ctrl-D   end the chat
/clear         forget what was said
Ctrl-C         stop an answer"""


class Chat:
    """A conversation: messages so far, and the session whose cache keeps what the turns have in common.

    `chat` False: the model has no chat template (or --raw), and each line is continued on its own. `limit` is the
    most tokens of an answer, None for no limit.
    """

    def __init__(self, model: Any, session: Any, sampler: Any, limit: int | None, chat: bool, system: str | None):
        self.model, self.session, self.sampler, self.limit, self.chat = model, session, sampler, limit, chat
        self.system = [{"role": "system", "content": system}] if system else []
        self.turns: list[list[dict[str, str]]] = []  # question and answer

    def converse(self) -> None:
        """Read lines and answer them until /bye or the end of input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input())
        if sys.stdin is not None and hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        name = screen.one_line(self.model.info.name)
        screen.say(f"{name}: /bye ends the chat, Ctrl-C stops an answer, /help for more")
        if not self.chat:
            screen.say("without a chat template: each line is continued as it stands, and nothing is remembered")
        while True:
            try:
                line = read_line()
                if line is None:
                    return screen.say("")
                if line in ("/bye", "/exit", "/quit"):
                    return None
                self.answer(line)
            except KeyboardInterrupt:
                screen.say("\n(/bye or Ctrl-D ends the chat)")

    def answer(self, line: str) -> None:
        """Obey a command or answer a message. Whatever goes wrong ends the turn and not the chat."""
        if line in ("/help", "/?"):
            return screen.say(HELP)
        if line == "/clear":
            self.turns.clear()
            return screen.say("forgotten")
        if not line:
            return None
        try:
            return self.turn(line)
        except BrokenPipeError:
            raise
        except Exception as error:
            if os.environ.get("GGUFKIT_DEBUG"):
                import traceback

                traceback.print_exc()
            return screen.say(f"error: {screen.describe(error)}")

    def turn(self, line: str) -> None:
        """One question and its answer; an answer that is cut short stays as far as it came."""
        question = {"role": "user", "content": line}
        ids = self.fit(question)
        pieces: list[str] = []

        def kept() -> Any:
            for piece in self.session.text(ids, self.sampler, self.limit):
                pieces.append(piece)
                yield piece

        interrupted = False
        try:
            with screen.reading(self.session):
                stream(kept())
        except KeyboardInterrupt:
            interrupted = True
        if pieces or not interrupted:
            self.turns.append([question, {"role": "assistant", "content": "".join(pieces)}])
        if interrupted:
            return screen.say("(stopped)")
        return closing(self.model, self.session, len(ids))

    def fit(self, question: dict[str, str]) -> list[int]:
        """The conversation's tokens with the new question, ready for the answer.

        Where they leave too little of the context for an answer, the oldest turns are forgotten.
        """
        if not self.chat:
            return self.model.tokenizer.encode(question["content"], add_special=True, parse_special=True)
        n_ctx = self.session.n_ctx
        room = min(n_ctx // 4, 512, n_ctx if self.limit is None else self.limit)
        ids, forgotten = self.ids(0, question), 0
        if len(ids) + room > n_ctx:
            # down to half the context at once: what follows has to be read anew, which should be rare
            while forgotten < len(self.turns) and (
                len(ids) + room > n_ctx or (len(ids) > n_ctx // 2 and forgotten < len(self.turns) - 1)
            ):
                forgotten += 1
                ids = self.ids(forgotten, question)
        if len(ids) > n_ctx:
            raise UsageError(f"this message takes {len(ids)} tokens, and the context has {n_ctx} (-c sets another)")
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            screen.say(f"(the context of {n_ctx} tokens is full: the oldest {turns} forgotten)")
            del self.turns[:forgotten]
        return ids

    def ids(self, first: int, question: dict[str, str]) -> list[int]:
        """Tokens of the conversation from turn `first` on, and the question."""
        kept = [message for turn in self.turns[first:] for message in turn]
        return self.model.chat_ids([*self.system, *kept, question])


def read_line() -> str | None:
    """The next line from the terminal; None at its end. The prompt never goes into a file that stdout may be."""
    try:
        if sys.stdout.isatty():
            return input("> ").strip()
        sys.stderr.write("> ")
        sys.stderr.flush()
        return input().strip()
    except EOFError:
        return None
