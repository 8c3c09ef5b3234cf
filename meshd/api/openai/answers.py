"""The answers to one request while they run: started, or taken up again, and let go of when their reader leaves."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote

import msgspec
from aiohttp import web

from meshd.agents.service import Coordinator, Finished, Generation, GenerationRequest, TextDelta
from meshd.api.http.errors import KEPT, KeptAnswer
from meshd.api.http.merge import closing, merge_iterators
from meshd.api.http.services import SERVICES
from meshd.api.openai.kept import AnyForm, encode_renderer
from meshd.errors import InvalidRequest

GENERATION_HEADERS = web.RequestKey("generation_headers", dict[str, str])
"""Where a request keeps the headers of its answer, once admitted."""


@dataclass(frozen=True, slots=True)
class RunningAnswers:
    """The answers to one request."""

    form: AnyForm
    id: str
    events: AsyncIterator[tuple[int, TextDelta | Finished]]
    """With each answer's index; interleaved as they come."""
    generation: Generation | None = None
    """Of a single answer."""

    @property
    def failed(self) -> bool:
        """Whether it can't be gone on with anywhere."""
        return self.generation is not None and self.generation.status == "failed"


@dataclass(frozen=True, slots=True)
class _Admitted:
    generation: Generation


@asynccontextmanager
async def started(
    request: web.Request, form: AnyForm, wanted: Sequence[GenerationRequest], *, known: bool
) -> AsyncIterator[RunningAnswers]:
    """Run all `wanted`. Leaving the block, whatever the reason, lets go of what still runs.

    A single answer is suspended by that, if the client knows its id (`known`) and its record is kept. Several are cancelled.
    Raises: as Coordinator.generate; Cancelled, when an answer was ended from elsewhere. Cancel: as leaving.
    """
    if len(wanted) == 1:
        generation = await generate(request, form, wanted[0])
        async with reading(request, form, generation, known=known) as running:
            yield running
    else:
        async with _several(request, form, wanted) as running:
            yield running


async def generate(request: web.Request, form: AnyForm, wanted: GenerationRequest) -> Generation:
    """Start a single answer that any peer can show. Raises: as Coordinator.generate. Cancel: nothing stays reserved."""
    coordinator = request.app[SERVICES].coordinator
    whole = msgspec.structs.replace(wanted, store=form.store, background=form.background, edge=encode_renderer(form))
    generation = await coordinator.generate(whole)
    show(request, generation)
    return generation


@asynccontextmanager
async def reading(
    request: web.Request, form: AnyForm, generation: Generation, *, known: bool = True
) -> AsyncIterator[RunningAnswers]:
    """Read a single answer from its beginning. Leaving the block: as `started`."""
    work = request.app[SERVICES].work
    answer_id = form.prefix + generation.session
    if form.store:
        request[KEPT] = KeptAnswer(answer_id, generation)
    try:
        async with closing(_events(generation)) as events:
            yield RunningAnswers(form, answer_id, events, generation)
    except asyncio.CancelledError:
        # At a shutdown the client is told the id. Whoever leaves before can't ask for what it has never heard of.
        if not known and not work.closing:
            await generation.cancel()
        raise
    finally:
        if not form.store:
            await generation.cancel()


async def _events(generation: Generation) -> AsyncGenerator[tuple[int, TextDelta | Finished], None]:
    async with closing(generation.events()) as events:
        async for event in events:
            yield 0, event


@asynccontextmanager
async def _several(request: web.Request, form: AnyForm, wanted: Sequence[GenerationRequest]) -> AsyncIterator[RunningAnswers]:
    """The block begins when all are admitted, or the first has text."""
    services = request.app[SERVICES]
    if len(wanted) > services.limits.answers:
        raise InvalidRequest(f"{len(wanted)} answers are too many for one request", param="prompt", hint="send fewer prompts")
    slots = asyncio.Semaphore(services.limits.answers_at_once)
    async with merge_iterators([_answer(services.coordinator, one, slots) for one in wanted]) as events:
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
        yield RunningAnswers(form, f"{form.prefix}{services.clock.random_bytes(16).hex()}", _deltas(early, events))


async def _answer(
    coordinator: Coordinator, wanted: GenerationRequest, slots: asyncio.Semaphore
) -> AsyncGenerator[_Admitted | TextDelta | Finished, None]:
    async with slots:
        generation = await coordinator.generate(msgspec.structs.replace(wanted, store=False))
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


def show(request: web.Request, generation: Generation) -> None:
    """Have the headers of the request's answer name this session and its plan."""
    request[GENERATION_HEADERS] = _headers({0: generation})


def _headers(admitted: Mapping[int, Generation]) -> dict[str, str]:
    """Those of the first answer; of several, all sessions in order."""
    generations = [admitted[index] for index in sorted(admitted)]
    return {
        "x-meshd-session": ",".join(generation.session for generation in generations),
        "x-meshd-plan": quote(generations[0].plan_header, safe=" :,"),  # peers' names are free text, headers are not
        "x-meshd-predicted-tpot-ms": f"{generations[0].predicted_tpot_s * 1000:.3f}",
    }
