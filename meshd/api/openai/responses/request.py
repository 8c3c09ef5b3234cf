"""The body of `POST /v1/responses`, with the same fields as in OpenAI's API."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.api.openai.fields import (
    MAX_MESSAGES,
    UNSUPPORTED,
    AnswerFields,
    Count,
    NoValue,
    ToolChoice,
    demands_tool,
    neutral,
    tools_unsupported,
    unsupported,
)
from meshd.clock import Clock
from meshd.errors import InvalidRequest
from meshd.types import SamplingDefaults

LOGPROBS = "message.output_text.logprobs"
"""Value of `include` that requests logprobs."""

Include = Annotated[list[str] | None, Meta(description=f'Only "{LOGPROBS}" has an effect.')]
_TEXT_PARTS = ("input_text", "output_text")
_REASONING = "reasoning"


def _unsupported(description: str) -> Meta:
    return Meta(description=f"Not supported: only {description}.", extra_json_schema={UNSUPPORTED: True})


class InputText(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message. `annotations` and `logprobs` occur in answers that clients send back as input."""

    type: Annotated[str, Meta(description="input_text or output_text.")]
    text: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """One turn. `id` and `status` occur in answers that clients send back as input. They are ignored.

    Clients also send back what a model thought, as items of the type `reasoning`. They are left out.
    """

    type: Annotated[str | None, Meta(description="message, if given.")] = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputText] | None = None
    id: str | None = None
    status: str | None = None

    @property
    def is_turn(self) -> bool:
        """Whether the item is a message."""
        return self.type in (None, "message")

    def check(self, path: str) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        if not self.is_turn:
            self._check_type(path)
            return
        if self.role is None:
            raise InvalidRequest(
                f"`{path}.role` is required", param=f"{path}.role", hint="send user, assistant, system or developer"
            )
        if self.role != "assistant" and (self.content is None or self.content == []):
            raise InvalidRequest(f"`{path}.content` is required", param=f"{path}.content", hint="send a text or parts of text")
        for index, part in enumerate(self.content if isinstance(self.content, list) else ()):
            where = f"{path}.content[{index}]"
            if part.type not in _TEXT_PARTS:
                raise unsupported(f"{where}.type", "send only parts of the types input_text and output_text")
            if part.text is None:
                raise InvalidRequest(f"`{where}.text` is required", param=f"{where}.text", hint="send a text")

    def _check_type(self, path: str) -> None:
        if self.type != _REASONING:
            hint = "send only items of the type message"
            made_by_tool = self.type is not None and self.type.endswith(("_call", "_output"))
            raise tools_unsupported(f"{path}.type", hint) if made_by_tool else unsupported(f"{path}.type", hint)

    def turn(self) -> ChatMessage:
        """Convert the turn for the coordinator: join its parts of text, and rename the role `developer` to `system`.

        `developer` is OpenAI's new name for the role `system`, and chat templates know only `system`.
        """
        text = "".join(part.text or "" for part in self.content) if isinstance(self.content, list) else self.content
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role=role or "", content=text or "")


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The format of the answer. Only plain text is supported."""

    type: Literal["text"] = "text"


class TextConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options for the text of the answer."""

    format: TextFormat | None = None


class ResponseRequest(AnswerFields, frozen=True, kw_only=True):
    """The body of POST /v1/responses."""

    input: Annotated[
        str | Annotated[list[InputItem], Meta(min_length=1, max_length=MAX_MESSAGES)],
        Meta(description="A text, or messages of system, developer, user and assistant; their content is text or text parts."),
    ]
    instructions: Annotated[str | None, Meta(description="A system message before the input.")] = None
    max_output_tokens: Annotated[Count | None, Meta(description="At least 1; the rest of the context if not given.")] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=20)] | None, Meta(description=f'From 0 to 20; needs `include` with "{LOGPROBS}".')
    ] = None
    include: Include = None
    background: Annotated[bool | None, Meta(description="Continue while no client reads the answer; needs `store`.")] = None
    store: Annotated[bool | None, Meta(description="Whether the answer can be read again by its id; true if not given.")] = None
    metadata: Annotated[
        Annotated[dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)] | None,
        Meta(description="Up to 16 texts of up to 512 characters, by names of up to 64. The response repeats them."),
    ] = None
    safety_identifier: str | None = None
    user: str | None = None
    conversation: NoValue = None
    moderation: NoValue = None
    parallel_tool_calls: bool | None = None
    previous_response_id: NoValue = None
    prompt: NoValue = None
    truncation: Annotated[Literal["disabled"] | None, neutral("disabled")] = None
    text: Annotated[TextConfig | None, _unsupported('null or {"format": {"type": "text"}}')] = None
    tool_choice: ToolChoice = None
    tools: Annotated[
        list[Any] | None,
        Meta(
            description="Not supported: tools are ignored, so that agents can ask without them.",
            extra_json_schema={UNSUPPORTED: True},
        ),
    ] = None

    @property
    def stored(self) -> bool:
        """Whether the answer can be read again by its id."""
        return self.store is not False

    @property
    def logprobs(self) -> bool:
        """Whether the request asks for logprobs."""
        return LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        AnswerFields.check(self)
        if demands_tool(self.tool_choice):
            raise tools_unsupported("tool_choice", 'leave it out or send "none" or "auto"')
        if not isinstance(self.input, str):
            for index, item in enumerate(self.input):
                item.check(f"input[{index}]")
            if not any(item.is_turn for item in self.input):
                raise InvalidRequest("`input` has no message", param="input", hint="send a message of the user")
        if self.background and not self.stored:
            raise InvalidRequest("`background` needs `store`", param="background", hint="set `store` to true or leave it out")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `include`", param="top_logprobs", hint=f'add "{LOGPROBS}" to `include`')

    def without_effect(self) -> Iterator[str]:
        """See `AnswerFields.without_effect`: tools, what earlier answers thought, and parts of `include`."""
        if self.tools:
            yield "tools"
        yield from (f"include[{index}]" for index, part in enumerate(self.include or ()) if part != LOGPROBS)
        if not isinstance(self.input, str):
            yield from (f"input[{index}]" for index, item in enumerate(self.input) if not item.is_turn)

    def generation_requests(self, clock: Clock, defaults: SamplingDefaults) -> list[GenerationRequest]:
        """Make the only request to the coordinator. It is in a list, as on other routes. Raises: InvalidRequest."""
        self.check()
        return [
            GenerationRequest(
                model=self.model,
                prompt=self._turns(),
                sampling=self.sampling(self.first_seed(clock), (self.top_logprobs or 0) if self.logprobs else None, defaults),
                max_tokens=self.max_output_tokens,
                stop=self.stops(),
                ignore_eos=bool(self.ignore_eos),
                mesh=self.mesh or MeshOptions(),
            )
        ]

    def _turns(self) -> tuple[ChatMessage, ...]:
        system = (ChatMessage(role="system", content=self.instructions),) if self.instructions else ()
        if isinstance(self.input, str):
            return (*system, ChatMessage(role="user", content=self.input))
        return (*system, *(item.turn() for item in self.input if item.is_turn))
