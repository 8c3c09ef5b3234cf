"""Serves the API: binds its address, and accepts connections within a limit, so that a flood of them can't exhaust the process.

aiohttp's own sites accept without a limit, and a connection that sends nothing keeps a file descriptor for as long as it likes.
Here each connection is accepted only when there is room for it: if need be, one without a running request is closed, first of all
one that has not sent any request.
"""

import asyncio
import enum
import errno
import logging
import socket
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from meshd.api.http.services import SERVICES, ClientLimits
from meshd.errors import ConfigError
from meshd.protocol import transport

log = logging.getLogger(__name__)

_BACKLOG = 4096
"""Connections that the kernel holds until they are accepted. They need no file descriptor of this process."""
_AT_ONCE = 64
"""Most connections that are accepted in one turn of the event loop, which takes about 2 ms."""
_DEFER_S = 5
"""Where the system can (Linux), it keeps a connection on which nothing comes to itself for so long. Thousands of silent ones then
take neither a file descriptor nor a place in the queue."""
_SWEEP_S = 1.0
_SLOW_S = 0.02
"""Age from which a connection without a whole request may be closed. Before that, its request may be there but not read yet."""
_NO_DESCRIPTORS_S = 0.05
"""Wait after the process ran out of file descriptors, before it accepts again."""
_FULL_S = 0.005
"""Wait while there is no room before more connections are accepted."""
_UNREAD_BYTES = 64 * 1024
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


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


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind the API's address, without listening yet. Port 0 takes a free port, the same one for all addresses of the host.

    Raises: ConfigError if the address can't be used.
    """
    try:
        listeners = transport.bind(host, port)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host}:{port}: {_reason(error, port)}", hint="choose another address with --api HOST:PORT"
        ) from error
    defer = getattr(socket, "TCP_DEFER_ACCEPT", None)
    if defer is not None:
        for listener in listeners:
            listener.setsockopt(socket.IPPROTO_TCP, defer, _DEFER_S)
    return listeners


def _reason(error: OSError, port: int) -> str:
    if error.errno in (errno.EACCES, errno.EPERM) and 0 < port < 1024:
        return f"{error.strerror}; ports below 1024 need root's rights"
    return error.strerror or str(error)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server."""

    runner: web.AppRunner
    host: str
    port: int
    listeners: tuple[socket.socket, ...]
    tasks: tuple["asyncio.Task[None]", ...]

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the server listens on. If port 0 was requested, the port is the one that was bound."""
        return self.host, self.port

    @property
    def url(self) -> str:
        """The base URL, such as `http://127.0.0.1:6374`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def aclose(self) -> None:
        """Stop listening, end running answers with an error, and close all connections within a second. Idempotent."""
        self.runner.app[SERVICES].work.interrupt()
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        for listener in self.listeners:
            listener.close()
        await self.runner.cleanup()


async def serve(app: web.Application, host: str, port: int) -> Server:
    """Bind `host:port` and serve there. Raises: ConfigError if the address can't be used."""
    return await serve_at(app, bind(host, port))


async def serve_at(app: web.Application, listeners: list[socket.socket]) -> Server:
    """Serve on bound addresses. When a client disconnects, its handler is cancelled.

    Raises: ConfigError if another program listens there since they were bound.
    """
    limits = app[SERVICES].limits
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=limits.shutdown_s,
        keepalive_timeout=limits.idle_s,
        handle_signals=False,
        logger=_connection_log(),
    )
    await runner.setup()
    try:
        for listener in listeners:
            listener.listen(_BACKLOG)
    except OSError as error:
        await runner.cleanup()
        for listener in listeners:
            listener.close()
        host, port, *_ = listeners[0].getsockname()
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror}", hint="choose another address with --api") from error
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(_Acceptor(runner, listener).run(), name="accept API connections") for listener in listeners]
    tasks.append(loop.create_task(_sweep(app[CONNECTIONS]), name="close silent API connections"))
    host, port, *_ = listeners[0].getsockname()
    return Server(runner, host, port, tuple(listeners), tuple(tasks))


