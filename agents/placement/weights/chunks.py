"""Schedules which chunk of a model's file is fetched from which peer. Pure: no I/O, no clock.

Missing parts are joined into ranges of a few MiB, and each range is checked when its last chunk is written. A source owns a range
and is asked for its chunks, two at a time. When no range is free, the source is asked for chunks of other sources' ranges. At the
end it is asked for chunks that another source is late with. So all sources finish at about the same time, however fast their links
are.
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
"""Chunks that one source is asked for at once: the second is in transit while the first is written."""
RANGE_BYTES = 4 << 20
"""Parts are joined into ranges of up to this size; a larger tensor is a range of its own."""
LATE_S = 1.0
"""A chunk that is unanswered for this long is also asked of another source, once no other chunk is left to ask for."""


def file_ranges(parts: Sequence[Part], wanted: Iterable[int]) -> list[FileRange]:
    """Join the wanted parts into ranges, in the file's order.

    No range crosses the end of a layer, so a peer that has a layer has all of each of its ranges.
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
    """Holds the transfers of all ranges of one fetch, and the sources that take part."""

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
        """Returns: the missing parts that no source has."""
        unoffered = (transfer for transfer in self._open.values() if not any(self._has(source, transfer) for source in self._have))
        return frozenset(part for transfer in unoffered for part in transfer.file_range.parts)

    def join(self, source: PeerId, have: Iterable[int] | None) -> None:
        """Add a source that has these parts (None: all), or update the parts of a source.

        A source that left may join again only after it has answered all that it was asked before.
        """
        self._have[source] = None if have is None else frozenset(have)

    def leave(self, source: PeerId, *, banned: bool = False) -> None:
        """Remove a source; others get its open chunks. If `banned`, unchecked ranges with bytes from it are fetched again."""
        if source not in self._have:
            return
        del self._have[source]
        self._asked.pop(source, None)
        self._own.pop(source, None)
        for transfer in self._open.values():
            transfer.handle(SourceLeft(source, banned))

    def next(self, source: PeerId, now: float) -> Chunk | None:
        """Choose the next chunk to ask this source for. Returns: None if there is none, or if `IN_FLIGHT` chunks are open."""
        if source not in self._have or self._asked[source] >= IN_FLIGHT:
            return None
        asked = self._unasked(source, now) or self._late(source, now)
        if asked is None:
            return None
        transfer = self.transfers[asked.chunk.transfer]
        transfer.handle(asked)
        if asked.owns:
            self._own[source] = transfer
        self._asked[source] += 1
        return asked.chunk

    def accept(self, source: PeerId, chunk: Chunk) -> bool:
        """Take a source's answer. Returns: whether to write its bytes; False if another source was faster."""
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
        """Record that a chunk's bytes are on the disk. Returns: the transfer to check now, if that was its last chunk."""
        transfer = self.transfers[chunk.transfer]
        return transfer if transfer.handle(ChunkWritten()) else None

    def verified(self, transfer: RangeTransfer) -> None:
        """Record that all parts of a range have the right hashes."""
        transfer.handle(RangeVerified())
        del self._open[transfer.number]
        for source in [source for source, own in self._own.items() if own is transfer]:
            del self._own[source]

    def corrupt(self, transfer: RangeTransfer) -> PeerId | None:
        """Record that a part has a wrong hash; the range is fetched again, from one source alone.

        Returns: the source that sent the range, if there was only one; it is to be banned.
        """
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

    def _has(self, source: PeerId, transfer: RangeTransfer) -> bool:
        have = self._have[source]
        return have is None or have.issuperset(transfer.file_range.parts)

    def _unasked(self, source: PeerId, now: float) -> ChunkAsked | None:
        """Choose a chunk that no source has been asked for.

        It is the next one of the source's own range, else the first one of a free range, else the last one of the range with the
        most such chunks.
        """
        own = self._own.get(source)
        if own is not None and own.owner == source and own.todo and not own.restarting:
            return ChunkAsked(own.todo[0], source, now)
        possible = [
            transfer
            for transfer in self._open.values()
            if transfer.todo and not transfer.restarting and self._has(source, transfer)
        ]
        free = next((transfer for transfer in possible if transfer.owner in (None, source)), None)
        if free is not None:
            return ChunkAsked(free.todo[0], source, now, owns=True)
        fullest = max(
            (transfer for transfer in possible if not transfer.alone), key=lambda transfer: len(transfer.todo), default=None
        )
        return ChunkAsked(fullest.todo[-1], source, now) if fullest is not None else None

    def _late(self, source: PeerId, now: float) -> ChunkAsked | None:
        """Choose a chunk that one other source, and only one, is late with."""
        for transfer in self._open.values():
            if transfer.alone or transfer.restarting or not self._has(source, transfer):
                continue
            for chunk, sources in transfer.in_flight.items():
                if len(sources) == 1 and source not in sources and now - next(iter(sources.values())) >= LATE_S:
                    return ChunkAsked(chunk, source, now)
        return None

    def _answered(self, source: PeerId) -> None:
        if self._asked[source] > 0:
            self._asked[source] -= 1
