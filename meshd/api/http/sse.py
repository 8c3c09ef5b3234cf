"""Server-sent events (WHATWG HTML, section 9.2) as OpenAI's clients read them.

An event has one `data:` line of JSON, an `id:` line if it has a number, and an `event:` line if it has a name. A successful
stream ends with `data: [DONE]`. A failed stream ends with `data: {"error": ...}`, which OpenAI's clients raise as an APIError.
Streams of `/v1/responses` have other last events in both cases, as in OpenAI's API.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from meshd.api.http.errors import HttpProblem, problem_for_client
from meshd.api.http.services import SERVICES
from meshd.api.merge import beside
from meshd.api.openai.renderers import StreamedEvent, error_event
from meshd.errors import InvalidRequest

HEADERS_DUE = web.RequestKey("headers_due", asyncio.Event)
"""Key under which a stream stores the event to set when its request waits for another answer's end."""
OUTCOME = web.RequestKey("outcome", str)
"""Key under which a request stores the code of an error that occurred after the status was sent."""

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream:
    """A response that is a stream of events. Status and headers are sent with the first event or comment.

    They are sent earlier if the request waits for another answer's end, or after `ClientLimits.headers_s`. From then on comments
    keep the connection open, and an error is sent as an event.

    About 128 KiB are buffered; then writes wait until the client reads. A client that does not read for `ClientLimits.write_s` is
    disconnected.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._limits = request.app[SERVICES].limits
        self._clock = request.app[SERVICES].clock
        self.response = web.StreamResponse(headers=_HEADERS)
        self.last = -1
        """Number of the last event that the client has; -1 for none."""
        self.sends_done = True
        """Whether a successful stream ends with `[DONE]`."""
        self._due = asyncio.Event()
        """Set when the headers are sent, or should be."""
        request[HEADERS_DUE] = self._due
        self.failure: Callable[[HttpProblem], StreamedEvent] = error_event
        """Makes the last event of a failed stream."""

    async def open(self) -> None:
        """Send status and headers before the first event."""
        await self.comment("open")

    async def send(self, item: object) -> None:
        """Send `item` as an event. Raises: ConnectionError if the client has disconnected or does not read."""
        await self.put(StreamedEvent(item))

    async def put(self, event: StreamedEvent) -> None:
        """Send an event if its number is above `last`. Raises: ConnectionError if the client has disconnected or does not read."""
        if event.number is not None and event.number <= self.last:
            return
        name = f"event: {event.name}\n" if event.name else ""
        number = f"id: {event.number}\n" if event.number is not None else ""
        await self._write(f"{name}{number}data: ".encode() + msgspec.json.encode(event.body) + b"\n\n")
        if event.number is not None:
            self.last = event.number

    async def comment(self, text: str) -> None:
        """Send a comment, which clients ignore."""
        await self._write(f": {text}\n\n".encode())

    async def done(self) -> None:
        """Send the end of a successful stream. Raises: ConnectionError."""
        if self.sends_done:
            await self._write(b"data: [DONE]\n\n")
        await self.response.write_eof()

    async def fail(self, error: Exception) -> None:
        """Send the error as the last event, and end the stream. Raises: ConnectionError."""
        problem = problem_for_client(self._request, error, self.last)
        self._request[OUTCOME] = problem.name
        await self.put(self.failure(problem))
        await self.response.write_eof()

    async def keep_alive(self) -> None:
        """Send the headers when they are due, and comments after them, so that proxies don't close an idle connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.headers_s):
                await self._due.wait()
        try:
            if not self.response.prepared:
                await self.comment("waiting")
            while True:
                await self._clock.sleep(self._limits.keep_alive_s)
                await self.comment("keep-alive")
        except ConnectionError:
            return

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s) as deadline:
                self._due.set()
                await self.response.prepare(self._request)
                await self.response.write(data)
        except TimeoutError:
            if not deadline.expired():
                raise
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read its stream") from None


def last_event_id(request: web.Request) -> int | None:
    """Return the number of the last event that the client has, by the header `Last-Event-ID`, which browsers send to resume.

    Returns: None without the header. Raises: InvalidRequest.
    """
    number = request.headers.get("Last-Event-ID")
    if number is None:
        return None
    if not (number.isascii() and number.isdecimal() and len(number) < 19):
        raise InvalidRequest("`Last-Event-ID` is not a number", param="Last-Event-ID", hint="send the `id` of the last event")
    return int(number)


async def respond(request: web.Request, produce: Callable[[EventStream], Awaitable[None]]) -> web.StreamResponse:
    """Answer with the stream that `produce` sends. An error before the first event is raised; a later error becomes the last event.

    Raises: what `produce` raises before the first event; ConnectionError.
    """
    stream = EventStream(request)
    async with beside(stream.keep_alive()):
        try:
            async with request.app[SERVICES].work.interruptible():
                await produce(stream)
                await stream.done()
        except ConnectionError:
            raise
        except Exception as error:
            if not stream.response.prepared:
                raise
            await stream.fail(error)
    return stream.response
