"""The services that every handler uses, and the limits for clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from meshd.agents.service import ClusterService, Coordinator
from meshd.clock import Clock
from meshd.errors import Cancelled
from meshd.telemetry import Telemetry


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Limits for one client."""

    body_bytes: int = 8 * 2**20
    body_s: float = 60.0
    """Time for a request's body to arrive."""
    write_s: float = 60.0
    """Time for a client to read what was sent. A slower client is disconnected."""
    keep_alive_s: float = 10.0
    """Time between comments in an event stream."""
    answers_at_once: int = 8
    """Concurrent answers of one request (`n`, several prompts). The others start as these end."""
    answers: int = 256
    """Answers of one request in all."""
    shutdown_s: float = 0.4
    """Time for running answers to write their error when the server closes."""


class InFlightRequests:
    """The running requests. A shutdown ends each with an error instead of cutting its connection."""

    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether `interrupt` was called."""
        return self._closing

    @asynccontextmanager
    async def interruptible(self) -> AsyncIterator[None]:
        """Run the block until it ends or `interrupt` is called. Raises: Cancelled in the latter case."""
        scope = asyncio.timeout(0 if self._closing else None)
        try:
            async with scope:
                self._scopes.add(scope)
                yield
        except TimeoutError:
            if not scope.expired():
                raise
            raise Cancelled("the answer was cut short: this peer is shutting down", hint="ask another peer") from None
        finally:
            self._scopes.discard(scope)

    def interrupt(self) -> None:
        """Interrupt all running blocks, and later ones at their first wait. Idempotent."""
        self._closing = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(now)


@dataclass(frozen=True, slots=True)
class Services:
    """The layers below, as the handlers use them."""

    coordinator: Coordinator
    mesh: ClusterService
    telemetry: Telemetry
    clock: Clock
    limits: ClientLimits = ClientLimits()
    work: InFlightRequests = field(default_factory=InFlightRequests)


SERVICES = web.AppKey("services", Services)
