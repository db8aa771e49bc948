"""Chat templates: Jinja in its sandbox, with what Hugging Face's templates need and with bounded time and memory.

A template comes with a model file, so it is a stranger's program. The sandbox keeps it from Python's internals; the
limits here keep it from running forever or filling the memory: every loop round and every call is counted, every
text that is put together is measured, and an operation that multiplies a text is refused before it is made.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from ggufkit_formats.errors import GgufkitError

MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 26  # characters of any text that a template makes
MAX_STEPS = 2_000_000  # loop rounds and calls
MAX_SECONDS = 10.0
# Filters, methods and functions whose result can be larger than what they are given.
GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "format", "format_map"}
GROWING |= {"translate", "indent", "wordwrap", "tojson", "batch", "slice", "list", "range", "xmlattr"}
GROWING |= {"pprint", "urlize", "truncate", "generate_lorem_ipsum"}


class TemplateError(GgufkitError):
    """The chat template is broken, refuses the conversation, or wants too much."""


class Budget:
    """What one rendering may use."""

    def __init__(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(f"chat template: more than {MAX_STEPS} steps")
        if not self.steps & 255 and time.monotonic() > self.deadline:
            raise TemplateError(f"chat template: more than {MAX_SECONDS:.0f} seconds")

    def rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def join(self, parts: Iterable[Any]) -> str:
        texts = [str(part) for part in parts]
        self.measure(sum(map(len, texts)))
        return "".join(texts)

    def measure(self, size: int) -> None:
        self.step()
        if size > MAX_TEXT:
            raise TemplateError(f"chat template: a text of more than {MAX_TEXT} characters")

    def growth(self, name: str, args: Iterable[Any]) -> None:
        """Refuses a call that could multiply what it is given beyond the limit."""
        self.step()
        if name in GROWING:
            size = 1
            for arg in args:
                size *= max(1, extent(arg))
            self.measure(size)


def extent(value: Any) -> int:
    """How much a value can multiply a text: its length, or the number that it is."""
    if isinstance(value, bool):
        return 1
    if isinstance(value, int):
        return min(abs(value), MAX_TEXT + 1)
    if isinstance(value, str):
        widths = [int(digits[:12]) for digits in re.findall(r"\d+", value)] if "{" in value or "%" in value else []
        return max([len(value), *widths])
    if isinstance(value, list | tuple | dict):
        return len(value)
    return 1


def multiply(budget: Budget, operator: str, left: Any, right: Any) -> Any:
    """`left * right` and its like, where the result stays within the limits."""
    if operator == "**":
        if isinstance(right, int) and extent(right) * max(1, extent(left)).bit_length() > 10_000:
            raise TemplateError("chat template: a power that is too large")
        return left**right
    if operator == "%":
        if isinstance(left, str):
            budget.measure(extent(left))
        return left % right
    if operator == "*":
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > 10_000:
                raise TemplateError("chat template: a product that is too large")
        else:
            budget.measure(extent(left) * extent(right))
        return left * right
    size = len(left) + len(right) if hasattr(left, "__len__") and hasattr(right, "__len__") else 0
    budget.measure(size)
    return left + right


def raise_exception(message: str) -> None:
    raise TemplateError(f"chat template: {message}")


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment(budget: Budget) -> Any:
    """A sandboxed environment whose rendering uses up `budget`."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what a model says; here its content is just there."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "%", "+"])

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            tree = super()._parse(source, name, filename)
            for loop in list(tree.find_all(nodes.For)):
                loop.iter = call("rounds", [loop.iter])
            for concat in list(tree.find_all(nodes.Concat)):
                concat.nodes = [call("join", [nodes.List(list(concat.nodes), "load")])]
            tree.set_environment(self)
            return tree

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            owner = getattr(function, "__self__", None)
            name = getattr(function, "__name__", "")
            given = [owner, *args, *kwargs.values()] if isinstance(owner, str) else [*args, *kwargs.values()]
            budget.growth(name, given)
            result = super().call(context, function, *args, **kwargs)
            budget.measure(len(result) if isinstance(result, str) else 0)
            return result

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return multiply(budget, operator, left, right)

    def call(name: str, args: list[Any]) -> Any:
        return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)

    def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            budget.growth(name, [*args, *kwargs.values()])
            result = function(*args, **kwargs)
            budget.measure(len(result) if isinstance(result, str) else 0)
            return result

        # Jinja tells by attributes of the function whether it wants the context.
        run.__dict__.update(getattr(function, "__dict__", {}))
        return run

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0)
    environment.filters["tojson"] = tojson
    environment.filters = {name: guarded(name, f) for name, f in environment.filters.items()}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.concat = budget.join  # type: ignore[method-assign]
    environment.rounds = budget.rounds  # type: ignore[attr-defined]
    environment.join = budget.join  # type: ignore[attr-defined]
    return environment


def render(source: str, **variables: Any) -> str:
    """The text that the template `source` makes of `variables`. TemplateError in one line where it cannot."""
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"chat template: {len(source)} characters, more than {MAX_SOURCE}")
    budget = Budget()
    try:
        template = make_environment(budget).from_string(source)
        return template.render(**variables)
    except TemplateError:
        raise
    except RecursionError:
        raise TemplateError("chat template: nested too deeply") from None
    except MemoryError:
        raise TemplateError("chat template: out of memory") from None
    except Exception as error:  # whatever a stranger's program can raise
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if isinstance(line, int) else ""
        message = " ".join(str(error).split())[:300]
        raise TemplateError(f"chat template: {type(error).__name__}: {message}{where}") from None
