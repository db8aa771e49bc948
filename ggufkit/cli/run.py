"""ggufkit run: generate text from a prompt, or chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from ggufkit_formats.errors import UsageError

from . import screen

RAW_LIMIT = 128  # tokens, where neither -n nor a chat template says when to stop


@click.command(name="run", short_help="Generate text, or chat.")
@click.argument("words", nargs=-1, metavar="[MODEL.gguf] [PROMPT]")
@screen.model_option
@screen.hf_option
@click.option(
    "-n",
    "--n-predict",
    "n_predict",
    type=click.IntRange(-1),
    metavar="N",
    help="Most tokens to generate; -1: no limit. Default: to the end of the answer, 128 with --raw.",
)
@click.option("--temp", "--temperature", "temp", type=click.FloatRange(0), default=0.8, show_default=True, metavar="T",
              help="Temperature; 0 takes the likeliest token.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(0), default=40, show_default=True, metavar="K",
              help="Keep the K likeliest tokens; 0 keeps all.")  # fmt: skip
@click.option("--top-p", type=click.FloatRange(0, 1), default=0.95, show_default=True, metavar="P",
              help="Keep tokens up to this total probability.")  # fmt: skip
@click.option("--min-p", type=click.FloatRange(0, 1), default=0.05, show_default=True, metavar="P",
              help="Keep tokens this likely beside the best.")  # fmt: skip
@click.option("--repeat-penalty", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, metavar="X",
              help="Penalize the last 64 tokens.")  # fmt: skip
@click.option("-s", "--seed", type=int, metavar="S", help="Seed; equal seeds give equal text. Default: a new one.")
@click.option("-c", "--ctx-size", type=click.IntRange(1), metavar="N", help="Most tokens in all. Default: the model's.")
@screen.gpu_layers_option
@click.option("--chat/--raw", "chat", default=None, help="With the model's chat template, or the bare prompt.")
@click.option("-sys", "--system", metavar="TEXT", help="System message, with --chat.")
@screen.pre_tokenizer_option
@screen.threads_option
@screen.device_option
@screen.json_option
def command(words: tuple[str, ...], model: str | None, hf: str | None, n_predict: int | None, temp: float, top_k: int,
            top_p: float, min_p: float, repeat_penalty: float, seed: int | None, ctx_size: int | None,
            n_gpu_layers: int | None, chat: bool | None, system: str | None, pre_tokenizer: str | None,
            threads: int | None, device: str, as_json: bool) -> None:  # fmt: skip
    """Generate text that answers or follows PROMPT; `-` reads it from stdin. Without PROMPT, on a terminal: a chat.

    The text streams to stdout, everything else goes to stderr. In a chat, /bye ends it and Ctrl-C stops an answer.
    """
    from ggufkit_runtime.sampler import Sampler

    sampler = Sampler(temp, top_k, top_p, min_p, repeat_penalty, seed)
    if system is not None and chat is False:
        raise UsageError("--system needs --chat: a raw prompt has no place for it")
    prompt, model = _prompt(words, screen.model_name(model, hf))
    if prompt is None and (as_json or sys.stdin is None or not sys.stdin.isatty()):
        raise UsageError("nothing to do: give a PROMPT, or - to read it from stdin")
    loaded = screen.load(model, device, threads, ctx_size, pre_tokenizer, n_gpu_layers)
    chat = _chats(loaded, chat, system)
    limit = n_predict if n_predict is not None else -1 if chat else RAW_LIMIT
    session = loaded.session()
    if prompt is None:
        from .chat import Chat

        return Chat(loaded, session, sampler, None if limit == -1 else limit, chat, system).converse()
    messages = [{"role": "system", "content": system}] if system else []
    if chat:
        ids = loaded.chat_ids([*messages, {"role": "user", "content": prompt}])
    else:
        ids = loaded.tokenizer.encode(prompt, add_special=True, parse_special=True)
    with screen.reading(session):
        pieces = session.text(ids, sampler, None if limit == -1 else limit)
        if as_json:
            text = gathered(pieces, session, limit)
            return screen.print_json(report(loaded, session, ids, text))
        stream(pieces)
    return closing(loaded, session, len(ids))


def _prompt(words: tuple[str, ...], model: str | None) -> tuple[str | None, str | None]:
    """The prompt, and the model: a first word that is a GGUF file names the model."""
    rest = list(words)
    if rest and model is None and rest[0].lower().endswith(".gguf"):
        exists = False
        with contextlib.suppress(OSError, ValueError):
            exists = Path(rest[0]).exists()
        if exists or len(rest) == 2:  # with a prompt behind it, it can only be meant as a model
            model = rest.pop(0)
        else:
            screen.say(f"note: there is no file {screen.one_line(rest[0])}, so that is the prompt")
    elif len(rest) == 2 and model is None and rest[0].startswith("hf:"):
        model = rest.pop(0)
    if len(rest) > 1:
        raise UsageError(f"one PROMPT, not {len(rest)} words: put it in quotes")
    if rest == ["-"]:
        return screen.read_stdin(), model
    return (rest[0] if rest else None), model


def _chats(model: Any, chat: bool | None, system: str | None) -> bool:
    """Whether the chat template is used: by default where there is one."""
    if model.tokenizer.chat_template is not None:
        return chat is not False
    if chat:
        raise UsageError("this model has no chat template: use --raw")
    if system is not None:
        raise UsageError("--system needs a chat template, and this model has none")
    return False


def stream(pieces: Iterator[str]) -> str:
    """Write an answer to stdout as it comes; returns it. A terminal gets control characters escaped."""
    text, safe = "", screen.printable if sys.stdout.isatty() else str
    try:
        for piece in pieces:
            text += piece
            sys.stdout.write(safe(piece))
            sys.stdout.flush()
    finally:
        if text and not text.endswith("\n"):
            with contextlib.suppress(OSError):
                sys.stdout.write("\n")
                sys.stdout.flush()
    return text


def gathered(pieces: Iterator[str], session: Any, limit: int) -> str:
    """The whole answer, with a progress bar where its length is known."""
    text = ""
    with screen.Progress("generating", limit, unit=lambda n: f"{n:.1f} tokens", patience=1.0) as bar:
        for piece in pieces:
            text += piece
            if limit > 0:
                bar(len(session.generated))
    return text


def closing(model: Any, session: Any, n_prompt: int) -> None:
    """Why it stopped, if not by itself, and how fast it was."""
    if session.context_full:
        screen.say(f"stopped: the context of {session.n_ctx} tokens is full")
    elif session.finish_reason == "length":
        screen.say(f"stopped at the limit of {len(session.generated)} tokens (-n)")
    t = session.timings
    per_s = t.generated_tokens / t.generate_s if t.generate_s else 0.0
    cached = f" (and {n_prompt - t.prompt_tokens} from the cache)" if n_prompt > t.prompt_tokens else ""
    screen.say(
        f"prompt: {t.prompt_tokens} tokens{cached}, {t.prompt_tokens / max(t.prompt_s, 1e-9):.1f} tokens/s; "
        f"generation: {t.generated_tokens} tokens, {per_s:.1f} tokens/s, "
        f"{per_s * model.weights.nbytes_per_token / 1e9:.1f} GB/s of weights"
        + (" (compiling kernels included)" if screen.compiled() else "")
    )


def report(model: Any, session: Any, ids: list[int], text: str) -> dict[str, Any]:
    """The JSON document of one answer."""
    t = session.timings
    return {
        "text": text,
        "prompt_tokens": list(ids),
        "tokens": list(session.generated),
        "finish_reason": session.finish_reason,
        "timings": {
            "load_s": model.load_s,
            "prompt_s": t.prompt_s,
            "prompt_tokens_per_s": t.prompt_tokens / max(t.prompt_s, 1e-9),
            "generate_s": t.generate_s,
            "generate_tokens_per_s": t.generated_tokens / t.generate_s if t.generate_s else 0.0,
        },
        "logits_hash": session.logits_hash,
    }
