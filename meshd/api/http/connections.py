"""The open connections of clients: which there are, and which one is closed to make room for another."""

import asyncio
import enum
import socket
from typing import Any

from aiohttp import web

from meshd.api.http.services import ClientLimits

_SLOW_S = 0.02
"""Age from which a connection without a whole request may be closed. Before that, its request may be there but not read yet."""


class Room(enum.Enum):
    """Whether a further connection may be accepted."""

    FREE = enum.auto()
    SOON = enum.auto()
    """Not before some new connections have had the time to send their request."""
    NONE = enum.auto()
    """All connections have a running request."""


class Connections:
    """The open connections of clients: without any data, without a whole request so far, between two requests, or busy."""

    def __init__(self, limits: ClientLimits) -> None:
        self._limits = limits
        self.unheard: dict[socket.socket, float] = {}
        """Connections on which nothing has come, and when each was opened, oldest first. They have no handler yet."""
        self.opening = 0
        """Connections on which something has come, and which are about to get their handler."""
        self._silent: dict[web.RequestHandler, float] = {}
        """Connections without a whole request so far, and when each got its handler, oldest first."""
        self._used_once: dict[web.RequestHandler, None] = {}
        """Connections between their first request and the second, the least recently used first."""
        self._reused: dict[web.RequestHandler, None] = {}
        """Connections between two later requests, the least recently used first. A flood of new clients does not displace them.

        At most half of all, so that the others last until their second request.
        """
        self._busy: dict[web.RequestHandler, bool] = {}
        """Connections with a running request, and whether it is not their first."""

    def __len__(self) -> int:
        idle = len(self._used_once) + len(self._reused)
        return len(self.unheard) + self.opening + len(self._silent) + idle + len(self._busy)

    def room(self, now: float) -> Room:
        """Say whether a further connection may be accepted now. `make_room` must follow if it is."""
        if len(self) < self._limits.connections or self._dispensable(now) is not None:
            return Room.FREE
        if len(self) < self._limits.connections:  # some of them were closed by their clients
            return Room.FREE
        return Room.SOON if self._silent or self.opening else Room.NONE

    def make_room(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the most dispensable connection if there are as many as allowed."""
        if len(self) < self._limits.connections:
            return
        match self._dispensable(loop.time()):
            case socket.socket() as client:
                self._close_unheard(client, loop)
            case web.RequestHandler() as handler:
                self._close(handler)

    def _dispensable(self, now: float) -> socket.socket | web.RequestHandler | None:
        """Return the connection without a running request that is closed first; None if there is none at present."""
        if self.unheard:
            return next(iter(self.unheard))
        oldest = _first_open(self._silent)
        if oldest is not None and now - self._silent[oldest] > _SLOW_S:
            return oldest
        if self.opening + len(self._silent) > self._limits.connections // 4:
            return None  # more new ones at once would displace all that are in use
        return _first_open(self._used_once) or _first_open(self._reused)

    def opened(self, handler: web.RequestHandler, now: float) -> None:
        """Add a new connection."""
        self._silent[handler] = now

    def begin(self, handler: web.RequestHandler) -> None:
        """Mark a connection as busy with a request: it is not closed to make room."""
        self._busy[handler] = handler in self._used_once or handler in self._reused
        self._forget(handler)

    def end(self, handler: web.RequestHandler) -> None:
        """Mark a connection as idle: its request has been answered."""
        if not self._busy.pop(handler, False):
            self._used_once[handler] = None
            return
        self._reused[handler] = None
        if len(self._reused) > self._limits.connections // 2:
            oldest = next(iter(self._reused))
            del self._reused[oldest]
            self._used_once[oldest] = None

    def sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the connections whose first request has not come in time, and forget those that clients have closed."""
        now = loop.time()
        for client, opened in list(self.unheard.items()):
            if now - opened < self._limits.first_request_s:
                break
            self._close_unheard(client, loop)
        for handler, opened in list(self._silent.items()):
            if now - opened < self._limits.first_request_s:
                break
            self._close(handler)
        self._forget_closed()

    def close_unheard(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close all connections on which nothing has come."""
        for client in list(self.unheard):
            self._close_unheard(client, loop)

    def _close_unheard(self, client: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        del self.unheard[client]
        loop.remove_reader(client)
        client.close()

    def _close(self, handler: web.RequestHandler) -> None:
        self._forget(handler)
        if handler.transport is not None:
            handler.transport.abort()  # close() would wait until the client has read what it was sent

    def _forget(self, handler: web.RequestHandler) -> None:
        self._silent.pop(handler, None)
        self._used_once.pop(handler, None)
        self._reused.pop(handler, None)

    def _forget_closed(self) -> None:
        for handler in [*self._silent, *self._used_once, *self._reused]:
            if not _is_open(handler):
                self._forget(handler)


def _first_open(table: dict[web.RequestHandler, Any]) -> web.RequestHandler | None:
    """Return a table's first connection, and drop those before it that clients have closed."""
    while (handler := next(iter(table), None)) is not None and not _is_open(handler):
        del table[handler]
    return handler


def _is_open(handler: web.RequestHandler) -> bool:
    return handler.transport is not None and not handler.transport.is_closing()


CONNECTIONS = web.AppKey("connections", Connections)
