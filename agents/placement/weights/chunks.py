"""Which piece of a model's file comes from which peer. Pure: no I/O, no clock.

What is missing is put together to units of some MiB, each of which is checked when its last piece is written. A source takes a
unit for itself and asks for its pieces, two at a time; when no unit is left it takes pieces of others' units, and at the very end
asks for pieces that another has been slow with: so all sources end together, whatever their links can do.

    WANTED --a source takes it--> COMING --all is written--> CHECKING --right--> HERE
    COMING --a source has lied before, or the one source of a unit goes--> WANTED
    CHECKING --wrong--> WANTED, and then from one source alone: the next wrong sum has a name
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from meshd.agents.machine import IllegalTransition
from meshd.models.files.manifest import Part, layer_of
from meshd.types import PeerId

PIECE_BYTES = 256 << 10
"""The most that is asked for at once: an activation never waits longer than for this."""
IN_FLIGHT = 2
UNIT_BYTES = 4 << 20
"""Parts are put together up to this; a larger tensor is a unit of its own."""
LATE_S = 1.0
"""A piece that has not come for so long is asked of another source too, when there is nothing else to ask for."""


class ChunkState(Enum):
    """Of a unit."""

    WANTED = "wanted"
    COMING = "coming"
    CHECKING = "checking"
    HERE = "here"


TRANSITIONS: dict[ChunkState, frozenset[ChunkState]] = {
    ChunkState.WANTED: frozenset({ChunkState.COMING}),
    ChunkState.COMING: frozenset({ChunkState.CHECKING, ChunkState.WANTED}),
    ChunkState.CHECKING: frozenset({ChunkState.HERE, ChunkState.WANTED}),
    ChunkState.HERE: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes to ask for; `round` rises when a unit is fetched anew, so that what comes late is known."""

    unit: int
    round: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FileRange:
    """Consecutive parts that lie one after the other in the file."""

    parts: tuple[int, ...]
    offset: int
    length: int


