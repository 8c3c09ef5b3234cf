"""Fetches the missing parts of a model's file from all peers that have them, at the same time."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.placement.weights.chunks import IN_FLIGHT, ChunkSchedule
from meshd.agents.placement.weights.sources import WeightSources
from meshd.agents.placement.weights.transfer import Chunk, RangeTransfer
from meshd.clock import Clock
from meshd.errors import LocalFault, MeshdError, ModelFileError, NoPeer, Overloaded, ProtocolViolation, RemoteFailure
from meshd.models.store.partial_copy import PartialCopy
from meshd.models.store.progress import ProgressMeter, in_thread
from meshd.protocol.messages import FetchWeights, WeightData
from meshd.types import PeerId

log = getLogger(__name__)

_CHUNK_S = 20.0
_LOOK_S = 0.25
"""Interval between checks for new sources, and for sources that have more parts than before."""
_PAUSE_S = 0.5
"""Delay before a source that is busy or has failed is asked again."""
_MAX_FAILURES = 5
_PATIENCE_S = 2.0
"""The fetch fails when no live peer has had some part for this long: a broken link is usually back by then."""
_FLUSH_BYTES = 16 << 20
_FLUSH_S = 1.0
"""The copy's record on the disk is written after `_FLUSH_BYTES` or `_FLUSH_S`. Parts that are not recorded are fetched again after
a crash."""


class ManifestConflict(NoPeer):
    """Some peers have another file under this model's id than the one that the partial copy was begun from."""


