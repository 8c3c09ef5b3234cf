"""Serves weights to other peers: the list of the tensors that this peer has, the tensors' hashes and their bytes.

The bytes come from a model's whole file, or from checked parts of a partial copy. While sessions run on this peer, the rate is
limited.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

from meshd.agents.links.links import Links
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights.transfer import CHUNK_BYTES
from meshd.clock import Clock
from meshd.errors import InvalidRequest, NotReady, Overloaded, UnknownModel
from meshd.models.cards import shown_to_peers
from meshd.models.files.disk import FileStamp, read_range, stamp_of
from meshd.models.files.manifest import Manifest, Offer, encode_offer
from meshd.models.store.partial_copy import HEADER_INDEX, PartialCopy
from meshd.models.store.progress import ProgressMeter, PullPhase
from meshd.models.store.store import StoredModel
from meshd.protocol.messages import FetchManifest, FetchWeights, ManifestData, WeightData
from meshd.types import LinkStats, ModelId, PeerId

SHARE = 0.3
"""Fraction of a link's measured bandwidth that weights may use while sessions run on this peer."""
_UNMEASURED_BYTES_S = 10e6
"""Bandwidth that is assumed for a link without a measurement."""
_LONGEST_WAIT_S = 10.0
"""A request that would have to wait longer is refused; the requesting peer sends it again later."""
_HASHING_WAIT_S = 2.0
"""How long a request waits for the hashes of a file before it is answered with NotReady."""
_HASHING_NICE = 10
_MAX_OPEN = 64


