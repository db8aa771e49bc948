"""Chat templates: what Hugging Face's need, and what hostile ones may not do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from ggufkit_formats import gguf
from ggufkit_formats.errors import GgufkitError, UsageError
from ggufkit_runtime import tokenizer
from ggufkit_runtime.tokenizer import template

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": " Ho "}]


def render(source: str, **variables: Any) -> str:
    return template.render(source, messages=MESSAGES, add_generation_prompt=True, bos_token="<s>", **variables)


def test_default_model(default_model_path: Path) -> None:
    with gguf.open(default_model_path) as file:
        t = tokenizer.from_metadata(file.metadata)
    text = t.apply_chat_template([{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert t.encode_chat([{"role": "system", "content": "S"}])[0] == 1
    assert not t.apply_chat_template([{"role": "user", "content": "x"}], False).endswith("assistant\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}\n{% endfor %}E", None),
        ("{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}", "1False22True2"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>"}'),
        ("{{ {'b': 'é'} | tojson(indent=2) }}", '{\n  "b": "é"\n}'),
        ("   {% if true %}\n  a\n   {% endif %}\nb", "  a\nb"),
        (
            "{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "13",
        ),
        ("{% generation %}a{{ 1 }}{% endgeneration %}b", "a1b"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{{ 'a' ~ 1 ~ none ~ messages | length }}", "a1None2"),
        ("{{ messages[0].content[:2] + 'x' }}{{ messages[::-1][0].role }}", "Hixassistant"),
        (
            "{{ 'x</think>y'.split('</think>')[-1].strip() }}{{ 'ab' * 2 }}{{ 7 % 2 }}{{ '%s-%d' % ('a', 5) }}",
            "yabab1a-5",
        ),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ messages | map(attribute='role') | join(',') }}", "user,assistant"),
        ("{{ strftime_now('%Y') | length }}{{ tools is defined }}{{ x is none }}", "4FalseFalse"),
        ("{% macro f(a) %}<{{ a }}>{% endmacro %}{{ f(1) }}{{ f('b') }}", "<1><b>"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x | upper }}{{ x | replace('a', 'b') }}", "a1A1b1"),
    ],
)
def test_what_templates_use(source: str, expected: str | None) -> None:
    if expected is None:
        expected = "<s>[user] Hi <b>\n[assistant] Ho\nE"
    assert render(source) == expected


HOSTILE = {
    "range": "{% for i in range(99999999999) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "tree": "{% for i in [1,1] recursive %}{% if loop.depth<500 %}{{ loop([1,1]) }}{% endif %}{% endfor %}",
    "classes": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "format escape": "{{ '{0.__class__.__mro__}'.format(messages) | length > 5 and messages.__class__.x }}",
    "change": "{{ messages.append(1) }}",
    "times": "{{ 'a' * 10000000000 }}",
    "list times": "{{ ([1] * 10000000000) | length }}",
    "power": "{{ (10 ** 9) ** (10 ** 9) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "star": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "indent": "{{ 'a\nb' | indent(10000000000) }}",
    "tilde": "{% set ns=namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "plus": "{% set ns=namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "block": "{% set ns=namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x=y %}{% endfor %}{{ ns.x }}",
    "lists": "{% set ns=namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x=ns.x+ns.x %}{% endfor %}",
    "replace": "{% set ns=namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('a','aaaaaaaaaaaa') %}{% endfor %}",
    "join": "{% set ns=namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x,ns.x]|join(ns.x) %}{% endfor %}",
    "slices": "{% set ns=namespace(x='a'*1000000,l=[]) %}{% for i in range(5000) %}"
    "{% set ns.l=ns.l+[ns.x[1:]] %}{% endfor %}",
    "syntax": "{% if %}",
    "undefined": "{{ foo.bar }}",
    "include": "{% include 'x' %}",
    "deep": "{{ " + "(" * 10000 + ")" * 10000 + " }}",
    "long": "x" * (template.MAX_SOURCE + 1),
    "division": "{{ 1 // 0 }}",
    "json": "{{ messages | tojson(indent='x' * 16000000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_STEPS", 200_000)
    begin = time.process_time()
    with pytest.raises(GgufkitError, match="chat template") as caught:
        render(HOSTILE[name])
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 5


def test_nested_lists_are_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_STEPS", 20_000)
    grow = (
        "{% set ns=namespace(x=[1],y=[1]) %}{% for i in range(60) %}"
        "{% set ns.x=[ns.x,ns.x] %}{% set ns.y=[ns.y,ns.y] %}{% endfor %}"
    )
    for use in (
        "{{ ns.x }}",
        "{{ ns.x == ns.y }}",
        "{{ ns.x is eq ns.y }}",
        "{{ ns.x | tojson }}",
        "{{ ns.x | string }}",
    ):
        with pytest.raises(template.TemplateError, match="steps"):
            render(grow + use)


def test_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MAX_SECONDS", 0.05)
    with pytest.raises(template.TemplateError, match="seconds"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")


def test_raise_exception() -> None:
    with pytest.raises(template.TemplateError, match=r"^chat template: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_no_template() -> None:
    t = tokenizer.Tokenizer.__new__(tokenizer.Tokenizer)
    t.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        t.apply_chat_template(MESSAGES)
