"""ggufkit run: generate text from a prompt, or chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from ggufkit_formats.errors import GgufkitError, UsageError

from . import screen


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
    help="Most tokens to generate. Default: to the end of the answer, 128 with --raw.",
)
@click.option("--temp", default=0.8, show_default=True, metavar="T", help="Temperature; 0 takes the likeliest token.")
@click.option("--top-k", default=40, show_default=True, metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")
@click.option("--top-p", default=0.95, show_default=True, metavar="P", help="Keep tokens up to this total probability.")
@click.option("--min-p", default=0.05, show_default=True, metavar="P", help="Keep tokens this likely beside the best.")
@click.option("--repeat-penalty", default=1.0, show_default=True, metavar="X", help="Penalize the last 64 tokens.")
@click.option("-s", "--seed", type=int, metavar="S", help="Seed; equal seeds give equal text. Default: a new one.")
@click.option("-c", "--ctx-size", type=click.IntRange(1), metavar="N", help="Most tokens in all. Default: the model's.")
@click.option("-ngl", "--n-gpu-layers", type=int, metavar="N", help="Layers on the GPU (none yet: the CPU runs all).")
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
    prompt, model = _prompt(words, model or (f"hf:{hf}" if hf else None))
    if prompt is None and (as_json or not sys.stdin.isatty()):
        raise UsageError("nothing to do: give a PROMPT, or - to read it from stdin")
    if n_gpu_layers and device != "cuda":
        screen.say("no GPU backend in this version: running on the CPU")
    loaded = screen.load(model, device, threads, ctx_size, pre_tokenizer)
    if chat is None:
        chat = loaded.tokenizer.chat_template is not None
    elif chat and loaded.tokenizer.chat_template is None:
        raise UsageError("this model has no chat template: use --raw")
    if system and not chat:
        raise UsageError("--system needs --chat")
    limit = None if n_predict == -1 else n_predict if n_predict is not None else None if chat else 128
    if prompt is None:
        return _converse(loaded, sampler, limit, chat, system)
    messages = [{"role": "system", "content": system}] if system else []
    if chat:
        ids = loaded.chat_ids([*messages, {"role": "user", "content": prompt}])
    else:
        ids = loaded.tokenizer.encode(prompt, add_special=True, parse_special=True)
    session = loaded.session()
    if as_json:
        text = "".join(session.text(ids, sampler, limit))
        return screen.print_json(_report(loaded, session, ids, text))
    _print(session, ids, sampler, limit)
    _closing(loaded, session, limit)


def _prompt(words: tuple[str, ...], model: str | None) -> tuple[str | None, str | None]:
    """The prompt, and the model: a first word that is a GGUF file names the model."""
    rest = list(words)
    if rest and model is None and rest[0].lower().endswith(".gguf") and Path(rest[0]).exists():
        model = rest.pop(0)
    if len(rest) > 1:
        raise UsageError(f"one PROMPT, not {len(rest)}: put it in quotes")
    if rest == ["-"]:
        return sys.stdin.buffer.read().decode("utf-8", "replace"), model
    return (rest[0] if rest else None), model


def _print(session: Any, ids: list[int], sampler: Any, limit: int | None) -> str:
    """Stream the answer to stdout; returns it."""
    text, safe = "", screen.printable if sys.stdout.isatty() else str
    for piece in session.text(ids, sampler, limit):
        text += piece
        sys.stdout.write(safe(piece))
        sys.stdout.flush()
    if not text.endswith("\n"):
        sys.stdout.write("\n")
        sys.stdout.flush()
    return text


def _closing(model: Any, session: Any, limit: int | None) -> None:
    """Why it stopped, if not by itself, and how fast it was."""
    if session.context_full:
        screen.say(f"stopped: the context of {session.n_ctx} tokens is full")
    elif session.finish_reason == "length":
        screen.say(f"stopped at the limit of {limit} tokens (-n)")
    t = session.timings
    per_s = t.generated_tokens / t.generate_s if t.generate_s else 0.0
    screen.say(
        f"prompt: {t.prompt_tokens} tokens, {t.prompt_tokens / max(t.prompt_s, 1e-9):.1f} tokens/s; "
        f"generation: {t.generated_tokens} tokens, {per_s:.1f} tokens/s, "
        f"{per_s * model.weights.nbytes_per_token / 1e9:.1f} GB/s of weights"
    )


def _report(model: Any, session: Any, ids: list[int], text: str) -> dict[str, Any]:
    t = session.timings
    return {
        "text": text,
        "prompt_tokens": list(ids),
        "tokens": session.generated,
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


def _converse(model: Any, sampler: Any, limit: int | None, chat: bool, system: str | None) -> None:
    """A chat on the terminal. The session's cache carries over what the turns have in common."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    screen.say(f"{screen.printable(model.info.name)} - /bye or Ctrl-D ends the chat, Ctrl-C stops an answer")
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    session = model.session()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return screen.say("")
        except KeyboardInterrupt:
            screen.say("")
            continue
        if line == "/bye":
            return None
        if not line:
            continue
        try:
            _turn(model, session, sampler, limit, chat, messages, line)
        except GgufkitError as error:
            screen.say(f"error: {error}")


def _turn(model: Any, session: Any, sampler: Any, limit: int | None, chat: bool,
          messages: list[dict[str, str]], line: str) -> None:  # fmt: skip
    """One question and its answer; an answer that is cut short stays in the history as far as it came."""
    if chat:
        ids = model.chat_ids([*messages, {"role": "user", "content": line}])
    else:
        ids = model.tokenizer.encode(line, add_special=True, parse_special=True)
    interrupted = False
    try:
        text = _print(session, ids, sampler, limit)
    except KeyboardInterrupt:
        interrupted = True
        text = model.tokenizer.decode(session.generated)
        screen.say("")
    messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]
    if not interrupted:
        _closing(model, session, limit)
