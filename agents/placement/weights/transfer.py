"""The transfer of one range of a model's file: a pure state machine, events in and commands out.

WANTED --ChunkAsked--> COMING --ChunkWritten, the last one--> CHECKING --RangeVerified--> HERE
COMING --SourceLeft--> WANTED, if the source has sent a chunk, and was banned or had to send the whole range alone
CHECKING --RangeCorrupt--> WANTED; then one source has to send the whole range alone, so a second wrong hash identifies it
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from meshd.agents.machine import Machine, Transition
from meshd.types import PeerId

CHUNK_BYTES = 256 << 10
"""Maximum size of a chunk. It is small because an activation on the same link may have to wait for one chunk."""


class TransferState(Enum):
    """State of a range: not asked for, being fetched, being hashed, or complete and checked on this disk."""

    WANTED = "wanted"
    COMING = "coming"
    CHECKING = "checking"
    HERE = "here"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a range, fetched by one request."""

    transfer: int
    """Number of the range's transfer."""
    round: int
    """Incremented each time the range is fetched again, so that a late answer to an earlier round is recognised."""
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FileRange:
    """Adjacent parts of a model's file. `parts` are their indices in the manifest."""

    parts: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ChunkAsked:
    """A source is asked for a chunk."""

    chunk: Chunk
    source: PeerId
    now: float
    owns: bool = False
    """Whether the source becomes the owner of the chunk's range."""


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A source sent a chunk; its bytes are being written now."""

    chunk: Chunk
    source: PeerId


@dataclass(frozen=True, slots=True)
class ChunkRefused:
    """A source was too busy to send a chunk."""

    chunk: Chunk
    source: PeerId


@dataclass(frozen=True, slots=True)
class ChunkWritten:
    """A chunk's bytes are on the disk."""


@dataclass(frozen=True, slots=True)
class SourceLeft:
    """A source is gone, or was `banned` because it sent wrong bytes."""

    source: PeerId
    banned: bool


@dataclass(frozen=True, slots=True)
class RangeVerified:
    """All parts of the range have the right hashes."""


@dataclass(frozen=True, slots=True)
class RangeCorrupt:
    """A part of the range has a wrong hash."""


Event = ChunkAsked | ChunkArrived | ChunkRefused | ChunkWritten | SourceLeft | RangeVerified | RangeCorrupt


@dataclass(frozen=True, slots=True)
class CheckRange:
    """Hash the parts of the range, now that all its chunks are on the disk."""


@dataclass(frozen=True, slots=True)
class BanSource:
    """Ban the only source of a range with a wrong hash."""

    source: PeerId


Command = CheckRange | BanSource


