"""The state of one copy of a stage's KV to a target peer, as a pure state machine: events in, commands out.

The stage's peer runs the machine. KV only grows at its end, so the progress of a copy is one number: how many positions the target
holds. Chunks are sent in order, at most two of them unanswered. If the target did not store a chunk, sending restarts at the
position that the target reports.

    OFFERED --OfferAccepted--> BEHIND or LEVEL
    BEHIND --BlocksStored, caught up--> LEVEL --KvGrown, a block or more is missing--> BEHIND
    any --CopyFailed, CopyStopped, no progress--> ENDED
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from meshd.agents.machine import Machine, Transition

_UNACKNOWLEDGED = 2
"""Maximum number of chunks in flight: the target stores one while the next is in transit."""
_EAGER_LAG = 4
"""An eager copy becomes level when it lacks fewer positions than this: one step of the target can compute them."""
_MAX_REFUSED = 3
"""Maximum number of restarts without progress of the target; at the next one the copy fails."""
_PATIENCE_TICKS = 20
"""Ticks (of 0.5 s) that a copy may wait without progress of the target, before it fails."""


class MirrorState(Enum):
    """How far the copy has got."""

    OFFERED = "offered"
    """The target has not accepted the offer yet."""
    BEHIND = "behind"
    """The target lacks positions and has not caught up yet."""
    LEVEL = "level"
    """The target lacks less than a block."""
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class OfferAccepted:
    """The target has reserved KV, and already holds this many positions."""

    held: int


@dataclass(frozen=True, slots=True)
class KvGrown:
    """The stage's KV has grown to this many positions."""

    filled: int


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """The target answered a chunk, which it may not have stored. It now holds this many positions."""

    held: int


@dataclass(frozen=True, slots=True)
class EagernessChanged:
    """From now on, KV is sent after each token (eager) or in whole blocks."""

    eager: bool


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Another 0.5 s have passed."""


@dataclass(frozen=True, slots=True)
class CopyFailed:
    reason: str


@dataclass(frozen=True, slots=True)
class CopyStopped:
    """The coordinator cancelled the copy, or the stage has ended."""


Event = OfferAccepted | KvGrown | BlocksStored | EagernessChanged | TimePassed | CopyFailed | CopyStopped


@dataclass(frozen=True, slots=True)
class SendBlocks:
    """Send KV of positions `[position, position + tokens)`."""

    position: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ReportProgress:
    """Report the copy's progress to the coordinator, or with `error` why it ended."""

    held: int
    filled: int
    error: str = ""


Command = SendBlocks | ReportProgress


@dataclass(slots=True)
class MirrorCopy(Machine[Event, Command]):
    """State of one copy. Only `handle` changes it."""

    filled: int
    """Number of positions in the stage's KV."""
    chunk_tokens: int
    """Maximum number of positions in one chunk."""
    block_tokens: int
    eager: bool = False
    state: MirrorState = MirrorState.OFFERED
    held: int = 0
    """Number of positions that the target holds."""
    sent: int = 0
    """Number of positions that the target holds or that are in flight to it."""
    in_flight: int = 0
    """Number of sent chunks that the target has not answered."""
    flushing: bool = False
    """Whether all unsent positions are to be sent, even less than a block."""
    quiet_ticks: int = 0
    """Ticks during which the copy waited for the target, since the target last made progress."""
    refused: int = 0
    """Restarts since the target last made progress."""

    def validate(self) -> None:
        """Check the invariants between events. Tests call it after each event. Raises: AssertionError."""
        if not 0 <= self.in_flight <= _UNACKNOWLEDGED:
            raise AssertionError("too many chunks in flight")
        if self.state in (MirrorState.BEHIND, MirrorState.LEVEL) and not self.held <= self.sent <= self.filled:
            raise AssertionError("the target holds more than was sent, or more was sent than the stage has")
        if self.state is MirrorState.BEHIND and not (self.in_flight or self.lag < self.block_tokens):
            raise AssertionError("nothing is in flight, though the copy is behind")
        if self.state is MirrorState.LEVEL and self.lag >= self.block_tokens:
            raise AssertionError("the copy is level, though it lacks a block")

    @property
    def lag(self) -> int:
        """Number of positions that the target lacks."""
        return self.filled - self.held

    def _pump(self) -> list[Command]:
        """Send chunks while fewer than two are in flight. Sending starts when a block is unsent (eager: one position)."""
        if self.filled - self.sent >= (1 if self.eager else self.block_tokens):
            self.flushing = True
        commands: list[Command] = []
        while self.flushing and self.sent < self.filled and self.in_flight < _UNACKNOWLEDGED:
            tokens = min(self.chunk_tokens, self.filled - self.sent)
            commands.append(SendBlocks(self.sent, tokens))
            self.sent += tokens
            self.in_flight += 1
        if self.sent == self.filled:
            self.flushing = False
        return commands

    def _update_state(self) -> list[Command]:
        """Change the state if the copy has caught up or fallen behind. Returns: a report if the copy has caught up."""
        if self.state is MirrorState.BEHIND and self.lag < (_EAGER_LAG if self.eager else self.block_tokens):
            self.state = MirrorState.LEVEL
            return [ReportProgress(self.held, self.filled)]
        if self.state is MirrorState.LEVEL and self.lag >= self.block_tokens:
            self.state = MirrorState.BEHIND
        return []


