"""Decides which chunk of a model's file is fetched from which peer. Pure: no I/O, no clock.

Missing parts of the file are joined into ranges of a few MiB, and each range is checked when its last chunk is written. A source
(a peer that has parts) owns one range at a time and is asked for that range's chunks, two at a time. When every range has an owner,
a source is asked for chunks of other sources' ranges; when all chunks are asked for, for chunks that another source is late with.
So all sources finish at about the same time, however fast their links are.
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
"""Number of chunks that one source is asked for at once: while one is written, the next is in transit."""
RANGE_BYTES = 4 << 20
"""Parts are joined into ranges of up to this size. A larger part is a range of its own."""
LATE_S = 1.0
"""A source is late with a chunk after this time. Another source is then also asked for it, once all chunks are asked for."""


def file_ranges(parts: Sequence[Part], wanted: Iterable[int]) -> list[FileRange]:
    """Join the wanted parts into ranges, in the file's order.

    A range contains parts of one layer, or one part outside the layers. So a peer that has a layer has all of its ranges.
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
    """Owns the transfers of all ranges of one fetch, and knows which sources take part."""

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
        """Add a source that has these parts (None: all), or update the parts of a known source.

        A source that left may join again only after all requests to it have been answered or have failed.
        """
        self._have[source] = None if have is None else frozenset(have)

    def leave(self, source: PeerId, *, banned: bool = False) -> None:
        """Remove a source; its open chunks go to others. If `banned`, incomplete ranges with bytes from it are fetched again."""
        if source not in self._have:
            return
        del self._have[source]
        self._asked.pop(source, None)
        self._own.pop(source, None)
        for transfer in self._open.values():
            transfer.handle(SourceLeft(source, banned))

    def next(self, source: PeerId, now: float) -> Chunk | None:
        """Choose the next chunk to ask this source for. Returns: None if there is none, or if `IN_FLIGHT` are open already."""
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
        """Accept a source's chunk. Returns: whether to write its bytes; False if they are no longer needed from this source."""
        transfer = self.transfers[chunk.transfer]
        self._answered(source)
        if source not in self._have or not transfer.awaits(chunk, source):
            return False
        transfer.handle(ChunkArrived(chunk, source))
        return True

    def give_back(self, source: PeerId, chunk: Chunk) -> None:
        """Make a chunk available again, because a source was too busy to send it."""
        self._answered(source)
        self.transfers[chunk.transfer].handle(ChunkRefused(chunk, source))

    def written(self, chunk: Chunk) -> RangeTransfer | None:
        """Record that a chunk's bytes are on the disk. Returns: the transfer to check, if this was its last chunk; else None."""
        transfer = self.transfers[chunk.transfer]
        return transfer if transfer.handle(ChunkWritten()) else None

    def verified(self, transfer: RangeTransfer) -> None:
        """Record that all parts of a range have the right hashes."""
        transfer.handle(RangeVerified())
        del self._open[transfer.number]
        for source in [source for source, own in self._own.items() if own is transfer]:
            del self._own[source]

    def corrupt(self, transfer: RangeTransfer) -> PeerId | None:
        """Record that a part of a range has a wrong hash. The range is fetched again, from one source alone.

        Returns: the source to ban, if only one source sent the range; else None.
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

        That is the next chunk of the source's own range; else the first chunk of a range without an owner; else the last chunk of
        the range with the most such chunks.
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
        """Choose a chunk that exactly one other source was asked for, if that source is late with it."""
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
