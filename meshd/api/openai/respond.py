"""Send answers to the client, whole or as a stream of events."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from aiohttp import web

from meshd.agents.service import GenerationRequest
from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES
from meshd.api.http.sse import EventStream, respond
from meshd.api.openai.answers import GENERATION_HEADERS, RunningAnswers, started
from meshd.api.openai.common_objects import UsageCounter, collect
from meshd.api.openai.stored_responses import AnyRenderer

_EVENTS_PER_TURN = 64
"""Number of events after which a stream yields to the event loop. The replay of past events would otherwise never yield."""


async def answer(
    request: web.Request, renderer: AnyRenderer, generation_requests: Sequence[GenerationRequest], *, stream: bool
) -> web.StreamResponse:
    """Start the answers and send them, whole or as a stream."""
    source = started(request, renderer, generation_requests, known=stream)
    return await send_stream(request, source) if stream else await send_whole(request, source)


async def send_whole(request: web.Request, source: AbstractAsyncContextManager[RunningAnswers]) -> web.StreamResponse:
    """Send all answers as one JSON object, after the last of them has ended."""
    async with request.app[SERVICES].work.interruptible(), source as running:
        counter = UsageCounter(running.renderer.per_prompt)
        answers = await collect(running.events, running.renderer.answers, counter)
        return json_response(running.renderer.whole(running.id, answers, counter.usage(), prompt_end=running.first.prompt_end))


async def send_stream(
    request: web.Request, source: AbstractAsyncContextManager[RunningAnswers], *, after: int = -1
) -> web.StreamResponse:
    """Send the answers as a stream of events, without the events up to number `after`."""

    async def produce(stream: EventStream) -> None:
        stream.last = after
        async with source as running:
            if stream.response.prepared:  # the request waited: its headers were sent before these values were known
                for name, value in request[GENERATION_HEADERS].items():
                    await stream.comment(f"{name}: {value}")
            await _write(stream, running)

    return await respond(request, produce)


async def _write(stream: EventStream, running: RunningAnswers) -> None:
    writer = running.renderer.writer(running.id, prompt_end=running.first.prompt_end)
    stream.sends_done = running.renderer.sends_done
    stream.failure = lambda problem: writer.fail(problem, stream.last, for_good=running.failed)
    for event in writer.begin():
        await stream.put(event)
    if not stream.response.prepared:
        await stream.open()
    count = 0
    async for index, item in running.events:
        for event in writer.take(index, item):
            await stream.put(event)
            count += 1
            if count % _EVENTS_PER_TURN == 0:
                await asyncio.sleep(0)
