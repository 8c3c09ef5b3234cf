"""One fetch: the parts of a model's file that are missing here, from all peers that have them at once."""

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
"""How often new sources, and sources that have more than before, are looked for."""
_PAUSE_S = 0.5
"""Before a source that is busy, or that failed, is asked again."""
_MAX_FAILURES = 5
_PATIENCE_S = 2.0
"""How long something may be missing that no live peer has: a link that broke is back by then."""
_FLUSH_BYTES = 16 << 20
_FLUSH_S = 1.0


class ManifestConflict(NoPeer):
    """Peers have another file under this model's id than the one of which parts are here."""


@dataclass(slots=True)
class WeightFetch:
    """Fills a copy that is open for writing. `run` once."""

    links: Links
    sources: WeightSources
    clock: Clock
    copy: PartialCopy
    schedule: ChunkSchedule
    meter: ProgressMeter
    gave: Counter[PeerId] = field(default_factory=Counter)
    """Bytes that each source brought."""
    refused: set[PeerId] = field(default_factory=set)
    """They speak of another file under this model's id."""
    _tasks: dict[PeerId, asyncio.Task[None]] = field(default_factory=dict)
    _asking: set[PeerId] = field(default_factory=set)
    _failures: Counter[PeerId] = field(default_factory=Counter)
    _failure: LocalFault | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _unflushed: int = 0
    _flushed_at: float = 0.0
    _digest: str = ""

    async def run(self) -> None:
        """Fetch until all parts are here, checked and recorded.

        Raises: NoPeer when no live peer has a missing part, ManifestConflict if some peers have another file; StorageError.
        Cancel: what has arrived is kept.
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
        hopeful = self.clock.monotonic()
        while not self.schedule.done:
            self._wake.clear()
            missing = self.schedule.unoffered()
            self._start_sources(everyone=bool(missing) and not self._asking and self.clock.monotonic() > hopeful)
            if self._asking or not missing:
                hopeful = self.clock.monotonic()
            elif self.clock.monotonic() - hopeful > _PATIENCE_S:
                kind = ManifestConflict if self.refused else NoPeer
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
        """A task for each source that has none. What none of them foresees is raised here."""
        for peer, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[peer]
                task.result()
        loop = asyncio.get_running_loop()
        for peer in self.sources.candidates(self.copy.about.id, everyone=everyone):
            if peer not in self._tasks and peer not in self.refused and self._failures[peer] < _MAX_FAILURES:
                self._asking.add(peer)
                self._tasks[peer] = loop.create_task(self._use(peer), name=f"weights from {peer:.8}")

    async def _use(self, peer: PeerId) -> None:
        """Draw from one source until all is here, or it fails."""
        try:
            await self._draw(peer)
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

    async def _draw(self, peer: PeerId) -> None:
        while not self.schedule.done:
            said = await self.sources.ask(peer, self.copy.about.id)
            if said.digest != self._digest:
                log.warning("%s (%.8s) speaks of another file as %s", self.sources.names(peer), peer, self.copy.about.name)
                self.refused.add(peer)
                return
            self.schedule.join(peer, said.offer.have)
            self._asking.discard(peer)
            while True:
                await self._lanes(peer)
                if self.schedule.done or peer not in self.schedule.sources:
                    return
                await self.clock.sleep(_LOOK_S)
                if said.offer.have is not None:
                    break  # it may have more by now

    async def _lanes(self, peer: PeerId) -> None:
        """As many questions at once as may be. Each lane ends by itself: what it has begun to write must be there when it does."""
        outcomes = await asyncio.gather(*(self._lane(peer) for _ in range(IN_FLIGHT)), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _lane(self, peer: PeerId) -> None:
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
                await self._take(peer, chunk, data)

    async def _take(self, peer: PeerId, chunk: Chunk, data: memoryview) -> None:
        self.gave[peer] += len(data)
        await in_thread(self.meter, self.copy.write, chunk.offset, data)
        self.meter.advance(len(data))
        transfer = self.schedule.written(chunk)
        if transfer is not None:
            await self._check(transfer)

    async def _ask(self, peer: PeerId, chunk: Chunk) -> memoryview | None:
        """The bytes; None: the source is busy. Raises: PeerFault."""
        question = FetchWeights(
            request=self.links.next_request(), model=self.copy.about.id, offset=chunk.offset, length=chunk.length
        )
        try:
            reply, data = await self.links.request(peer, question, timeout_s=_CHUNK_S)
        except RemoteFailure as error:
            if error.remote_code == Overloaded.code:
                return None
            raise
        if not isinstance(reply, WeightData) or reply.offset != chunk.offset or len(data) != chunk.length:
            raise ProtocolViolation(f"{len(data)} bytes of weights came, where {chunk.length} were asked for")
        return data

    async def _check(self, transfer: RangeTransfer) -> None:
        """What came is trusted only if its sums are right; else it is known who lied, or will be the next time."""
        wrong = await in_thread(self.meter, self._first_wrong, transfer)
        if wrong is None:
            self.copy.keep(transfer.file_range.parts)
            self.schedule.verified(transfer)
            self._wake.set()
            await self._flush(transfer.file_range.length)
            return
        givers = ", ".join(sorted(f"{self.sources.names(peer)} ({peer:.8})" for peer in transfer.senders))
        log.warning("tensor %s of %s has a wrong sum: it came from %s", wrong or "(header)", self.copy.about.name, givers)
        liar = self.schedule.corrupt(transfer)
        if liar is not None:
            self.sources.ban(liar, f"it gave wrong bytes for {wrong or 'the header'} of {self.copy.about.name}")
            self.schedule.leave(liar, lied=True)

    def _first_wrong(self, transfer: RangeTransfer) -> str | None:
        parts = self.copy.about.manifest.parts
        wrong = (index for index in transfer.file_range.parts if not self.copy.is_right(index, lambda count: self.meter.advance(0)))
        return next((parts[index].name for index in wrong), None)

    async def _flush(self, size_bytes: int) -> None:
        """Now and then: what is not remembered on the disk is fetched again after a crash."""
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
        self.sources.tell_refusal(peer, error)
        await self.clock.sleep(_PAUSE_S)
