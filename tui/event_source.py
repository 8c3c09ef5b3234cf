"""One request for the events of a daemon, read on a thread.

The standard library's client loads ten times faster than aiohttp, and a thread of its own costs a third of the time that an event
loop needs for as many lines. It can begin before Textual is loaded.
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

_CONNECT_S = 5.0
_SILENT_S = 30.0
"""The daemon sends a comment at least every 10 s. A stream that is silent for longer is broken."""
_LINE_BYTES = 1 << 20
"""Limit of one event."""
_READ_BYTES = 1 << 16
_WAITING_BYTES = 8 << 20
"""Events that wait for the event loop. While there are so many, nothing is read, and the daemon counts what this reader misses."""
_COLLECT_S = 0.02
"""Events are collected for so long before the event loop is woken for the next ones."""

Numbered = tuple[str, dict[str, Any]]
"""The number of an event, empty for one that can't be resumed from, and the event."""


class EventSource:
    """Connects and reads at once, when it is made. `close` ends it."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url, self._headers = urlsplit(url), headers
        self._socket: socket.socket | None = None
        self._events: list[Numbered] = []
        self._waiting = 0
        """Size of these events, in bytes."""
        self._changed = threading.Condition()
        """Guards all that both threads use, and tells the reading thread of room, or of the end."""
        self._wake: Callable[[], object] = lambda: None
        self._closed = False
        self._opened = False
        self._ended = ""
        """Why the stream has ended; empty as long as it has not."""
        threading.Thread(target=self._run, name="events", daemon=True).start()

    async def batches(self) -> AsyncGenerator[list[Numbered], None]:
        """Yield the events as they come. The first batch is empty, as soon as the daemon has accepted the request.

        Raises: ConnectionError with the reason, for the user, when the stream has ended.
        """
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        opened = False
        try:
            while True:
                ready.clear()
                with self._changed:
                    events, self._events, self._waiting = self._events, [], 0
                    now_open, ended = self._opened, self._ended
                    self._changed.notify()
                if now_open and not opened:
                    opened = True
                    yield []
                if events:
                    yield events
                    await asyncio.sleep(_COLLECT_S)
                elif ended:
                    raise ConnectionError(ended)
                else:
                    await ready.wait()
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection. The thread ends soon."""
        with self._changed:
            self._closed = True
            self._wake = lambda: None
            self._changed.notify()
            if self._socket is not None:
                with suppress(OSError):  # it has ended already
                    self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread up, as `close` would not

    def _run(self) -> None:
        connection = self._connection()
        try:
            ended = self._read(connection)
        except TimeoutError:
            ended = "the daemon does not answer"
        except OSError as error:
            ended = f"{self._url.netloc}: {error.strerror or error}"
        except Exception as error:  # whatever a server can send, the reader must hear of the end
            ended = str(error) or type(error).__name__
        connection.close()
        self._ended_by(ended)

    def _connection(self) -> HTTPConnection:
        kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
        return kind(self._url.hostname or "", self._url.port, timeout=_CONNECT_S)

    def _read(self, connection: HTTPConnection) -> str:
        """Read until the end. Returns: why it is the end."""
        connection.connect()
        with self._changed:
            if self._closed:
                return "closed"
            self._socket = connection.sock
        connection.sock.settimeout(_SILENT_S)
        connection.request("GET", self._url.path, headers={"Accept": "text/event-stream", **self._headers})
        response = connection.getresponse()
        if response.status != 200:
            return error_in(response.status, response.read(_LINE_BYTES))
        with self._changed:
            self._opened = True
            self._wake()
        return self._read_events(response)

    def _read_events(self, response: HTTPResponse) -> str:
        rest, number = b"", ""
        while data := response.read1(_READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _LINE_BYTES:
                return "the daemon sends an event that is too long"
            events: list[Numbered] = []
            for line in lines:
                if line.startswith(b"id: "):
                    number = line[4:].strip().decode("ascii", "replace")
                elif line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self._add(events, len(data))
                        return str(event["error"].get("message", "the daemon has ended the stream"))
                    events.append((number, event))
                    number = ""
            if events and not self._add(events, len(data)):
                break
        return "the daemon has ended the stream"

    def _add(self, events: Iterable[Numbered], size: int) -> bool:
        """Hand events over as soon as there is room. Returns: whether anybody wants more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < _WAITING_BYTES or self._closed)
            if not self._events:
                self._wake()
            self._events.extend(events)
            self._waiting += size
            return not self._closed

    def _ended_by(self, reason: str) -> None:
        with self._changed:
            self._ended = reason
            self._wake()


def error_in(status: int, body: bytes) -> str:
    """Return the message of an error response."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the daemon answers {status}"
