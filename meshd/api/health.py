"""`GET /health`, `GET /ready` and `GET /metrics`, for supervisors and monitoring."""

from typing import Literal

import msgspec
from aiohttp import web

from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES

RETRY_AFTER_S = 1
"""Seconds after which a client should ask again while a model loads."""


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /health: the daemon is alive."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /ready: whether requests can be answered now."""

    status: Literal["ready", "loading"]
    progress: float
    """Progress of loading the daemon's models, from 0 to 1."""
    waiting_for: str


async def health(request: web.Request) -> web.Response:
    """Answer 200 as long as the daemon runs. No API key is needed."""
    return json_response(Health())


async def ready(request: web.Request) -> web.Response:
    """Answer 200 if requests can be answered now, or 503 with Retry-After and the progress while a model loads."""
    is_ready, progress, waiting_for = request.app[SERVICES].coordinator.readiness()
    body = Readiness(status="ready" if is_ready else "loading", progress=progress, waiting_for=waiting_for)
    if is_ready:
        return json_response(body)
    return json_response(body, status=503, headers={"Retry-After": str(RETRY_AFTER_S)})


async def metrics(request: web.Request) -> web.Response:
    """Send this peer's metrics in Prometheus' text format."""
    telemetry = request.app[SERVICES].telemetry
    return web.Response(body=telemetry.render(), headers={"Content-Type": telemetry.content_type})
