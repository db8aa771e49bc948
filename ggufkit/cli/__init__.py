"""The command line: `ggufkit COMMAND`. One file a command, loaded when it is called for."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any, NoReturn

import click
from ggufkit_formats.errors import GgufkitError, UsageError

# name -> one line of help, shown without importing the command's file
COMMANDS = {
    "convert": "Convert a checkpoint or a GGUF file to a file type.",
    "run": "Generate text, or chat.",
    "inspect": "Show the metadata and tensors of a GGUF file.",
    "tokenize": "Show the token ids of a text.",
    "perplexity": "Measure how well a model predicts a text.",
    "bench": "Measure tokens per second.",
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
    """Entry point of the `ggufkit` command: every failure is one line on stderr and an exit status."""
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
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
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("\n")
        return 130
    except UsageError as error:
        return _fail(error, 2)
    except GgufkitError as error:
        return _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader is gone: nothing to flush to
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1)
    except MemoryError:
        return _fail("out of memory", 1)
    except Exception as error:
        return _fail(f"internal error: {type(error).__name__}: {error} (GGUFKIT_DEBUG=1 shows where)", 1)


def _fail(error: object, status: int) -> int:
    if os.environ.get("GGUFKIT_DEBUG"):
        import traceback

        traceback.print_exc()
    text = " ".join(str(error).split())
    sys.stderr.write(f"error: {''.join(c if c.isprintable() else '?' for c in text)}\n")
    return status
