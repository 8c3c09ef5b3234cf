"""The event stream of this peer. Each reader has a bounded queue, so a slow reader does not delay the others."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from meshd.clock import Clock

_QUEUE_LIMIT = 256
"""Maximum number of events that wait for one reader; beyond it the oldest are dropped and counted."""


class _Reader:
    def __init__(self) -> None:
        self.waiting: deque[dict[str, Any]] = deque(maxlen=_QUEUE_LIMIT)
        self.lost = 0
        self.wake = asyncio.Event()

    def push(self, event: dict[str, Any]) -> None:
        if len(self.waiting) == _QUEUE_LIMIT:
            self.lost += 1
        self.waiting.append(event)
        self.wake.set()


class EventBus:
    """Passes each published event to every reader. Must be used on the event loop's thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._readers: set[_Reader] = set()

    def publish(self, kind: str, **fields: object) -> None:
        """Send `{"type": kind, "at": seconds since the Unix epoch, ...}` to every reader."""
        if self._readers:
            event = {"type": kind, "at": self._clock.wall(), **fields}
            for reader in self._readers:
                reader.push(event)

    async def subscribe(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events from now on. A reader that missed events gets a `lost` event with their number.

        Cancel: unsubscribes.
        """
        reader = _Reader()
        self._readers.add(reader)
        try:
            while True:
                while not reader.waiting:
                    reader.wake.clear()
                    await reader.wake.wait()
                if reader.lost:
                    lost, reader.lost = reader.lost, 0
                    yield {"type": "lost", "at": self._clock.wall(), "events": lost}
                yield reader.waiting.popleft()
        finally:
            self._readers.discard(reader)
