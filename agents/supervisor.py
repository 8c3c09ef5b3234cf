"""Restarts the agents of a peer that fail, so that an unforeseen error costs one agent a second and not the peer its sessions."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from logging import getLogger
from typing import Any

from meshd.clock import Clock
from meshd.errors import ConfigError, first_error

log = getLogger(__name__)

Supervise = Callable[[str, Callable[[], Awaitable[None]]], Coroutine[Any, Any, None]]
"""`supervise(name, run)` runs one agent, or one loop of an agent."""

RESTART_S = 1.0
FAILURES = 3
WITHIN_S = 60.0
"""An agent that fails `FAILURES` times within `WITHIN_S` does not recover by a restart, so the peer must stop."""


async def unsupervised(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run an agent without restarts: its first error reaches the caller."""
    await run()


def raise_if_cancelled() -> None:
    """Raises: CancelledError if this task was told to end. Code that handles an error and continues must call it: a group of tasks
    in which one fails at the moment of a cancellation raises only the failure (Python 3.11 and 3.12), and the cancellation is lost.
    """
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


class Supervisor:
    """Runs agents, and starts an agent that failed again.

    An agent keeps its state when its `run` raises. What must happen when the peer stops is in the agent's `close`.
    """

    def __init__(self, clock: Clock) -> None:
        self.gave_up = asyncio.Event()
        """Set when an agent failed too often. The peer should drain and stop; until then its agents are still restarted."""
        self.reason = ""
        """Which agent failed too often, and its last error."""
        self.failures = 0
        """Number of failures of all agents since the start."""
        self._clock = clock
        self._failures: dict[str, deque[float]] = {}

    async def supervise(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run an agent until it returns, and `RESTART_S` after an error again. Raises: ConfigError. Cancel: cancels the agent."""
        while True:
            try:
                await run()
            except ConfigError:
                raise
            except Exception as error:
                raise_if_cancelled()
                self._failed(name, error)
                await self._clock.sleep(RESTART_S)
            else:
                return

    def _failed(self, name: str, error: Exception) -> None:
        now = self._clock.monotonic()
        self.failures += 1
        times = self._failures.setdefault(name, deque(maxlen=FAILURES))
        times.append(now)
        log.error("%s failed and is started again in %g s", name, RESTART_S, exc_info=error)
        if len(times) == FAILURES and now - times[0] <= WITHIN_S and not self.gave_up.is_set():
            first = first_error(error)
            last = f"{type(first).__name__}: {first}"
            self.reason = f"{name} failed {FAILURES} times within {now - times[0]:.0f} s, the last time with {last}"
            self.gave_up.set()