def _accepted(copy: MirrorCopy, event: OfferAccepted) -> list[Command]:
    copy.state = MirrorState.BEHIND
    copy.held = copy.sent = max(0, min(event.held, copy.filled))
    copy.flushing = True
    copy.quiet_ticks = 0
    return [*copy._update_state(), *copy._pump()]


def _grown_before(copy: MirrorCopy, event: KvGrown) -> list[Command]:
    copy.filled = event.filled
    return []


def _grown(copy: MirrorCopy, event: KvGrown) -> list[Command]:
    copy.filled = event.filled
    if not copy.in_flight:
        copy.quiet_ticks = 0
    return [*copy._update_state(), *copy._pump()]


def _stored(copy: MirrorCopy, event: BlocksStored) -> list[Command]:
    copy.in_flight = max(0, copy.in_flight - 1)
    if event.held > copy.held:
        copy.quiet_ticks = copy.refused = 0
    copy.held = max(0, min(event.held, copy.sent))
    if not copy.in_flight and copy.held < copy.sent:
        copy.sent, copy.flushing = copy.held, True  # a chunk was not stored: restart at the target's position
        copy.refused += 1
        if copy.refused > _MAX_REFUSED:
            return _failed(copy, CopyFailed("the target stores nothing"))
    return [*copy._update_state(), *copy._pump()]


def _eagerness_changed(copy: MirrorCopy, event: EagernessChanged) -> list[Command]:
    copy.eager = event.eager
    if copy.state is MirrorState.OFFERED:
        return []
    copy.state = MirrorState.BEHIND  # so that the copy is reported again once it is LEVEL by the new limit
    return [*copy._update_state(), *copy._pump()]


def _ticked(copy: MirrorCopy, event: TimePassed) -> list[Command]:
    if copy.in_flight or copy.state is MirrorState.OFFERED:
        copy.quiet_ticks += 1
        if copy.quiet_ticks > _PATIENCE_TICKS:
            return _failed(copy, CopyFailed("the target stores nothing"))
    return [ReportProgress(copy.held, copy.filled)] if copy.state is MirrorState.BEHIND else []


def _failed(copy: MirrorCopy, event: CopyFailed) -> list[Command]:
    copy.state = MirrorState.ENDED
    return [ReportProgress(copy.held, copy.filled, event.reason)]


def _stopped(copy: MirrorCopy, event: CopyStopped) -> list[Command]:
    copy.state = MirrorState.ENDED
    return []


def _ignore(copy: MirrorCopy, event: Event) -> list[Command]:
    return []


_ignored = Transition(_ignore)

TRANSITIONS: dict[tuple[Enum, type[Any]], Transition] = {
    (MirrorState.OFFERED, OfferAccepted): Transition(_accepted, (MirrorState.BEHIND, MirrorState.LEVEL)),
    (MirrorState.OFFERED, KvGrown): Transition(_grown_before),
    (MirrorState.OFFERED, BlocksStored): _ignored,  # the answer to a chunk of an earlier copy
}
for _state in (MirrorState.BEHIND, MirrorState.LEVEL):
    TRANSITIONS[_state, KvGrown] = Transition(_grown, (MirrorState.BEHIND, MirrorState.LEVEL))
    TRANSITIONS[_state, BlocksStored] = Transition(_stored, (MirrorState.BEHIND, MirrorState.LEVEL, MirrorState.ENDED))
for _state in (MirrorState.OFFERED, MirrorState.BEHIND, MirrorState.LEVEL):
    TRANSITIONS[_state, EagernessChanged] = Transition(_eagerness_changed, (MirrorState.BEHIND, MirrorState.LEVEL))
    TRANSITIONS[_state, TimePassed] = Transition(_ticked, (MirrorState.ENDED,))
    TRANSITIONS[_state, CopyFailed] = Transition(_failed, (MirrorState.ENDED,))
    TRANSITIONS[_state, CopyStopped] = Transition(_stopped, (MirrorState.ENDED,))
for _event in (OfferAccepted, KvGrown, BlocksStored, EagernessChanged, TimePassed, CopyFailed, CopyStopped):
    TRANSITIONS[MirrorState.ENDED, _event] = _ignored
MirrorCopy.table = TRANSITIONS
