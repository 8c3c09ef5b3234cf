"""The events of a daemon, over its HTTP API. A daemon that goes away is reported, and asked again until it is back."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

_SILENT_S = 30.0
"""The daemon sends a comment at least every 15 s. A stream that is silent for longer is broken."""
_RETRY_S, _LONGEST_RETRY_S = 0.25, 4.0
_LINE_BYTES = 1 << 20
"""Limit of one event."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The stream of events has begun, or goes on."""

    resumed: bool
    """Whether no event was missed. If not, all rows follow."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The daemon can't be reached, or has ended the stream. It is asked again in `retry_s`."""

    reason: str
    retry_s: float


@dataclass(slots=True)
class Feed:
    """Reads the events of one daemon for as long as it is iterated."""

    api: str
    """Such as `http://127.0.0.1:6374`."""
    api_key: str = ""
    _last: str = ""
    """Number of the last event that has come."""
    _retry_s: float = field(default=_RETRY_S)

    async def events(self) -> AsyncIterator[dict[str, Any] | Connected | Disconnected]:
        """Yield events, and each change of the connection. Cancel: closes the connection."""
        await asyncio.to_thread(import_module, "aiohttp")  # 0.2 s, for which the first picture need not wait
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_SILENT_S)
        async with aiohttp.ClientSession(timeout=timeout, read_bufsize=_LINE_BYTES) as client:
            while True:
                try:
                    async for item in self._stream(client):
                        yield item
                    reason = "the daemon has ended the stream"
                except TimeoutError:
                    reason = "the daemon does not answer"
                except (aiohttp.ClientError, OSError, ValueError) as error:
                    reason = str(error) or type(error).__name__
                yield Disconnected(reason, self._retry_s)
                await asyncio.sleep(self._retry_s)
                self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)

    async def _stream(self, client: "aiohttp.ClientSession") -> AsyncIterator[dict[str, Any] | Connected]:
        headers = {"Accept": "text/event-stream"} | headers_of(self.api_key)
        if self._last:
            headers["Last-Event-ID"] = self._last
        async with client.get(f"{self.api}/mesh/v1/events", headers=headers) as response:
            if response.status != 200:
                raise ValueError(await error_of(response))
            yield Connected(resumed=bool(self._last))
            self._retry_s = _RETRY_S
            number = ""
            async for line in response.content:
                if line.startswith(b"id: "):
                    number = line[4:].strip().decode("ascii", "replace")
                elif line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ValueError(str(event["error"].get("message", "the daemon has ended the stream")))
                    yield event
                    self._last, number = number or self._last, ""


def headers_of(api_key: str) -> dict[str, str]:
    """Return the headers with which the daemon knows who asks."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


async def error_of(response: "aiohttp.ClientResponse") -> str:
    """Return the message of an error response."""
    try:
        document = json.loads(await response.text())
        return str(document["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):  # aiohttp's own errors of a connection are OSErrors
        return f"the daemon answers {response.status}"
