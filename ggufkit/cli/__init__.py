"""The command line: `ggufkit COMMAND`. One file a command, loaded when it is called for."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from typing import Any, NoReturn

import click
from ggufkit_formats.errors import UsageError

from . import interrupts

# name -> one line of help, shown without importing the command's file
COMMANDS = {
    "convert": "Convert a checkpoint or a GGUF file to a file type.",
    "run": "Generate text, or chat.",
    "inspect": "Show the metadata and tensors of a GGUF file.",
    "export": "Write a GGUF file as a Hugging Face checkpoint.",
    "diff": "Compare two GGUF files.",
    "verify": "Check a GGUF file, weights and tokenizer included.",
    "types": "List all tensor types and file types.",
    "tokenize": "Show the token ids of a text.",
    "perplexity": "Measure how well a model predicts a text.",
    "imatrix": "Make an importance matrix for convert.",
    "bench": "Measure tokens per second.",
    "warmup": "Compile kernels before they are needed.",
}


class LazyGroup(click.Group):
    """Lists the commands by name and imports only the one that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"ggufkit.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (commands: {', '.join(COMMANDS)})"
            raise click.UsageError(f"no command {args[0]!r}{hint}")
        return super().resolve_command(ctx, args)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from ggufkit import __version__

        click.echo(f"ggufkit {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
              help="Show the version.")  # fmt: skip
def group() -> None:
    """Read, write, convert and run GGUF model files."""


def main(args: list[str] | None = None) -> NoReturn:
    """Entry point of the `ggufkit` command: every failure is one line on stderr and an exit status.

    A program that calls it with `args` keeps its own handlers of signals, and is not ended but by SystemExit.
    """
    is_command = args is None
    # No command computes with BLAS, whose threads cost each start 60 ms of processor time and each process memory.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(50_000, 20, 20)  # hundreds of thousands of strings and pairs of a vocabulary are no garbage
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    status = _run(args)
    if is_command:
        interrupts.done()
    _let_go(sys.stdout)
    _let_go(sys.stderr)
    if is_command and status in (130, 143):
        interrupts.leave(status)
    sys.exit(status)


def _run(args: list[str] | None) -> int:
    try:
        if args is None:
            interrupts.obey()
        result = group.main(args, prog_name="ggufkit", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            return 2
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _fail(error.format_message().rstrip(".") + hint, 2)
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:  # SIGTERM
        return exit.code if isinstance(exit.code, int) else 1
    except click.Abort as error:  # click's word for Ctrl-C, and for an EOFError, which is none of the user's
        return 130 if not isinstance(error.__cause__, EOFError) else _fail(error.__cause__, 1)
    except BrokenPipeError:
        return 1  # the reader has what it wanted, as with `| head`: nothing to say
    except Exception as error:
        return _fail(error, 2 if isinstance(error, UsageError) else 1)


def _fail(error: Exception | str, status: int) -> int:
    from . import screen

    if os.environ.get("GGUFKIT_DEBUG"):
        import traceback

        traceback.print_exc()
    text = screen.one_line(error) if isinstance(error, str) else screen.describe(error)
    with contextlib.suppress(OSError):
        sys.stderr.write(f"error: {text}\n")
    return status


def _let_go(stream: Any) -> None:
    """Flush a stream, or where nobody takes what it holds, throw that away: Python's own flush would complain."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
