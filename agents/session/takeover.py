"""Sessions whose coordinator was lost and whose record this peer has: it continues them, and tries again if that fails.

Their stages keep KV for a lease of some seconds only, so they don't wait behind new requests. Those that can't be continued yet (no
peer has the model, or too many sessions run here) stay in a list, as long as their records are kept.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.locator import Locator
from meshd.agents.session.journal.record import SessionRecord
from meshd.agents.session.journal.store import KEEP_S, MAX_RECORDS
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.types import PeerId, SessionId

log = getLogger(__name__)

_SETTLE_S = 0.5
"""Delay before a lost coordinator's answers are taken over: if only the link broke, the coordinator is linked again by then."""
_RETRY_S = 2.0
_AT_ONCE = 8
"""Sessions that are taken over at the same time: each one's record is decoded, and all peers are asked for it."""


@dataclass(slots=True, eq=False)
class _Orphan:
    session: SessionId
    coordinator: PeerId
    """The coordinator that was lost."""
    since: float
    due: float
    tried: bool = False
    """Whether an attempt runs now."""
    reason: str = ""
    """Why the last attempt failed."""


@dataclass(slots=True)
class Takeovers:
    """Owns the sessions that this peer may have to continue."""

    links: Links
    deputy: Deputy
    locator: Locator
    clock: Clock
    coordinates: Callable[[SessionId], bool]
    """Whether this peer runs the session already."""
    take: Callable[[SessionRecord], Awaitable[None]]
    """Continues the session of a record on this peer. Raises: MeshdError if that is not possible now."""
    _orphans: dict[SessionId, _Orphan] = field(default_factory=dict)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._orphans)

    def add(self, session: SessionId, coordinator: PeerId) -> None:
        """Take the session over soon, unless another peer should. `coordinator`: the lost one."""
        now = self.clock.monotonic()
        if session not in self._orphans and len(self._orphans) >= MAX_RECORDS:
            log.warning("session %s is not taken over: %d others wait for that", session, len(self._orphans))
            return
        self._orphans[session] = _Orphan(session, coordinator, now, now + _SETTLE_S)

    def tick(self, now: float) -> None:
        """Try the sessions that are due. Called several times a second."""
        for orphan in list(self._orphans.values()):
            if len(self._tasks) >= _AT_ONCE:
                return
            if orphan.due <= now and not orphan.tried:
                orphan.tried = True
                task = asyncio.get_running_loop().create_task(self._attempt(orphan), name=f"take over {orphan.session}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Cancel all attempts."""
        for task in self._tasks:
            task.cancel()

    async def _attempt(self, orphan: _Orphan) -> None:
        try:
            record = await self._due_to(orphan)
            if record is not None:
                await self.take(record)
        except MeshdError as error:
            now = self.clock.monotonic()
            if now - orphan.since <= KEEP_S:
                if str(error) != orphan.reason:
                    log.warning("session %s can't be taken over yet: %s", orphan.session, error)
                orphan.reason, orphan.due, orphan.tried = str(error), now + _RETRY_S, False
                return
            log.warning("session %s could not be taken over: %s", orphan.session, error)
        if self._orphans.get(orphan.session) is orphan:
            del self._orphans[orphan.session]

    async def _due_to(self, orphan: _Orphan) -> SessionRecord | None:
        """Returns: the record of a session that this peer must continue; None if it must not, or not any more."""
        if orphan.coordinator in self.links.peers() or self.coordinates(orphan.session):
            return None  # the link broke only for a moment, or a client has resumed the session here
        stored = self.deputy.look(orphan.session)
        if stored is None or stored.coordinator != orphan.coordinator:
            return None
        if not stored.finish and not await self.locator.should_take_over(orphan.session, orphan.coordinator):
            return None
        return self.deputy.record(orphan.session)
