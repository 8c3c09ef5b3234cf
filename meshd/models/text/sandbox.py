"""The jinja2 environment of chat templates, with the options, filters and functions that Hugging Face's transformers gives them.

jinja2's sandbox keeps a template from running code and from changing its input. It bounds neither time nor memory: templates are
rendered in a text worker (`meshd.models.text.worker`), which ends at its limits.
"""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateRuntimeError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training. Here it renders its content and nothing more."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 types it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def chat_environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """Make an environment for chat templates. `now` gives the time for `strftime_now`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag], cache_size=0
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert a value to JSON: the `tojson` filter of transformers, which escapes neither non-ASCII characters nor HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRuntimeError(message)
