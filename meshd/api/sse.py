"""Answers as server-sent events (WHATWG HTML, section 9.2), the way OpenAI's clients read them.

Each event is one `data:` line of JSON; `data: [DONE]` ends a stream that went well. One that fails ends with
`data: {"error": ...}` in its place, which OpenAI's clients raise as an APIError.
"""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from meshd.api.errors import problem
from meshd.api.merge import beside
from meshd.api.services import SERVICES

OUTCOME = web.RequestKey("outcome", str)
"""Where a request keeps the code of an error that came too late for its status."""

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream:
    """One response as events. Its status and headers go out with the first of them.

    Writes wait for the client to read (at most some 128 KiB lie between); one that doesn't for `write_s` is cut off.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._limits = request.app[SERVICES].limits
        self._clock = request.app[SERVICES].clock
        self.response = web.StreamResponse(headers=_HEADERS)

    async def open(self) -> None:
        """Send status and headers while there is no event yet."""
        await self.comment("open")

    async def send(self, item: object) -> None:
        """One event, as JSON. Raises: ConnectionError, when the client is gone or stuck."""
        await self._write(b"data: " + msgspec.json.encode(item) + b"\n\n")

    async def comment(self, text: str) -> None:
        """What clients skip."""
        await self._write(f": {text}\n\n".encode())

    async def done(self) -> None:
        """The end of a stream that went well."""
        await self._write(b"data: [DONE]\n\n")
        await self.response.write_eof()

    async def fail(self, error: Exception) -> None:
        """The end of one that did not."""
        told = problem(error, self._request.path)
        self._request[OUTCOME] = told.name
        await self._write(b"data: " + told.body() + b"\n\n")
        await self.response.write_eof()

    async def keep_alive(self) -> None:
        """A comment now and then, once the stream is open, lest a proxy think it dead."""
        while True:
            await self._clock.sleep(self._limits.keep_alive_s)
            if self.response.prepared:
                try:
                    await self.comment("keep-alive")
                except ConnectionError:
                    return

    async def _write(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.write_s) as deadline:
                await self.response.prepare(self._request)
                await self.response.write(data)
        except TimeoutError:
            if not deadline.expired():
                raise
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read its stream") from None


async def respond(request: web.Request, produce: Callable[[EventStream], Awaitable[None]]) -> web.StreamResponse:
    """Stream what `produce` sends. An error before the stream is open is raised, one after it is the last event.

    Raises: what `produce` raises; ConnectionError.
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
