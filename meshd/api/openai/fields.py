"""Request fields that several routes have, and their conversion for the coordinator.

A field falls into one of three groups. One that meshd supports is used. One that is known to change the answer and is not supported
accepts only its neutral values (null, an empty list, the default): any other value is an error that names the field. All others,
such as hints for other servers (`prompt_cache_key`, `verbosity`), are ignored, and the header `x-meshd-ignored` names them.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from meshd.agents.service import MeshOptions
from meshd.bounds import MAX_LOGIT_BIAS, MAX_STOP_CHARACTERS, MAX_STOPS, AskedPenalty, AskedRepetition, AskedTemperature
from meshd.clock import Clock
from meshd.errors import InvalidRequest, ToolsUnsupported
from meshd.types import SamplingDefaults, SamplingParams

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARACTERS)]

UNSUPPORTED = "x-unsupported"
"""Key in a field's JSON schema. It marks a field that accepts only neutral values."""

NoList = Annotated[
    Annotated[list[Any], Meta(max_length=0)] | None,
    Meta(description="Not supported: only null or an empty list.", extra_json_schema={UNSUPPORTED: True}),
]
NoValue = Annotated[None, Meta(description="Not supported: only null.", extra_json_schema={UNSUPPORTED: True})]
Tools = Annotated[
    list[Any] | None, Meta(description="Not supported: only null or an empty list.", extra_json_schema={UNSUPPORTED: True})
]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | dict[str, Any] | None,
    Meta(description='Not supported: only null, "none" or "auto".', extra_json_schema={UNSUPPORTED: True}),
]
MAX_MESSAGES = 16_384
"""Most messages of a chat. Each has at least some tokens, so that longer chats fit into no context."""

_SEED_SPAN = 2**63


def neutral(*values: str) -> Meta:
    """Make the schema of a field that accepts only null and these neutral values."""
    allowed = ", ".join(f'"{value}"' for value in values)
    return Meta(description=f"Not supported: only null or {allowed}.", extra_json_schema={UNSUPPORTED: True})


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a stream."""


class ChunkOptions(StreamOptions, frozen=True, kw_only=True):
    """Options of a stream of chunks."""

    include_usage: bool | None = None
    """Whether the stream ends with a chunk that has the usage and no choices."""


class AnswerFields(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of all routes that generate answers."""

    model: Annotated[str, Meta(min_length=1, max_length=512, description="A model of GET /v1/models.")]
    temperature: Annotated[
        AskedTemperature | None,
        Meta(description="From 0 (always the most likely token) to 2. Default: the model's own, or 1. So for the next six."),
    ] = None
    top_p: Annotated[Annotated[float, Meta(gt=0, le=1)] | None, Meta(description="Above 0, up to 1 (all tokens).")] = None
    top_k: Annotated[Annotated[int, Meta(ge=0, le=2**31 - 1)] | None, Meta(description="0: all tokens.")] = None
    min_p: Annotated[Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="From 0 (all tokens) to 1.")] = None
    presence_penalty: Annotated[AskedPenalty | None, Meta(description="From -2 to 2.")] = None
    frequency_penalty: Annotated[AskedPenalty | None, Meta(description="From -2 to 2.")] = None
    repetition_penalty: Annotated[AskedRepetition | None, Meta(description="From 0.01 to 10; 1: no penalty.")] = None
    repeat_penalty: Annotated[AskedRepetition | None, Meta(description="Another name of `repetition_penalty`.")] = None
    logit_bias: Annotated[
        Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_LOGIT_BIAS)] | None,
        Meta(description=f"Token id to a bias from -100 to 100, for up to {MAX_LOGIT_BIAS} tokens."),
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-_SEED_SPAN, le=_SEED_SPAN - 1)] | None,
        Meta(description="64 bits; the same seed gives the same answer. Answer i of n has seed + i. Random if not given."),
    ] = None
    stop: Annotated[
        StopText | Annotated[list[StopText], Meta(max_length=MAX_STOPS)] | None, Meta(description="One text, or up to 16 of them.")
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: Annotated[bool | None, Meta(description="Continue to max_tokens, past the model's end of text.")] = None
    mesh: Annotated[MeshOptions | None, Meta(description="Where and how the mesh computes the answer.")] = None

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "`stream_options` is only for streams", param="stream_options", hint="set `stream` to true or leave it out"
            )
        if None not in (self.repetition_penalty, self.repeat_penalty) and self.repetition_penalty != self.repeat_penalty:
            raise InvalidRequest(
                "`repetition_penalty` and `repeat_penalty` differ", param="repeat_penalty", hint="send only `repetition_penalty`"
            )

    def without_effect(self) -> Iterator[str]:
        """Yield the names of fields that this type has, but that have no effect in this request."""
        yield from ()

    def sampling(self, seed: int, logprobs: int | None, defaults: SamplingDefaults) -> SamplingParams:
        """Return the sampling parameters. `logprobs`: None requests none.

        A parameter that the request lacks has the value of `defaults`, the model's own, or else that of OpenAI's API.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty,
            "logit_bias": self.logit_bias,
        }
        given |= {name: getattr(defaults, name) for name in defaults.__struct_fields__ if given[name] is None}
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(seed=seed, logprobs=logprobs, **known)

    def first_seed(self, clock: Clock) -> int:
        """Return the seed of the first answer, in 63 bits: the requested seed or a random one."""
        seed = self.seed if self.seed is not None else int.from_bytes(clock.random_bytes(8), "little")
        return seed % _SEED_SPAN


class GenerationFields(AnswerFields, frozen=True, kw_only=True):
    """Fields that chats and text completions have and responses don't."""

    max_tokens: Annotated[Count | None, Meta(description="At least 1.")] = None
    n: Annotated[Annotated[int, Meta(ge=1, le=8)] | None, Meta(description="Answers to each prompt, from 1 to 8.")] = None
    stream_options: ChunkOptions | None = None

    @property
    def count(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a chunk that has the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def seeds(self, clock: Clock) -> list[int]:
        """Return the seeds of the `n` answers to each prompt: `first_seed` and the numbers after it."""
        first = self.first_seed(clock)
        return [(first + index) % _SEED_SPAN for index in range(self.count)]


def unsupported(param: str, hint: str) -> InvalidRequest:
    """Make the error for a field that requests something that meshd does not support."""
    return InvalidRequest(f"`{param}` is not supported", param=param, hint=hint)


def asks_for_tools(tools: list[Any] | None, choice: str | dict[str, Any] | None) -> bool:
    """Whether a request may be answered with a call of a tool: it has tools and does not rule them out, or it demands a call."""
    return (bool(tools) and choice != "none") or demands_tool(choice)


def demands_tool(choice: str | dict[str, Any] | None) -> bool:
    """Whether `tool_choice` or `function_call` demands that the answer is a call of a tool."""
    return choice == "required" or isinstance(choice, dict)


def tools_unsupported(param: str, hint: str = 'leave it out, or set "tool_choice" to "none"') -> ToolsUnsupported:
    """Make the error for a field that asks for tools."""
    return ToolsUnsupported(f"`{param}` asks for tools, which are not supported", param=param, hint=hint)
