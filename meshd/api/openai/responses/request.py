"""The body of `POST /v1/responses`, with the same fields as in OpenAI's API."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from meshd.agents.service import ChatMessage, GenerationRequest, MeshOptions
from meshd.api.openai.fields import UNSUPPORTED, AnswerFields, Count, NoList, NoValue, neutral
from meshd.clock import Clock
from meshd.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
"""Value of `include` that requests logprobs."""

Include = Annotated[list[Literal["message.output_text.logprobs"]] | None, Meta(description=f'Only "{LOGPROBS}".')]


def _unsupported(description: str) -> Meta:
    return Meta(description=f"Not supported: only {description}.", extra_json_schema={UNSUPPORTED: True})


class InputText(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part of a message. `annotations` and `logprobs` occur in answers that clients send back as input."""

    type: Literal["input_text", "output_text"]
    text: str
    prompt_cache_breakpoint: NoValue = None
    annotations: NoList = None
    logprobs: list[Any] | None = None


class InputMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn. `id` and `status` occur in answers that clients send back as input. They are ignored."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputText], Meta(min_length=1)]
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: NoValue = None

    def turn(self) -> ChatMessage:
        """Convert the turn for the coordinator: join its parts of text, and rename the role `developer` to `system`.

        `developer` is OpenAI's new name for the role `system`, and chat templates know only `system`.
        """
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=text)


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The format of the answer. Only plain text is supported."""

    type: Literal["text"] = "text"


class TextConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options for the text of the answer."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options for reasoning, which is not supported."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponseRequest(AnswerFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/responses."""

    input: Annotated[
        str | Annotated[list[InputMessage], Meta(min_length=1)],
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
    access_programs: NoValue = None
    background_options: NoValue = None
    context_management: NoValue = None
    conversation: NoValue = None
    image: NoValue = None
    max_tool_calls: NoValue = None
    moderation: NoValue = None
    parallel_tool_calls: bool | None = None
    previous_response_id: NoValue = None
    prompt: NoValue = None
    prompt_cache_key: NoValue = None
    prompt_cache_options: NoValue = None
    prompt_cache_retention: NoValue = None
    reasoning: Annotated[Reasoning | None, _unsupported('null or {"effort": "none"}')] = None
    service_tier: Annotated[Literal["auto", "default"] | None, neutral("auto", "default")] = None
    text: Annotated[TextConfig | None, _unsupported('null or {"format": {"type": "text"}}')] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, neutral("none", "auto")] = None
    tools: NoList = None
    truncation: Annotated[Literal["disabled"] | None, neutral("disabled")] = None

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
        if self.background and not self.stored:
            raise InvalidRequest("`background` needs `store`", param="background", hint="set `store` to true or leave it out")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `include`", param="top_logprobs", hint=f'add "{LOGPROBS}" to `include`')

    def generation_requests(self, clock: Clock) -> list[GenerationRequest]:
        """Make the only request to the coordinator. It is in a list, as on other routes. Raises: InvalidRequest."""
        self.check()
        return [
            GenerationRequest(
                model=self.model,
                prompt=self._turns(),
                sampling=self.sampling(self.first_seed(clock), (self.top_logprobs or 0) if self.logprobs else None),
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
        return (*system, *(message.turn() for message in self.input))
