"""The deputy: keeps other coordinators' session records, and reports those whose coordinator is lost.

The coordinator's side is `writer.py`; `store.py` decides what is kept and for how long.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from meshd.agents.links.links import Links
from meshd.agents.session.journal.record import SessionRecord, decode_record
from meshd.agents.session.journal.store import JournalStore
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError
from meshd.protocol.messages import Journal, JournalDrop, Journaled, JournalTokens
from meshd.types import PeerId, SessionId

MAX_RECORD_BYTES = 8 * 2**20
"""Of one record on the wire: decoded it takes several times as much."""
_SWEEP_S = 5.0


@dataclass(slots=True)
class Deputy:
    """Owns the records that this peer keeps for others.

    `on_orphan(record)` is called for each session whose coordinator's link is down. `on_dropped(peer, session)` goes to this peer's
    own writer: another deputy reports that it lacks the session's record, or part of it.
    """

    links: Links
    clock: Clock
    on_orphan: Callable[[SessionRecord], None]
    on_dropped: Callable[[PeerId, SessionId], None]
    store: JournalStore = field(default_factory=JournalStore)

    def register(self) -> None:
        """Take the journal's messages from the links."""
        self.links.register(Journal, self._on_journal)
        self.links.register(JournalTokens, self._on_tokens)
        self.links.register(JournalDrop, self._on_drop)

    async def run(self) -> None:
        """Forget what was long not touched. Ends only by being cancelled."""
        while True:
            await self.clock.sleep(_SWEEP_S)
            self.store.expire(self.clock.monotonic())

    def record(self, session: SessionId) -> SessionRecord | None:
        """What is kept of it here."""
        return self.store.get(session)

    def hand_to(self, session: SessionId, coordinator: PeerId) -> None:
        """Another peer has taken the record and goes on with the session."""
        self.store.hand_to(session, coordinator, self.clock.monotonic())

    def end(self, session: SessionId, finish: str, *, forget: bool) -> bool:
        """End a session, or forget it, for its client. Returns: whether it was known here."""
        return self.store.forget(session) if forget else self.store.end(session, finish, self.clock.monotonic())

    def forget(self, session: SessionId) -> None:
        """This peer coordinates it now."""
        self.store.forget(session)

    def on_peer_gone(self, peer: PeerId) -> None:
        """A link is down: the sessions of that coordinator are orphans, those that ended too while they are kept."""
        for record in self.store.records_of(peer):
            self.on_orphan(record)

    def _on_journal(self, sender: PeerId, message: Journal, payload: memoryview) -> Journaled:
        if len(payload) > MAX_RECORD_BYTES:
            raise InvalidRequest(f"a record of {len(payload)} bytes is not kept here: the limit is {MAX_RECORD_BYTES}")
        record = decode_record(payload)
        if record.session != message.session or record.coordinator != sender:
            raise InvalidRequest("a record comes from its own coordinator, under its own session")
        self.store.keep(record, self.clock.monotonic())
        return Journaled(request=message.request, session=message.session)

    def _on_tokens(self, sender: PeerId, message: JournalTokens, payload: memoryview) -> None:
        if not self.store.append(sender, message, self.clock.monotonic()):
            with suppress(MeshdError):  # its link is jammed or gone: it will find out
                self.links.send(sender, JournalDrop(session=message.session, epoch=message.epoch))

    def _on_drop(self, sender: PeerId, message: JournalDrop, payload: memoryview) -> None:
        if not self.store.drop(message.session, sender):
            self.on_dropped(sender, message.session)