@dataclass(slots=True)
class WeightFetch:
    """Fetches parts into a partial copy that is open for writing. Each instance runs once."""

    links: Links
    sources: WeightSources
    clock: Clock
    copy: PartialCopy
    schedule: ChunkSchedule
    meter: ProgressMeter
    received_bytes: Counter[PeerId] = field(default_factory=Counter)
    """Bytes of weights received from each source."""
    _conflicting: set[PeerId] = field(default_factory=set)
    """Peers that have another file under this model's id."""
    _tasks: dict[PeerId, asyncio.Task[None]] = field(default_factory=dict)
    _asking: set[PeerId] = field(default_factory=set)
    """Sources that have not answered yet which parts they have."""
    _failures: Counter[PeerId] = field(default_factory=Counter)
    _failure: LocalFault | None = None
    """A failure of this device, such as a full disk; it ends the fetch."""
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _unflushed: int = 0
    _flushed_at: float = 0.0
    _digest: str = ""

    async def run(self) -> None:
        """Fetch until all parts of `schedule` are on this disk, checked and recorded.

        Raises: NoPeer when no live peer has a missing part, ManifestConflict if some peers have another file; StorageError.
        Cancel: the parts that have arrived are kept.
        """
        self._digest = self.copy.about.manifest.digest
        self._flushed_at = self.clock.monotonic()
        try:
            await self._drive()
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            if self._failure is None:
                await in_thread(self.meter, self.copy.flush)

    async def _drive(self) -> None:
        obtainable_at = self.clock.monotonic()  # the last time when each missing part had a source or might get one
        while not self.schedule.done:
            self._wake.clear()
            missing = self.schedule.unoffered()
            self._start_sources(everyone=bool(missing) and not self._asking and self.clock.monotonic() > obtainable_at)
            if self._asking or not missing:
                obtainable_at = self.clock.monotonic()
            elif self.clock.monotonic() - obtainable_at > _PATIENCE_S:
                kind = ManifestConflict if self._conflicting else NoPeer
                raise kind(f"no live peer can give {self._named(missing)} of {self.copy.about.name}")
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            if self._failure is not None:
                raise self._failure

    def _named(self, parts: Iterable[int]) -> str:
        known = self.copy.about.manifest.parts
        names = [known[index].name or "the header" for index in sorted(parts)]
        return f"{names[0]} and {len(names) - 1} more tensors" if len(names) > 1 else names[0]

    def _start_sources(self, *, everyone: bool) -> None:
        """Start a task for each source without one. Raises: any unexpected exception of a task that has ended."""
        for peer, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[peer]
                task.result()
        loop = asyncio.get_running_loop()
        for peer in self.sources.candidates(self.copy.about.id, everyone=everyone):
            if peer not in self._tasks and peer not in self._conflicting and self._failures[peer] < _MAX_FAILURES:
                self._asking.add(peer)
                self._tasks[peer] = loop.create_task(self._use(peer), name=f"weights from {peer:.8}")

    async def _use(self, peer: PeerId) -> None:
        """Fetch from one source until all parts are on this disk or the source fails."""
        try:
            await self._fetch_from(peer)
        except (ModelFileError, ProtocolViolation) as error:
            self.sources.ban(peer, str(error))
        except LocalFault as error:
            self._failure = error
        except MeshdError as error:
            await self._failed(peer, error)
        finally:
            self.schedule.leave(peer)
            self._asking.discard(peer)
            self._wake.set()

    async def _fetch_from(self, peer: PeerId) -> None:
        while not self.schedule.done:
            answer = await self.sources.ask(peer, self.copy.about.id)
            if answer.digest != self._digest:
                log.warning(
                    "%s (%.8s) is not used as a source: its file of %s differs from the one that is being fetched",
                    self.sources.names(peer),
                    peer,
                    self.copy.about.name,
                )
                self._conflicting.add(peer)
                return
            self.schedule.join(peer, answer.offer.have)
            self._asking.discard(peer)
            while True:
                await self._request_chunks(peer)
                if self.schedule.done or peer not in self.schedule.sources:
                    return
                await self.clock.sleep(_LOOK_S)
                if answer.offer.have is not None:
                    break  # a source with a partial copy may have more parts by now

    async def _request_chunks(self, peer: PeerId) -> None:
        """Keep `IN_FLIGHT` requests to a source open until the schedule has no more chunk for the source.

        When one request fails, the others are not cancelled: bytes that are being written must be on the disk when this returns.
        """
        outcomes = await asyncio.gather(*(self._request_each(peer) for _ in range(IN_FLIGHT)), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _request_each(self, peer: PeerId) -> None:
        """Request and write one chunk after another, until the schedule has no more."""
        while (chunk := self.schedule.next(peer, self.clock.monotonic())) is not None:
            try:
                data = await self._ask(peer, chunk)
            except MeshdError:
                self.schedule.leave(peer)
                raise
            if data is None:
                self.schedule.give_back(peer, chunk)
                await self.clock.sleep(_PAUSE_S)
            elif self.schedule.accept(peer, chunk):
                await self._write(peer, chunk, data)

    async def _write(self, peer: PeerId, chunk: Chunk, data: memoryview) -> None:
        self.received_bytes[peer] += len(data)
        await in_thread(self.meter, self.copy.write, chunk.offset, data)
        self.meter.advance(len(data))
        transfer = self.schedule.written(chunk)
        if transfer is not None:
            await self._check(transfer)

    async def _ask(self, peer: PeerId, chunk: Chunk) -> memoryview | None:
        """Request a chunk from a source. Returns: the chunk's bytes; None if the source is busy. Raises: PeerFault."""
        request = FetchWeights(
            request=self.links.next_request(), model=self.copy.about.id, offset=chunk.offset, length=chunk.length
        )
        try:
            reply, data = await self.links.request(peer, request, timeout_s=_CHUNK_S)
        except RemoteFailure as error:
            if error.remote_code == Overloaded.code:
                return None
            raise
        if not isinstance(reply, WeightData) or reply.offset != chunk.offset or len(data) != chunk.length:
            raise ProtocolViolation(f"it sent {len(data)} bytes of weights where {chunk.length} were asked for")
        return data

    async def _check(self, transfer: RangeTransfer) -> None:
        """Hash a complete range. On a wrong hash, have the range fetched again, and ban its sender if there was only one."""
        wrong = await in_thread(self.meter, self._first_wrong, transfer)
        if wrong is None:
            self.copy.keep(transfer.file_range.parts)
            self.schedule.verified(transfer)
            self._wake.set()
            await self._flush(transfer.file_range.length)
            return
        senders = ", ".join(sorted(f"{self.sources.names(peer)} ({peer:.8})" for peer in transfer.senders))
        log.warning(
            "%s of %s has a wrong hash and is fetched again: it came from %s", wrong or "the header", self.copy.about.name, senders
        )
        corrupt_sender = self.schedule.corrupt(transfer)
        if corrupt_sender is not None:
            self.sources.ban(corrupt_sender, f"it gave wrong bytes for {wrong or 'the header'} of {self.copy.about.name}")
            self.schedule.leave(corrupt_sender, banned=True)

    def _first_wrong(self, transfer: RangeTransfer) -> str | None:
        """Returns: the name of the first part with a wrong hash (empty for the header); None if all hashes are right."""
        parts = self.copy.about.manifest.parts
        wrong = (index for index in transfer.file_range.parts if not self.copy.is_right(index, lambda count: self.meter.advance(0)))
        return next((parts[index].name for index in wrong), None)

    async def _flush(self, size_bytes: int) -> None:
        """Count `size_bytes`, and write the copy's record to the disk after `_FLUSH_BYTES` or `_FLUSH_S`."""
        self._unflushed += size_bytes
        now = self.clock.monotonic()
        if self._unflushed >= _FLUSH_BYTES or now - self._flushed_at >= _FLUSH_S:
            self._unflushed, self._flushed_at = 0, now
            await in_thread(self.meter, self.copy.flush)

    async def _failed(self, peer: PeerId, error: MeshdError) -> None:
        self._failures[peer] += 1
        self.schedule.leave(peer)
        self._asking.discard(peer)
        self._wake.set()
        self.sources.log_refusal(peer, error)
        await self.clock.sleep(_PAUSE_S)
