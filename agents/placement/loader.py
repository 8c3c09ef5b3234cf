"""Loads and unloads layers on this peer: fetch the weights, read them, run the check step, serve, release.

It decides which layers to release when memory is short. Which layers belong on which peer is decided elsewhere: by a user or the
planner (`client.py`) and by the keeper (`replication.py`). Their requests arrive as PLACE and UNPLACE.

A run of layers goes LOADING -> WARM (the check step, which also measures the layers) -> ACTIVE -> DRAINING -> released. When a load
fails, layers that served before keep serving.
"""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.links.links import Links
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.ready.layer_times import LayersKey, LayerTimes, LayerTimesFile
from meshd.agents.placement.ready.stages import SharedStages
from meshd.agents.placement.ready.warmup import warm_up
from meshd.agents.placement.resident import LoadState, ResidentLayers, ResidentModels
from meshd.agents.placement.restart.placements import PlacedLayers, Placements
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.clock import Clock
from meshd.errors import MeshdError, ModelFileError, NotReady, OutOfMemory, Unavailable
from meshd.kernels.backend import Backend, LoadedLayers
from meshd.kernels.kv.memory import PAGE_TOKENS
from meshd.kernels.kv.share import KvShare
from meshd.models.files.gguf import GgufFile
from meshd.numerics import is_promised
from meshd.protocol.messages import Place, Placed, Unplace, Unplaced
from meshd.state import MemoryFolder
from meshd.types import LayerRange, ModelCard, ModelId, PeerId

log = getLogger(__name__)

_PULL_SHARE = 0.5
"""Reported progress (0 to 1) at which all weights are fetched. The rest stands for reading them."""


@dataclass(frozen=True, slots=True)
class _Key:
    model: ModelId
    layers: LayerRange


@dataclass(frozen=True, slots=True)
class _Load:
    """A load that runs."""

    kv_tokens: int
    task: "asyncio.Task[ResidentLayers]"


