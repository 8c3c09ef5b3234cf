"""The objects and events of `/v1/responses`, with the same fields as in OpenAI's API."""

from typing import Any, Literal

import msgspec

from meshd.api.openai.common_objects import TokenLogprob, Usage

ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The turn of the assistant, which is the answer."""

    id: str
    type: Literal["message"] = "message"
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ResponseError(msgspec.Struct, frozen=True, kw_only=True):
    """Why an answer failed. `type` has the value that other routes send as `code`."""

    code: Literal["server_error"] = "server_error"
    message: str
    type: str | None
    param: str | None = None


class IncompleteDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class InputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Details of the input tokens. meshd counts no tokens as cached."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    """Details of the output tokens. meshd counts no tokens as reasoning."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of an answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> "ResponseUsage":
        """Convert a usage to the field names of `/v1/responses`."""
        return cls(input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens)


class ReasoningShown(msgspec.Struct, frozen=True, kw_only=True):
    """Options for reasoning, which is not supported."""

    effort: None = None
    summary: None = None


class FormatShown(msgspec.Struct, frozen=True, kw_only=True):
    """The format of the answer: plain text."""

    type: Literal["text"] = "text"


class TextShown(msgspec.Struct, frozen=True, kw_only=True):
    """Options for the text of the answer."""

    format: FormatShown = FormatShown()
    verbosity: Literal["medium"] = "medium"


class RequestEcho(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a request that its response repeats."""

    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    safety_identifier: str | None
    temperature: float
    tool_choice: Literal["none", "auto"]
    top_logprobs: int
    top_p: float
    user: str | None


class Response(RequestEcho, frozen=True, kw_only=True):
    """The current state of an answer."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: ResponseStatus
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputMessage]
    usage: ResponseUsage | None = None
    max_tool_calls: None = None
    previous_response_id: None = None
    prompt_cache_key: None = None
    reasoning: ReasoningShown = ReasoningShown()
    service_tier: Literal["default"] = "default"
    store: bool
    text: TextShown = TextShown()
    tools: list[Any] = []
    truncation: Literal["disabled"] = "disabled"


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of DELETE /v1/responses/{id}: the record is deleted."""

    id: str
    object: str
    deleted: Literal[True] = True


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """An event of a streamed response."""

    sequence_number: int
    """Number of the event, from 0. Clients send it as `starting_after` to resume the stream."""


class WholeEvent(StreamEvent, frozen=True, kw_only=True):
    """An event with the response in its current state."""

    response: Response


class Created(WholeEvent, frozen=True, kw_only=True, tag="response.created"):
    """The first event of a stream."""


class InProgress(WholeEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    """The second event of a stream."""


class Completed(WholeEvent, frozen=True, kw_only=True, tag="response.completed"):
    """The last event of a completed answer."""


class Incomplete(WholeEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    """The last event of an answer that reached `max_output_tokens`."""


class ResponseFailed(WholeEvent, frozen=True, kw_only=True, tag="response.failed"):
    """The last event of an answer that failed and that no peer can resume."""


class ItemAdded(StreamEvent, frozen=True, kw_only=True, tag="response.output_item.added"):
    """The answer's message begins."""

    output_index: int = 0
    item: OutputMessage


class ItemDone(StreamEvent, frozen=True, kw_only=True, tag="response.output_item.done"):
    """The answer's message is complete."""

    output_index: int = 0
    item: OutputMessage


class ContentEvent(StreamEvent, frozen=True, kw_only=True):
    """An event of the message's only content part."""

    item_id: str
    output_index: int = 0
    content_index: int = 0


class PartAdded(ContentEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    """The content part begins."""

    part: OutputText


class OutputTextDelta(ContentEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """The next part of the text."""

    delta: str
    logprobs: list[TokenLogprob]


class TextDone(ContentEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The text is complete."""

    text: str
    logprobs: list[TokenLogprob]


class PartDone(ContentEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    """The content part is complete."""

    part: OutputText


class ErrorEvent(StreamEvent, frozen=True, kw_only=True, tag="error"):
    """The stream fails after event `sequence_number`. If the answer can be resumed, `message` describes how."""

    code: str | None
    message: str
    param: str | None


AnyStreamEvent = (
    Created | InProgress | ItemAdded | PartAdded | OutputTextDelta | TextDone | PartDone | ItemDone
    | Completed | Incomplete | ResponseFailed | ErrorEvent
)  # fmt: skip
