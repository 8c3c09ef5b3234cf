"""`/mesh/v1/*`: what the monitor and the command line read and ask."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

from meshd.agents.service import Mesh, PlaceRequest, PlanRequest
from meshd.api.body import read_body
from meshd.api.merge import closing
from meshd.api.reply import Rows, json_response
from meshd.api.services import SERVICES
from meshd.api.sse import EventStream, respond

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class UnplaceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /mesh/v1/unplace asks."""

    model: str


class Unplaced(msgspec.Struct, frozen=True, kw_only=True):
    """A model was let go."""

    model: str
    freed_bytes: int
    """Over all peers."""


def rows(read: Callable[[Mesh], list[dict[str, Any]]]) -> Handler:
    """A handler that lists what `read` finds."""

    async def listing(request: web.Request) -> web.Response:
        return json_response(Rows(read(request.app[SERVICES].mesh)))

    return listing


async def identity(request: web.Request) -> web.Response:
    """This peer itself."""
    return json_response(request.app[SERVICES].mesh.identity())


async def events(request: web.Request) -> web.StreamResponse:
    """Events as they happen, until the client goes."""

    async def produce(stream: EventStream) -> None:
        await stream.open()
        await _send_all(stream, request.app[SERVICES].mesh.events())

    return await respond(request, produce)


async def _send_all(stream: EventStream, items: AsyncIterator[object]) -> None:
    async with closing(items):
        async for item in items:
            await stream.send(item)


async def plan(request: web.Request) -> web.Response:
    """What would be placed where, with predictions and reasons."""
    asked = await read_body(request, PlanRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(await services.mesh.plan(asked))


async def place(request: web.Request) -> web.StreamResponse:
    """Put a model's layers on peers; the progress as events."""
    asked = await read_body(request, PlaceRequest)

    async def produce(stream: EventStream) -> None:
        await _send_all(stream, request.app[SERVICES].mesh.place(asked))

    return await respond(request, produce)


async def unplace(request: web.Request) -> web.Response:
    """Let go of a model on all peers."""
    asked = await read_body(request, UnplaceRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Unplaced(model=asked.model, freed_bytes=await services.mesh.unplace(asked.model)))


async def probe_links(request: web.Request) -> web.Response:
    """Measure this peer's links anew."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Rows(await services.mesh.probe_links()))
