"""Time and randomness as parameters, so that a test or the simulator can set both."""

import asyncio
import os
import time
from typing import Protocol


class Clock(Protocol):
    """The source of time and random bytes for an agent."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary point in time; they never decrease."""
        ...

    def wall(self) -> float:
        """Return seconds since 1970 (UTC), for people and for `created` fields."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for this many seconds. Cancel: ends the wait at once."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Return `count` random bytes, for ids, incarnations and keys."""
        ...


class SystemClock:
    """The clock and the random source of the operating system."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)
