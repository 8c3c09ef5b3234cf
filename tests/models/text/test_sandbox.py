"""The sandbox of chat templates: honest templates work, hostile ones end soon and take little memory."""

import time
import tracemalloc
from datetime import datetime

import pytest

from meshd.errors import InvalidRequest, ModelFileError
from meshd.models.text.template import MAX_SOURCE_CHARACTERS, ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]


def render(source: str) -> str:
    return ChatTemplate(source, bos="<s>", eos="</s>", now=lambda: datetime(2026, 11, 23, 7)).render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {% if loop.last %}{{ m.content | trim }}{% endif %}\n{% endfor %}", "Bye"),
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>Hi <b></s>"),
        ("{{ messages[1:] | length }}{{ messages[::-1][0]['content'] }}{{ messages[-1].role }}", "2Byeuser"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}", "Hi <b>|Bye"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ loop.index ~ loop.length }}{% endfor %}", "13"),
        ("{% macro say(m) %}[{{ m.role | upper }}]{% endmacro %}{{ say(messages[0]) }}", "[USER]"),
        ("{{ {'b': 'é<', 'a': [1, none]} | tojson }}", '{"b": "é<", "a": [1, null]}'),
        ("{{ {'a': 1} | tojson(indent=2) | safe }}", '{\n  "a": 1\n}'),
        ("{{ strftime_now('%d %b %Y') }}", "23 Nov 2026"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ 'a-b'.replace('-', '+') }}{{ 'a,b' | replace(',', ';') }}{{ ','.join(['x', 'y']) }}", "a+ba;bx,y"),
        ("{{ 'a' + 'b' * 2 }} {{ 2 * 3 + 2 ** 3 }} {{ 7 % 4 }} {{ [1] + [2] }} {{ 'a b'.split()[1] }}", "abb 14 3 [1, 2] b"),
        ("{{ 'a\\n\\nb' | indent }}{{ 'a\\nb' | indent(1, true) }}", "a\n\n    b a\n b"),
        ("{{ '{}{}{{'.format(7, 'é') }}{{ '{x}{0}'.format(1, x=[]) }}", "7é{[]1"),
        ("{{ tools is none and documents is none }}{{ nothing is defined }}{{ nothing }}", "TrueFalse"),
        ("{% for k, v in dict(a=1).items() %}{{ k ~ v }}{% endfor %}{{ 'a' in ['a', 'b'] }}{{ (1, 'x')[1] }}", "a1Truex"),
        ("{{ [3, 1, 2] | sort | list }}{{ {'k': 1}.items() | list }}{{ {'b': 1} | dictsort }}", "[1, 2, 3][('k', 1)][('b', 1)]"),
    ],
)
def test_features_that_chat_templates_use_work(source: str, expected: str) -> None:
    assert render(source) == expected


UNUSABLE = {
    "cut short": "{% for",
    "unknown filter": "{{ x | nosuch }}",
    "include": "{% include 'x' %}",
    "block": "{% block x %}{% endblock %}",
    "extends": "{% extends 'x' %}",
    "import": "{% import 'x' as x %}",
    "recursive loop": "{% for x in y recursive %}{% endfor %}",
    "too long": "x" * (MAX_SOURCE_CHARACTERS + 1),
    "too deep": "{{" + "(" * 9000 + ")" * 9000 + "}}",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_template_is_refused_when_it_is_compiled(name: str) -> None:
    with pytest.raises(ModelFileError, match="chat template can't be used"):
        render(UNUSABLE[name])


def growing(beginning: str, step: str, after: str = "", turns: int = 99_999) -> str:
    """Make a template with a variable `ns.a` that grows in a loop."""
    return f"{{% set ns = namespace(a={beginning}) %}}{{% for i in range({turns}) %}}{step}{{% endfor %}}{after}"


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set r = range(9999) | list %}" + "{% for a in r %}" * 3 + "{% endfor %}" * 3,
    "long range": "{{ range(10**9) | list }}",
    "repetition": "{{ 'x' * 10**10 }}",
    "repetition the other way": "{{ 10**10 * 'x' }}",
    "list repetition": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "product": growing("7", "{% set ns.a = ns.a * ns.a %}"),
    "doubling with ~": growing("'x'", "{% set ns.a = ns.a ~ ns.a %}"),
    "doubling with +": growing("'x'", "{% set ns.a = ns.a + ns.a %}"),
    "doubling a list": growing("[1]", "{% set ns.a = ns.a + ns.a %}"),
    "nesting": growing("'x'", "{% set ns.a = [ns.a, ns.a] %}{{ ns.a }}"),
    "comparing what is nested": growing(
        "1, b=1", "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}", "{{ ns.a == ns.b }}", turns=60
    ),
    "hashing what is nested": growing("'x'", "{% set ns.a = (ns.a, ns.a) %}", "{% set x = {}.get(ns.a) %}", turns=60),
    "nesting by dict": growing("'x'", "{% set ns.a = dict(a=ns.a, b=ns.a) %}"),
    "nesting by macro": growing("'x'", "{% macro f() %}{% set ns.a = varargs %}{% endmacro %}{{ f(ns.a, ns.a) }}"),
    "nesting to JSON": growing("'x'", "{% set ns.a = [ns.a, ns.a] %}{% set x = ns.a | tojson %}"),
    "keeping slices": growing("[]", "{% set b = 'x' * 999999 %}{% set ns.a = ns.a + [b[1:]] %}"),
    "keeping texts": growing("[]", "{% set x %}" + "x" * 9999 + "{% endset %}{% set ns.a = ns.a + [x] %}"),
    "replace": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "replace filter": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "join": "{{ ('y' * 99999).join(['x'] * 99999) }}",
    "join filter": "{{ (['x'] * 99999) | join('y' * 99999) }}",
    "join one text": "{{ (['x' * 99999] * 99999) | join }}",
    "list of a text": "{{ ('x' * 50000000) | list | length }}",
    "select of a text": "{{ ('x' * 50000000) | select | list | length }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "printf width": "{{ '%0999999999d' % 3 }}",
    "printf of a computed text": "{% set f = '%0' ~ '999999999d' %}{{ f % 3 }}",
    "format width": "{{ '{:>999999999}'.format(3) }}",
    "format by subscript": "{{ ''['format_map']({}) }}",
    "format by filter": "{{ '{:>999999999}' | attr('format') }}{{ ('{:>999999999}' | attr('format'))(3) }}",
    "format attribute": "{{ '{0.x}'.format(3) }}{{ '{a[0]}'.format(a=[3]) }}",
    "format to a great length": "{{ ('{0}' * 99999).format('x' * 99999) }}",
    "indent": "{{ 'a\\nb' | indent(10**9) }}",
    "indent by a text": "{{ 'a\\nb' | indent('x' * 99) }}",
    "padding": "{{ 'a'.ljust(10**9) }}",
    "JSON indent": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "date width": "{{ strftime_now('%0999999999d') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['os'] }}",
    "changing what is given": "{{ messages.append(1) }}",
    "output": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_soon_and_takes_little_memory(name: str) -> None:
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            render(HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 1 << 28
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 10
