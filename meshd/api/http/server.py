"""Serves the API: binds its address, and accepts connections within a limit, so that a flood of them can't exhaust the process.

aiohttp's own sites accept without a limit, and a connection that sends nothing keeps a file descriptor for as long as it likes.
Here each connection is accepted only when there is room for it: if need be, one without a running request is closed, first of all
one that has not sent any request.
"""

import asyncio
import errno
import logging
import socket
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from meshd.api.http.connections import CONNECTIONS, Connections, Room
from meshd.api.http.services import SERVICES
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
_NO_DESCRIPTORS_S = 0.05
"""Wait after the process ran out of file descriptors, before it accepts again."""
_FULL_S = 0.005
"""Wait while there is no room before more connections are accepted."""
_UNREAD_BYTES = 64 * 1024
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


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
