"""`/v1/responses`: answers that outlive their connection, by id at any peer. The ids of chats and completions are taken too."""

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
from meshd.api.openai.answers import RunningAnswers, generate, reading, show
from meshd.api.openai.fields import NotTrue, unsupported
from meshd.api.openai.kept import AnyForm, decode_renderer, session_of
from meshd.api.openai.parts import ENDED
from meshd.api.openai.renderers import model_fields
from meshd.api.openai.responses.renderer import ResponseRenderer
from meshd.api.openai.responses.request import LOGPROBS, Include, ResponseRequest
from meshd.api.openai.responses.schemas import Deleted, RequestEcho
from meshd.api.openai.showing import answer, streamed, whole
from meshd.errors import InvalidRequest


class RetrieveQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What GET /v1/responses/{id} takes."""

    stream: Annotated[bool | None, Meta(description="Stream the answer's events, past ones too; the answer goes on here.")] = None
    starting_after: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="The number of the last event that came; `Last-Event-ID` says the same. Needs `stream`."),
    ] = None
    include: Include = None
    include_obfuscation: NotTrue = None

    def check(self) -> None:
        """What types can't say. Raises: InvalidRequest."""
        if self.starting_after is not None and not self.stream:
            raise InvalidRequest("`starting_after` is for streams", param="starting_after", hint="set `stream` to true")
        if self.include_obfuscation:
            raise unsupported("include_obfuscation", "leave it out or send false")

    def check_for(self, form: AnyForm) -> None:
        """Whether this answer can be shown so. Raises: InvalidRequest."""
        if self.include and not (isinstance(form, ResponseRenderer) and form.logprobs):
            raise InvalidRequest(
                f"`include` asks for {LOGPROBS}, but none were made", param="include", hint="ask for them at its creation"
            )

    def after(self, request: web.Request) -> int:
        """The last event that the client has; -1: none. The header is a browser's, which connects again by itself.

        Raises: InvalidRequest.
        """
        seen = request.headers.get("Last-Event-ID")
        if seen is None:
            return -1 if self.starting_after is None else self.starting_after
        if not (seen.isascii() and seen.isdecimal() and len(seen) < 19):
            raise InvalidRequest("`Last-Event-ID` is no number", param="Last-Event-ID", hint="send the `id` of the last event")
        return int(seen)


async def create(request: web.Request) -> web.StreamResponse:
    """Answer, whole, as a stream, or in the background."""
    services = request.app[SERVICES]
    body = await read_body(request, ResponseRequest)
    wanted = body.wanted(services.clock)
    form = _form_of(body, request)
    if not body.background or body.stream:
        return await answer(request, form, wanted, stream=bool(body.stream))
    async with services.work.interruptible():
        generation = await generate(request, form, wanted[0])
        return json_response(form.standing(generation))


async def retrieve(request: web.Request) -> web.StreamResponse:
    """An answer by its id: as it stands, or as a stream on from any event. A chat or completion that still runs is waited for."""
    query = read_query(request, RetrieveQuery)
    query.check()
    after = query.after(request) if query.stream else -1
    generation, form = await _look(request)
    query.check_for(form)
    if query.stream:
        return await streamed(request, _resumed(request, form), after=after)
    if not isinstance(form, ResponseRenderer):
        return await whole(request, _resumed(request, form))
    show(request, generation)
    return json_response(form.standing(generation))


async def cancel(request: web.Request) -> web.Response:
    """End an answer in the background; one that is over stays as it is."""
    generation, form = await _look(request)
    if not (isinstance(form, ResponseRenderer) and form.background):
        raise InvalidRequest(
            "only an answer that was created with `background` can be cancelled", hint="close its stream, or delete it"
        )
    services = request.app[SERVICES]
    async with services.work.interruptible():
        if generation.status not in ENDED:
            await services.coordinator.end(generation.session)
            generation = await services.coordinator.look(generation.session)
        show(request, generation)
        return json_response(form.standing(generation))


async def delete(request: web.Request) -> web.Response:
    """End an answer, if it runs, and forget it."""
    generation, form = await _look(request)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        await services.coordinator.end(generation.session, forget=True)
    show(request, generation)
    name = "response" if isinstance(form, ResponseRenderer) else f"{form.object_name}.deleted"
    return json_response(Deleted(id=request.match_info["id"], object=name))


async def _look(request: web.Request) -> tuple[Generation, AnyForm]:
    """The answer that the path names. Nothing is taken over for who asks for the wrong thing. Raises: UnknownSession."""
    answer_id = request.match_info["id"]
    services = request.app[SERVICES]
    async with services.work.interruptible():
        generation = await services.coordinator.look(session_of(answer_id))
    return generation, decode_renderer(generation.edge, answer_id)


@asynccontextmanager
async def _resumed(request: web.Request, form: AnyForm) -> AsyncIterator[RunningAnswers]:
    """The answer that the path names, going on here. Raises: as Coordinator.resume."""
    generation = await request.app[SERVICES].coordinator.resume(session_of(request.match_info["id"]))
    show(request, generation)
    async with reading(request, form, generation) as running:
        yield running


def _form_of(body: ResponseRequest, request: web.Request) -> ResponseRenderer:
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
            temperature=1.0 if body.temperature is None else body.temperature,
            tool_choice=body.tool_choice or "auto",
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            user=body.user,
        ),
    )
