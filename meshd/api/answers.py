"""The answers to one request, run at once, as one sequence of events; and their common parts in OpenAI's shapes."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from aiohttp import web

from meshd import __version__
from meshd.agents.service import Coordinator, Finished, Generation, GenerationRequest, TextDelta, TokenText
from meshd.api.merge import closing, merged
from meshd.api.services import SERVICES, Services
from meshd.errors import Cancelled, InvalidRequest
from meshd.types import FinishReason

GENERATION_HEADERS = web.RequestKey("generation_headers", dict[str, str])
"""Where a request keeps the headers of its answer, once admitted."""

FinishName = Literal["stop", "length"]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of all answers together; each prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What every object of one request has in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str


@dataclass(slots=True)
class Collected:
    """One whole answer."""

    text: list[str] = field(default_factory=list)
    tokens: list[TokenText] = field(default_factory=list)
    finish: FinishName = "stop"


@dataclass(slots=True)
class Tally:
    """Counts the tokens of a request's answers; `count` answers belong to one prompt."""

    count: int
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, index: int, finished: Finished) -> None:
        """Answer `index` is done."""
        self.completion_tokens += finished.completion_tokens
        if index % self.count == 0:
            self.prompt_tokens += finished.prompt_tokens

    def usage(self) -> Usage:
        """All so far."""
        total = self.prompt_tokens + self.completion_tokens
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens, total_tokens=total)


@dataclass(frozen=True, slots=True)
class _Admitted:
    generation: Generation


def head(services: Services, prefix: str, model: str) -> dict[str, Any]:
    """The fields of `Head`: a new id, the time, the model by its own name, the fingerprint of its weights and this version."""
    card = next((card for card in services.coordinator.models() if model in (card.name, card.id, card.ref)), None)
    weights = card.id if card else model
    return {
        "id": f"{prefix}-{services.clock.random_bytes(16).hex()}",
        "created": int(services.clock.wall()),
        "model": card.name if card else model,
        "system_fingerprint": f"fp_{hashlib.sha256(f'{__version__}:{weights}'.encode()).hexdigest()[:10]}",
    }


@asynccontextmanager
async def answers(
    request: web.Request, wanted: Sequence[GenerationRequest]
) -> AsyncIterator[AsyncIterator[tuple[int, TextDelta | Finished]]]:
    """Run all `wanted`; the block gets their events with each answer's index, interleaved as they come.

    The block begins when all are admitted, or the first has text. Leaving it, whatever the reason, cancels what still
    runs. Cancel: the same. Raises: as Coordinator.generate; Cancelled, when an answer was ended from elsewhere.
    """
    services = request.app[SERVICES]
    if len(wanted) > services.limits.answers:
        raise InvalidRequest(f"{len(wanted)} answers are too many for one request", param="prompt", hint="send fewer prompts")
    slots = asyncio.Semaphore(services.limits.answers_at_once)
    async with merged([_answer(services.coordinator, one, slots) for one in wanted]) as events:
        admitted: dict[int, Generation] = {}
        early: list[tuple[int, TextDelta | Finished]] = []
        async for index, event in events:
            if not isinstance(event, _Admitted):
                early.append((index, event))
                break
            admitted[index] = event.generation
            if len(admitted) == len(wanted):
                break
        request[GENERATION_HEADERS] = _headers(admitted)
        yield _deltas(early, events)


async def _answer(
    coordinator: Coordinator, wanted: GenerationRequest, slots: asyncio.Semaphore
) -> AsyncGenerator[_Admitted | TextDelta | Finished, None]:
    async with slots:
        generation = await coordinator.generate(wanted)
        try:
            yield _Admitted(generation)
            async with closing(generation.events()) as events:
                async for event in events:
                    yield event
        finally:
            await generation.cancel()


async def _deltas(
    early: Sequence[tuple[int, TextDelta | Finished]], events: AsyncIterator[tuple[int, _Admitted | TextDelta | Finished]]
) -> AsyncIterator[tuple[int, TextDelta | Finished]]:
    for item in early:
        yield item
    async for index, event in events:
        if not isinstance(event, _Admitted):
            yield index, event


def finish_name(finished: Finished) -> FinishName:
    """OpenAI's word for why an answer ended. Raises: Cancelled, if it was not its own end."""
    match finished.reason:
        case FinishReason.STOP:
            return "stop"
        case FinishReason.LENGTH:
            return "length"
        case _:
            raise Cancelled("the answer was cut short: its session was ended", hint="send the request again")


async def collect(events: AsyncIterator[tuple[int, TextDelta | Finished]], count: int, tally: Tally) -> list[Collected]:
    """All `count` answers, whole and in order."""
    whole = [Collected() for _ in range(count)]
    async for index, event in events:
        if isinstance(event, Finished):
            whole[index].finish = finish_name(event)
            tally.add(index, event)
        else:
            whole[index].text.append(event.text)
            whole[index].tokens.extend(event.tokens)
    return whole


def shown(logprob: float) -> float:
    """A logprob as OpenAI shows it: JSON has no infinity, -9999 stands for it."""
    return max(logprob, -9999.0)


def _headers(admitted: Mapping[int, Generation]) -> dict[str, str]:
    """Those of the first answer; of several, all sessions in order."""
    generations = [admitted[index] for index in sorted(admitted)]
    return {
        "x-meshd-session": ",".join(generation.session for generation in generations),
        "x-meshd-plan": quote(generations[0].plan_header, safe=" :,"),  # peers' names are free text, headers are not
        "x-meshd-predicted-tpot-ms": f"{generations[0].predicted_tpot_s * 1000:.3f}",
    }
