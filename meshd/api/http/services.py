"""The services that every handler uses, and the limits for clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from meshd.agents.cluster_service import ClusterService
from meshd.agents.service import Coordinator
from meshd.api.access.limits import CURRENT
from meshd.clock import Clock
from meshd.errors import Cancelled
from meshd.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Limits for the requests and connections of clients."""

    connections: int = 1024
    """Most connections at once. A further one replaces a connection without a running request."""
    first_request_s: float = 10.0
    """Longest time from the opening of a connection to the end of its first request's headers."""
    idle_s: float = 75.0
    """Time for which a connection stays open between two requests, somewhat longer than proxies keep theirs (nginx: 60 s)."""
    body_bytes: int = 8 * 2**20
    body_s: float = 60.0
    """Longest time for a request's body to arrive."""
    write_s: float = 60.0
    """Longest time that a write waits for the client to read. A slower client is disconnected."""
    keep_alive_s: float = 10.0
    """Time between the comments that keep an event stream open."""
    headers_s: float = 25.0
    """Longest time until a stream's headers are sent. Proxies close connections on which nothing arrives, some after 30 s.

    Until then an error has its own HTTP status. A request that waits for another answer's end gets its headers at once.
    """
    answers_at_once: int = 8
    """Most answers of one request (`n`, several prompts) that run at the same time. Each further answer starts when one ends."""
    answers: int = 256
    """Most answers of one request in total."""
    shutdown_s: float = 0.4
    """Longest time for running answers to send their error when the server closes."""


class InFlightRequests:
    """The running requests. At a shutdown, or when its API key is revoked, each ends with an error, not a closed connection."""

    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether `interrupt` was called."""
        return self._closing

    @asynccontextmanager
    async def interruptible(self) -> AsyncIterator[None]:
        """Run the block until it ends, `interrupt` is called, or the API key of the request is revoked.

        Raises: Cancelled if it was interrupted; HTTPUnauthorized if the key was revoked or has expired.
        """
        admission = CURRENT.get()
        scope = asyncio.timeout(0 if self._closing else None)
        try:
            async with scope:
                self._scopes.add(scope)
                if admission is not None:
                    admission.enter(scope)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            if admission is not None and admission.revoked:
                raise web.HTTPUnauthorized(text=admission.revoked, headers={"WWW-Authenticate": "Bearer"}) from None
            raise Cancelled(
                "the answer was cut short: this peer is shutting down", hint="send the request to another peer"
            ) from None
        finally:
            self._scopes.discard(scope)
            if admission is not None:
                admission.leave(scope)

    def interrupt(self) -> None:
        """Interrupt all running blocks, and every later block at its first await. Idempotent."""
        self._closing = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(now)


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of the daemon that handlers use."""

    coordinator: Coordinator
    mesh: ClusterService
    telemetry: Telemetry
    clock: Clock
    limits: ClientLimits = ClientLimits()
    work: InFlightRequests = field(default_factory=InFlightRequests)


SERVICES = web.AppKey("services", Services)
