"""When the steps of each session arrived, were computed and were sent on this peer, for `meshd debug trace`.

A step costs one packed record of 48 bytes. Numbers are limited for each session and for all together; the oldest go first.
"""

import math
import struct
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from meshd.errors import ProtocolViolation
from meshd.types import SessionId

MAX_SPANS = 4096
"""Records of one session that are kept at least."""
MAX_BYTES = 8 << 20
MAX_SESSIONS = 512
_RECORD = struct.Struct("<IIIHBx4d")
RECORD_BYTES = _RECORD.size


class SpanKind(IntEnum):
    """What a record is about."""

    PREFILL = 0
    DECODE = 1
    TOKEN = 2
    """A token reached the coordinator: all times are the same, and `position` is the token's index in the answer."""


class Span(NamedTuple):
    """One step at one stage. Times are in seconds of the recording peer's monotonic clock."""

    kind: SpanKind
    epoch: int
    stage: int
    position: int
    tokens: int
    arrived: float
    """The step's input was received."""
    started: float
    ended: float
    sent: float
    """The peer began to send its output: never later than it arrives elsewhere."""


@dataclass(slots=True)
class _Records:
    data: bytearray = field(default_factory=bytearray)
    dropped: int = 0


@dataclass(slots=True)
class Spans:
    """The records of the newest sessions."""

    size: int = 0
    """Bytes of all records."""
    _sessions: OrderedDict[SessionId, _Records] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: SessionId, span: Span) -> None:
        """Add a record."""
        records = self._sessions.get(session)
        if records is None:
            records = self._sessions[session] = _Records()
        kind, epoch, stage, position, tokens, *times = span
        records.data += _RECORD.pack(epoch, position, tokens, stage, kind, *times)
        self.size += RECORD_BYTES
        if len(records.data) >= 2 * MAX_SPANS * RECORD_BYTES:  # by half at once: to cut the front moves the rest
            del records.data[: MAX_SPANS * RECORD_BYTES]
            records.dropped += MAX_SPANS
            self.size -= MAX_SPANS * RECORD_BYTES
        while len(self._sessions) > MAX_SESSIONS or (self.size > MAX_BYTES and len(self._sessions) > 1):
            self.size -= len(self._sessions.popitem(last=False)[1].data)

    def of(self, session: SessionId) -> tuple[bytes, int]:
        """Return a session's records, as `decode_spans` reads them, and how many older ones were dropped."""
        records = self._sessions.get(session)
        return (bytes(records.data), records.dropped) if records is not None else (b"", 0)


def decode_spans(data: bytes | memoryview) -> list[Span]:
    """Decode records, and check them: they may come from another peer. Raises: ProtocolViolation."""
    if len(data) % RECORD_BYTES or len(data) > 2 * MAX_SPANS * RECORD_BYTES:
        raise ProtocolViolation(f"the records of a trace have {len(data)} bytes, which is too many or not a whole number")
    spans = []
    for epoch, position, tokens, stage, kind, *times in _RECORD.iter_unpack(data):
        if kind >= len(SpanKind) or not all(map(math.isfinite, times)) or sorted(times) != times:
            raise ProtocolViolation("a record of a trace has an unknown kind, or times that are out of order")
        spans.append(Span(SpanKind(kind), epoch, stage, position, tokens, *times))
    return spans
