"""`GET /health`, `GET /ready` and `GET /metrics`: for supervisors and monitoring."""

from typing import Literal

import msgspec
from aiohttp import web

from meshd.api.http.reply import json_response
from meshd.api.http.services import SERVICES

RETRY_AFTER_S = 1


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon is alive."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests can be answered now."""

    status: Literal["ready", "loading"]
    progress: float
    """From 0 to 1."""
    waiting_for: str


async def health(request: web.Request) -> web.Response:
    """Alive: 200 as long as the daemon runs. Needs no key."""
    return json_response(Health())


async def ready(request: web.Request) -> web.Response:
    """Ready: 200 when requests can be answered; 503 with Retry-After and progress while a model loads."""
    is_ready, progress, waiting_for = request.app[SERVICES].coordinator.readiness()
    body = Readiness(status="ready" if is_ready else "loading", progress=progress, waiting_for=waiting_for)
    if is_ready:
        return json_response(body)
    return json_response(body, status=503, headers={"Retry-After": str(RETRY_AFTER_S)})


async def metrics(request: web.Request) -> web.Response:
    """This peer's measurements in Prometheus' text form."""
    telemetry = request.app[SERVICES].telemetry
    return web.Response(body=telemetry.render(), headers={"Content-Type": telemetry.content_type})
