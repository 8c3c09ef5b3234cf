"""A client's connection with one peer, and the handler that serves it in place of the HTTP server."""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from meshd.agents.service import AnswerSecret, Generation
from meshd.types import SessionId
from sim.clients.requests import ClientRequest
from sim.peer.process import SimProcess

_MAX_UNREAD = 4
"""Number of unread events at which the handler of a connection waits for the client."""


@dataclass(frozen=True, slots=True)
class SessionNamed:
    """Event: the peer has accepted the request, as part of this session. `secret` is in the answer's id."""

    session: SessionId
    secret: AnswerSecret


@dataclass(frozen=True, slots=True)
class ConnectionLost:
    """Event: the connection broke, or no event came in time."""

    why: str


@dataclass(eq=False, slots=True)
class Connection:
    """A queue of events from a peer to a client. Its handler runs in the context of the peer's process."""

    process: SimProcess
    events: deque[Any] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    handler: asyncio.Task[None] | None = None
    closed: bool = False

    def push(self, event: object) -> None:
        """Send an event to the client, unless the connection is closed or the peer's process was killed."""
        if not self.closed and not self.process.killed:
            self.events.append(event)
            self.arrived.set()

    def break_off(self, why: str) -> None:
        """Break the connection, because the peer's process has ended."""
        self.events.append(ConnectionLost(why))
        self.arrived.set()

    async def next(self, timeout_s: float) -> Any:
        """Return the next event, or `ConnectionLost` if none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.events:
                    self.arrived.clear()
                    await self.arrived.wait()
        except TimeoutError:
            return ConnectionLost(f"nothing for {timeout_s:g} s")
        event = self.events.popleft()
        self.taken.set()
        return event

    async def wait_for_reader(self) -> None:
        """Wait until fewer than `_MAX_UNREAD` events are unread."""
        while len(self.events) >= _MAX_UNREAD:
            self.taken.clear()
            await self.taken.wait()

    def close(self) -> None:
        """Close the connection as the client: events are dropped, and the handler is cancelled."""
        self.closed = True
        if self.handler is not None and not self.process.killed:
            self.handler.cancel()


async def handle(connection: Connection, request: ClientRequest, secret: AnswerSecret | None) -> None:
    """Serve a connection as the HTTP server does: generate an answer, or resume the one with `secret`, and push its events."""
    coordinator = connection.process.coordinator
    try:
        generation: Generation
        if secret is None:
            generation = await coordinator.generate(request.generation)
        else:
            generation = await coordinator.resume(secret)
        correct = next(iter(request.answers.values()))  # with several numerics, guesses are right for the first one
        connection.process.spec.drafts.truths[generation.session] = correct.expected.tokens
        connection.push(SessionNamed(generation.session, generation.secret))
        events = generation.events()
        try:
            async for event in events:
                connection.push(event)
                await connection.wait_for_reader()
        finally:
            await events.aclose()  # type: ignore[attr-defined]
    except Exception as error:
        connection.push(error)
