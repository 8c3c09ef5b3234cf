"""Which layers lie on this peer: fetch, check, load, warm, serve, let go.

A load goes LOADING -> WARM (one check step, which also measures it) -> ACTIVE -> DRAINING -> gone. A failed load changes
nothing: what served before serves on.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.links.links import Links
from meshd.agents.placement.loads import LoadState, ResidentLayers, ResidentModels
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.warmup import warm_up
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.clock import Clock
from meshd.errors import MeshdError, ModelFileError, OutOfMemory, Unavailable
from meshd.kernels.backend import Backend, LoadedLayers
from meshd.kernels.kv import BLOCK_TOKENS, KVPool
from meshd.models.files.gguf import GgufFile
from meshd.protocol.messages import Place, Placed, Unplace, Unplaced
from meshd.types import LayerRange, ModelCard, ModelId, PeerId

log = getLogger(__name__)

_PULL_SHARE = 0.5
"""Of the progress bar, for what must be fetched first."""


@dataclass(frozen=True, slots=True)
class _Key:
    model: ModelId
    layers: LayerRange


@dataclass(slots=True)
class Loader:
    """Owns this peer's loads."""

    links: Links
    library: ModelLibrary
    weights: WeightProvider
    holdings: ResidentModels
    backend: Backend
    compute: ComputeQueue
    clock: Clock
    free_bytes: Callable[[], int]
    """What may still be reserved."""
    on_change: Callable[[], None]
    draining: Callable[[], bool] = lambda: False
    """This peer is about to leave: it loads nothing more."""
    _loading: dict[_Key, asyncio.Task[ResidentLayers]] = field(default_factory=dict)
    _files: dict[int, GgufFile] = field(default_factory=dict)

    def register(self) -> None:
        """Take PLACE and UNPLACE from the links."""
        self.links.register(Place, self._on_place)
        self.links.register(Unplace, self._on_unplace)

    async def close(self) -> None:
        """Let go of everything, loads under way included."""
        for task in self._loading.values():
            task.cancel()
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        for load in list(self.holdings):
            self._release(load)

    async def _on_place(self, sender: PeerId, message: Place, payload: memoryview) -> Placed:
        async with asyncio.timeout(message.deadline_ms / 1000):
            load = await self.place(message)
        return Placed(request=message.request, layers=load.layers, kv_tokens=load.kv_tokens)

    async def place(self, wanted: Place) -> ResidentLayers:
        """An active load with these layers and room for that many tokens. The same wish twice is one load.

        Raises: UnknownModel, DownloadError, StorageError, ModelFileError, OutOfMemory. Cancel: others who wait for it go on.
        """
        present = self._present(wanted)
        if present is not None:
            self._settle(present, wanted)
            return present
        if self.draining():
            raise Unavailable("this peer is about to leave and takes no more layers", hint="place them on another")
        key = _Key(wanted.model, wanted.layers)
        task = self._loading.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(wanted), name=f"load {wanted.layers}")
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        load = await asyncio.shield(task)
        self._settle(load, wanted)
        return load

    def _present(self, wanted: Place) -> ResidentLayers | None:
        """An active load that does, one that is no standby copy first."""
        fitting = [
            load
            for load in self.holdings.of(wanted.model)
            if load.state is LoadState.ACTIVE and wanted.layers in load.layers and load.kv_tokens >= wanted.kv_tokens
        ]
        return max(fitting, key=lambda load: (not load.standby, load.pool.blocks_free if load.pool else 0), default=None)

    def _settle(self, load: ResidentLayers, wanted: Place) -> None:
        """Have a load be what the latest wish for it says; what was once wanted for itself is no standby copy any more."""
        before = load.standby, load.pinned
        load.standby = load.standby and wanted.standby
        load.pinned = load.pinned or wanted.pinned
        if (load.standby, load.pinned) != before:
            self.on_change()

    async def _load(self, wanted: Place) -> ResidentLayers:
        loop = asyncio.get_running_loop()
        card = await self._fetch(wanted)
        if wanted.layers not in card.layers:
            raise ModelFileError(f"{card.name} has layers {card.layers}, not {wanted.layers}")
        load = ResidentLayers(
            card,
            wanted.layers,
            _whole_blocks(wanted.kv_tokens),
            _weights_of(card, wanted.layers),
            standby=wanted.standby,
            pinned=wanted.pinned,
        )
        self._make_room(load)
        self.holdings.loads.append(load)
        try:
            await self._fill(load, wanted.ref)

            def progress(share: float) -> None:
                load.progress = _PULL_SHARE + share * (1 - _PULL_SHARE)
                loop.call_soon_threadsafe(self.on_change)

            await asyncio.to_thread(self._read, load, progress)
            load.state = LoadState.WARM
            await self.compute.call(lambda: warm_up(load))
        except BaseException as error:
            load.state = LoadState.FAILED
            self._release(load)
            if isinstance(error, MeshdError | asyncio.CancelledError):
                raise
            raise ModelFileError(f"loading layers {wanted.layers} of {card.name} failed: {error}") from error
        load.state, load.progress = LoadState.ACTIVE, 1.0
        log.info("layers %s of %s are active: %d MB of weights", load.layers, card.name, load.weight_bytes // 10**6)
        if not load.steady:
            log.warning(
                "%s on this processor computes a token otherwise among others than alone, in the last bits: an answer that goes on "
                "after a loss may differ from one that was not struck",
                self.backend.name,
            )
        self._retire_covered(load)
        self.on_change()
        return load

    async def _fetch(self, wanted: Place) -> ModelCard:
        """The card of a model that is on this disk, or at a peer, and is the one that was meant."""
        known = self.library.local.get(wanted.model)
        return known if known is not None else await self.weights.card(wanted.model, wanted.ref)

    async def _fill(self, load: ResidentLayers, ref: str) -> None:
        """Have on this disk what `_read` will read."""

        def progress(share: float) -> None:
            load.progress = share * _PULL_SHARE
            self.on_change()

        progress(0.0)
        await self.weights.fill(load.card, ref, load.layers, progress)
        progress(1.0)

    def _read(self, load: ResidentLayers, progress: Callable[[float], None]) -> None:
        """On a worker thread: map the file and build the stage's weights and its KV pool."""
        file = self.library.open(load.card)
        self._files[id(load)] = file
        layers = load.layers

        def read(share: float) -> None:
            file.release_pages()  # the backend has its own form of what it read
            progress(share)

        load.weights = self.backend.load(
            load.card.spec,
            layers,
            file,
            embedding=layers.start == 0,
            head=layers.end == load.card.spec.layers,
            progress=read,
        )
        load.weight_bytes = max(load.weight_bytes, load.weights.weight_bytes)  # what was reserved holds what packing adds
        load.pool = KVPool(load.card.spec, layers, load.kv_tokens // BLOCK_TOKENS, BLOCK_TOKENS)

    def _make_room(self, load: ResidentLayers) -> None:
        """Check the reservation before any memory is taken. Idle standby copies give way, then idle loads of the same model; for
        a standby copy nothing does.
        """
        for other in [] if load.standby else self._in_the_way(load):
            if self.free_bytes() >= load.reserved_bytes:
                return
            self._release(other)
        free = self.free_bytes()
        if free < load.reserved_bytes:
            missing = load.reserved_bytes - free
            raise OutOfMemory(
                f"layers {load.layers} of {load.card.name} need {load.reserved_bytes} bytes with KV for {load.kv_tokens} tokens, "
                f"{missing} more than are free here",
                hint="fewer layers on this peer, a smaller context, or a higher --memory",
            )

    def _in_the_way(self, load: ResidentLayers) -> list[ResidentLayers]:
        """Loads that may be let go for this one, the dearest last."""
        standby = [other for other in self.holdings if other.gives_way]
        same = [other for other in self.holdings.of(load.card.id) if other.state is LoadState.ACTIVE and not other.in_use]
        return standby + [other for other in same if not other.standby]

    def _retire_covered(self, new: ResidentLayers) -> None:
        """Older loads whose layers all lie in the new one serve their sessions to the end, then go."""
        for load in self.holdings.of(new.card.id):
            dearer = new.standby and not load.standby
            if load is not new and load.layers in new.layers and load.state is LoadState.ACTIVE and not dearer:
                load.state = LoadState.DRAINING
        self.sweep()

    def sweep(self) -> None:
        """Release draining loads that no session uses any more. Called whenever a session ends."""
        for load in list(self.holdings):
            if load.state is LoadState.DRAINING and not load.in_use:
                self._release(load)

    def _release(self, load: ResidentLayers) -> None:
        if load in self.holdings.loads:
            self.holdings.loads.remove(load)
        weights, load.weights, load.pool = load.weights, None, None
        if weights is not None:
            _close_quietly(weights)
        file = self._files.pop(id(load), None)
        if file is not None:
            file.close()
        self.on_change()

    async def _on_unplace(self, sender: PeerId, message: Unplace, payload: memoryview) -> Unplaced:
        return Unplaced(request=message.request, freed_bytes=self.unplace(message.model))

    def unplace(self, model: ModelId) -> int:
        """Let go of a model; bytes that are or will be free. Sessions that run end first."""
        freed = 0
        for load in self.holdings.of(model):
            if load.state is LoadState.ACTIVE:
                freed += load.reserved_bytes
                load.state = LoadState.DRAINING
        self.sweep()
        self.on_change()
        return freed


def _close_quietly(weights: LoadedLayers) -> None:
    try:
        weights.close()
    except MeshdError as error:
        log.warning("freeing weights: %s", error)


def _whole_blocks(tokens: int) -> int:
    return math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS


def _weights_of(card: ModelCard, layers: LayerRange) -> int:
    total = sum(card.held_layer_bytes[layer] for layer in layers)
    total += card.embedding_bytes if layers.start == 0 else 0
    return total + (card.held_head_bytes if layers.end == card.spec.layers else 0)
