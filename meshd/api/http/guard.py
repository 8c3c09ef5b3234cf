"""Admit requests: with an API key those that carry it, without one those of programs on this machine.

Without a key the daemon listens on loopback only, where any web page in a local browser could reach it: by a request to
`http://127.0.0.1:6374` from its scripts, or through a name of its own that it points at 127.0.0.1 (DNS rebinding). So a
request must name a loopback host, and one with an `Origin` must come from that very host. No CORS header is ever sent.
"""

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

OPEN_PATHS = frozenset({"/health"})
"""Answered without a key, for supervisors."""


def guard(api_key: str | None) -> Middleware:
    """Make the middleware that admits requests. It raises: HTTPUnauthorized, HTTPForbidden."""
    digest = hashlib.sha256(api_key.encode()).digest() if api_key is not None else None

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if digest is None:
            _check_origin(request)
        elif request.path not in OPEN_PATHS:
            _check_key(request, digest)
        return await handler(request)

    return check


def _check_key(request: web.Request, digest: bytes) -> None:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Both sides are hashed, so that the comparison's time reveals neither the key's length nor a common prefix.
    same = hmac.compare_digest(hashlib.sha256(given.strip().encode("utf-8", "surrogateescape")).digest(), digest)
    if scheme.lower() != "bearer" or not same:
        reason = "the API key is wrong" if given else "this daemon needs an API key"
        raise web.HTTPUnauthorized(text=f"{reason}: send `Authorization: Bearer KEY`", headers={"WWW-Authenticate": "Bearer"})


def _check_origin(request: web.Request) -> None:
    if not is_loopback(request.host):
        raise web.HTTPForbidden(text=f"the host {request.host!r} is not this machine: ask localhost, or set an API key")
    origin = request.headers.get("Origin")
    if origin is not None and not _same_origin(origin, request.host):
        raise web.HTTPForbidden(text=f"a web page of {origin!r} may not ask this daemon: set an API key to serve other origins")


def is_loopback(host: str) -> bool:
    """Whether a Host header (`name[:port]`) names this machine's loopback."""
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
