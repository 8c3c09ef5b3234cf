"""Which chunk of a model's file comes from which peer. Pure: no I/O, no clock.

Missing parts are joined to ranges of some MiB, each of which is checked when its last chunk is written. A source takes a range for
itself and is asked for its chunks, two at a time; when no range is free it takes chunks of other sources' ranges, and at the very
end chunks for which another source is slow: so all sources finish together, whatever their links can do.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from meshd.agents.placement.weights.transfer import (
    BanSource,
    Chunk,
    ChunkArrived,
    ChunkAsked,
    ChunkRefused,
    ChunkWritten,
    FileRange,
    RangeCorrupt,
    RangeTransfer,
    RangeVerified,
    SourceLeft,
    TransferState,
)
from meshd.models.files.manifest import Part, layer_of
from meshd.types import PeerId

IN_FLIGHT = 2
"""Chunks that one source is asked for at once: the next one travels while this one is written."""
RANGE_BYTES = 4 << 20
"""Parts are joined up to this size; a larger tensor is a range of its own."""
LATE_S = 1.0
"""After so long without an answer a chunk is asked of another source too, when nothing else is left to ask for."""


def file_ranges(parts: Sequence[Part], wanted: Iterable[int]) -> list[FileRange]:
    """Join the wanted parts to ranges, in the file's order.

    No range crosses a layer's end, so that a peer with some of the layers has whole ranges.
    """
    ranges: list[FileRange] = []
    for index in sorted(wanted):
        part, last = parts[index], ranges[-1] if ranges else None
        if last is not None and _joins(parts[last.parts[-1]], part) and last.length + part.length <= RANGE_BYTES:
            ranges[-1] = FileRange((*last.parts, index), last.offset, last.length + part.length)
        else:
            ranges.append(FileRange((index,), part.offset, part.length))
    return ranges


def _joins(before: Part, part: Part) -> bool:
    layer = layer_of(part.name)
    return before.end == part.offset and layer is not None and layer_of(before.name) == layer


class ChunkSchedule:
    """All transfers of one fetch, and the sources that take part."""

    def __init__(self, ranges: Iterable[FileRange]) -> None:
        self.transfers = [RangeTransfer(number, one) for number, one in enumerate(ranges)]
        self._open = dict(enumerate(self.transfers))
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
        """Missing parts that no source has."""
        alone = (transfer for transfer in self._open.values() if not any(self._may(source, transfer) for source in self._have))
        return frozenset(part for transfer in alone for part in transfer.file_range.parts)

    def join(self, source: PeerId, have: Iterable[int] | None) -> None:
        """Add a source with these parts (None: all), or update the parts of one that takes part already.

        A source that left may join again when it has answered everything that it was asked.
        """
        self._have[source] = None if have is None else frozenset(have)

    def leave(self, source: PeerId, *, lied: bool = False) -> None:
        """Remove a source: its open chunks go to others. If it lied, nothing that it sent is kept unless it was checked."""
        if source not in self._have:
            return
        del self._have[source]
        self._asked.pop(source, None)
        self._own.pop(source, None)
        for transfer in self._open.values():
            transfer.handle(SourceLeft(source, lied))

    def next(self, source: PeerId, now: float) -> Chunk | None:
        """Choose the chunk to ask this source for now. Returns: None if there is none, or it has enough to answer."""
        if source not in self._have or self._asked[source] >= IN_FLIGHT:
            return None
        asked = self._fresh(source, now) or self._late(source, now)
        if asked is None:
            return None
        transfer = self.transfers[asked.chunk.transfer]
        transfer.handle(asked)
        if asked.owns:
            self._own[source] = transfer
        self._asked[source] += 1
        return asked.chunk

    def accept(self, source: PeerId, chunk: Chunk) -> bool:
        """Take a source's answer. Returns: whether to write its bytes; not if another source was faster."""
        transfer = self.transfers[chunk.transfer]
        self._answered(source)
        if source not in self._have or not transfer.awaits(chunk, source):
            return False
        transfer.handle(ChunkArrived(chunk, source))
        return True

    def give_back(self, source: PeerId, chunk: Chunk) -> None:
        """Return a chunk that a source could not send this time."""
        self._answered(source)
        self.transfers[chunk.transfer].handle(ChunkRefused(chunk, source))

    def written(self, chunk: Chunk) -> RangeTransfer | None:
        """Note that a chunk's bytes are on the disk. Returns: the transfer to check now, if that was its last chunk."""
        transfer = self.transfers[chunk.transfer]
        return transfer if transfer.handle(ChunkWritten()) else None

    def verified(self, transfer: RangeTransfer) -> None:
        """All parts of a range have the right hashes."""
        transfer.handle(RangeVerified())
        del self._open[transfer.number]
        for source in [source for source, own in self._own.items() if own is transfer]:
            del self._own[source]

    def corrupt(self, transfer: RangeTransfer) -> PeerId | None:
        """A part has a wrong hash: fetch the range again, from one source alone. Returns: the sender, if there was only one."""
        return next((command.source for command in transfer.handle(RangeCorrupt()) if isinstance(command, BanSource)), None)

    def validate(self) -> None:
        """Check the invariants of the schedule and its transfers. Raises: AssertionError."""
        asked: Counter[PeerId] = Counter()
        for transfer in self.transfers:
            transfer.validate()
            assert (transfer.number in self._open) == (transfer.state is not TransferState.HERE)
            for sources in transfer.in_flight.values():
                asked.update(sources.keys())
        assert all(self._asked[source] >= count for source, count in asked.items())
        assert asked.keys() <= self._have.keys()

    def _may(self, source: PeerId, transfer: RangeTransfer) -> bool:
        have = self._have[source]
        return have is None or have.issuperset(transfer.file_range.parts)

    def _fresh(self, source: PeerId, now: float) -> ChunkAsked | None:
        """Choose from its own range, else from a free one, else the last chunk of the range with most left to ask for."""
        own = self._own.get(source)
        if own is not None and own.owner == source and own.todo and not own.restarting:
            return ChunkAsked(own.todo[0], source, now)
        possible = [one for one in self._open.values() if one.todo and not one.restarting and self._may(source, one)]
        free = next((transfer for transfer in possible if transfer.owner in (None, source)), None)
        if free is not None:
            return ChunkAsked(free.todo[0], source, now, owns=True)
        fullest = max((transfer for transfer in possible if not transfer.alone), key=lambda one: len(one.todo), default=None)
        return ChunkAsked(fullest.todo[-1], source, now) if fullest is not None else None

    def _late(self, source: PeerId, now: float) -> ChunkAsked | None:
        for transfer in self._open.values():
            if transfer.alone or transfer.restarting or not self._may(source, transfer):
                continue
            for chunk, sources in transfer.in_flight.items():
                if len(sources) == 1 and source not in sources and now - next(iter(sources.values())) >= LATE_S:
                    return ChunkAsked(chunk, source, now)
        return None

    def _answered(self, source: PeerId) -> None:
        if self._asked[source] > 0:
            self._asked[source] -= 1
