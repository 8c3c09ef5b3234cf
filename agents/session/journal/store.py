"""The records that a deputy keeps for other peers' coordinators: pure, and bounded in count, memory and time.

House rules of this file: a record belongs to one coordinator at a time, and only that coordinator may add to it. Another one takes
the record over with a higher epoch. Tokens are only appended, in order: a repeat changes nothing, and a gap is refused.
"""

from dataclasses import dataclass, field

import msgspec

from meshd.agents.session.journal.record import AnswerToken, SessionRecord, followed_by
from meshd.errors import InvalidRequest, Overloaded
from meshd.protocol.messages import JournalTokens
from meshd.types import PeerId, SessionId

MAX_RECORDS = 256
MAX_BYTES = 64 * 2**20
KEEP_S = 600.0
"""How long a record is kept after its last change, whether the answer has ended or its coordinator is lost."""

# Approximate sizes of Python objects in bytes; `tests/agents/session/journal/test_store.py` compares them with measured memory.
_RECORD_BYTES = 2048
_PROMPT_TOKEN_BYTES = 40
_TOKEN_BYTES = 128
_LOGPROBS_BYTES = 160
_TOP_BYTES = 160


@dataclass(slots=True)
class _StoredRecord:
    head: SessionRecord
    """The record without its tokens."""
    tokens: list[AnswerToken]
    size: int
    touched: float
    previous: PeerId | None = None
    """The coordinator that handed the session over to the present one."""

    def record(self) -> SessionRecord:
        return msgspec.structs.replace(self.head, tokens=tuple(self.tokens))