@dataclass(slots=True)
class RangeTransfer:
    """One span on its way."""

    number: int
    span: FileRange
    state: ChunkState = ChunkState.WANTED
    round: int = 0
    owner: PeerId | None = None
    alone: bool = False
    """All of it must come from its owner."""
    stale: bool = False
    """It begins anew once nothing of it is being written."""
    todo: deque[Chunk] = field(default_factory=deque)
    flying: dict[Chunk, dict[PeerId, float]] = field(default_factory=dict)
    """Asked of whom, and when."""
    writing: int = 0
    written: int = 0
    givers: set[PeerId] = field(default_factory=set)

    @property
    def pieces(self) -> int:
        return -(-self.span.length // PIECE_BYTES)

    def renew(self) -> None:
        """All pieces are to be asked for."""
        end = self.span.offset + self.span.length
        self.todo = deque(
            Chunk(self.number, self.round, offset, min(PIECE_BYTES, end - offset))
            for offset in range(self.span.offset, end, PIECE_BYTES)
        )
        self.flying.clear()
        self.givers.clear()
        self.written = 0
        self.owner = None
        self.stale = False


def file_ranges(parts: Sequence[Part], wanted: Iterable[int]) -> list[FileRange]:
    """Put wanted parts together, in the file's order. None reaches over a layer's end: who holds some layers has whole spans."""
    spans: list[FileRange] = []
    for index in sorted(wanted):
        part, last = parts[index], spans[-1] if spans else None
        if last is not None and _joins(parts[last.parts[-1]], part) and last.length + part.length <= UNIT_BYTES:
            spans[-1] = FileRange((*last.parts, index), last.offset, last.length + part.length)
        else:
            spans.append(FileRange((index,), part.offset, part.length))
    return spans


def _joins(before: Part, part: Part) -> bool:
    layer = layer_of(part.name)
    return before.end == part.offset and layer is not None and layer_of(before.name) == layer


class ChunkSchedule:
    """All units of one fetch, and the sources that are there."""

    def __init__(self, spans: Iterable[FileRange]) -> None:
        self.units = [RangeTransfer(number, span) for number, span in enumerate(spans)]
        for unit in self.units:
            unit.renew()
        self._open = dict(enumerate(self.units))
        self._have: dict[PeerId, frozenset[int] | None] = {}
        self._asked: Counter[PeerId] = Counter()
        self._own: dict[PeerId, RangeTransfer] = {}

    @property
    def done(self) -> bool:
        return not self._open

    @property
    def sources(self) -> frozenset[PeerId]:
        return frozenset(self._have)

    def unoffered(self) -> frozenset[int]:
        """Parts that are missing and that no source has."""
        units = (unit for unit in self._open.values() if not any(self._may(source, unit) for source in self._have))
        return frozenset(part for unit in units for part in unit.span.parts)

    def join(self, source: PeerId, have: Iterable[int] | None) -> None:
        """A source is there, with these parts (None: all). A repeat tells what it has now; one that left comes back only when it
        has answered all that it was asked.
        """
        self._have[source] = None if have is None else frozenset(have)

    def leave(self, source: PeerId, *, lied: bool = False) -> None:
        """It is gone, and what it was asked for goes to others; of one that lied, nothing unchecked is kept."""
        if source not in self._have:
            return
        del self._have[source]
        self._asked.pop(source, None)
        self._own.pop(source, None)
        for unit in self._open.values():
            self._take_back(unit, source)
            if unit.state is ChunkState.COMING and source in unit.givers and (lied or (unit.alone and unit.owner == source)):
                self._anew(unit)
            elif unit.owner == source:
                unit.owner = None

    def next(self, source: PeerId, now: float) -> Chunk | None:
        """What this source should be asked for now, if anything."""
        if source not in self._have or self._asked[source] >= IN_FLIGHT:
            return None
        piece = self._fresh(source) or self._late(source, now)
        if piece is None:
            return None
        unit = self.units[piece.unit]
        if unit.state is ChunkState.WANTED:
            self._move(unit, ChunkState.COMING)
        unit.flying.setdefault(piece, {})[source] = now
        self._asked[source] += 1
        return piece

    def accept(self, source: PeerId, piece: Chunk) -> bool:
        """A source has answered; whether its bytes are to be written: they are not if another was quicker."""
        unit = self.units[piece.unit]
        self._answered(source)
        if source not in self._have or source not in unit.flying.get(piece, ()):
            return False
        del unit.flying[piece]
        unit.givers.add(source)
        unit.writing += 1
        return True

    def give_back(self, source: PeerId, piece: Chunk) -> None:
        """A source could not answer this time."""
        self._answered(source)
        self._return(self.units[piece.unit], piece, source)

    def written(self, piece: Chunk) -> RangeTransfer | None:
        """Its bytes are on the disk; the unit, if that was the last of it: it must be checked now."""
        unit = self.units[piece.unit]
        unit.writing -= 1
        unit.written += 1
        if unit.stale:
            self._anew(unit)
        elif unit.written == unit.pieces:
            self._move(unit, ChunkState.CHECKING)
            return unit
        return None

    def right(self, unit: RangeTransfer) -> None:
        """All its parts have the sums that they must have."""
        self._move(unit, ChunkState.HERE)
        del self._open[unit.number]
        for source in [source for source, own in self._own.items() if own is unit]:
            del self._own[source]

    def wrong(self, unit: RangeTransfer) -> PeerId | None:
        """One has not. It comes anew, from one source alone; who gave it, if that was one."""
        givers = list(unit.givers)
        unit.alone = True
        self._anew(unit)
        return givers[0] if len(givers) == 1 else None

    def validate(self) -> None:
        """Raises: AssertionError if the books don't balance."""
        asked: Counter[PeerId] = Counter()
        for unit in self.units:
            if unit.state is ChunkState.HERE:
                assert unit.number not in self._open
                continue
            assert self._open[unit.number] is unit
            assert len(unit.todo) + len(unit.flying) + unit.writing + unit.written == unit.pieces
            assert unit.writing >= 0
            assert unit.state is not ChunkState.WANTED or len(unit.todo) == unit.pieces
            assert unit.state is not ChunkState.CHECKING or unit.written == unit.pieces
            for piece, askers in unit.flying.items():
                assert askers
                assert piece.round == unit.round
                asked.update(askers.keys())
                assert not unit.alone or askers.keys() == {unit.owner}
            assert not unit.alone or unit.givers <= {unit.owner} or unit.state is ChunkState.CHECKING
        assert all(self._asked[source] >= count for source, count in asked.items())
        assert asked.keys() <= self._have.keys()

    # Insides

    def _may(self, source: PeerId, unit: RangeTransfer) -> bool:
        have = self._have[source]
        return have is None or have.issuperset(unit.span.parts)

    def _fresh(self, source: PeerId) -> Chunk | None:
        """Of its own unit, else of one that nobody has, else the last one of another's that has most left to ask for."""
        own = self._own.get(source)
        if own is not None and own.owner == source and own.todo and not own.stale:
            return own.todo.popleft()
        possible = [unit for unit in self._open.values() if unit.todo and not unit.stale and self._may(source, unit)]
        free = next((unit for unit in possible if unit.owner in (None, source)), None)
        if free is not None:
            free.owner = source
            self._own[source] = free
            return free.todo.popleft()
        fullest = max((unit for unit in possible if not unit.alone), key=lambda unit: len(unit.todo), default=None)
        return fullest.todo.pop() if fullest is not None else None

    def _late(self, source: PeerId, now: float) -> Chunk | None:
        for unit in self._open.values():
            if unit.alone or unit.stale or not self._may(source, unit):
                continue
            for piece, askers in unit.flying.items():
                if len(askers) == 1 and source not in askers and now - next(iter(askers.values())) >= LATE_S:
                    return piece
        return None

    def _answered(self, source: PeerId) -> None:
        if self._asked[source] > 0:
            self._asked[source] -= 1

    def _take_back(self, unit: RangeTransfer, source: PeerId) -> None:
        for piece in list(unit.flying):
            self._return(unit, piece, source)

    def _return(self, unit: RangeTransfer, piece: Chunk, source: PeerId) -> None:
        askers = unit.flying.get(piece, {})
        if askers.pop(source, None) is not None and not askers:
            del unit.flying[piece]
            unit.todo.append(piece)

    def _anew(self, unit: RangeTransfer) -> None:
        """Bytes of the old round that are being written must be there before those of the new one come."""
        if unit.writing:
            unit.stale = True
            return
        if unit.state is not ChunkState.WANTED:
            self._move(unit, ChunkState.WANTED)
        unit.round += 1
        unit.renew()

    def _move(self, unit: RangeTransfer, state: ChunkState) -> None:
        if state not in TRANSITIONS[unit.state]:
            raise IllegalTransition(f"unit {unit.number}: {unit.state.value} to {state.value}")
        unit.state = state
