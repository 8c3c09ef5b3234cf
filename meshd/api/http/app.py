"""Compose the HTTP API of one peer."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Literal

from aiohttp import web
from aiohttp.typedefs import Handler

from meshd.agents.cluster_service import ClusterService
from meshd.agents.service import Coordinator
from meshd.api.access.ring import KeyRing
from meshd.api.http.body import drop_broken_body
from meshd.api.http.connections import CONNECTIONS, Connections
from meshd.api.http.errors import problem_for_client
from meshd.api.http.guard import CALLER, guard, route_of
from meshd.api.http.ignored import HEADER as IGNORED_HEADER
from meshd.api.http.ignored import IGNORED
from meshd.api.http.openapi import openapi
from meshd.api.http.routes import ROUTES
from meshd.api.http.services import SERVICES, ClientLimits, Services
from meshd.api.http.sse import OUTCOME
from meshd.api.openai.answers import GENERATION_HEADERS
from meshd.clock import Clock
from meshd.errors import RateLimited
from meshd.telemetry import Telemetry

logger = logging.getLogger(__name__)

_OUTCOMES: dict[str, Literal["ok", "limited", "client_gone", "error"]] = {
    "ok": "ok",
    RateLimited.code: "limited",
    "client_gone": "client_gone",
}
"""How the outcomes of requests are counted by key. All others are errors."""


def create_app(
    coordinator: Coordinator,
    mesh: ClusterService,
    telemetry: Telemetry,
    *,
    api_key: str | None = None,
    keys: KeyRing | None = None,
    clock: Clock,
    limits: ClientLimits | None = None,
) -> web.Application:
    """Make the application with all routes. Without keys it serves only programs on this machine (see `guard`).

    `keys` are the accepted keys; None: only `api_key`, which has all rights.
    """
    keys = keys or KeyRing(clock, telemetry, default=api_key)
    limits = limits or ClientLimits()
    app = web.Application(middlewares=[_answer_errors, guard(keys, clock.monotonic)], client_max_size=limits.body_bytes)
    app[SERVICES] = Services(coordinator, mesh, telemetry, clock, limits)
    app[CONNECTIONS] = Connections(limits)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    app.router.add_get("/openapi.json", openapi)
    app.on_response_prepare.append(_add_headers)

    async def watch_keys(_: web.Application) -> AsyncIterator[None]:
        watching = asyncio.create_task(keys.watch(), name="watch API keys")
        yield
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    app.cleanup_ctx.append(watch_keys)
    return app


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    outcome = "ok"
    connections = request.app[CONNECTIONS]
    connections.begin(request.protocol)
    try:
        response = await handler(request)
        outcome = request.get(OUTCOME, outcome)
    except (asyncio.CancelledError, ConnectionError):
        outcome = "client_gone"
        raise
    except Exception as error:
        problem = problem_for_client(request, error)
        outcome = problem.name
        response = problem.response()
    finally:
        drop_broken_body(request)
        connections.end(request.protocol)
        _record_outcome(request, outcome)
    return response


def _record_outcome(request: web.Request, outcome: str) -> None:
    route = route_of(request) or "unknown"
    caller = request.get(CALLER, "")
    telemetry = request.app[SERVICES].telemetry
    telemetry.request(route, outcome)
    if caller:
        telemetry.api_key_request(caller, _OUTCOMES.get(outcome, "error"))
    logger.debug("answered", extra={"method": request.method, "route": route, "outcome": outcome, "api_key": caller})


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["x-request-id"] = f"req_{request.app[SERVICES].clock.random_bytes(16).hex()}"
    response.headers.update(request.get(GENERATION_HEADERS, {}))
    if (ignored := request.get(IGNORED)) is not None and ignored.count:
        response.headers[IGNORED_HEADER] = ignored.header()
