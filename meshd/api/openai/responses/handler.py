"""The routes under `/v1/responses`: create responses, and read, cancel or delete answers by their id.

Stored answers outlive their connection and can be read at any peer. Reading and deleting also work for chats and text completions.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from meshd.agents.service import Generation
from meshd.api.http.body import read_body, read_query
from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES
from meshd.api.http.sse import last_event_id
from meshd.api.openai.answers import RunningAnswers, generate, reading, set_generation_headers
from meshd.api.openai.common_objects import ENDED
from meshd.api.openai.renderers import model_fields, sampling_defaults
from meshd.api.openai.respond import answer, send_stream, send_whole
from meshd.api.openai.responses.renderer import ResponseRenderer
from meshd.api.openai.responses.request import LOGPROBS, Include, ResponseRequest
from meshd.api.openai.responses.schemas import Deleted, RequestEcho
from meshd.api.openai.stored_responses import AnyRenderer, decode_renderer, secret_of
from meshd.errors import InvalidRequest
from meshd.types import SamplingParams


class RetrieveQuery(msgspec.Struct, frozen=True, kw_only=True):
    """The query of GET /v1/responses/{id}."""

    stream: Annotated[
        bool | None, Meta(description="Stream the answer's events, including past ones. This peer takes over the answer.")
    ] = None
    starting_after: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="Number of the last event received; the header `Last-Event-ID` means the same. Needs `stream`."),
    ] = None
    include: Include = None

    def check(self) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        if self.starting_after is not None and not self.stream:
            raise InvalidRequest("`starting_after` is only for streams", param="starting_after", hint="set `stream` to true")

    def check_for(self, renderer: AnyRenderer) -> None:
        """Check that the answer of this renderer has what `include` requests. Raises: InvalidRequest."""
        if LOGPROBS in (self.include or ()) and not (isinstance(renderer, ResponseRenderer) and renderer.logprobs):
            raise InvalidRequest(
                f"`include` asks for {LOGPROBS}, but the answer has none",
                param="include",
                hint="request them when creating the answer",
            )

    def after(self, request: web.Request) -> int:
        """Return the number of the last event that the client has; -1 for none.

        Browsers send the header `Last-Event-ID` when they reconnect. It has precedence over `starting_after`.

        Raises: InvalidRequest.
        """
        number = last_event_id(request)
        if number is None:
            return -1 if self.starting_after is None else self.starting_after
        return number


async def create(request: web.Request) -> web.StreamResponse:
    """Create a response. It is sent whole or as a stream, or runs in the background."""
    services = request.app[SERVICES]
    body = await read_body(request, ResponseRequest)
    generation_requests = body.generation_requests(services.clock, sampling_defaults(services, body.model))
    renderer = _renderer_of(body, request, generation_requests[0].sampling)
    if not body.background or body.stream:
        return await answer(request, renderer, generation_requests, stream=bool(body.stream))
    async with services.work.interruptible():
        generation = await generate(request, renderer, generation_requests[0])
        return json_response(renderer.snapshot(generation))


async def retrieve(request: web.Request) -> web.StreamResponse:
    """Send an answer by its id: its current state, or its stream from any event on.

    Without `stream`, a chat or text completion that still runs is sent when it has ended.
    """
    query = read_query(request, RetrieveQuery)
    query.check()
    after = query.after(request) if query.stream else -1
    generation, renderer = await _look(request)
    query.check_for(renderer)
    if query.stream:
        return await send_stream(request, _resumed(request, renderer), after=after)
    if not isinstance(renderer, ResponseRenderer):
        return await send_whole(request, _resumed(request, renderer))
    set_generation_headers(request, generation, renderer)
    return json_response(renderer.snapshot(generation))


async def cancel(request: web.Request) -> web.Response:
    """Cancel a response that was created with `background`, and send its state. A response that has ended does not change."""
    generation, renderer = await _look(request)
    if not (isinstance(renderer, ResponseRenderer) and renderer.background):
        raise InvalidRequest(
            "only an answer that was created with `background` can be cancelled", hint="close its stream, or delete it"
        )
    services = request.app[SERVICES]
    async with services.work.interruptible():
        if generation.status not in ENDED:
            await services.coordinator.end(generation.session)
            generation = await services.coordinator.look(generation.secret)
        set_generation_headers(request, generation, renderer)
        return json_response(renderer.snapshot(generation))


async def delete(request: web.Request) -> web.Response:
    """Cancel an answer if it still runs, and delete its record."""
    generation, renderer = await _look(request)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        await services.coordinator.end(generation.session, forget=True)
    set_generation_headers(request, generation, renderer)
    name = "response" if isinstance(renderer, ResponseRenderer) else f"{renderer.object_name}.deleted"
    return json_response(Deleted(id=request.match_info["id"], object=name))


async def _look(request: web.Request) -> tuple[Generation, AnyRenderer]:
    """Look up the answer whose id is in the path, without taking it over. Raises: UnknownSession."""
    answer_id = request.match_info["id"]
    services = request.app[SERVICES]
    async with services.work.interruptible():
        generation = await services.coordinator.look(secret_of(answer_id))
    return generation, decode_renderer(generation.renderer, answer_id)


@asynccontextmanager
async def _resumed(request: web.Request, renderer: AnyRenderer) -> AsyncIterator[RunningAnswers]:
    """Take over the answer whose id is in the path, and resume it on this peer. Raises: what Coordinator.resume raises."""
    generation = await request.app[SERVICES].coordinator.resume(secret_of(request.match_info["id"]))
    set_generation_headers(request, generation, renderer)
    async with reading(request, renderer, generation) as running:
        yield running


def _renderer_of(body: ResponseRequest, request: web.Request, sampling: SamplingParams) -> ResponseRenderer:
    return ResponseRenderer(
        **model_fields(request.app[SERVICES], body.model),
        store=body.stored,
        background=bool(body.background),
        logprobs=body.logprobs,
        asked=RequestEcho(
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            safety_identifier=body.safety_identifier,
            temperature=sampling.temperature,
            tool_choice="none" if body.tool_choice == "none" else "auto",
            top_logprobs=body.top_logprobs or 0,
            top_p=sampling.top_p,
            user=body.user,
        ),
    )
