"""The requests of one API key: how many began in the last minute, which run now, and how they are ended when the key is revoked."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

from meshd.api.access.keys import ApiKey
from meshd.errors import RateLimited

WINDOW_S = 60.0
_BUSY_S = 1.0
"""When to try again if too many requests run: nobody knows when one of them ends."""


class BackgroundAnswer(Protocol):
    """An answer that runs on after its request has ended."""

    @property
    def status(self) -> str: ...

    async def cancel(self) -> None: ...


class Admission:
    """One admitted request. `close` ends it; `revoke` interrupts it."""

    def __init__(self, label: str, on_close: "Callable[[Admission], None] | None" = None) -> None:
        self.label = label
        """Names who sent the request, without a secret: a key's prefix, `default`, or `local`."""
        self.revoked = ""
        """Why the request must end; empty while it may run."""
        self.answers: list[BackgroundAnswer] = []
        """Answers that run on after this request."""
        self._on_close = on_close
        self._scopes: set[asyncio.Timeout] = set()

    def enter(self, scope: asyncio.Timeout) -> None:
        """Add a block of code that ends when the key is revoked."""
        self._scopes.add(scope)
        if self.revoked:
            self._interrupt(scope)

    def leave(self, scope: asyncio.Timeout) -> None:
        self._scopes.discard(scope)

    def revoke(self, reason: str) -> None:
        """Interrupt the request. Idempotent."""
        self.revoked = self.revoked or reason
        for scope in self._scopes:
            self._interrupt(scope)

    def close(self) -> None:
        """End the request, which frees its place."""
        if self._on_close is not None:
            self._on_close(self)
            self._on_close = None

    def _interrupt(self, scope: asyncio.Timeout) -> None:
        if not scope.expired():
            scope.reschedule(asyncio.get_running_loop().time())


CURRENT: ContextVar[Admission | None] = ContextVar("admission", default=None)
"""The admission of the request that this task answers. None: the request came without a key."""


class KeyUse:
    """The requests of one key. Exact limits: no more than `rate` requests begin in any 60 seconds."""

    def __init__(self, key: ApiKey) -> None:
        self.key = key
        self._began: deque[float] = deque(maxlen=key.rate or 1)
        self._running: set[Admission] = set()
        self._background: list[BackgroundAnswer] = []

    @property
    def running(self) -> int:
        """Requests that run now, and answers that run in the background."""
        self._forget_ended()
        return len(self._running) + len(self._background)

    def admit(self, now: float) -> Admission:
        """Admit a request. `now` is in seconds of a monotonic clock. Raises: RateLimited."""
        key = self.key
        if key.concurrency is not None and self.running >= key.concurrency:
            raise RateLimited(
                f"the API key {key.prefix} may have {key.concurrency} requests at once",
                hint="wait until one of them has ended",
                retry_after_s=_BUSY_S,
            )
        if key.rate is not None:
            if len(self._began) == key.rate and (wait_s := self._began[0] + WINDOW_S - now) > 0:
                raise RateLimited(
                    f"the API key {key.prefix} may send {key.rate} requests a minute",
                    hint="send the next one later",
                    retry_after_s=wait_s,
                )
            self._began.append(now)
        admission = Admission(key.prefix, self._ended)
        self._running.add(admission)
        return admission

    def revoke(self, reason: str) -> list[BackgroundAnswer]:
        """Interrupt all requests. Returns: the answers in the background, which are to be cancelled."""
        for admission in self._running:
            admission.revoke(reason)
        answers, self._background = self._background, []
        return [*answers, *(answer for admission in self._running for answer in admission.answers)]

    def _ended(self, admission: Admission) -> None:
        self._running.discard(admission)
        self._background += admission.answers
        self._forget_ended()  # a key without a limit is never asked how much runs

    def _forget_ended(self) -> None:
        self._background = [answer for answer in self._background if answer.status in ("queued", "in_progress")]
