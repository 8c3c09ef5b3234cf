"""A model's chat template: messages to the prompt that the model was trained on."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TypeAlias

from jinja2 import TemplateError

from meshd.errors import InvalidRequest, ModelFileError
from meshd.models.gguf_header import MetadataValue
from meshd.models.sandbox import BoundedSandbox

Message: TypeAlias = Mapping[str, str]
"""`role`, `content`, and what else a template may look for."""

MAX_SOURCE_CHARACTERS = 256 << 10
MAX_PROMPT_CHARACTERS = 16 << 20
_RENDER_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, NameError)
"""A number that is too large becomes the name `inf` in what jinja2 compiles: so NameError."""


class ChatTemplate:
    """A compiled template, rendered in a sandbox that bounds its work. Safe to share between threads."""

    def __init__(self, source: str, *, bos: str = "", eos: str = "", now: Callable[[], datetime] = datetime.now) -> None:
        """`bos` and `eos` are the tokens' texts. Raises: ModelFileError for a source that is no template."""
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ModelFileError(f"the chat template can't be used: it is longer than {MAX_SOURCE_CHARACTERS} characters")
        environment = BoundedSandbox()
        environment.globals["strftime_now"] = lambda form: _formatted(now(), form)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise ModelFileError(f"the chat template can't be used: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt, with the model's control tokens spelt out. Raises: InvalidRequest, with the template's own words."""
        parts = []
        left = MAX_PROMPT_CHARACTERS
        variables = {"messages": list(messages), "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            for part in self._template.generate(self._tokens | variables):
                left -= len(part)
                if left < 0:
                    raise ValueError(f"the prompt is longer than {MAX_PROMPT_CHARACTERS} characters")
                parts.append(part)
        except _RENDER_ERRORS as error:
            why = str(error) or type(error).__name__
            raise InvalidRequest(f"the model's chat template refuses these messages: {why}", param="messages") from error
        return "".join(parts)


def template_from_gguf(metadata: Mapping[str, MetadataValue], *, now: Callable[[], datetime] = datetime.now) -> ChatTemplate:
    """The template that a GGUF file carries. Raises: InvalidRequest if it has none, ModelFileError if it is broken."""
    source = metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        raise InvalidRequest(
            "this model can't chat: its file has no chat template", param="messages", hint="send a prompt to /v1/completions"
        )
    return ChatTemplate(source, bos=_token(metadata, "bos_token_id"), eos=_token(metadata, "eos_token_id"), now=now)


def _token(metadata: Mapping[str, MetadataValue], key: str) -> str:
    tokens, id_ = metadata.get("tokenizer.ggml.tokens"), metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(tokens, tuple) or not isinstance(id_, int) or not 0 <= id_ < len(tokens):
        return ""
    return str(tokens[id_])


def _formatted(moment: datetime, form: str) -> str:
    if len(form) > 64 or any(character.isdigit() for character in form):
        raise ValueError("strftime_now takes a short format without widths")
    return moment.strftime(form)
