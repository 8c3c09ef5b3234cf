"""Who may run now: a bounded number of sessions, a bounded queue, first come first served."""

import asyncio
from collections import deque

from meshd.errors import Overloaded


class Admission:
    """A fair gate. Every ticket taken must be given back exactly once."""

    def __init__(self, *, running: int, waiting: int, wait_s: float) -> None:
        self._limit = running
        self._waiting_limit = waiting
        self._wait_s = wait_s
        self._queue: deque[asyncio.Future[None]] = deque()
        self.running = 0
        self._mean_s = 5.0
        """Running mean of how long a session lasts: the guess behind Retry-After."""

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> bool:
        """Whether `enter` would not wait."""
        return self.running < self._limit and not self._queue

    async def enter(self) -> None:
        """Wait for a ticket. Raises: Overloaded if the queue is full or the wait too long. Cancel: leaves the queue."""
        if self.free:
            self.running += 1
            return
        if len(self._queue) >= self._waiting_limit:
            raise self._overloaded(f"{self.running} requests run and {len(self._queue)} wait")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            async with asyncio.timeout(self._wait_s):  # not wait_for: it loses a cancel that comes with the ticket
                await place
        except TimeoutError:
            if place.done() and not place.cancelled():
                return  # the ticket came in the same moment
            raise self._overloaded(f"waited {self._wait_s:.0f} s for a place") from None
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.leave(0.0)  # likewise: hand it on
            raise
        finally:
            if place in self._queue:
                self._queue.remove(place)

    def leave(self, lasted_s: float) -> None:
        """Give a ticket back; the next in the queue gets it."""
        if lasted_s > 0:
            self._mean_s += 0.2 * (lasted_s - self._mean_s)
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.running -= 1

    def _overloaded(self, why: str) -> Overloaded:
        guess = self._mean_s * (len(self._queue) + 1) / self._limit
        return Overloaded(f"no place for this request: {why}", hint="try again later", retry_after_s=max(1.0, min(guess, 60.0)))
