"""The events of a daemon, over its HTTP API. A daemon that goes away is reported, and asked again until it is back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from meshd.tui.event_source import EventSource

_RETRY_S, _LONGEST_RETRY_S = 0.25, 4.0


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
    _begun: EventSource | None = None

    def begin(self) -> None:
        """Ask for the events now. They wait until the feed is iterated."""
        self._begun = self._source()

    async def events(self) -> AsyncIterator[dict[str, Any] | Connected | Disconnected]:
        """Yield events, and each change of the connection. Cancel: closes the connection."""
        while True:
            source, self._begun = self._begun or self._source(), None
            resumed, opened = bool(self._last), False
            try:
                async with aclosing(source.batches()) as batches:
                    async for batch in batches:
                        if not opened:
                            opened, self._retry_s = True, _RETRY_S
                            yield Connected(resumed)
                        for number, event in batch:
                            yield event
                            self._last = number or self._last
            except ConnectionError as error:
                reason = str(error)
            yield Disconnected(reason, self._retry_s)
            await asyncio.sleep(self._retry_s)
            self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)

    def _source(self) -> EventSource:
        resume = {"Last-Event-ID": self._last} if self._last else {}
        return EventSource(f"{self.api}/mesh/v1/events", headers_of(self.api_key) | resume)


def headers_of(api_key: str) -> dict[str, str]:
    """Return the headers with which the daemon knows who asks."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
