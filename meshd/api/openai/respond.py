"""Send answers to the client: whole, or as a stream of events."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from aiohttp import web

from meshd.agents.service import GenerationRequest
from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES
from meshd.api.http.sse import EventStream, respond
from meshd.api.openai.answers import RunningAnswers, started
from meshd.api.openai.common_objects import UsageCounter, collect
from meshd.api.openai.stored_responses import AnyRenderer

_EVENTS_PER_TURN = 64
"""Replayed events need no wait: after so many of them the writer yields to the event loop."""


async def answer(
    request: web.Request, renderer: AnyRenderer, generation_requests: Sequence[GenerationRequest], *, stream: bool
) -> web.StreamResponse:
    """Start the answers and send them."""
    source = started(request, renderer, generation_requests, known=stream)
    return await streamed(request, source) if stream else await whole(request, source)


async def whole(request: web.Request, source: AbstractAsyncContextManager[RunningAnswers]) -> web.StreamResponse:
    """Send all answers as one JSON object when the last has ended."""
    async with request.app[SERVICES].work.interruptible(), source as running:
        tally = UsageCounter(running.renderer.per_prompt)
        answers = await collect(running.events, running.renderer.answers, tally)
        return json_response(running.renderer.whole(running.id, answers, tally.usage()))


async def streamed(
    request: web.Request, source: AbstractAsyncContextManager[RunningAnswers], *, after: int = -1
) -> web.StreamResponse:
    """Send the events after number `after` as they are made."""

    async def produce(stream: EventStream) -> None:
        stream.last = after
        async with source as running:
            await _write(stream, running)

    return await respond(request, produce)


async def _write(stream: EventStream, running: RunningAnswers) -> None:
    writer = running.renderer.writer(running.id)
    stream.says_done = running.renderer.says_done
    stream.failure = lambda problem: writer.fail(problem, stream.last, for_good=running.failed)
    for event in writer.begin():
        await stream.put(event)
    if not stream.response.prepared:
        await stream.open()
    made = 0
    async for index, item in running.events:
        for event in writer.take(index, item):
            await stream.put(event)
            made += 1
            if made % _EVENTS_PER_TURN == 0:
                await asyncio.sleep(0)
