"""Admission control: limits how many sessions run at once. Further requests wait in a bounded first-in-first-out queue."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from meshd.errors import Overloaded

_LONGEST_RETRY_S = 300.0


class Admission:
    """Grants a fixed number of slots, in the order of the calls of `enter`. Each `enter` that returns needs exactly one `leave`."""

    def __init__(self, *, running: int, waiting: int, wait_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = running
        self._waiting_limit = waiting
        self._wait_s = wait_s
        self._queue: deque[asyncio.Future[None]] = deque()
        self._now = now
        self._began: list[float] = []
        """When each running session got its slot."""
        self._mean_s = 5.0
        """Moving average of how long a session runs, in seconds."""

    def limit(self, *, running: int, waiting: int) -> None:
        """Change both limits. Sessions that run stay, and requests that wait keep their places."""
        self._limit, self._waiting_limit = running, waiting
        while self.running < self._limit and self._queue:
            self._pass_on()

    @property
    def running(self) -> int:
        return len(self._began)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def free(self) -> bool:
        """Whether `enter` would return at once."""
        return self.running < self._limit and not self._queue

    async def enter(self, on_wait: Callable[[], None] | None = None) -> None:
        """Wait for a slot. `on_wait` is called if none is free now.

        Raises: Overloaded if the queue is full, or no slot was free within `wait_s`.
        Cancel: the request leaves the queue and takes no slot.
        """
        if self.free:
            self._began.append(self._now())
            return
        if len(self._queue) >= self._waiting_limit:
            raise self._overloaded(f"{self.running} requests run and {len(self._queue)} wait")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(waiter)
        if on_wait is not None:
            on_wait()
        try:
            async with asyncio.timeout(self._wait_s):  # `wait_for` can lose a cancellation that arrives with the slot
                await waiter
        except TimeoutError:
            if waiter.done() and not waiter.cancelled():
                return  # `leave` handed over the slot just before the timeout
            raise self._overloaded(f"no other request ended within {self._wait_s:.0f} s") from None
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.leave(0.0)  # `leave` handed over the slot just before the cancellation: pass it on
            raise
        finally:
            if waiter in self._queue:
                self._queue.remove(waiter)

    def enter_ahead(self) -> None:
        """Take a slot at once, ahead of all waiting requests and beyond the limit, but not beyond twice the limit.

        For a session that runs already and whose stages can't wait. Raises: Overloaded.
        """
        if self.running >= 2 * self._limit:
            raise self._overloaded(f"{self.running} requests run")
        self._began.append(self._now())

    def leave(self, lasted_s: float) -> None:
        """Free a slot, or pass it to the first waiting request. `lasted_s`: how long the session ran; 0 if it did not run."""
        if lasted_s > 0:
            self._mean_s += 0.2 * (lasted_s - self._mean_s)
        began = self._now() - lasted_s
        self._began.remove(min(self._began, key=lambda other: abs(other - began)))
        if self.running >= self._limit:
            return  # sessions that entered ahead still fill the limit
        self._pass_on()

    def _pass_on(self) -> None:
        """Give a slot to the first waiting request."""
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                self._began.append(self._now())
                waiter.set_result(None)
                return

    @property
    def retry_after_s(self) -> float:
        """Estimate in how many seconds a further request would get a slot, behind those that wait already."""
        ages = [self._now() - began for began in self._began]
        # A running session is seen at half of its time on average. So where the running ones are older, sessions take longer now.
        typical_s = max(self._mean_s, 2 * sum(ages) / max(1, len(ages)))
        return max(1.0, min(typical_s * (len(self._queue) + 1) / self._limit, _LONGEST_RETRY_S))

    def _overloaded(self, why: str) -> Overloaded:
        return Overloaded(f"this peer is full: {why}", hint="try again later", retry_after_s=self.retry_after_s)
