"""Objects that chats, text completions and responses share: usage, logprobs and collected answers."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from meshd.agents.service import Finished, TextDelta, TokenText
from meshd.errors import Cancelled
from meshd.types import FinishReason

FinishName = Literal["stop", "length"]

ENDED = frozenset({"completed", "failed", "cancelled"})
"""Values of `Generation.status` with which an answer can't be resumed."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts over all answers to a request. The tokens of a prompt count once, even if it has several answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ObjectHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that every object of a chat or text completion begins with. They are equal in all objects of a request."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """The token that was chosen at a position, and the most likely tokens at this position."""

    token: str
    logprob: float
    bytes: tuple[int, ...] | None
    top_logprobs: list[TopLogprob]


@dataclass(slots=True)
class CollectedAnswer:
    """The tokens and text of one answer that is complete or still grows."""

    text: list[str] = field(default_factory=list)
    tokens: list[TokenText] = field(default_factory=list)
    finish: FinishName = "stop"

    @property
    def empty(self) -> bool:
        """Whether the answer has neither tokens nor text yet."""
        return not (self.tokens or any(self.text))

    def add(self, delta: TextDelta) -> None:
        """Append the next delta."""
        self.text.append(delta.text)
        self.tokens.extend(delta.tokens)


@dataclass(slots=True)
class UsageCounter:
    """Counts the tokens of a request's answers. Each prompt has `per_prompt` answers."""

    per_prompt: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ended: int = 0
    """Number of answers that have ended."""

    def add(self, index: int, finished: Finished) -> None:
        """Count the tokens of answer `index`, which has ended."""
        self.ended += 1
        self.completion_tokens += finished.completion_tokens
        if index % self.per_prompt == 0:
            self.prompt_tokens += finished.prompt_tokens

    def usage(self) -> Usage:
        """Return the counts so far."""
        total = self.prompt_tokens + self.completion_tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens, total_tokens=total)


def finish_name(finished: Finished) -> FinishName:
    """Return OpenAI's name for the reason why an answer ended. Raises: Cancelled if the reason is neither STOP nor LENGTH."""
    match finished.reason:
        case FinishReason.STOP:
            return "stop"
        case FinishReason.LENGTH:
            return "length"
        case _:
            raise Cancelled("the answer is incomplete: its session was ended", hint="send the request again")


async def collect(
    events: AsyncIterator[tuple[int, TextDelta | Finished]], count: int, counter: UsageCounter
) -> list[CollectedAnswer]:
    """Wait for `count` answers to end, and return them in order. `counter` counts their tokens.

    Raises: what `events` raises; Cancelled if an answer ended for a reason other than STOP or LENGTH.
    """
    answers = [CollectedAnswer() for _ in range(count)]
    async for index, event in events:
        if isinstance(event, Finished):
            answers[index].finish = finish_name(event)
            counter.add(index, event)
        else:
            answers[index].add(event)
    return answers


def clamp_logprob(logprob: float) -> float:
    """Clamp a logprob to -9999, as OpenAI does, since JSON has no infinity."""
    return max(logprob, -9999.0)


def token_logprobs(tokens: Iterable[TokenText]) -> list[TokenLogprob]:
    """Convert tokens to the logprob objects of chats and responses."""
    return [
        TokenLogprob(
            token=one.token,
            logprob=clamp_logprob(one.logprob),
            bytes=one.bytes,
            top_logprobs=[TopLogprob(token=top.token, logprob=clamp_logprob(top.logprob), bytes=top.bytes) for top in one.top],
        )
        for one in tokens
    ]
