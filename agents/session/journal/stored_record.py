"""A session's record as a deputy keeps it: encoded, so that its size in memory is the number of its bytes. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from meshd.agents.session.journal.record import AnswerToken, SessionRecord, decode_record, encode_record, followed_by
from meshd.types import PeerId, SessionId

RECORD_BYTES = 2048
"""Approximate bytes of the Python objects of one record apart from its contents."""

_tokens_decoder = msgspec.msgpack.Decoder(tuple[AnswerToken, ...])


@dataclass(slots=True)
class StoredRecord:
    """A record, with the fields that a deputy looks at or changes decoded."""

    session: SessionId
    key: str
    coordinator: PeerId
    coordinators: tuple[PeerId, ...]
    epoch: int
    finish: str
    kept: bool
    """Whether the record is kept after the end of the answer."""
    touched: float
    """When the record last changed."""
    previous: PeerId | None = None
    """The coordinator that handed the session over to the present one."""
    count: int = 0
    """Number of answer tokens."""
    _head: bytes = b""
    """The record without its tokens, as it arrived."""
    _tokens: bytearray = field(default_factory=bytearray)
    """The answer tokens in msgpack, one after the other."""

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return RECORD_BYTES + len(self._head) + len(self._tokens)

    def record(self) -> SessionRecord:
        """Decode the whole record."""
        header = b"\xdd" + self.count.to_bytes(4, "big")  # msgpack's array of `count` elements, which follow
        return msgspec.structs.replace(
            decode_record(self._head),
            coordinator=self.coordinator,
            coordinators=self.coordinators,
            epoch=self.epoch,
            finish=self.finish,
            tokens=_tokens_decoder.decode(header + bytes(self._tokens)),
        )

    def append(self, encoded: bytes, count: int) -> None:
        """Append `count` tokens that `encode_tokens` encoded."""
        self._tokens += encoded
        self.count += count

    def take_tokens_of(self, other: "StoredRecord") -> None:
        """Take the tokens of an earlier record of the session in place of the own ones."""
        self._tokens, self.count = other._tokens, other.count

    def hand_to(self, coordinator: PeerId) -> None:
        """Make another peer the record's coordinator."""
        if coordinator != self.coordinator:
            self.previous = self.coordinator
            self.coordinators = followed_by(self.coordinators, self.coordinator)
            self.coordinator = coordinator


def store_record(record: SessionRecord, now: float) -> StoredRecord:
    """Encode a record."""
    stored = StoredRecord(
        session=record.session,
        key=record.key,
        coordinator=record.coordinator,
        coordinators=record.coordinators,
        epoch=record.epoch,
        finish=record.finish,
        kept=record.store,
        touched=now,
        _head=encode_record(msgspec.structs.replace(record, tokens=())),
    )
    stored.append(encode_tokens(record.tokens), len(record.tokens))
    return stored


def encode_tokens(tokens: Iterable[AnswerToken]) -> bytes:
    """Encode tokens one after the other."""
    return b"".join(map(msgspec.msgpack.encode, tokens))
