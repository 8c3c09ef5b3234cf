"""What every handler is given, and the limits that the edge keeps."""

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
    """What one client may cost."""

    body_bytes: int = 8 * 2**20
    body_s: float = 60.0
    """For a request's body to arrive."""
    write_s: float = 60.0
    """For a client to read on; a slower one is let go and its answer cancelled."""
    keep_alive_s: float = 10.0
    """Between comments in an event stream."""
    answers_at_once: int = 8
    """Of one request (`n`, several prompts); the others start as these end."""
    answers: int = 256
    """Of one request in all."""
    shutdown_s: float = 0.4
    """For running answers to write their error when the server closes."""


class InFlightRequests:
    """The requests being answered, so that a shutdown can end each with an error in place of a cut connection."""

    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether `interrupt` was called."""
        return self._closing

    @asynccontextmanager
    async def interruptible(self) -> AsyncIterator[None]:
        """Run the block until it ends or `interrupt` is called. Raises: Cancelled, in the latter case."""
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
        """End all running blocks, and later ones as they begin to wait. Idempotent."""
        self._closing = True
        now = asyncio.get_running_loop().time()
        for scope in self._scopes:
            if not scope.expired():
                scope.reschedule(now)


@dataclass(frozen=True, slots=True)
class Services:
    """The rooms below, as the handlers see them."""

    coordinator: Coordinator
    mesh: ClusterService
    telemetry: Telemetry
    clock: Clock
    limits: ClientLimits = ClientLimits()
    work: InFlightRequests = field(default_factory=InFlightRequests)


SERVICES = web.AppKey("services", Services)
