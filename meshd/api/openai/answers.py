"""The running answers of one request: start or resume them, and release them when the client disconnects."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote

import msgspec
from aiohttp import web

from meshd.agents.service import Finished, Generation, GenerationRequest, TextDelta
from meshd.api.access.limits import CURRENT
from meshd.api.http.errors import RESUMABLE, ResumableAnswer
from meshd.api.http.ignored import IGNORED, IgnoredFields
from meshd.api.http.services import SERVICES
from meshd.api.http.sse import HEADERS_DUE
from meshd.api.merge import closing, merge_iterators
from meshd.api.openai.stored_responses import AnyRenderer, encode_renderer
from meshd.errors import InvalidRequest

GENERATION_HEADERS = web.RequestKey("generation_headers", dict[str, str])
"""Key under which a request stores the headers for its response, as soon as its answers are admitted."""


@dataclass(frozen=True, slots=True)
class RunningAnswers:
    """The running answers of one request."""

    renderer: AnyRenderer
    id: str
    events: AsyncIterator[tuple[int, TextDelta | Finished]]
    """(index of the answer, event), in order of arrival."""
    first: Generation
    """The first answer that was admitted. All answers to a chat have the same prompt."""
    generation: Generation | None = None
    """The answer, if the request has only one. None: it has several."""

    @property
    def failed(self) -> bool:
        """Whether the answer failed and no peer can resume it."""
        return self.generation is not None and self.generation.status == "failed"


@dataclass(frozen=True, slots=True)
class _Admitted:
    generation: Generation


@asynccontextmanager
async def started(
    request: web.Request, renderer: AnyRenderer, generation_requests: Sequence[GenerationRequest], *, known: bool
) -> AsyncIterator[RunningAnswers]:
    """Start the answers to all `generation_requests`. Leaving the block releases the answers that still run.

    A single answer is suspended, so that the client can resume it, if its record is stored and the client knows the answer's id
    (`known`) or receives the id in an error. In all other cases, answers are cancelled.

    Raises: what Coordinator.generate raises; Cancelled if another request ended an answer.
    Cancel: same as leaving the block.
    """
    if len(generation_requests) == 1:
        generation = await generate(request, renderer, generation_requests[0])
        async with reading(request, renderer, generation, known=known) as running:
            yield running
    else:
        async with _several(request, renderer, generation_requests) as running:
            yield running


async def generate(request: web.Request, renderer: AnyRenderer, generation_request: GenerationRequest) -> Generation:
    """Start a single answer, and store its renderer with it, so that any peer can render the answer.

    Raises: what Coordinator.generate raises.
    Cancel: the answer is not started, and nothing stays reserved.
    """
    services = request.app[SERVICES]
    whole = msgspec.structs.replace(
        generation_request, store=renderer.store, background=renderer.background, renderer=encode_renderer(renderer)
    )
    began = services.clock.monotonic()
    generation = await services.coordinator.generate(whole, on_wait=_on_wait(request))
    set_generation_headers(request, generation, renderer, waited_s=services.clock.monotonic() - began)
    if whole.background and (admission := CURRENT.get()) is not None:
        admission.answers.append(generation)
    return generation


@asynccontextmanager
async def reading(
    request: web.Request, renderer: AnyRenderer, generation: Generation, *, known: bool = True
) -> AsyncIterator[RunningAnswers]:
    """Read a single answer from its beginning. Leaving the block releases the answer as `started` does."""
    work = request.app[SERVICES].work
    answer_id = renderer.prefix + generation.secret
    if renderer.store:
        request[RESUMABLE] = ResumableAnswer(answer_id, generation)
    try:
        async with closing(_events(generation)) as events:
            yield RunningAnswers(renderer, answer_id, events, generation, generation)
    except asyncio.CancelledError:
        # A client without the id could not resume the answer. At a shutdown, however, the client receives an error with the id.
        if not known and not work.closing:
            await generation.cancel()
        raise
    finally:
        if not renderer.store:
            await generation.cancel()


async def _events(generation: Generation) -> AsyncGenerator[tuple[int, TextDelta | Finished], None]:
    async with closing(generation.events()) as events:
        async for event in events:
            yield 0, event


@asynccontextmanager
async def _several(
    request: web.Request, renderer: AnyRenderer, generation_requests: Sequence[GenerationRequest]
) -> AsyncIterator[RunningAnswers]:
    """Start several answers. The block begins when all answers are admitted, or when the first of them has text or ends."""
    services = request.app[SERVICES]
    began = services.clock.monotonic()
    if len(generation_requests) > services.limits.answers:
        raise InvalidRequest(
            f"{len(generation_requests)} answers are too many for one request", param="prompt", hint="send fewer prompts"
        )
    slots = asyncio.Semaphore(services.limits.answers_at_once)
    async with merge_iterators([_answer(request, one, slots) for one in generation_requests]) as events:
        admitted: dict[int, Generation] = {}
        early: list[tuple[int, TextDelta | Finished]] = []
        async for index, event in events:
            if not isinstance(event, _Admitted):
                early.append((index, event))
                break
            admitted[index] = event.generation
            if len(admitted) == len(generation_requests):
                break
        _set_headers(request, admitted, services.clock.monotonic() - began)
        answer_id = f"{renderer.prefix}{services.clock.random_bytes(16).hex()}"
        yield RunningAnswers(renderer, answer_id, _deltas(early, events), admitted[min(admitted)])


async def _answer(
    request: web.Request, generation_request: GenerationRequest, slots: asyncio.Semaphore
) -> AsyncGenerator[_Admitted | TextDelta | Finished, None]:
    async with slots:
        generation = await request.app[SERVICES].coordinator.generate(
            msgspec.structs.replace(generation_request, store=False), on_wait=_on_wait(request)
        )
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


def _on_wait(request: web.Request) -> Callable[[], None] | None:
    due = request.get(HEADERS_DUE)
    return None if due is None else due.set


def set_generation_headers(request: web.Request, generation: Generation, renderer: AnyRenderer, *, waited_s: float = 0.0) -> None:
    """Set the response headers for the session, its plan, its predicted times and, if it can be read again, the answer's id.

    `waited_s`: how long the request has waited so far, for its turn or for its model; a client's first token takes this besides.
    """
    _set_headers(request, {0: generation}, waited_s)
    if renderer.store:
        request[GENERATION_HEADERS]["x-meshd-answer"] = renderer.prefix + generation.secret


def _set_headers(request: web.Request, admitted: Mapping[int, Generation], waited_s: float) -> None:
    request[GENERATION_HEADERS] = _headers(admitted, waited_s)
    ignored = request.setdefault(IGNORED, IgnoredFields([]))
    for name in admitted[min(admitted)].ignored:
        ignored.add(name)


def _headers(admitted: Mapping[int, Generation], waited_s: float) -> dict[str, str]:
    """Make the response headers: sessions of all admitted answers in order; plan, numerics and predicted times of the first."""
    generations = [admitted[index] for index in sorted(admitted)]
    return {
        "x-meshd-session": ",".join(generation.session for generation in generations),
        "x-meshd-plan": quote(generations[0].plan_header, safe=" :,"),  # header values allow fewer characters than peer names
        "x-meshd-numerics": generations[0].numerics_header,
        "x-meshd-predicted-ttft-ms": f"{(waited_s + generations[0].predicted_ttft_s) * 1000:.3f}",
        "x-meshd-predicted-tpot-ms": f"{generations[0].predicted_tpot_s * 1000:.3f}",
    }
