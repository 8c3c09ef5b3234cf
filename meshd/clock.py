"""Time and randomness as parameters, so that a test or the simulator can set both."""

import asyncio
import os
import time
from typing import Protocol


class Clock(Protocol):
    """Where an actor gets its time and its random bytes."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch, for people and for `created` fields."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait; cancel ends it at once."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Unpredictable bytes (ids, incarnations)."""
        ...


class SystemClock:
    """The machine's own clock and entropy."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)