@dataclass(slots=True)
class RangeTransfer(Machine[Event, Command]):
    """State of one range's transfer. Only `handle` changes it."""

    number: int
    file_range: FileRange
    state: TransferState = TransferState.WANTED
    round: int = 0
    owner: PeerId | None = None
    alone: bool = False
    """Whether all chunks must come from the owner."""
    restarting: bool = False
    """Whether a new round begins as soon as the writes of this round are done."""
    todo: deque[Chunk] = field(default_factory=deque)
    in_flight: dict[Chunk, dict[PeerId, float]] = field(default_factory=dict)
    """For each chunk that is asked for and not received, the sources that were asked, each with the time."""
    writing: int = 0
    written: int = 0
    senders: set[PeerId] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._begin_round()

    @property
    def chunks(self) -> int:
        return -(-self.file_range.length // CHUNK_BYTES)

    def awaits(self, chunk: Chunk, source: PeerId) -> bool:
        """Whether the source's answer still counts: False if another source was faster or a new round has begun."""
        return source in self.in_flight.get(chunk, ())

    def is_stale(self, event: Event) -> bool:
        return isinstance(event, ChunkArrived | ChunkRefused) and not self.awaits(event.chunk, event.source)

    def title(self) -> str:
        return f"transfer of range {self.number}"

    def validate(self) -> None:
        """Check the invariants that hold between events. Raises: AssertionError."""
        if self.state is TransferState.HERE:
            assert not self.todo
            assert not self.in_flight
            return
        assert len(self.todo) + len(self.in_flight) + self.writing + self.written == self.chunks
        assert self.writing >= 0
        assert self.state is not TransferState.WANTED or len(self.todo) == self.chunks
        assert self.state is not TransferState.CHECKING or self.written == self.chunks
        for chunk, sources in self.in_flight.items():
            assert sources
            assert chunk.round == self.round
            assert not self.alone or sources.keys() == {self.owner}
        assert not self.alone or self.senders <= {self.owner} or self.state is TransferState.CHECKING

    def _begin_round(self) -> None:
        end = self.file_range.offset + self.file_range.length
        self.todo = deque(
            Chunk(self.number, self.round, offset, min(CHUNK_BYTES, end - offset))
            for offset in range(self.file_range.offset, end, CHUNK_BYTES)
        )
        self.in_flight.clear()
        self.senders.clear()
        self.written = 0
        self.owner = None
        self.restarting = False

    def _restart(self) -> None:
        """Begin a new round once the writes of this round are done: a late write would overwrite bytes of the new round."""
        if self.writing:
            self.restarting = True
            return
        self.state = TransferState.WANTED
        self.round += 1
        self._begin_round()

    def _withdraw(self, chunk: Chunk, source: PeerId) -> None:
        """Forget that a source was asked for a chunk. If no other source was asked for the chunk, it goes back to `todo`."""
        sources = self.in_flight[chunk]
        if sources.pop(source, None) is not None and not sources:
            del self.in_flight[chunk]
            self.todo.append(chunk)


def _asked(transfer: RangeTransfer, event: ChunkAsked) -> list[Command]:
    # A new chunk is at either end of `todo`. A late chunk that another source is asked for is in flight, not in `todo`.
    if transfer.todo and transfer.todo[0] == event.chunk:
        transfer.todo.popleft()
    elif transfer.todo and transfer.todo[-1] == event.chunk:
        transfer.todo.pop()
    transfer.state = TransferState.COMING
    transfer.in_flight.setdefault(event.chunk, {})[event.source] = event.now
    if event.owns:
        transfer.owner = event.source
    return []


def _arrived(transfer: RangeTransfer, event: ChunkArrived) -> list[Command]:
    del transfer.in_flight[event.chunk]
    transfer.senders.add(event.source)
    transfer.writing += 1
    return []


def _refused(transfer: RangeTransfer, event: ChunkRefused) -> list[Command]:
    transfer._withdraw(event.chunk, event.source)
    return []


def _written(transfer: RangeTransfer, event: ChunkWritten) -> list[Command]:
    transfer.writing -= 1
    transfer.written += 1
    if transfer.restarting:
        transfer._restart()
    elif transfer.written == transfer.chunks:
        transfer.state = TransferState.CHECKING
        return [CheckRange()]
    return []


def _left(transfer: RangeTransfer, event: SourceLeft) -> list[Command]:
    for chunk in list(transfer.in_flight):
        transfer._withdraw(chunk, event.source)
    incomplete = transfer.alone and transfer.owner == event.source
    if event.source in transfer.senders and (event.banned or incomplete):
        transfer._restart()
    elif transfer.owner == event.source:
        transfer.owner = None
    return []


def _disowned(transfer: RangeTransfer, event: SourceLeft) -> list[Command]:
    """Remove the source if it is the owner. In WANTED and CHECKING, no chunk is in flight."""
    if transfer.owner == event.source:
        transfer.owner = None
    return []


def _verified(transfer: RangeTransfer, event: RangeVerified) -> list[Command]:
    transfer.state = TransferState.HERE
    return []


def _corrupt(transfer: RangeTransfer, event: RangeCorrupt) -> list[Command]:
    senders = list(transfer.senders)
    transfer.alone = True
    transfer._restart()
    return [BanSource(senders[0])] if len(senders) == 1 else []


TRANSITIONS: dict[tuple[Enum, type[Any]], Transition] = {
    (TransferState.WANTED, ChunkAsked): Transition(_asked, (TransferState.COMING,)),
    (TransferState.WANTED, SourceLeft): Transition(_disowned),
    (TransferState.COMING, ChunkAsked): Transition(_asked),
    (TransferState.COMING, ChunkArrived): Transition(_arrived),
    (TransferState.COMING, ChunkRefused): Transition(_refused),
    (TransferState.COMING, ChunkWritten): Transition(_written, (TransferState.CHECKING, TransferState.WANTED)),
    (TransferState.COMING, SourceLeft): Transition(_left, (TransferState.WANTED,)),
    (TransferState.CHECKING, SourceLeft): Transition(_disowned),
    (TransferState.CHECKING, RangeVerified): Transition(_verified, (TransferState.HERE,)),
    (TransferState.CHECKING, RangeCorrupt): Transition(_corrupt, (TransferState.WANTED,)),
}
RangeTransfer.table = TRANSITIONS
