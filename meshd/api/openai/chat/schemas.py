"""The bodies of `POST /v1/chat/completions`, with the same fields as in OpenAI's API."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.api.openai.common_objects import FinishName, ObjectHeader, TokenLogprob, Usage
from meshd.api.openai.fields import UNSUPPORTED, Count, GenerationFields, NoList, NoValue, neutral, unsupported
from meshd.clock import Clock
from meshd.errors import InvalidRequest


class TextPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a chat. The fields after `name` occur in answers that clients send back as turns, and must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Meta(min_length=1)]
    name: str | None = None
    refusal: None = None
    annotations: NoList = None
    audio: None = None
    tool_calls: NoList = None
    function_call: None = None

    def turn(self) -> ChatMessage:
        """Convert the turn for the coordinator: join its parts of text, and rename the role `developer` to `system`.

        `developer` is OpenAI's new name for the role `system`, and chat templates know only `system`.
        """
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=text, name=self.name)


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The format of the answer. Only plain text is supported."""

    type: Literal["text"]


class ChatRequest(GenerationFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[
        list[Message],
        Meta(
            min_length=1,
            description="Turns with the role system, developer, user or assistant; their content is text or text parts.",
        ),
    ]
    max_completion_tokens: Annotated[Count | None, Meta(description="At least 1; the rest of the context if not given.")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Annotated[int, Meta(ge=0, le=20)] | None, Meta(description="From 0 to 20; needs `logprobs`.")] = None
    safety_identifier: str | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Meta(description="Variables of the model's chat template, such as `enable_thinking`; unknown ones are ignored."),
    ] = None
    audio: NoValue = None
    function_call: Annotated[Literal["none", "auto"] | None, neutral("none", "auto")] = None
    functions: NoList = None
    metadata: NoValue = None
    modalities: Annotated[list[Literal["text"]] | None, neutral("text")] = None
    moderation: NoValue = None
    parallel_tool_calls: bool | None = None
    prediction: NoValue = None
    prompt_cache_key: NoValue = None
    prompt_cache_options: NoValue = None
    prompt_cache_retention: NoValue = None
    reasoning_effort: Annotated[Literal["none"] | None, neutral("none")] = None
    response_format: Annotated[
        ResponseFormat | None, Meta(description='Only null or {"type": "text"}.', extra_json_schema={UNSUPPORTED: True})
    ] = None
    service_tier: Annotated[Literal["auto", "default"] | None, neutral("auto", "default")] = None
    store: Annotated[
        bool | None,
        Meta(
            description="Only false or null; with false, a broken stream can't be resumed.",
            extra_json_schema={UNSUPPORTED: True, "enum": [False, None]},
        ),
    ] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, neutral("none", "auto")] = None
    tools: NoList = None
    verbosity: Annotated[Literal["medium"] | None, neutral("medium")] = None
    web_search_options: NoValue = None

    def check(self) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        GenerationFields.check(self)
        if self.store:
            raise unsupported("store", "leave it out or send false")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs`", param="top_logprobs", hint="set `logprobs` to true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                "`max_tokens` and `max_completion_tokens` differ", param="max_tokens", hint="send only `max_completion_tokens`"
            )

    def generation_requests(self, clock: Clock) -> list[GenerationRequest]:
        """Make `n` requests to the coordinator, one for each answer. Raises: InvalidRequest."""
        self.check()
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        prompt = tuple(message.turn() for message in self.messages)
        return [
            GenerationRequest(
                model=self.model,
                prompt=prompt,
                template=self.chat_template_kwargs or {},
                sampling=self.sampling(seed, logprobs),
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
