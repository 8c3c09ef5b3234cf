"""The routes under `/mesh/v1/`, which the monitor and the command line use."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from meshd.agents.cluster_service import ClusterService, DoctorRequest, PlaceRequest, PlanRequest
from meshd.api.http.body import read_body, read_query
from meshd.api.http.reply import Rows, json_response
from meshd.api.http.services import SERVICES
from meshd.api.http.sse import EventStream, last_event_id, respond
from meshd.api.merge import closing
from meshd.api.openai.renderers import StreamedEvent
from meshd.bounds import MAX_TEXT
from meshd.models.store.catalogue import CATALOGUE

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class UnplaceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /mesh/v1/unplace."""

    model: str


class Unplaced(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /mesh/v1/unplace."""

    model: str
    freed_bytes: int
    """Memory freed on all peers together."""


class PullRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /mesh/v1/pull."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT)]
    """A short name, or a reference such as `hf:ORG/NAME:QUANT`. A file of this device can't be named."""


class RemovedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of DELETE /mesh/v1/models/{id}."""

    model: str
    freed_bytes: int
    """Disk space freed. 0: another name uses the file, or meshd did not write it."""


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /mesh/v1/drain."""

    peer: str
    """The peer's name, or an unambiguous prefix of its id."""
    undo: bool = False
    """True: end the drain, so that the peer accepts work again."""
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 60.0
    """Longest time to wait until all sessions have moved away. When it has passed, the peer continues to drain."""


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /mesh/v1/drain."""

    peer: str
    name: str
    sessions_left: int
    """Number of stages of running sessions that the peer still computes. 0: the peer can stop without disturbing a session."""


class MigrateRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /mesh/v1/migrate."""

    session: str
    target: str
    """Name of the peer to move stages to, or an unambiguous prefix of its id."""
    source: str | None = None
    """Name of the peer whose stages are moved, or an unambiguous prefix of its id. null: all stages are moved."""


class Migrated(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /mesh/v1/migrate."""

    session: str
    plan: str
    """The session's stages after the move, as `name:0-12,name:12-30`."""
    pause_ms: float
    """Time from the last token before the move to the first token after it."""


class EventsQuery(msgspec.Struct, frozen=True, kw_only=True):
    """The query of GET /mesh/v1/events."""

    after: Annotated[
        Annotated[int, msgspec.Meta(ge=0)] | None,
        msgspec.Meta(description="Number of the last event received, to resume; the header `Last-Event-ID` means the same."),
    ] = None


class InviteRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /mesh/v1/invites."""

    minutes: Annotated[float, msgspec.Meta(gt=0, le=60)] = 10.0


class ClosedInvites(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of DELETE /mesh/v1/invites."""

    closed: int
    """Number of invites that were open: 0 or 1."""


class ReloadedSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of POST /mesh/v1/reload: the names of the settings that have a new value."""

    applied: tuple[str, ...]
    """They are valid now."""
    needs_restart: tuple[str, ...]
    """They are valid after a restart."""


class CancelledSession(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of DELETE /mesh/v1/sessions/{id}."""

    session: str


def rows(read: Callable[[ClusterService], list[dict[str, Any]]]) -> Handler:
    """Make a handler that sends the rows that `read` returns."""

    async def listing(request: web.Request) -> web.Response:
        return json_response(Rows(read(request.app[SERVICES].mesh)))

    return listing


async def models(request: web.Request) -> web.Response:
    """Send the models that this mesh knows."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Rows(await services.mesh.known_models()))


async def catalogue(request: web.Request) -> web.Response:
    """Send the models that can be pulled by a short name."""
    return json_response(
        Rows(
            [
                {"name": entry.name, "ref": str(entry.sources[0]), "bytes": entry.size_bytes, "licence": entry.licence}
                for entry in CATALOGUE.values()
            ]
        )
    )


async def identity(request: web.Request) -> web.Response:
    """Send this peer's identity."""
    return json_response(request.app[SERVICES].mesh.identity())


async def events(request: web.Request) -> web.StreamResponse:
    """Stream the rows of all listings, then events as they happen, until the client disconnects."""
    query = read_query(request, EventsQuery)
    after = last_event_id(request)
    after = query.after if after is None else after

    async def produce(stream: EventStream) -> None:
        await stream.open()
        async with closing(request.app[SERVICES].mesh.events(after)) as lines:
            async for line in lines:
                await stream.put(StreamedEvent(msgspec.Raw(line.line), line.number))

    return await respond(request, produce)


async def _send_all(stream: EventStream, items: AsyncIterator[object]) -> None:
    async with closing(items):
        async for item in items:
            await stream.send(item)


async def invite(request: web.Request) -> web.StreamResponse:
    """Open an invite, and stream its state until it has ended. It is closed when the client leaves."""
    body = await read_body(request, InviteRequest)

    async def produce(stream: EventStream) -> None:
        await _send_all(stream, request.app[SERVICES].mesh.invite(body.minutes))

    return await respond(request, produce)


async def invites(request: web.Request) -> web.Response:
    """Send the open invite, without its code."""
    return json_response(Rows([msgspec.to_builtins(step) for step in request.app[SERVICES].mesh.invites()]))


async def close_invites(request: web.Request) -> web.Response:
    """Close the open invite."""
    return json_response(ClosedInvites(closed=int(request.app[SERVICES].mesh.close_invite())))


async def plan(request: web.Request) -> web.Response:
    """Plan which peers would compute which layers, with predictions and reasons. Nothing is loaded."""
    body = await read_body(request, PlanRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(await services.mesh.plan(body))


async def place(request: web.Request) -> web.StreamResponse:
    """Load a model's layers on peers, and stream the progress."""
    body = await read_body(request, PlaceRequest)

    async def produce(stream: EventStream) -> None:
        await _send_all(stream, request.app[SERVICES].mesh.place(body))

    return await respond(request, produce)


async def doctor(request: web.Request) -> web.StreamResponse:
    """Look for faults, and stream what each check finds."""
    body = await read_body(request, DoctorRequest)

    async def produce(stream: EventStream) -> None:
        await _send_all(stream, request.app[SERVICES].mesh.doctor(body))

    return await respond(request, produce)


async def unplace(request: web.Request) -> web.Response:
    """Free a model's layers on all peers."""
    body = await read_body(request, UnplaceRequest)
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Unplaced(model=body.model, freed_bytes=await services.mesh.unplace(body.model)))


async def pull(request: web.Request) -> web.StreamResponse:
    """Fetch a model to this peer's disk, and stream the progress. The pull stops when the client disconnects."""
    body = await read_body(request, PullRequest)

    async def produce(stream: EventStream) -> None:
        await _send_all(stream, request.app[SERVICES].mesh.pull(body.model))

    return await respond(request, produce)


async def remove_model(request: web.Request) -> web.Response:
    """Remove a model from this peer's disk."""
    name, services = request.match_info["id"], request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(RemovedModel(model=name, freed_bytes=await services.mesh.remove_model(name)))


async def drain(request: web.Request) -> web.Response:
    """Move running sessions away from a peer, so that the peer can be stopped. With `undo`, end the drain."""
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


async def cancel(request: web.Request) -> web.Response:
    """Cancel a session wherever it runs. Its answer ends."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(CancelledSession(session=await services.mesh.cancel(request.match_info["id"])))


async def story(request: web.Request) -> web.Response:
    """Send a session's events, collected from all peers."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Rows(await services.mesh.story(request.match_info["id"])))


async def trace(request: web.Request) -> web.Response:
    """Send when each peer computed a session's steps, as a document of Chrome's trace format."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        body = await services.mesh.trace(request.match_info["id"])
    return web.Response(body=body, content_type="application/json")


async def reload(request: web.Request) -> web.Response:
    """Read the settings again, and apply those that can change while the daemon runs."""
    return json_response(msgspec.convert(request.app[SERVICES].mesh.reload(), ReloadedSettings))


async def probe_links(request: web.Request) -> web.Response:
    """Measure this peer's links again, and send the results."""
    services = request.app[SERVICES]
    async with services.work.interruptible():
        return json_response(Rows(await services.mesh.probe_links()))
