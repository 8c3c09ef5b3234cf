"""The records that a deputy keeps for other peers' coordinators: pure, and bounded in count, memory and time.

House rules of this file: a record belongs to one coordinator at a time, and only that coordinator may add to it. Another one takes
the record over with a higher epoch. Tokens are only appended, in order: a repeat changes nothing, and a gap is refused. No
coordinator may use more than its share of the memory, so that one peer can't take the room of all others.
"""

from dataclasses import dataclass, field

from meshd.agents.session.journal.record import FINISHES, SessionRecord
from meshd.agents.session.journal.stored_record import StoredRecord, encode_tokens, store_record
from meshd.errors import InvalidRequest, Overloaded
from meshd.protocol.messages import JournalTokens
from meshd.types import PeerId, SessionId

MAX_RECORDS = 256
MAX_BYTES = 64 * 2**20
KEEP_S = 600.0
"""How long a record is kept after its last change, whether the answer has ended or its coordinator is lost."""


@dataclass(slots=True)
class JournalStore:
    """Stores records by session. To stay within its limits it deletes records of ended answers, oldest first."""

    max_records: int = MAX_RECORDS
    max_bytes: int = MAX_BYTES
    share: float = 0.5
    """The part of both limits that the records of one coordinator may take."""
    keep_s: float = KEEP_S
    size: int = 0
    _records: dict[SessionId, StoredRecord] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, session: SessionId) -> SessionRecord | None:
        """Decode the session's record. Returns: None if there is none."""
        stored = self._records.get(session)
        return stored.record() if stored is not None else None

    def look(self, session: SessionId) -> StoredRecord | None:
        """Returns: the session's record as it is stored; None if there is none."""
        return self._records.get(session)

    def coordinator_of(self, session: SessionId) -> PeerId | None:
        """Returns: the peer that may add to the session's record; None if there is no record."""
        stored = self._records.get(session)
        return stored.coordinator if stored is not None else None

    def sessions_of(self, coordinator: PeerId) -> list[SessionId]:
        """Returns: the sessions of this coordinator that have a record here."""
        return [session for session, stored in self._records.items() if stored.coordinator == coordinator]

    def keep(self, record: SessionRecord, now: float) -> None:
        """Store a full record.

        Raises: InvalidRequest if the stored record has a later epoch, or the same epoch and another coordinator; Overloaded if
        there is no room.
        """
        present, stored = self._records.get(record.session), store_record(record, now)
        if present is not None:
            _check_later(present, record)
            if record.coordinator == present.coordinator and stored.count < present.count:
                stored.take_tokens_of(present)  # a record may come with only its first tokens, or later than tokens sent after it
        if not self._make_room(stored.size - (present.size if present else 0), stored):
            raise Overloaded(
                f"this peer keeps {len(self._records)} records of {self.size} bytes and has no room", retry_after_s=10.0
            )
        self._remove(record.session)
        self._records[record.session] = stored
        self.size += stored.size
        self._drop_unwanted(stored)

    def append(self, sender: PeerId, message: JournalTokens, now: float) -> bool:
        """Append tokens that the coordinator sent.

        Returns: False if they were refused; the coordinator must then send the full record. They are refused if there is no record,
        if it belongs to another coordinator, has ended or lacks tokens before these, or if there is no room.
        """
        stored = self._records.get(message.session)
        if stored is None or stored.coordinator != sender or message.finish not in FINISHES:
            return False
        if message.epoch < stored.epoch:
            return True  # a late message: the record of a later epoch includes these tokens
        new = message.tokens[max(0, stored.count - message.index) :]
        if stored.finish:
            return not new and message.finish in ("", stored.finish)
        if not 0 <= message.index <= stored.count:
            return False
        encoded = encode_tokens(new)
        if not self._make_room(len(encoded), stored):
            self._remove(message.session)
            return False
        stored.append(encoded, len(new))
        self.size += len(encoded)
        stored.touched = now
        stored.epoch = message.epoch
        stored.finish = message.finish
        self._drop_unwanted(stored)
        return True

    def hand_to(self, session: SessionId, coordinator: PeerId, now: float) -> None:
        """Make another peer the record's coordinator. Keep the record, in case that peer is lost before it has a deputy."""
        if (stored := self._records.get(session)) is not None:
            stored.hand_to(coordinator)
            stored.touched = now

    def end(self, session: SessionId, finish: str, now: float) -> bool:
        """Mark the session as ended, unless it has ended already. Returns: whether there is a record."""
        stored = self._records.get(session)
        if stored is None:
            return False
        if not stored.finish:
            stored.finish, stored.touched = finish, now
            self._drop_unwanted(stored)
        return True

    def drop(self, session: SessionId, sender: PeerId) -> bool:
        """Delete the record if `sender` is its coordinator, or has handed it over. Returns: whether it was deleted."""
        stored = self._records.get(session)
        if stored is None or sender not in (stored.coordinator, stored.previous):
            return False
        self._remove(session)
        return True

    def forget(self, session: SessionId) -> bool:
        """Delete the record, whichever coordinator it has. Returns: whether there was a record."""
        known = session in self._records
        self._remove(session)
        return known

    def expire(self, now: float) -> None:
        """Delete records that have not changed for `keep_s`. Called periodically."""
        for session in [session for session, stored in self._records.items() if now - stored.touched > self.keep_s]:
            self._remove(session)

    def validate(self) -> None:
        """Check the sizes and limits. Raises: AssertionError."""
        assert self.size == sum(stored.size for stored in self._records.values())
        assert len(self._records) <= self.max_records
        assert self.size <= self.max_bytes
        for session, stored in self._records.items():
            assert stored.session == session == stored.record().session
            assert stored.count == len(stored.record().tokens)

    def _make_room(self, size: int, wanted: StoredRecord) -> bool:
        """Make room for `size` more bytes of a session: delete records of other, ended sessions, oldest first.

        The coordinator's own ended sessions make room for what is beyond its share.

        Returns: False if even that is not enough; then nothing is deleted.
        """
        others = [stored for stored in self._records.values() if stored.session != wanted.session]
        replaced = self._records.get(wanted.session)
        before = (replaced.size if replaced is not None else 0) + size
        ended = sorted((stored for stored in others if stored.finish), key=lambda stored: stored.touched)
        victims: list[StoredRecord] = []
        own = [stored for stored in others if stored.coordinator == wanted.coordinator]
        for among, share in ((own, self.share), (others, 1.0)):
            max_records, max_bytes = max(min(1, self.max_records), share * self.max_records), share * self.max_bytes
            left = [stored for stored in among if stored not in victims]
            count, total = len(left) + 1, sum(stored.size for stored in left) + before
            for stored in [stored for stored in ended if stored in left]:
                if count <= max_records and total <= max_bytes:
                    break
                victims.append(stored)
                count, total = count - 1, total - stored.size
            if count > max_records or total > max_bytes:
                return False
        for victim in victims:
            self._remove(victim.session)
        return True

    def _drop_unwanted(self, stored: StoredRecord) -> None:
        """Delete the record if its answer has ended and the client asked not to store it."""
        if stored.finish and not stored.kept:
            self._remove(stored.session)

    def _remove(self, session: SessionId) -> None:
        stored = self._records.pop(session, None)
        if stored is not None:
            self.size -= stored.size


def _check_later(present: StoredRecord, record: SessionRecord) -> None:
    """Check that `record` may replace `present`. Raises: InvalidRequest."""
    if record.epoch < present.epoch or (record.epoch == present.epoch and record.coordinator != present.coordinator):
        raise InvalidRequest(
            f"session {record.session} is at epoch {present.epoch} with {present.coordinator:.8}: epoch {record.epoch} is past"
        )


def size_of(record: SessionRecord) -> int:
    """Returns: the bytes that a record takes in a store."""
    return store_record(record, 0.0).size
