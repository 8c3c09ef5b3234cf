"""The bodies of `POST /v1/chat/completions`, with the same fields as in OpenAI's API."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.api.openai.common_objects import FinishName, ObjectHeader, TokenLogprob, Usage
from meshd.api.openai.fields import (
    MAX_MESSAGES,
    UNSUPPORTED,
    Count,
    GenerationFields,
    NoValue,
    ToolChoice,
    Tools,
    asks_for_tools,
    neutral,
    tools_unsupported,
)
from meshd.clock import Clock
from meshd.errors import InvalidRequest
from meshd.types import SamplingDefaults


class TextPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of a chat. The fields after `reasoning` occur in answers that clients send back as turns, and must be empty."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        Meta(description="system, developer, user or assistant; tools are not supported."),
    ]
    content: str | list[TextPart] | None = None
    """Only the content of an assistant's turn may be empty."""
    name: str | None = None
    reasoning_content: str | None = None
    """What the assistant thought before this turn. The chat template decides whether the model sees it."""
    reasoning: str | None = None
    """Another name of `reasoning_content`."""
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    tool_calls: Tools = None
    function_call: dict[str, Any] | None = None

    def check(self, path: str) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        if self.role in ("tool", "function"):
            raise tools_unsupported(f"{path}.role", "leave out the turns of tools")
        for name, value in (("tool_calls", self.tool_calls), ("function_call", self.function_call)):
            if value:
                raise tools_unsupported(f"{path}.{name}", "leave out the turns of tools")
        if self.role != "assistant" and (self.content is None or self.content == []):
            raise InvalidRequest(f"`{path}.content` is required", param=f"{path}.content", hint="send a text or parts of text")

    def turn(self) -> ChatMessage:
        """Convert the turn for the coordinator: join its parts of text, and rename the role `developer` to `system`.

        `developer` is OpenAI's new name for the role `system`, and chat templates know only `system`.
        """
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content
        return ChatMessage(
            role="system" if self.role == "developer" else self.role,
            content=text or "",
            name=self.name,
            reasoning=self.reasoning_content or self.reasoning,
        )


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The format of the answer. Only plain text is supported."""

    type: Literal["text"]


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[Message],
        Meta(
            min_length=1,
            max_length=MAX_MESSAGES,
            description="Turns with the role system, developer, user or assistant; their content is text or text parts.",
        ),
    ]
    max_completion_tokens: Annotated[Count | None, Meta(description="At least 1; the rest of the context if not given.")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Annotated[int, Meta(ge=0, le=20)] | None, Meta(description="From 0 to 20; needs `logprobs`.")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Meta(description="Variables of the model's chat template, such as `enable_thinking`; unknown ones are ignored."),
    ] = None
    audio: NoValue = None
    function_call: ToolChoice = None
    functions: Tools = None
    modalities: Annotated[list[Literal["text"]] | None, neutral("text")] = None
    moderation: NoValue = None
    response_format: Annotated[
        ResponseFormat | None, Meta(description='Only null or {"type": "text"}.', extra_json_schema={UNSUPPORTED: True})
    ] = None
    store: Annotated[bool | None, Meta(description="With false, a broken stream can't be resumed; true if not given.")] = None
    tool_choice: ToolChoice = None
    tools: Tools = None
    web_search_options: NoValue = None

    def check(self) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        GenerationFields.check(self)
        for index, message in enumerate(self.messages):
            message.check(f"messages[{index}]")
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            if asks_for_tools(getattr(self, tools), getattr(self, choice)):
                raise tools_unsupported(tools if getattr(self, tools) else choice)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs`", param="top_logprobs", hint="set `logprobs` to true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                "`max_tokens` and `max_completion_tokens` differ", param="max_tokens", hint="send only `max_completion_tokens`"
            )

    def without_effect(self) -> Iterator[str]:
        """See `AnswerFields.without_effect`: tools that the request itself rules out."""
        yield from (name for name in ("tools", "functions") if getattr(self, name))

    def generation_requests(self, clock: Clock, defaults: SamplingDefaults) -> list[GenerationRequest]:
        """Make `n` requests to the coordinator, one for each answer. Raises: InvalidRequest."""
        self.check()
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        prompt = tuple(message.turn() for message in self.messages)
        return [
            GenerationRequest(
                model=self.model,
                prompt=prompt,
                template=self.chat_template_kwargs or {},
                sampling=self.sampling(seed, logprobs, defaults),
                max_tokens=self.max_completion_tokens or self.max_tokens,
                stop=self.stops(),
                ignore_eos=bool(self.ignore_eos),
                mesh=self.mesh or MeshOptions(),
            )
            for seed in self.seeds(clock)
        ]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Logprobs of the tokens of an answer or a chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The turn of the assistant in an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | UnsetType = UNSET
    """What the model thought before it answered. Absent: nothing."""
    refusal: None = None
    annotations: list[Any] = []


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishName


class ChatCompletion(ObjectHeader, frozen=True, kw_only=True):
    """All answers to one request."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage
    service_tier: Literal["default"] = "default"


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a chunk that belongs to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName | None = None


class ChatCompletionChunk(ObjectHeader, frozen=True, kw_only=True):
    """One event of a stream. With `include_usage`, the last event has the usage and no choices; the others have a usage of null."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: Literal["default"] = "default"