@dataclass(slots=True)
class JournalStore:
    """Stores records by session. To stay within its limits it deletes records of ended answers, oldest first."""

    max_records: int = MAX_RECORDS
    max_bytes: int = MAX_BYTES
    keep_s: float = KEEP_S
    size: int = 0
    _records: dict[SessionId, _StoredRecord] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, session: SessionId) -> SessionRecord | None:
        """Returns: the session's record; None if there is none."""
        stored = self._records.get(session)
        return stored.record() if stored is not None else None

    def coordinator_of(self, session: SessionId) -> PeerId | None:
        """Returns: the peer that may add to the session's record; None if there is no record."""
        stored = self._records.get(session)
        return stored.head.coordinator if stored is not None else None

    def records_of(self, coordinator: PeerId) -> list[SessionRecord]:
        """Returns: the records of all sessions of this coordinator."""
        return [stored.record() for stored in self._records.values() if stored.head.coordinator == coordinator]

    def keep(self, record: SessionRecord, now: float) -> None:
        """Store a full record.

        Raises: InvalidRequest if the stored record has a later epoch, or the same epoch and another coordinator; Overloaded if
        there is no room.
        """
        present = self._records.get(record.session)
        tokens = list(record.tokens)
        if present is not None:
            _check_later(present.head, record)
            if record.epoch == present.head.epoch and len(tokens) < len(present.tokens):
                tokens = present.tokens  # the coordinator sent these tokens later than `record`, but they arrived earlier
        head = msgspec.structs.replace(record, tokens=())
        size = size_of(head) + sum(map(_token_size, tokens))
        if not self._make_room(size - (present.size if present else 0), record.session):
            raise Overloaded(
                f"this peer keeps {len(self._records)} records of {self.size} bytes and has no room", retry_after_s=10.0
            )
        self._remove(record.session)
        stored = self._records[record.session] = _StoredRecord(head, tokens, size, now)
        self.size += size
        self._drop_unwanted(stored)

    def append(self, sender: PeerId, message: JournalTokens, now: float) -> bool:
        """Append tokens that the coordinator sent.

        Returns: False if they were refused; the coordinator must then send the full record. They are refused if there is no record,
        if it belongs to another coordinator, has ended or lacks tokens before these, or if there is no room.
        """
        stored = self._records.get(message.session)
        if stored is None or stored.head.coordinator != sender:
            return False
        if message.epoch < stored.head.epoch:
            return True  # a late message: the record of a later epoch includes these tokens
        new = message.tokens[max(0, len(stored.tokens) - message.index) :]
        if stored.head.finish:
            return not new and message.finish in ("", stored.head.finish)
        if not 0 <= message.index <= len(stored.tokens):
            return False
        more = sum(map(_token_size, new))
        if not self._make_room(more, message.session):
            self._remove(message.session)
            return False
        stored.tokens += new
        stored.size += more
        self.size += more
        stored.touched = now
        if message.epoch > stored.head.epoch or message.finish:
            stored.head = msgspec.structs.replace(stored.head, epoch=message.epoch, finish=message.finish)
        self._drop_unwanted(stored)
        return True

    def hand_to(self, session: SessionId, coordinator: PeerId, now: float) -> None:
        """Make another peer the record's coordinator. Keep the record, in case that peer is lost before it has a deputy."""
        if (stored := self._records.get(session)) is not None:
            stored.previous, before = stored.head.coordinator, stored.head
            coordinators = followed_by(before.coordinators, before.coordinator)
            stored.head = msgspec.structs.replace(before, coordinator=coordinator, coordinators=coordinators)
            stored.touched = now

    def end(self, session: SessionId, finish: str, now: float) -> bool:
        """Mark the session as ended, unless it has ended already. Returns: whether there is a record."""
        stored = self._records.get(session)
        if stored is None:
            return False
        if not stored.head.finish:
            stored.head = msgspec.structs.replace(stored.head, finish=finish)
            stored.touched = now
            self._drop_unwanted(stored)
        return True

    def drop(self, session: SessionId, sender: PeerId) -> bool:
        """Delete the record if `sender` is its coordinator, or has handed it over. Returns: whether it was deleted."""
        stored = self._records.get(session)
        if stored is None or sender not in (stored.head.coordinator, stored.previous):
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
            assert stored.head.session == session
            assert not stored.head.tokens
            assert stored.size == size_of(stored.record())

    def _make_room(self, size: int, session: SessionId) -> bool:
        """Make room for `size` more bytes of this session: delete records of other, ended sessions, oldest first.

        Returns: False if even that is not enough; then nothing is deleted.
        """
        count, left = len(self._records) + (session not in self._records), self.size + size
        victims: list[SessionId] = []
        for stored in sorted(
            (stored for stored in self._records.values() if stored.head.finish), key=lambda stored: stored.touched
        ):
            if count <= self.max_records and left <= self.max_bytes:
                break
            if stored.head.session != session:
                victims.append(stored.head.session)
                count, left = count - 1, left - stored.size
        if count > self.max_records or left > self.max_bytes:
            return False
        for victim in victims:
            self._remove(victim)
        return True

    def _drop_unwanted(self, stored: _StoredRecord) -> None:
        """Delete the record if its answer has ended and the client asked not to store it."""
        if stored.head.finish and not stored.head.store:
            self._remove(stored.head.session)

    def _remove(self, session: SessionId) -> None:
        stored = self._records.pop(session, None)
        if stored is not None:
            self.size -= stored.size


def _check_later(present: SessionRecord, record: SessionRecord) -> None:
    """Check that `record` may replace `present`. Raises: InvalidRequest."""
    if record.epoch < present.epoch or (record.epoch == present.epoch and record.coordinator != present.coordinator):
        raise InvalidRequest(
            f"session {record.session} is at epoch {present.epoch} with {present.coordinator:.8}: epoch {record.epoch} is past"
        )


def size_of(record: SessionRecord) -> int:
    """Returns: approximate size of a decoded record in memory, in bytes."""
    texts = len(record.renderer) + sum(map(len, record.stop))
    return _RECORD_BYTES + texts + _PROMPT_TOKEN_BYTES * len(record.prompt) + sum(map(_token_size, record.tokens))


def _token_size(token: AnswerToken) -> int:
    logprobs = token[1]
    return _TOKEN_BYTES if logprobs is None else _TOKEN_BYTES + _LOGPROBS_BYTES + _TOP_BYTES * len(logprobs.top)
