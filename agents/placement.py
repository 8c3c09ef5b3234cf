"""Which layers lie on this peer: fetch, check, load, warm, serve, let go.

A load goes LOADING -> WARM (one check step, which also measures it) -> ACTIVE -> DRAINING -> gone. A failed load changes
nothing: what served before serves on.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.compute import ComputeThread
from meshd.agents.holdings import Holdings, Load, LoadState
from meshd.agents.library import Library
from meshd.agents.links import Links
from meshd.agents.warmup import warm_up
from meshd.clock import Clock
from meshd.errors import MeshdError, ModelFileError, OutOfMemory
from meshd.kernels.backend import Backend, LoadedLayers
from meshd.kernels.kv import BLOCK_TOKENS, KVPool
from meshd.models.gguf import GgufFile
from meshd.protocol.messages import Place, Placed, Unplace, Unplaced
from meshd.types import LayerRange, ModelCard, ModelId, PeerId

log = getLogger(__name__)

_PULL_SHARE = 0.5
"""Of the progress bar, when the file must be fetched first."""


@dataclass(frozen=True, slots=True)
class _Key:
    model: ModelId
    layers: LayerRange


@dataclass(slots=True)
class Placement:
    """Owns this peer's loads."""

    links: Links
    library: Library
    holdings: Holdings
    backend: Backend
    compute: ComputeThread
    clock: Clock
    free_bytes: Callable[[], int]
    """What may still be reserved."""
    on_change: Callable[[], None]
    _loading: dict[_Key, asyncio.Task[Load]] = field(default_factory=dict)
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

    async def place(self, wanted: Place) -> Load:
        """An active load with these layers and room for that many tokens. The same wish twice is one load.

        Raises: UnknownModel, DownloadError, StorageError, ModelFileError, OutOfMemory. Cancel: others who wait for it go on.
        """
        present = self.holdings.find(wanted.model, wanted.layers)
        if present is not None and present.kv_tokens >= wanted.kv_tokens:
            return present
        key = _Key(wanted.model, wanted.layers)
        task = self._loading.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load(wanted), name=f"load {wanted.layers}")
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        return await asyncio.shield(task)

    async def _load(self, wanted: Place) -> Load:
        loop = asyncio.get_running_loop()
        card = await self._fetch(wanted)
        if wanted.layers not in card.layers:
            raise ModelFileError(f"{card.name} has layers {card.layers}, not {wanted.layers}")
        load = Load(card, wanted.layers, _whole_blocks(wanted.kv_tokens), _weights_of(card, wanted.layers))
        self._make_room(load)
        self.holdings.loads.append(load)
        try:
            load.progress = _PULL_SHARE
            self.on_change()

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
        self._retire_covered(load)
        self.on_change()
        return load

    async def _fetch(self, wanted: Place) -> ModelCard:
        """The card of a file that is on this disk and is the one that was meant."""
        known = self.library.local.get(wanted.model)
        if known is not None:
            return known
        card = await self.library.pull(wanted.ref, lambda share: None)
        if card.id != wanted.model:
            raise ModelFileError(f"{wanted.ref} is another file here ({card.id}) than at the peer that asks ({wanted.model})")
        return card

    def _read(self, load: Load, progress: Callable[[float], None]) -> None:
        """On a worker thread: map the file and build the stage's weights and its KV pool."""
        stored = self.library.store.get(load.card.id)
        if stored is None:
            raise ModelFileError(f"the file of {load.card.name} has gone from this disk")
        file = self.library.store.open(stored)
        self._files[id(load)] = file
        layers = load.layers
        load.weights = self.backend.load(
            load.card.spec,
            layers,
            file,
            embedding=layers.start == 0,
            head=layers.end == load.card.spec.layers,
            progress=progress,
        )
        load.weight_bytes = load.weights.weight_bytes
        load.pool = KVPool(load.card.spec, layers, load.kv_tokens // BLOCK_TOKENS, BLOCK_TOKENS)

    def _make_room(self, load: Load) -> None:
        """Check the reservation before any memory is taken; idle loads of the same model give way."""
        for other in self.holdings.of(load.card.id):
            if self.free_bytes() >= load.reserved_bytes:
                return
            if other.state is LoadState.ACTIVE and other.sessions == 0:
                self._release(other)
        free = self.free_bytes()
        if free < load.reserved_bytes:
            missing = load.reserved_bytes - free
            raise OutOfMemory(
                f"layers {load.layers} of {load.card.name} need {load.reserved_bytes} bytes with KV for {load.kv_tokens} tokens, "
                f"{missing} more than are free here",
                hint="fewer layers on this peer, a smaller context, or a higher --memory",
            )

    def _retire_covered(self, new: Load) -> None:
        """Older loads whose layers all lie in the new one serve their sessions to the end, then go."""
        for load in self.holdings.of(new.card.id):
            if load is not new and load.layers in new.layers and load.state is LoadState.ACTIVE:
                load.state = LoadState.DRAINING
        self.sweep()

    def sweep(self) -> None:
        """Release draining loads that no session uses any more. Called whenever a session ends."""
        for load in list(self.holdings):
            if load.state is LoadState.DRAINING and load.sessions == 0:
                self._release(load)

    def _release(self, load: Load) -> None:
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
    total = sum(card.layer_bytes[layer] for layer in layers)
    total += card.embedding_bytes if layers.start == 0 else 0
    return total + (card.head_bytes if layers.end == card.spec.layers else 0)
