"""The deputy: keeps session records for other coordinators, and reports the sessions whose coordinator is lost.

The coordinator's side is `writer.py`. `store.py` holds the records and limits their number, memory and age.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from meshd.agents.links.links import Links
from meshd.agents.session.journal.record import SessionRecord, decode_record
from meshd.agents.session.journal.store import JournalStore
from meshd.agents.session.journal.stored_record import StoredRecord
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError, Superseded
from meshd.protocol.messages import HandOver, Journal, JournalDrop, Journaled, JournalTokens
from meshd.types import PeerId, SessionId

MAX_RECORD_BYTES = 8 * 2**20
"""Limit for the payload of JOURNAL. The tokens of a longer answer follow in JOURNAL_TOKENS."""
_SWEEP_S = 5.0


@dataclass(slots=True)
class Deputy:
    """Owns the records that this peer keeps for others."""

    links: Links
    clock: Clock
    on_orphan: Callable[[SessionId, PeerId], None]
    """Called with each session whose coordinator is lost, and the coordinator."""
    on_dropped: Callable[[PeerId, SessionId], None]
    """Called when another peer, a deputy of this one, reports that it lacks a session's record or a part of it."""
    coordinates: Callable[[SessionId], bool]
    """Whether this peer coordinates a session, and so keeps no record of it for another peer."""
    store: JournalStore = field(default_factory=JournalStore)

    def register(self) -> None:
        """Register the handlers of JOURNAL, JOURNAL_TOKENS and JOURNAL_DROP."""
        self.links.register(Journal, self._on_journal)
        self.links.register(JournalTokens, self._on_tokens)
        self.links.register(JournalDrop, self._on_drop)

    async def run(self) -> None:
        """Remove expired records, until cancelled."""
        while True:
            await self.clock.sleep(_SWEEP_S)
            self.store.expire(self.clock.monotonic())

    def record(self, session: SessionId) -> SessionRecord | None:
        """Returns: this peer's record of the session; None if it has none."""
        return self.store.get(session)

    def look(self, session: SessionId) -> StoredRecord | None:
        """Returns: this peer's record of the session, not decoded; None if it has none."""
        return self.store.look(session)

    def hand_to(self, session: SessionId, coordinator: PeerId) -> None:
        """Record that another peer has fetched the record and now coordinates the session."""
        self.store.hand_to(session, coordinator, self.clock.monotonic())

    def on_hand_over(self, sender: PeerId, message: HandOver) -> bool:
        """Take additions to the record from another coordinator from now on. Returns: whether `sender` was its coordinator."""
        if self.store.coordinator_of(message.session) != sender:
            return False
        self.hand_to(message.session, message.to)
        return True

    def end(self, session: SessionId, finish: str, *, forget: bool) -> bool:
        """Mark the session as ended; with `forget`, delete its record. Returns: whether this peer had the record."""
        return self.store.forget(session) if forget else self.store.end(session, finish, self.clock.monotonic())

    def forget(self, session: SessionId) -> None:
        """Delete the record: this peer coordinates the session now."""
        self.store.forget(session)

    def on_peer_gone(self, peer: PeerId) -> None:
        """Report all sessions of a coordinator whose link is down, including those that have ended and can still be read."""
        for session in self.store.sessions_of(peer):
            self.on_orphan(session, peer)

    def _on_journal(self, sender: PeerId, message: Journal, payload: memoryview) -> Journaled:
        if len(payload) > MAX_RECORD_BYTES:
            raise InvalidRequest(f"a record of {len(payload)} bytes is too large to be kept here: the limit is {MAX_RECORD_BYTES}")
        record = decode_record(payload)
        if record.session != message.session or record.coordinator != sender:
            raise InvalidRequest("only a session's coordinator may send its record, and under the session's own id")
        self._check_coordinator(message.session, sender)
        self.store.keep(record, self.clock.monotonic())
        return Journaled(request=message.request, session=message.session)

    def _check_coordinator(self, session: SessionId, sender: PeerId) -> None:
        """Check that a peer may replace the session's record. Raises: Superseded while another peer coordinates the session."""
        if self.coordinates(session):
            raise Superseded(f"session {session} is coordinated by this peer")
        present = self.store.coordinator_of(session)
        if present not in (None, sender) and present in self.links.peers():
            raise Superseded(f"session {session} has a coordinator that is alive: {present}")

    def _on_tokens(self, sender: PeerId, message: JournalTokens, payload: memoryview) -> None:
        if not self.store.append(sender, message, self.clock.monotonic()):
            with suppress(MeshdError):  # if this fails, the next tokens cause another JOURNAL_DROP
                self.links.send(sender, JournalDrop(session=message.session, epoch=message.epoch))

    def _on_drop(self, sender: PeerId, message: JournalDrop, payload: memoryview) -> None:
        if not self.store.drop(message.session, sender):
            self.on_dropped(sender, message.session)
