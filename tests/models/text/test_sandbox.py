"""The sandbox of chat templates: honest templates work, and none runs code or changes its input. Text workers bound the rest."""

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
        ("{{ '%s-%03d' % ('a', 7) }}{{ 'x'.zfill(3) }}{{ 'abc'.rfind('c') }}{{ 'a'.ljust(3) }}|", "a-00700x2a  |"),
        ("{% block x %}in{% endblock %}{% for x in [[1]] recursive %}{{ x[0] if x is sequence else x }}{% endfor %}", "in1"),
        ("{% for k, v in dict(a=1).items() %}{{ k ~ v }}{% endfor %}{{ 'a' in ['a', 'b'] }}{{ (1, 'x')[1] }}", "a1Truex"),
        ("{{ [3, 1, 2] | sort | list }}{{ {'k': 1}.items() | list }}{{ {'b': 1} | dictsort }}", "[1, 2, 3][('k', 1)][('b', 1)]"),
    ],
)
def test_features_that_chat_templates_use_work(source: str, expected: str) -> None:
    assert render(source) == expected


UNUSABLE = {
    "cut short": "{% for",
    "unknown filter": "{{ x | nosuch }}",
    "too long": "x" * (MAX_SOURCE_CHARACTERS + 1),
    "too deep": "{{" + "(" * 9000 + ")" * 9000 + "}}",
    "too many branches": "{% if a %}" + "{% elif a %}" * 20000 + "{% endif %}",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_template_is_refused_when_it_is_compiled(name: str) -> None:
    with pytest.raises(ModelFileError, match="chat template can't be used"):
        render(UNUSABLE[name])


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by filter": "{{ (('' | attr('__class__')).mro() | list)[1] }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format('') | length > 9 and raise_exception('no') }}{{ ''.__class__.x.y }}",
    "globals": "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['os'] }}",
    "changing what is given": "{{ messages.append(1) }}",
    "another file": "{% include '/etc/passwd' %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long range": "{{ range(10**9) | list }}",
    "output": "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        render(HOSTILE[name])
