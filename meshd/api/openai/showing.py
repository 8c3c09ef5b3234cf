"""Answers as HTTP: whole, or as a stream of events."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

from aiohttp import web

from meshd.agents.service import GenerationRequest
from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES
from meshd.api.http.sse import EventStream, respond
from meshd.api.openai.answers import RunningAnswers, started
from meshd.api.openai.kept import AnyForm
from meshd.api.openai.parts import UsageCounter, collect

_BREATH = 64
"""Events of a replay, which come without a wait, between two turns of the loop."""


async def answer(request: web.Request, form: AnyForm, wanted: Sequence[GenerationRequest], *, stream: bool) -> web.StreamResponse:
    """Start the answers and show them."""
    source = started(request, form, wanted, known=stream)
    return await streamed(request, source) if stream else await whole(request, source)


async def whole(request: web.Request, source: AbstractAsyncContextManager[RunningAnswers]) -> web.StreamResponse:
    """All answers as one JSON object, at their end."""
    async with request.app[SERVICES].work.interruptible(), source as running:
        tally = UsageCounter(running.form.per_prompt)
        answers = await collect(running.events, running.form.answers, tally)
        return json_response(running.form.whole(running.id, answers, tally.usage()))


async def streamed(
    request: web.Request, source: AbstractAsyncContextManager[RunningAnswers], *, after: int = -1
) -> web.StreamResponse:
    """The events after number `after`, as they come."""

    async def produce(stream: EventStream) -> None:
        stream.last = after
        async with source as running:
            await _write(stream, running)

    return await respond(request, produce)


async def _write(stream: EventStream, running: RunningAnswers) -> None:
    writer = running.form.writer(running.id)
    stream.says_done = running.form.says_done
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
            if made % _BREATH == 0:
                await asyncio.sleep(0)
