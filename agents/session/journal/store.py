"""The records that a deputy keeps for other peers' coordinators: pure, and bounded in count, memory and time.

House rules of this file: a record belongs to one coordinator at a time, and nobody else may add to it. Another coordinator takes it
with a higher epoch. Tokens only ever grow, one after another: a repeat changes nothing, a gap is refused.
"""

from dataclasses import dataclass, field

import msgspec

from meshd.agents.session.journal.record import AnswerToken, SessionRecord
from meshd.errors import InvalidRequest, Overloaded
from meshd.protocol.messages import JournalTokens
from meshd.types import PeerId, SessionId

MAX_RECORDS = 256
MAX_BYTES = 64 * 2**20
KEEP_S = 600.0
"""How long a record is kept that nobody adds to: after the answer's end, or when its coordinator is gone and nobody takes it."""

_RECORD_BYTES = 2048
"""What Python takes, about: for a record, and for each of its parts."""
_PROMPT_TOKEN_BYTES = 40
_TOKEN_BYTES = 128
_LOGPROBS_BYTES = 160
_TOP_BYTES = 160


@dataclass(slots=True)
class _Kept:
    head: SessionRecord
    """Without its tokens."""
    tokens: list[AnswerToken]
    size: int
    touched: float

    def record(self) -> SessionRecord:
        return msgspec.structs.replace(self.head, tokens=tuple(self.tokens))


@dataclass(slots=True)
class JournalStore:
    """Records by session."""

    max_records: int = MAX_RECORDS
    max_bytes: int = MAX_BYTES
    keep_s: float = KEEP_S
    size: int = 0
    _kept: dict[SessionId, _Kept] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, session: SessionId) -> SessionRecord | None:
        """The record as far as it is known here."""
        kept = self._kept.get(session)
        return kept.record() if kept is not None else None

    def records_of(self, coordinator: PeerId) -> list[SessionRecord]:
        """What this coordinator would leave behind."""
        return [kept.record() for kept in self._kept.values() if kept.head.coordinator == coordinator]

    def keep(self, record: SessionRecord, now: float) -> None:
        """Take a whole record. Raises: InvalidRequest (another coordinator has it, or a later epoch); Overloaded (no room)."""
        present = self._kept.get(record.session)
        tokens = list(record.tokens)
        if present is not None:
            _check_later(present.head, record)
            if record.epoch == present.head.epoch and len(tokens) < len(present.tokens):
                tokens = present.tokens  # it was overtaken by tokens that came after it
        head = msgspec.structs.replace(record, tokens=())
        size = size_of(head) + sum(map(_token_size, tokens))
        if not self._make_room(size - (present.size if present else 0), record.session):
            raise Overloaded(f"this peer keeps {len(self._kept)} records of {self.size} bytes and has no room", retry_after_s=10.0)
        self._remove(record.session)
        kept = self._kept[record.session] = _Kept(head, tokens, size, now)
        self.size += size
        self._drop_unwanted(kept)

    def append(self, sender: PeerId, message: JournalTokens, now: float) -> bool:
        """Add what the coordinator tells. False: that can't be done, only the whole record helps."""
        kept = self._kept.get(message.session)
        if kept is None or kept.head.coordinator != sender:
            return False
        if message.epoch < kept.head.epoch:
            return True  # late: a later epoch's record tells it all
        new = message.tokens[max(0, len(kept.tokens) - message.index) :]
        if kept.head.finish:
            return not new and message.finish in ("", kept.head.finish)
        if not 0 <= message.index <= len(kept.tokens):
            return False
        more = sum(map(_token_size, new))
        if not self._make_room(more, message.session):
            self._remove(message.session)
            return False
        kept.tokens += new
        kept.size += more
        self.size += more
        kept.touched = now
        if message.epoch > kept.head.epoch or message.finish:
            kept.head = msgspec.structs.replace(kept.head, epoch=message.epoch, finish=message.finish)
        self._drop_unwanted(kept)
        return True

    def hand_to(self, session: SessionId, coordinator: PeerId, now: float) -> None:
        """Another peer goes on with the session: if it is lost too before it has a deputy, the record is its orphan."""
        if (kept := self._kept.get(session)) is not None:
            kept.head = msgspec.structs.replace(kept.head, coordinator=coordinator)
            kept.touched = now

    def end(self, session: SessionId, finish: str, now: float) -> bool:
        """Nobody shall go on with it; whether it is known. What has ended stays as it is."""
        kept = self._kept.get(session)
        if kept is None:
            return False
        if not kept.head.finish:
            kept.head = msgspec.structs.replace(kept.head, finish=finish)
            kept.touched = now
            self._drop_unwanted(kept)
        return True

    def drop(self, session: SessionId, sender: PeerId) -> bool:
        """Forget it, if this is its coordinator; whether it was."""
        kept = self._kept.get(session)
        if kept is None or kept.head.coordinator != sender:
            return False
        self._remove(session)
        return True

    def forget(self, session: SessionId) -> bool:
        """Forget it, whoever it belongs to; whether it was known."""
        known = session in self._kept
        self._remove(session)
        return known

    def expire(self, now: float) -> None:
        """Drop what was long not touched; to be called now and then."""
        for session in [session for session, kept in self._kept.items() if now - kept.touched > self.keep_s]:
            self._remove(session)

    def validate(self) -> None:
        """Raises: AssertionError if the account does not agree with what is kept."""
        assert self.size == sum(kept.size for kept in self._kept.values())
        assert len(self._kept) <= self.max_records
        assert self.size <= self.max_bytes
        for session, kept in self._kept.items():
            assert kept.head.session == session
            assert not kept.head.tokens
            assert kept.size == size_of(kept.record())

    def _make_room(self, size: int, session: SessionId) -> bool:
        """For so many bytes more of this session: what has ended goes, oldest first, as far as needed; nothing if that won't do."""
        count, left = len(self._kept) + (session not in self._kept), self.size + size
        victims: list[SessionId] = []
        for kept in sorted((kept for kept in self._kept.values() if kept.head.finish), key=lambda kept: kept.touched):
            if count <= self.max_records and left <= self.max_bytes:
                break
            if kept.head.session != session:
                victims.append(kept.head.session)
                count, left = count - 1, left - kept.size
        if count > self.max_records or left > self.max_bytes:
            return False
        for victim in victims:
            self._remove(victim)
        return True

    def _drop_unwanted(self, kept: _Kept) -> None:
        if kept.head.finish and not kept.head.store:
            self._remove(kept.head.session)

    def _remove(self, session: SessionId) -> None:
        kept = self._kept.pop(session, None)
        if kept is not None:
            self.size -= kept.size


def _check_later(present: SessionRecord, record: SessionRecord) -> None:
    """Raises: InvalidRequest."""
    if record.epoch < present.epoch or (record.epoch == present.epoch and record.coordinator != present.coordinator):
        raise InvalidRequest(
            f"session {record.session} is at epoch {present.epoch} with {present.coordinator:.8}: epoch {record.epoch} is past"
        )


def size_of(record: SessionRecord) -> int:
    """About what it takes in memory."""
    texts = len(record.edge) + sum(map(len, record.stop))
    return _RECORD_BYTES + texts + _PROMPT_TOKEN_BYTES * len(record.prompt) + sum(map(_token_size, record.tokens))


def _token_size(token: AnswerToken) -> int:
    logprobs = token[1]
    return _TOKEN_BYTES if logprobs is None else _TOKEN_BYTES + _LOGPROBS_BYTES + _TOP_BYTES * len(logprobs.top)
