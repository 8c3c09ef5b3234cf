"""`/mesh/v1/*`: the API that the monitor and the command line use."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from meshd.agents.service import ClusterService, PlaceRequest, PlanRequest
from meshd.api.http.body import read_body
from meshd.api.http.merge import closing
from meshd.api.http.reply import Rows, json_response
from meshd.api.http.services import SERVICES
from meshd.api.http.sse import EventStream, respond

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class UnplaceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /mesh/v1/unplace asks."""

    model: str


class Unplaced(msgspec.Struct, frozen=True, kw_only=True):
    """A model's layers were freed."""

    model: str
    freed_bytes: int
    """Sum over all peers."""


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /mesh/v1/drain asks."""

    peer: str
    """Its name, or an unambiguous beginning of its id."""
    undo: bool = False
    """Accept work again."""
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 60.0
    """How long to wait for its sessions to move away. It keeps draining after that."""


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """A peer drains, or takes work again."""

    peer: str
    name: str
    sessions_left: int
    """Stages of running sessions that it still computes; 0: it can be stopped without disturbing any session."""


class MigrateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /mesh/v1/migrate asks."""

    session: str
    target: str
    """A peer's name, or an unambiguous beginning of its id."""
    source: str | None = None
    """Move only what it computes there; null: all stages."""


class Migrated(msgspec.Struct, frozen=True, kw_only=True):
    """A session was moved."""

    session: str
    plan: str
    """`name:0-12,name:12-30`, as it is now."""
    pause_ms: float
    """From the last token before the move to the first one after it."""


def rows(read: Callable[[ClusterService], list[dict[str, Any]]]) -> Handler:
    """A handler that lists what `read` finds."""

    async def listing(request: web.Request) -> web.Response:
        return json_response(Rows(read(request.app[SERVICES].mesh)))

    return listing


async def identity(request: web.Request) -> web.Response:
    """This peer itself."""
    return json_response(request.app[SERVICES].mesh.identity())


async def events(request: web.Request) -> web.StreamResponse:
    """Stream events as they happen, until the client leaves."""

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
    body = await read_body(request, PlanRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(await services.mesh.plan(body))


async def place(request: web.Request) -> web.StreamResponse:
    """Put a model's layers on peers; the progress as events."""
    body = await read_body(request, PlaceRequest)

    async def produce(stream: EventStream) -> None:
        await _send_all(stream, request.app[SERVICES].mesh.place(body))

    return await respond(request, produce)


async def unplace(request: web.Request) -> web.Response:
    """Free a model's layers on all peers."""
    body = await read_body(request, UnplaceRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Unplaced(model=body.model, freed_bytes=await services.mesh.unplace(body.model)))


async def drain(request: web.Request) -> web.Response:
    """Move away what runs on a peer."""
    body = await read_body(request, DrainRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        drained = await services.mesh.drain(body.peer, undo=body.undo, timeout_s=body.timeout_s)
    return json_response(msgspec.convert(drained, Drained))


async def migrate(request: web.Request) -> web.Response:
    """Move a session's stages to another peer."""
    body = await read_body(request, MigrateRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        migrated = await services.mesh.migrate(body.session, body.target, body.source)
    return json_response(msgspec.convert(migrated, Migrated))


async def story(request: web.Request) -> web.Response:
    """What happened to a session."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Rows(await services.mesh.story(request.match_info["id"])))


async def probe_links(request: web.Request) -> web.Response:
    """Measure this peer's links anew."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Rows(await services.mesh.probe_links()))