class _Acceptor:
    """Accepts the connections of one listening socket.

    A client sends its request as soon as it is connected, so a connection gets a handler, which is the expensive part, only when it
    has data to read. Until then it is a bare socket: thousands of silent connections a second are accepted and closed again without
    the queue of the kernel overflowing, which would delay honest clients by the second after which TCP tries again.
    """

    def __init__(self, runner: web.AppRunner, listener: socket.socket) -> None:
        assert runner.server is not None
        self._factory = runner.server
        self._connections = runner.app[CONNECTIONS]
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._handing_over: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept until cancelled."""
        try:
            while True:
                await self._acceptable()
                try:
                    if not self._accept_waiting():
                        await asyncio.sleep(_FULL_S)
                except OSError as error:
                    log.warning("API connections can't be accepted, trying again: %s", error.strerror or error)
                    await asyncio.sleep(_NO_DESCRIPTORS_S)
        finally:
            self._connections.close_unheard(self._loop)

    async def _acceptable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_reader(self._listener, _set_once, ready)
        try:
            await ready
        finally:
            self._loop.remove_reader(self._listener)

    def _accept_waiting(self) -> bool:
        """Accept what the kernel has queued, at most `_AT_ONCE`, so that the other work of the loop gets its turn.

        Returns: False if there is no room at present for a connection that waits.
        """
        for _ in range(_AT_ONCE):
            room = self._connections.room(self._loop.time())
            if room is Room.SOON:
                return False
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                break
            client.setblocking(False)
            if room is Room.NONE:
                _refuse(client)
                continue
            first = _peek(client)
            if first == b"":
                client.close()
                continue
            self._connections.make_room(self._loop)
            if first is not None:
                self._hand_over(client)
            else:
                self._connections.unheard[client] = self._loop.time()
                self._loop.add_reader(client, self._heard, client)
        return True

    def _heard(self, client: socket.socket) -> None:
        self._loop.remove_reader(client)
        self._connections.unheard.pop(client, None)
        if _peek(client) == b"":
            client.close()
        else:
            self._hand_over(client)

    def _hand_over(self, client: socket.socket) -> None:
        self._connections.opening += 1
        task = self._loop.create_task(self._serve(client))
        self._handing_over.add(task)
        task.add_done_callback(self._handing_over.discard)

    async def _serve(self, client: socket.socket) -> None:
        try:
            _, handler = await self._loop.connect_accepted_socket(self._factory, client)
        except OSError:
            client.close()
            return
        finally:
            self._connections.opening -= 1
        if not isinstance(self._loop, asyncio.BaseEventLoop):
            client.detach()  # uvloop's transport owns the descriptor; the socket's finaliser must not close it too
        self._connections.opened(handler, self._loop.time())


def _set_once(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def _peek(client: socket.socket) -> bytes | None:
    """Return the first byte that has come, without taking it; empty if the client has gone, None if a read would wait."""
    try:
        return client.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _refuse(client: socket.socket) -> None:
    try:
        client.send(_BUSY)
        client.recv(_UNREAD_BYTES)  # the client would not see the answer if its request were still unread at the close
    except OSError:
        pass  # it has gone already
    finally:
        client.close()


async def _sweep(connections: Connections) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_S)
        connections.sweep(loop)


def _connection_log() -> logging.Logger:
    """Return the logger of aiohttp's connections. Anyone may send a request that is not HTTP: that is one line at debug level."""
    logger = logging.getLogger(f"{__name__}.connections")
    if _shorten_malformed not in logger.filters:
        logger.addFilter(_shorten_malformed)
    return logger


def _shorten_malformed(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        log.debug("%s: malformed request: %s", record.getMessage(), error.message.splitlines()[0] if error.message else error.code)
        return False
    return True