@dataclass(slots=True)
class RateLimiter:
    """Limits the rate of weights to all peers together, so that activations of running sessions don't wait for them."""

    clock: Clock
    busy: Callable[[], bool]
    """Returns whether sessions run on this peer."""
    link_stats: Callable[[], dict[PeerId, LinkStats]]
    _free_at: float = 0.0

    async def wait(self, peer: PeerId, size_bytes: int) -> None:
        """Wait until this many bytes may be sent to a peer. Raises: Overloaded if that would take longer than `_LONGEST_WAIT_S`."""
        now = self.clock.monotonic()
        if not self.busy():
            self._free_at = now
            return
        begin = max(now, self._free_at)
        if begin - now > _LONGEST_WAIT_S:
            raise Overloaded("weights are sent slowly while sessions run here", retry_after_s=1.0)
        stats = self.link_stats().get(peer)
        self._free_at = begin + size_bytes / (SHARE * (stats.bandwidth_bytes_s if stats else _UNMEASURED_BYTES_S))
        if begin > now:
            await self.clock.sleep(begin - now)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file to read weights from: a whole file, or a partial copy (`copy`)."""

    path: Path
    size: int
    stamp: FileStamp | None = None
    copy: PartialCopy | None = None

    def is_fresh(self) -> bool:
        """Whether the file has not changed since it was opened."""
        return self.copy.is_fresh() if self.copy is not None else self.stamp == stamp_of(self.path)

    def check(self, offset: int, end: int) -> None:
        """Check that the bytes from `offset` to `end` are on this disk. Raises: InvalidRequest if not."""
        here = end <= self.size if self.copy is None else self.copy.covers(offset, end)
        if not here:
            raise InvalidRequest(f"bytes {offset} to {end} of this model are not here")


@dataclass(slots=True)
class WeightServer:
    """Answers FETCH_MANIFEST and FETCH_WEIGHTS."""

    links: Links
    library: ModelLibrary
    limiter: RateLimiter
    _manifests: dict[ModelId, asyncio.Task[Manifest]] = field(default_factory=dict)
    _opened: dict[ModelId, _Opened] = field(default_factory=dict)

    def register(self) -> None:
        """Register the handlers of FETCH_MANIFEST and FETCH_WEIGHTS."""
        self.links.register(FetchManifest, self._on_fetch_manifest)
        self.links.register(FetchWeights, self._on_fetch_weights)

    async def close(self) -> None:
        """Stop hashing."""
        for task in self._manifests.values():
            task.cancel()
        await asyncio.gather(*self._manifests.values(), return_exceptions=True)

    async def _on_fetch_manifest(self, sender: PeerId, message: FetchManifest, payload: memoryview) -> tuple[ManifestData, bytes]:
        offer = await self._offer(message.model)
        card = self.library.card_here(message.model)
        if card is None:
            raise UnknownModel("this peer has nothing of that model")
        data = encode_offer(offer)
        return ManifestData(request=message.request, card=shown_to_peers(card), sha256=sha256(data).hexdigest()), data

    async def _offer(self, model: ModelId) -> Offer:
        stored = await asyncio.to_thread(self.library.store.get, model)
        if stored is not None:
            return Offer(await self._manifest_of(stored))
        copy = await asyncio.to_thread(self.library.store.partials.get, model)
        if copy is None or HEADER_INDEX not in copy.have:
            raise UnknownModel("this peer has nothing of that model")
        return Offer(copy.about.manifest, tuple(sorted(copy.have)))

    async def _manifest_of(self, stored: StoredModel) -> Manifest:
        """Get a model's manifest, which is made once and cached. Raises: NotReady if that takes over `_HASHING_WAIT_S`."""
        task = self._manifests.get(stored.id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.get_running_loop().create_task(self._make_manifest(stored), name=f"hash {stored.name}")
            self._manifests[stored.id] = task
        done, _ = await asyncio.wait([task], timeout=_HASHING_WAIT_S)
        if not done:
            raise NotReady(f"the tensors of {stored.name} are being hashed here", retry_after_s=0.5)
        return task.result()

    async def _make_manifest(self, stored: StoredModel) -> Manifest:
        """Hash a model's file on a thread. Cancel: waits for the thread, which stops at its next chunk."""
        meter = ProgressMeter(stored.name, lambda step: None)
        meter.begin(PullPhase.CHECKING, total=stored.size_bytes)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, thread_name_prefix="hash", initializer=_lower_priority) as thread:
            work = loop.run_in_executor(thread, partial(self.library.store.manifest, stored, meter.advance))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                meter.stop()
                await asyncio.wait([work])
                work.exception()
                raise

    async def _on_fetch_weights(self, sender: PeerId, message: FetchWeights, payload: memoryview) -> tuple[WeightData, bytes]:
        if message.offset < 0 or not 0 < message.length <= CHUNK_BYTES:
            raise InvalidRequest(f"{message.length} bytes can't be asked for at once: 1 to {CHUNK_BYTES} can", param="length")
        await self.limiter.wait(sender, message.length)
        data = await asyncio.to_thread(self._read, message.model, message.offset, message.length)
        return WeightData(request=message.request, offset=message.offset), data

    def _read(self, model: ModelId, offset: int, length: int) -> bytes:
        opened = self._opened.get(model)
        if opened is None or not opened.is_fresh():
            opened = self._open(model)
        opened.check(offset, offset + length)
        return read_range(opened.path, offset, length)

    def _open(self, model: ModelId) -> _Opened:
        """Find a model's file, and check it if it has changed on the disk. Raises: UnknownModel, ModelFileError, StorageError."""
        stored = self.library.store.get(model)
        if stored is not None:
            stamp = stamp_of(stored.path)
            if stamp != stored.stamp:
                self.library.store.open(stored).close()
            opened = _Opened(stored.path, stored.size_bytes, stamp=stamp)
        else:
            copy = self.library.store.partials.get(model)
            if copy is None:
                raise UnknownModel("this peer has nothing of that model")
            opened = _Opened(copy.path, copy.about.manifest.size, copy=copy)
        if len(self._opened) >= _MAX_OPEN:
            self._opened.clear()
        self._opened[model] = opened
        return opened


def _lower_priority() -> None:
    """Lower this thread's priority, so that the threads that compute answers run first."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _HASHING_NICE)
