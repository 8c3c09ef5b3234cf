"""Admit requests. With API keys: those that carry one which may do what they ask for. Without: those of programs on this machine.

A key comes as `Authorization: Bearer KEY` or as `x-api-key: KEY`. Logs and metrics name it by its prefix, never by the key.

Without keys the daemon listens only on loopback. A web page in a local browser could still reach it: its scripts can send
requests to `http://127.0.0.1:6374`, and its domain name can resolve to 127.0.0.1 (DNS rebinding). So the `Host` header must name
loopback, and an `Origin` header must name the same host and port. CORS headers are never sent.
"""

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from meshd.api.access.limits import CURRENT, Admission
from meshd.api.access.ring import Caller, KeyRing
from meshd.api.access.scopes import Need, grants, need_of
from meshd.errors import NotPermitted

CALLER = web.RequestKey("caller", str)
"""Key under which a request stores whose it is: a key's prefix, `default` or `local`. Absent: it came without a valid key."""


def guard(keys: KeyRing, now: Callable[[], float]) -> Middleware:
    """Make the middleware that admits requests. `now` gives seconds of a monotonic clock.

    It raises HTTPUnauthorized, HTTPForbidden, NotPermitted or RateLimited for requests that it rejects.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        need = need_of(request.method, route_of(request))
        keys.refresh()
        caller = keys.find(_given_keys(request))
        if caller is None:
            _check_stranger(request, need, closed=keys.closed)
            return await handler(request)
        request[CALLER] = caller.label
        if not grants(caller.scope, need):
            raise NotPermitted(
                f"the API key {caller.label} is for {caller.scope}: {request.method} {request.path} needs one for {_wanted(need)}",
                hint=f"make one with `meshd key api add NAME --scope {_wanted(need)}`",
            )
        return await _answer_within_limits(caller, request, handler, now())

    return check


def route_of(request: web.Request) -> str:
    """Return the path of the request's route, such as `/v1/models/{id}`; empty if it has none.

    Rights follow from the route, not from the path as it was sent, which may be spelled in several ways.
    """
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else ""


async def _answer_within_limits(caller: Caller, request: web.Request, handler: Handler, now: float) -> web.StreamResponse:
    admission: Admission = caller.admit(now)
    token = CURRENT.set(admission)
    try:
        return await handler(request)
    finally:
        CURRENT.reset(token)
        admission.close()


def _given_keys(request: web.Request) -> list[str]:
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    given = (bearer if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", ""))
    return [key.strip() for key in given if key.strip()]


def _check_stranger(request: web.Request, need: Need, *, closed: bool) -> None:
    """Check a request without a valid key."""
    if need is Need.NOTHING and closed:
        return
    if not closed:
        _check_origin(request)
    if closed or need is Need.OWNER:
        reason = "the API key is wrong" if _given_keys(request) else "this daemon needs an API key"
        text = f"{reason}: send `Authorization: Bearer KEY`, or `x-api-key: KEY`"
        raise web.HTTPUnauthorized(text=text, headers={"WWW-Authenticate": "Bearer"})


def _wanted(need: Need) -> str:
    return need.value if need in (Need.INFER, Need.READ) else "admin"


def _check_origin(request: web.Request) -> None:
    if not is_loopback(request.host):
        raise web.HTTPForbidden(text=f"the host {request.host!r} is not this machine: use localhost, or set an API key")
    origin = request.headers.get("Origin")
    if origin is not None and not _same_origin(origin, request.host):
        raise web.HTTPForbidden(text=f"a web page of {origin!r} may not use this daemon: set an API key to serve other origins")


def is_loopback(host: str) -> bool:
    """Whether a Host header (`name[:port]`) names loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _same_origin(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
