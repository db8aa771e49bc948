"""Chat templates: Jinja in its sandbox, with what Hugging Face's templates need and with bounded time and memory.

A template comes with a model file, so it is a stranger's program. The sandbox keeps it from Python's internals;
the budget here keeps it from running forever or filling the memory. Every loop round and every call is counted,
every text and list that is made is counted, and an operation that multiplies is refused before it is done. Nested
lists are weighed before they are printed or compared, because sharing makes them larger than they look.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

from ggufkit_formats.errors import GgufkitError

MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 24  # characters that a template may put together, all in all
MAX_STEPS = 2_000_000  # loop rounds and calls
MAX_SECONDS = 10.0
ITEM = 8  # an item of a list counts as so many characters

# Filters, methods and functions whose result can be larger than what they are given.
GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "format", "format_map"}
GROWING |= {"translate", "indent", "batch", "slice", "range", "xmlattr", "truncate", "tojson"}
# Those that look into nested lists.
DEEP = {"string", "tojson", "pprint", "join", "sort", "unique", "groupby", "min", "max", "index", "count", "remove"}


class TemplateError(GgufkitError):
    """The chat template is broken, refuses the conversation, or wants too much."""


class Budget:
    """What one rendering may use, and has used."""

    def __init__(self) -> None:
        self.steps = 0
        self.made = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(f"chat template: more than {MAX_STEPS} steps")
        if not self.steps & 255 and time.monotonic() > self.deadline:
            raise TemplateError(f"chat template: more than {MAX_SECONDS:.0f} seconds")

    def allow(self, size: int) -> None:
        if self.made + size > MAX_TEXT:
            raise TemplateError(f"chat template: more than {MAX_TEXT} characters of text")

    def counted(self, value: Any) -> Any:
        """`value`, which has just been made."""
        if isinstance(value, str | bytes):
            self.made += len(value)
        elif isinstance(value, list | tuple | dict):
            self.made += ITEM * len(value)
        self.allow(0)
        return value

    def rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.step()
            yield item

    def join(self, parts: Iterable[Any]) -> str:
        self.step()
        texts = [str(self.weighed(part)) for part in parts]
        self.allow(sum(map(len, texts)))
        return self.counted("".join(texts))

    def weighed(self, value: Any) -> Any:
        """`value`, if it is not too large when it is written out."""
        stack, size = [value], 0
        while stack:
            top = stack.pop()
            if isinstance(top, dict):
                stack.extend(top)
                stack.extend(top.values())
            elif isinstance(top, list | tuple | set):
                stack.extend(top)
            elif top is not value:
                self.step()
                size += len(top) if isinstance(top, str) else 1
                self.allow(size)
        return value

    def call(self, name: str, args: list[Any]) -> None:
        """Refuses a call that could multiply what it is given beyond the budget."""
        self.step()
        if name in GROWING:
            size = 1
            for arg in args:
                size *= max(1, extent(arg))
            self.allow(size)
        if name in DEEP:
            for arg in args:
                self.weighed(arg)


def extent(value: Any) -> int:
    """How much a value can multiply a text: its length, or the number that it is or holds."""
    if isinstance(value, bool):
        return 1
    if isinstance(value, int):
        return min(abs(value), MAX_TEXT + 1)
    if isinstance(value, str):
        numbers = re.findall(r"\d+", value) if "{" in value or "%" in value else []
        return max([len(value), *(int(digits[:9]) for digits in numbers)])
    if isinstance(value, list | tuple | dict):
        return len(value)
    return 1


def operate(budget: Budget, sign: str, left: Any, right: Any) -> Any:
    """`left sign right`, where the result stays within the budget."""
    if sign == "**":
        if isinstance(right, int) and isinstance(left, int) and abs(right) * left.bit_length() > 10_000:
            raise TemplateError("chat template: a power that is too large")
        return left**right
    if sign == "%":
        if isinstance(left, str):
            stars = right if isinstance(right, tuple) and "*" in left else ()
            budget.allow(max(extent(left), *map(extent, (*stars, 0))))
            budget.weighed(right)
        return budget.counted(left % right)
    if sign == "*":
        return multiply(budget, left, right)
    return budget.counted(left + right)


def multiply(budget: Budget, left: Any, right: Any) -> Any:
    numbers = [x for x in (left, right) if isinstance(x, int)]
    texts = [x for x in (left, right) if isinstance(x, str)]
    if len(numbers) == 2:
        if sum(n.bit_length() for n in numbers) > 10_000:
            raise TemplateError("chat template: a product that is too large")
    else:
        budget.allow((1 if texts else ITEM) * extent(left) * extent(right))
    return budget.counted(left * right)


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
    from jinja2.visitor import NodeTransformer

    def through(name: str, *args: Any) -> Any:
        return nodes.Call(nodes.EnvironmentAttribute(f"budget_{name}"), list(args), [], None, None)

    class Meter(NodeTransformer):
        """Leads what could take long or grow through the budget."""

        def visit_For(self, node: Any) -> Any:
            self.generic_visit(node)
            node.iter = through("rounds", node.iter)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return through("join", nodes.List(list(node.nodes)))

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            node.expr = through("weighed", node.expr)
            for operand in node.ops:
                operand.expr = through("weighed", operand.expr)
            return node

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            return through("counted", node) if isinstance(node.arg, nodes.Slice) else node

    class Generation(Extension):
        """`{% generation %}` marks what a model says; here its content is just there."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "%", "+"])

        def _parse(self, source: str, name: Any, filename: Any) -> Any:
            tree = Meter().visit(super()._parse(source, name, filename))
            tree.set_environment(self)
            return tree

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            function_name = getattr(function, "__name__", "")
            owner = getattr(inspect.unwrap(function), "__self__", None) if callable(function) else None
            given = [*args, *kwargs.values()]
            if isinstance(owner, str | list | tuple | dict):
                given.append(owner)
            if owner is not budget:
                budget.call(function_name, given)
            result = super().call(context, function, *args, **kwargs)
            return result if owner is budget else budget.counted(result)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return operate(budget, operator, left, right)

    def guarded(name: str, function: Callable[..., Any], counts: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            budget.call(name, [*args, *kwargs.values()])
            if not counts:  # a test compares
                for arg in args:
                    budget.weighed(arg)
            result = function(*args, **kwargs)
            return budget.counted(result) if counts else result

        # Jinja learns from attributes of the function whether it wants the context.
        run.__dict__.update(getattr(function, "__dict__", {}))
        return run

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        cache_size=0,
        finalize=budget.weighed,
    )
    environment.filters["tojson"] = tojson
    for name in ("urlize", "wordwrap", "striptags"):  # slow on long texts, and of no use in a prompt
        del environment.filters[name]
    del environment.globals["lipsum"]
    environment.filters = {name: guarded(name, f, True) for name, f in environment.filters.items()}
    environment.tests = {name: guarded(name, f, False) for name, f in environment.tests.items()}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.concat = budget.join  # type: ignore[method-assign]
    for name in ("rounds", "join", "weighed", "counted"):
        setattr(environment, f"budget_{name}", getattr(budget, name))
    return environment


def render(source: str, **variables: Any) -> str:
    """The text that the template `source` makes of `variables`. TemplateError in one line where it cannot."""
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"chat template: {len(source)} characters, more than {MAX_SOURCE}")
    try:
        return make_environment(Budget()).from_string(source).render(**variables)
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
