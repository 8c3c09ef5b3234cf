"""A model's chat template, which renders messages as a prompt in the format that the model was trained on."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from jinja2 import Template, TemplateError

from meshd.errors import InvalidRequest, ModelFileError
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.text.sandbox import chat_environment
from meshd.models.text.tokenizer.document import HUGGINGFACE_KEY, huggingface_json
from meshd.models.text.tokenizer.gguf_keys import TokenizerKeys

Message: TypeAlias = Mapping[str, Any]
"""`role`, `content` (text, or a list of parts), and other keys that a template may read, such as `tool_calls`."""

MAX_SOURCE_CHARACTERS = 256 << 10
MAX_PROMPT_CHARACTERS = 16 << 20
_RENDER_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, NameError)
"""Errors that a template can raise. NameError: jinja2 compiles an overflowing float literal, such as 1e999, to the name `inf`."""
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
_WITH_TOOLS = "tokenizer.chat_template.tool_use"
"""GGUF's key of the template for conversations with tools, in models that have a separate one."""


class ChatTemplate:
    """A compiled template. It may come from anybody and take any time and memory: only a text worker renders it."""

    def __init__(
        self,
        source: str,
        *,
        bos: str = "",
        eos: str = "",
        with_tools: str | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Compile the template. `bos` and `eos` are the texts of these tokens.

        `with_tools` is the source for conversations with tools; None: `source`.

        Raises: ModelFileError if a source is not a valid template.
        """
        self._environment = chat_environment(now)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._template = self._compiled(source)
        self._with_tools = self._template if with_tools is None else self._compiled(with_tools)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the prompt, with the model's control tokens spelt out.

        `tools` are functions described by JSON Schema. `variables` are further variables of the template, e.g. `enable_thinking`.

        Raises: InvalidRequest if the template raises an error, whose message it includes, or if the prompt is too long.
        """
        others = variables or {}
        if taken := sorted(_OWN_VARIABLES & others.keys()):
            raise InvalidRequest(f"a chat template's variable {taken[0]!r} can't be set", param="chat_template_kwargs")
        given = {
            "messages": list(messages),
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._template if tools is None else self._with_tools
        parts = []
        left = MAX_PROMPT_CHARACTERS
        try:
            for part in template.generate(self._tokens | dict(others) | given):
                left -= len(part)
                if left < 0:
                    raise ValueError(f"the prompt is longer than {MAX_PROMPT_CHARACTERS} characters")
                parts.append(part)
        except _RENDER_ERRORS as error:
            why = str(error) or type(error).__name__
            raise InvalidRequest(f"the model's chat template refuses these messages: {why}", param="messages") from error
        return "".join(parts)

    def _compiled(self, source: str) -> Template:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ModelFileError(f"the chat template can't be used: it is longer than {MAX_SOURCE_CHARACTERS} characters")
        try:
            return self._environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise ModelFileError(f"the chat template can't be used: {error}") from error
        except MemoryError as error:  # also what Python's parser raises when its stack is full
            raise ModelFileError("the chat template can't be used: it is nested too deep") from error


def template_from_gguf(metadata: Mapping[str, MetadataValue], *, now: Callable[[], datetime] = datetime.now) -> ChatTemplate:
    """Read the chat template of a GGUF file. Raises: InvalidRequest if it has none, ModelFileError if it is broken."""
    source, with_tools = metadata.get("tokenizer.chat_template"), metadata.get(_WITH_TOOLS)
    if not isinstance(source, str):
        raise InvalidRequest(
            "this model can't chat: its file has no chat template", param="messages", hint="send a prompt to /v1/completions"
        )
    bos, eos = _token_texts(metadata, "bos_token_id", "eos_token_id")
    return ChatTemplate(source, bos=bos, eos=eos, with_tools=with_tools if isinstance(with_tools, str) else None, now=now)


def _token_texts(metadata: Mapping[str, MetadataValue], *keys: str) -> list[str]:
    """Return the texts of the tokens whose ids are under these keys; an empty text for a key that the file does not have."""
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    if HUGGINGFACE_KEY in metadata and (document := huggingface_json(metadata)) is not None:
        return [document.text_of(id_) if isinstance(id_, int) else "" for id_ in ids]
    tokens = metadata.get("tokenizer.ggml.tokens")
    known = tokens if isinstance(tokens, tuple) else ()
    reader = TokenizerKeys(metadata)
    used = [reader.special(key, reader.types(len(known))) if known else None for key in keys]
    return ["" if id_ is None else str(known[id_]) for id_ in used]
