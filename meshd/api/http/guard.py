"""Admit requests. With an API key: requests that carry the key. Without a key: requests of programs on this machine.

Without a key the daemon listens only on loopback. A web page in a local browser could still reach it: its scripts can send
requests to `http://127.0.0.1:6374`, and its domain name can resolve to 127.0.0.1 (DNS rebinding). So the `Host` header must name
loopback, and an `Origin` header must name the same host and port. CORS headers are never sent.
"""

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key, so that supervisors can use them."""


def guard(api_key: str | None) -> Middleware:
    """Make the middleware that admits requests, and raises HTTPUnauthorized or HTTPForbidden for those that it rejects."""
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
