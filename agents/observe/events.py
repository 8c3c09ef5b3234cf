"""What happens on this peer, for whoever watches: bounded for each reader, so a slow one holds up nobody."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from meshd.clock import Clock

_KEPT = 256


class _Reader:
    def __init__(self) -> None:
        self.waiting: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self.lost = 0
        self.wake = asyncio.Event()

    def push(self, event: dict[str, Any]) -> None:
        if len(self.waiting) == _KEPT:
            self.lost += 1
        self.waiting.append(event)
        self.wake.set()


class EventBus:
    """Publish from the loop's thread; read with `subscribe`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._readers: set[_Reader] = set()

    def publish(self, kind: str, **fields: object) -> None:
        """`{"type": kind, "at": seconds since the epoch, ...}` to every reader."""
        if self._readers:
            event = {"type": kind, "at": self._clock.wall(), **fields}
            for reader in self._readers:
                reader.push(event)

    async def subscribe(self) -> AsyncGenerator[dict[str, Any], None]:
        """Events from now on. A reader that fell behind is told how many it lost. Cancel: unsubscribes."""
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
