"""What two peers have sent one another over a link and over those that took its place after it broke (SPEC.md, section 5).

Each side counts the messages of each lane. It keeps what it has sent until the other side has reported that it arrived. When a link
takes the place of a broken one, each side learns what the other has received, and sends the rest again. Pure: no I/O and no clock.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshd.errors import Overloaded, ProtocolViolation
from meshd.protocol.framing import KIB, MIB
from meshd.protocol.messages import Goodbye, Heartbeat, HeartbeatAck, Hello, Lane, Message, Probe, ProbeAck, Received

KEPT_BYTES = 64 * MIB
"""Most bytes that are kept of one lane. A connection queues at most 32 MiB, and TCP some more: a link that is up stays below it."""
_FRAME_BYTES = 256
"""Bytes that a kept message takes in addition to its header and payload."""
REPORT_MESSAGES, REPORT_BYTES = 64, 1 * MIB
"""After so many messages, or bytes of payload, a side reports what it has received. Heartbeats report it as well."""
_UNCOUNTED = frozenset(kind.number for kind in (Hello, Heartbeat, HeartbeatAck, Goodbye, Probe, ProbeAck, Received))
_FUTILE = 5
"""A message that was sent again this many times and has not arrived may break the link itself, which is then given up."""


def is_counted(message: Message) -> bool:
    """Whether a message is counted and sent again. Those about the link itself are not."""
    return message.number not in _UNCOUNTED


@dataclass(frozen=True, slots=True)
class SentFrame:
    """A message that was sent, encoded."""

    header: bytes
    payload: memoryview

    @property
    def size(self) -> int:
        """Bytes that it takes while it is kept."""
        return len(self.header) + len(self.payload) + _FRAME_BYTES


@dataclass(slots=True)
class SentMessages:
    """The messages that were sent on one lane and may not have arrived."""

    received: int = 0
    """The other side has received this many messages."""
    unwritten: int = 0
    """How many of the kept messages were not given to the present connection, or to the last one: always the newest."""
    kept: deque[SentFrame] = field(default_factory=deque)
    """The messages after the first `received`."""
    kept_bytes: int = 0

    @property
    def total(self) -> int:
        """Number of all messages so far."""
        return self.received + len(self.kept)

    @property
    def next(self) -> SentFrame | None:
        """The oldest message that is still to be given to the connection."""
        return self.kept[len(self.kept) - self.unwritten] if self.unwritten else None

    @property
    def has_room(self) -> bool:
        """Whether half of the limit is free."""
        return self.kept_bytes <= KEPT_BYTES // 2

    def check_room(self, frame: SentFrame) -> None:
        """Check that one more message may be kept. Raises: Overloaded."""
        if self.kept_bytes + frame.size > KEPT_BYTES:
            raise Overloaded(f"{self.kept_bytes // KIB} KiB were sent to this peer and may not have arrived", retry_after_s=0.1)

    def keep(self, frame: SentFrame, *, written: bool) -> None:
        """Add a message. `written`: it was given to the connection, after all earlier ones."""
        self.kept.append(frame)
        self.kept_bytes += frame.size
        self.unwritten += not written

    def wrote(self) -> None:
        """Record that `next` was given to the connection."""
        self.unwritten -= 1

    def acknowledge(self, received: int) -> None:
        """Forget the first `received` messages, which have arrived. Raises: ProtocolViolation if they were never sent."""
        if received > self.total - self.unwritten:
            raise ProtocolViolation(f"{received} messages were received, but only {self.total - self.unwritten} were sent")
        while self.received < received:
            self.kept_bytes -= self.kept.popleft().size
            self.received += 1

    def can_restart_at(self, received: int) -> bool:
        """Whether all messages after the first `received` are kept."""
        return self.received <= received <= self.total - self.unwritten

    def restart_at(self, received: int) -> None:
        """Begin again on another connection, with the message after the first `received`. See `can_restart_at`."""
        self.acknowledge(received)
        self.unwritten = len(self.kept)


@dataclass(slots=True)
class LinkHistory:
    """One side's record of what was sent and received, by lane."""

    number: int
    """Number of the first link. Both sides name the history by it."""
    sent: tuple[SentMessages, ...] = field(default_factory=lambda: tuple(SentMessages() for _ in Lane))
    received: list[int] = field(default_factory=lambda: [0] * len(Lane))
    """Numbers of messages that have arrived."""
    _unreported_messages: int = 0
    _unreported_bytes: int = 0
    _progress: int = -1
    """Sent messages that had arrived when the latest link broke. -1: none was on its way then."""
    _futile: int = 0

    def note_received(self, lane: Lane, size: int) -> bool:
        """Count a message that has arrived. Returns: whether the other side is to be told now."""
        self.received[lane] += 1
        self._unreported_messages += 1
        self._unreported_bytes += size
        return self._unreported_messages >= REPORT_MESSAGES or self._unreported_bytes >= REPORT_BYTES

    def report(self) -> tuple[int, int]:
        """Return what has arrived, by lane, to be told to the other side."""
        self._unreported_messages = self._unreported_bytes = 0
        control, bulk = self.received
        return control, bulk

    def acknowledge(self, received: Sequence[int]) -> None:
        """Forget what the other side has received. Raises: ProtocolViolation as `SentMessages.acknowledge` does."""
        for sent, count in zip(self.sent, received, strict=True):
            sent.acknowledge(count)

    def can_restart_at(self, received: Sequence[int]) -> bool:
        """Whether all that the other side has not received is kept."""
        return all(sent.can_restart_at(count) for sent, count in zip(self.sent, received, strict=True))

    def restart_at(self, received: Sequence[int]) -> None:
        """Begin again on another link, with what the other side has not received."""
        for sent, count in zip(self.sent, received, strict=True):
            sent.restart_at(count)

    def is_futile(self) -> bool:
        """Record that the link has broken. Returns: whether a message was sent several times, and broke the link each time."""
        progress = sum(sent.received for sent in self.sent)
        waiting = any(len(sent.kept) > sent.unwritten for sent in self.sent)
        self._futile = self._futile + 1 if waiting and progress == self._progress else 0
        self._progress = progress if waiting else -1
        return self._futile >= _FUTILE