@dataclass(slots=True)
class Loader:
    """Owns this peer's resident layers."""

    links: Links
    library: ModelLibrary
    weights: WeightProvider
    residents: ResidentModels
    backend: Backend
    stages: SharedStages
    compute: ComputeQueue
    clock: Clock
    spare_bytes: Callable[[], int]
    """Returns the bytes that may still be reserved; less than 0 while layers are promised memory that others are yet to give up."""
    on_change: Callable[[], None]
    placements: Placements = field(default_factory=lambda: Placements(MemoryFolder()))
    layer_times: LayerTimesFile = field(default_factory=lambda: LayerTimesFile(MemoryFolder()))
    draining: Callable[[], bool] = lambda: False
    """Whether this peer is being drained, and so loads nothing more."""
    _loading: dict[_Key, _Load] = field(default_factory=dict)
    _reading: set[_Key] = field(default_factory=set)
    """Loads on a worker thread or on the compute thread: they can't be ended there at once."""
    _withdrawn: set[_Key] = field(default_factory=set)
    """Loads of `_reading` whose model was unplaced meanwhile: they are released at their end."""
    _restoring: set["asyncio.Task[None]"] = field(default_factory=set)
    """Loads of layers that were released for a load which then failed."""
    _files: dict[int, GgufFile] = field(default_factory=dict)
    """Open files by the `id()` of the resident layers that use them."""

    def register(self) -> None:
        """Register the handlers of PLACE and UNPLACE."""
        self.links.register(Place, self._on_place)
        self.links.register(Unplace, self._on_unplace)

    async def close(self) -> None:
        """Cancel all loads and release all layers."""
        tasks = [*self._restoring, *(load.task for load in self._loading.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.stages.close()
        for resident in list(self.residents):
            self._release(resident)

    async def _on_place(self, sender: PeerId, message: Place, payload: memoryview) -> Placed:
        try:
            async with asyncio.timeout(message.deadline_ms / 1000):
                resident = await self.place(message)
        except TimeoutError:
            raise NotReady(f"layers {message.layers} are not loaded within {message.deadline_ms} ms; the load continues") from None
        return Placed(request=message.request, layers=resident.layers, kv_tokens=resident.kv_tokens)

    async def place(self, request: Place, *, restored: bool = False) -> ResidentLayers:
        """Load layers, unless they are active with enough KV, and record that they are placed here.

        `restored`: this peer asks for them itself, because they were placed here before it restarted.

        Requests for the same layers at the same time share one load. One for more KV than the load reserves waits for its end.

        Returns: active layers that contain the requested ones.
        Raises: UnknownModel, DownloadError, StorageError, ModelFileError, OutOfMemory; Unavailable while this peer is drained;
        NoPeer if it has other numerics than the request expects.
        Cancel: the load continues for its other callers.
        """
        self.residents.check_numerics(request.numerics)
        key = _Key(request.model, request.layers)
        while True:
            present = self._present(request)
            if present is not None:
                return await self._asked_for(present, request, restored)
            if self.draining():
                raise Unavailable("this peer is about to leave and takes no more layers", hint="place them on another")
            load = self._loading.get(key) or self._begin(key, request, restored)
            if load.kv_tokens >= request.kv_tokens:
                return await self._asked_for(await self._end_of(load, request.layers), request, restored)
            await asyncio.wait([load.task])
            if load.task.cancelled():
                raise _unplaced(request.layers)

    def _begin(self, key: _Key, request: Place, restored: bool) -> _Load:
        task = asyncio.get_running_loop().create_task(self._load(request, restored), name=f"load {request.layers}")
        self._loading[key] = load = _Load(_whole_pages(request.kv_tokens), task)
        task.add_done_callback(lambda _: self._loading.pop(key, None))
        task.add_done_callback(_note_failure)
        return load

    async def _end_of(self, load: _Load, layers: LayerRange) -> ResidentLayers:
        try:
            return await asyncio.shield(load.task)
        except asyncio.CancelledError:
            if load.task.cancelled():
                raise _unplaced(layers) from None
            raise

    def _present(self, request: Place) -> ResidentLayers | None:
        """Find active layers that satisfy a request; a standby copy only if no other layers do. Returns: None if there are none."""
        fitting = [
            resident
            for resident in self.residents.of(request.model)
            if resident.state is LoadState.ACTIVE and request.layers in resident.layers and resident.kv_tokens >= request.kv_tokens
        ]
        return max(
            fitting,
            key=lambda resident: (not resident.standby, resident.kv_tokens_free),
            default=None,
        )

    async def _asked_for(self, resident: ResidentLayers, request: Place, restored: bool) -> ResidentLayers:
        """Update the flags of layers that a request asked for, and record them.

        A request that is not for a standby copy promotes the copy, a pinned one pins it, and one of a peer ends `restored`.
        """
        before = resident.standby, resident.pinned, resident.restored
        resident.standby = resident.standby and request.standby
        resident.pinned = resident.pinned or request.pinned
        resident.restored = resident.restored and restored
        if (resident.standby, resident.pinned, resident.restored) != before:
            self.on_change()
        if not resident.standby and resident.state is LoadState.ACTIVE:
            card = resident.card
            self.placements.add(
                PlacedLayers(
                    model=card.id,
                    name=card.name,
                    ref=card.ref,
                    layers=resident.layers,
                    kv_tokens=resident.kv_tokens,
                    pinned=resident.pinned,
                )
            )
            await asyncio.to_thread(self.placements.save)
        return resident

    async def _load(self, request: Place, restored: bool) -> ResidentLayers:
        loop = asyncio.get_running_loop()
        key = _Key(request.model, request.layers)
        card = await self._fetch(request)
        if request.layers not in card.layers:
            raise ModelFileError(f"{card.name} has layers {card.layers}, not {request.layers}")
        resident = ResidentLayers(
            card,
            request.layers,
            _whole_pages(request.kv_tokens),
            _weight_bytes(card, request.layers, self.backend),
            standby=request.standby,
            pinned=request.pinned,
            restored=restored,
            has_room=False,
        )
        await self.stages.make_room(resident.reserved_bytes)
        self._check_room(resident)
        self.residents.entries.append(resident)
        released: list[ResidentLayers] = []
        try:
            await self._fill(resident, request.ref)
            if self._room_beside(resident) < 0:
                await self.stages.make_room(0)
            self._make_room(resident, released)

            def progress(share: float) -> None:
                resident.progress = _PULL_SHARE + share * (1 - _PULL_SHARE)
                loop.call_soon_threadsafe(self.on_change)

            self._reading.add(key)
            await asyncio.to_thread(self._read, resident, progress)
            resident.state = LoadState.WARM
            self.on_change()
            await self._check(resident)
            if key in self._withdrawn:
                raise _unplaced(request.layers)
        except BaseException as error:
            resident.state = LoadState.FAILED
            self._release(resident)
            self._restore(released)
            if isinstance(error, MeshdError | asyncio.CancelledError):
                raise
            raise ModelFileError(f"loading layers {request.layers} of {card.name} failed: {error}") from error
        finally:
            self._reading.discard(key)
            self._withdrawn.discard(key)
        resident.state, resident.progress = LoadState.ACTIVE, 1.0
        log.info("layers %s of %s are active: %d MB of weights", resident.layers, card.name, resident.weight_bytes // 10**6)
        if not resident.steady and is_promised(self.residents.numerics):
            log.warning(
                "%s gives a token of these layers other last bits alone than in a batch, although %s promises the same: after a "
                "recovery, the rest of an answer may differ from that of an undisturbed run",
                self.backend.name,
                self.residents.numerics,
            )
        self._retire_covered(resident)
        self.on_change()
        return resident

    async def _fetch(self, request: Place) -> ModelCard:
        """Get the model's card from this disk, or else from a peer or the model's source."""
        known = self.library.local.get(request.model)
        return known if known is not None else await self.weights.card(request.model, request.ref)

    async def _fill(self, resident: ResidentLayers, ref: str) -> None:
        """Fetch the tensors that `_read` needs and that are not on this disk."""

        def progress(share: float) -> None:
            resident.progress = share * _PULL_SHARE
            self.on_change()

        progress(0.0)
        await self.weights.fill(resident.card, ref, resident.layers, progress)
        progress(1.0)

    async def _check(self, resident: ResidentLayers) -> None:
        """Run the check of layers that were just loaded, and keep what it measured."""
        key = LayersKey(
            model=resident.card.id, layers=resident.layers, numerics=self.residents.numerics, threads=self.backend.threads
        )
        if await warm_up(resident, self.compute, self.clock, self.layer_times.find(key)):
            await asyncio.to_thread(self.layer_times.save, key, LayerTimes.of(resident))

    def _read(self, resident: ResidentLayers, progress: Callable[[float], None]) -> None:
        """Map the model's file and build the weights. Runs on a worker thread."""
        file = self.library.open(resident.card)
        self._files[id(resident)] = file
        layers = resident.layers

        def read(share: float) -> None:
            file.release_pages()  # the backend has converted the tensors that it read into its own format
            progress(share)

        resident.weights = self.backend.load(
            resident.card.spec,
            layers,
            file,
            embedding=layers.start == 0,
            head=layers.end == resident.card.spec.layers,
            progress=read,
        )
        resident.weight_bytes = max(resident.weight_bytes, resident.weights.weight_bytes)  # packing can enlarge the weights
        resident.kv = KvShare(self.residents.arena, resident.card.id, resident.card.spec, layers, resident.kv_tokens)

    def _check_room(self, new: ResidentLayers) -> None:
        """Check that the memory that `new` reserves is free, or would be without idle layers. Releases nothing.

        Raises: OutOfMemory.
        """
        idle = 0 if new.standby else sum(other.reserved_bytes for other in self._releasable(new))
        self._require(new, self.spare_bytes() + idle - new.reserved_bytes)

    def _make_room(self, new: ResidentLayers, released: list[ResidentLayers]) -> None:
        """Release idle layers until the memory that `new` reserves is free, and append them to `released`.

        It runs when the weights of `new` are on this disk, and before memory is allocated for them. Idle standby copies are
        released first, then idle layers of the same model. Nothing is released for a standby copy.

        Raises: OutOfMemory.
        """
        for other in [] if new.standby else self._releasable(new):
            if self._room_beside(new) >= 0:
                break
            released.append(other)
            self.placements.released(other.card.id, other.layers)
            self._release(other)
        self._require(new, self._room_beside(new))
        new.has_room = True

    def _room_beside(self, new: ResidentLayers) -> int:
        """Returns: the bytes that are free beside `new`, less than 0 if it lacks some. Loads that are fetched do not count."""
        fetching = (other.reserved_bytes for other in self.residents if other is not new and not other.has_room)
        return self.spare_bytes() + sum(fetching)

    def _require(self, new: ResidentLayers, left_bytes: int) -> None:
        if left_bytes < 0:
            raise OutOfMemory(
                f"layers {new.layers} of {new.card.name} need {new.reserved_bytes} bytes with KV for {new.kv_tokens} tokens, "
                f"{-left_bytes} more than are free here",
                hint="fewer layers on this peer, a smaller context, or a higher --memory",
            )

    def _restore(self, released: list[ResidentLayers]) -> None:
        """Load layers again that were released for a load which failed."""
        for resident in released:
            task = asyncio.get_running_loop().create_task(self._load_again(resident), name=f"restore {resident.layers}")
            self._restoring.add(task)
            task.add_done_callback(self._restoring.discard)

    async def _load_again(self, resident: ResidentLayers) -> None:
        card = resident.card
        try:
            await self.place(
                Place(
                    request=0,
                    model=card.id,
                    ref=card.ref,
                    layers=resident.layers,
                    kv_tokens=resident.kv_tokens,
                    deadline_ms=0,
                    standby=resident.standby,
                    pinned=resident.pinned,
                )
            )
        except MeshdError as error:
            what = f"layers {resident.layers} of {card.name}"
            log.warning("%s, released for a load that failed, can't be loaded again: %s", what, error)

    def _releasable(self, new: ResidentLayers) -> list[ResidentLayers]:
        """List the idle layers that may be released to make room for `new`, in the order of release."""
        standby = [other for other in self.residents if other.gives_way]
        same = [other for other in self.residents.of(new.card.id) if other.state is LoadState.ACTIVE and not other.in_use]
        return standby + [other for other in same if not other.standby]

    def _retire_covered(self, new: ResidentLayers) -> None:
        """Drain older layers that `new` contains, except layers that serve if `new` is a standby copy."""
        for resident in self.residents.of(new.card.id):
            is_covered = resident is not new and resident.layers in new.layers and resident.state is LoadState.ACTIVE
            if is_covered and not (new.standby and not resident.standby):
                resident.state = LoadState.DRAINING
        self.sweep()

    def sweep(self) -> None:
        """Release draining layers that no session uses any more. Must be called whenever a session ends."""
        for resident in list(self.residents):
            if resident.state is LoadState.DRAINING and not resident.in_use:
                self._release(resident)

    def _release(self, resident: ResidentLayers) -> None:
        if resident in self.residents.entries:
            self.residents.entries.remove(resident)
        weights, resident.weights, resident.kv = resident.weights, None, None
        resident.stages.made.clear()
        resident.stages.border_bytes = 0
        if weights is not None:
            _close_quietly(weights)
        file = self._files.pop(id(resident), None)
        if file is not None:
            file.close()
        self.on_change()

    async def _on_unplace(self, sender: PeerId, message: Unplace, payload: memoryview) -> Unplaced:
        freed = self.unplace(message.model)
        await asyncio.to_thread(self.placements.save)
        return Unplaced(request=message.request, freed_bytes=freed)

    def unplace(self, model: ModelId) -> int:
        """Drain all layers of a model, which are released when their last session ends, and end the loads of more of them.

        Returns: bytes freed now or then.
        """
        freed = 0
        self.placements.end(model)
        for key, load in list(self._loading.items()):
            if key.model == model and key in self._reading:
                self._withdrawn.add(key)
            elif key.model == model:
                load.task.cancel()
        for resident in self.residents.of(model):
            if resident.state is LoadState.ACTIVE:
                freed += resident.reserved_bytes
                resident.state = LoadState.DRAINING
        self.sweep()
        self.on_change()
        return freed


def _note_failure(load: asyncio.Task[ResidentLayers]) -> None:
    """Log why a load failed. The request that began it may have reached its deadline before."""
    if not load.cancelled() and (error := load.exception()) is not None:
        log.info("%s failed: %s", load.get_name(), error)


def _unplaced(layers: LayerRange) -> Unavailable:
    return Unavailable(f"layers {layers} were not loaded: the model was unplaced meanwhile", hint="place it again")


def _close_quietly(weights: LoadedLayers) -> None:
    try:
        weights.close()
    except MeshdError as error:
        log.warning("the backend could not free weights: %s", error)


def _whole_pages(tokens: int) -> int:
    return math.ceil(tokens / PAGE_TOKENS) * PAGE_TOKENS


def _weight_bytes(card: ModelCard, layers: LayerRange, backend: Backend) -> int:
    """Predict the bytes that layers take, with embedding and head if they are at the ends. Raises: ModelFileError."""
    table = card.embedding_bytes if layers.start == 0 else 0
    if card.layer_weights:
        return table + backend.memory_bytes(card.weights_of(layers))
    head = card.head_bytes if layers.end == card.spec.layers else 0
    return table + sum(card.layer_bytes[layers.start : layers.end]) + head
