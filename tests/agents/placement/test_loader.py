"""Loading and unloading: which layers give way to which, and how standby copies are loaded, promoted and replaced."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from in_process.clusters import make_card
from in_process.peers import Peers, until
from meshd.agents.device.compute import ComputeThread
from meshd.agents.placement.loader import Loader
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.ready.stages import SharedStages
from meshd.agents.placement.resident import LoadState, ResidentLayers, ResidentModels
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.sources import WeightSources
from meshd.clock import SystemClock
from meshd.errors import DownloadError, ModelFileError, NoPeer, OutOfMemory, RemoteFailure, Unavailable
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.share import KvShare
from meshd.kernels.registry import make_backend
from meshd.models.store.store import Store
from meshd.numerics import NumericsId
from meshd.protocol.messages import Place, Placed
from meshd.types import LayerRange, ModelCard, ModelId
from tiny.llama import TinyLlama, tiny_spec

SPEC = tiny_spec(layers=4, tied=True)
KV = 64


def card_of(number: int) -> ModelCard:
    card = make_card(SPEC.layers, layer_bytes=[300_000] * SPEC.layers)
    return msgspec.structs.replace(
        card, id=ModelId(f"{number:032x}"), name=f"tiny-{number}", spec=SPEC, embedding_bytes=50_000, head_bytes=50_000
    )


CARDS = [card_of(number) for number in range(2)]


class FromMemory(Loader):
    """Loads a made-up model instead of a file."""

    __slots__ = ("broken", "fetching", "reading", "unfetchable")
    fetching: asyncio.Event
    """If it is set as an attribute: fetching ends with this event."""
    reading: threading.Event
    """The same for reading."""

    async def _fill(self, resident: ResidentLayers, ref: str) -> None:
        """Fetch nothing: this loader needs no file."""
        if resident.card.name in getattr(self, "unfetchable", ()):
            raise DownloadError("no source has it")
        if (event := getattr(self, "fetching", None)) is not None:
            await event.wait()

    def _read(self, resident: ResidentLayers, progress: Callable[[float], None]) -> None:
        if (event := getattr(self, "reading", None)) is not None:
            event.wait(5.0)
        source = TinyLlama(SPEC, kinds={"token_embd": "Q8_0"})
        if resident.card.name in getattr(self, "broken", ()):
            raise ModelFileError("torn")
        ends = {"embedding": resident.layers.start == 0, "head": resident.layers.end == SPEC.layers}
        resident.weights = self.backend.load(SPEC, resident.layers, source, progress=progress, **ends)
        resident.kv = KvShare(self.residents.arena, resident.card.id, SPEC, resident.layers, resident.kv_tokens)


class LoaderDriver:
    """A loader whose memory and draining state the test sets."""

    def __init__(self, loader: FromMemory, budget: list[int], draining: list[bool]) -> None:
        self.loader, self.budget, self.draining = loader, budget, draining

    async def load(self, start: int, end: int, *, model: int = 0, kv_tokens: int = KV, **how: Any) -> ResidentLayers:
        return await self.loader.place(place_request(start, end, model=model, kv_tokens=kv_tokens, **how))

    def room_for(self, *loads: tuple[int, int]) -> None:
        """Set the memory budget to exactly what these layer ranges need together."""
        self.budget[0] = sum(sized(start, end) for start, end in loads)

    @property
    def ranges(self) -> list[tuple[str, str, bool]]:
        return [(resident.card.name, str(resident.layers), resident.standby) for resident in self.loader.residents]


def place_request(start: int, end: int, *, model: int = 0, kv_tokens: int = KV, **how: Any) -> Place:
    card = CARDS[model]
    layers = LayerRange(start, end)
    return Place(request=1, model=card.id, ref=card.ref, layers=layers, kv_tokens=kv_tokens, deadline_ms=10_000, **how)


def sized(start: int, end: int, kv_tokens: int = KV) -> int:
    ends = 50_000 * ((start == 0) + (end == SPEC.layers))
    return (end - start) * (300_000 + kv_tokens * CARDS[0].kv_bytes_per_token_layer()) + ends


@pytest.fixture
async def driver(peers: Peers, tmp_path: Path) -> AsyncIterator[LoaderDriver]:
    links = peers.start("a").links
    sources = WeightSources(links.id, links, adverts=list, names=str, clock=SystemClock(), link_stats=dict)
    headers = HeaderFetcher(links, sources)
    library = ModelLibrary(links=links, store=Store(tmp_path), adverts=list, on_change=lambda: None, headers=headers)
    library.local |= {card.id: card for card in CARDS}
    residents, budget, draining = ResidentModels(HostArena(1 << 32)), [1 << 30], [False]
    compute = ComputeThread()

    def spare_bytes() -> int:
        return budget[0] - residents.reserved_bytes

    loader = FromMemory(
        links=links,
        library=library,
        weights=WeightProvider(links, library, sources, SystemClock()),
        residents=residents,
        backend=make_backend("torch", 1),
        stages=SharedStages(residents, spare_bytes, lambda: None),
        compute=compute,
        clock=SystemClock(),
        spare_bytes=spare_bytes,
        on_change=lambda: None,
        draining=lambda: draining[0],
    )
    yield LoaderDriver(loader, budget, draining)
    await loader.close()
    compute.close()


async def test_the_advert_marks_a_standby_copy(driver: LoaderDriver) -> None:
    resident = await driver.load(0, 2, standby=True)
    assert resident.holding().standby
    assert resident.holding().state == "active"


async def test_an_ordinary_request_promotes_a_standby_copy_without_a_load(driver: LoaderDriver) -> None:
    copy = await driver.load(0, 2, standby=True)
    assert await driver.load(0, 2, pinned=True) is copy
    assert not copy.standby
    assert copy.pinned
    assert await driver.load(0, 2, standby=True) is copy
    assert not copy.standby


async def test_a_request_that_arrives_while_the_copy_still_loads_promotes_it_too(driver: LoaderDriver) -> None:
    copy, resident = await asyncio.gather(driver.load(0, 2, standby=True), driver.load(0, 2))
    assert copy is resident
    assert not resident.standby


async def test_copies_of_any_model_give_way_to_an_ordinary_load(driver: LoaderDriver) -> None:
    await driver.load(0, 2, standby=True)
    await driver.load(2, 4, model=1)
    driver.room_for((0, 2), (2, 4))
    await driver.load(0, 2, model=1)
    assert driver.ranges == [("tiny-1", "2-4", False), ("tiny-1", "0-2", False)]


async def test_a_copy_gives_way_before_an_idle_load_of_the_same_model(driver: LoaderDriver) -> None:
    await driver.load(0, 2)
    await driver.load(0, 2, model=1, standby=True)
    driver.room_for((0, 2), (2, 4))
    await driver.load(2, 4)
    assert driver.ranges == [("tiny-0", "0-2", False), ("tiny-0", "2-4", False)]


async def test_a_copy_in_use_stays_and_the_load_is_refused(driver: LoaderDriver) -> None:
    copy = await driver.load(0, 2, standby=True)
    driver.room_for((0, 2))
    assert copy.kv is not None
    lease = copy.kv.open(copy.layers, 1)
    with pytest.raises(OutOfMemory):
        await driver.load(0, 2, model=1)
    lease.forget()
    await driver.load(0, 2, model=1)
    assert driver.ranges == [("tiny-1", "0-2", False)]


async def test_nothing_gives_way_to_a_copy(driver: LoaderDriver) -> None:
    await driver.load(0, 2)
    await driver.load(0, 2, model=1, standby=True)
    driver.room_for((0, 2), (0, 2))
    with pytest.raises(OutOfMemory):
        await driver.load(2, 4, standby=True)
    assert driver.ranges == [("tiny-0", "0-2", False), ("tiny-1", "0-2", True)]


async def test_a_copy_that_covers_an_ordinary_load_does_not_replace_it(driver: LoaderDriver) -> None:
    """A standby copy may have less KV, and may be released at any time."""
    small = await driver.load(1, 2, kv_tokens=4 * KV)
    await driver.load(0, 2, standby=True)
    assert small.state is LoadState.ACTIVE
    await driver.load(0, 3)
    assert driver.ranges == [("tiny-0", "0-3", False)]


async def test_unplacing_a_model_releases_its_standby_copies(driver: LoaderDriver) -> None:
    await driver.load(0, 2)
    await driver.load(2, 4, standby=True)
    assert driver.loader.unplace(CARDS[0].id) == sum(sized(*layers) for layers in ((0, 2), (2, 4)))
    assert driver.ranges == []


async def test_unplacing_a_model_ends_its_load_while_the_weights_are_fetched(driver: LoaderDriver) -> None:
    driver.loader.fetching = asyncio.Event()
    load = asyncio.create_task(driver.load(0, 2, standby=True))
    other = asyncio.create_task(driver.load(0, 2, model=1))
    await until(lambda: len(driver.ranges) == 2)
    driver.loader.unplace(CARDS[0].id)
    with pytest.raises(Unavailable, match="unplaced meanwhile"):
        await load
    driver.loader.fetching.set()
    await other
    assert driver.ranges == [("tiny-1", "0-2", False)]
    assert (await driver.load(0, 2)).state is LoadState.ACTIVE, "it can be placed again"


async def test_unplacing_a_model_ends_its_load_while_the_weights_are_read(driver: LoaderDriver) -> None:
    driver.loader.reading = threading.Event()
    load = asyncio.create_task(driver.load(0, 2))
    await until(lambda: bool(driver.loader._reading))
    driver.loader.unplace(CARDS[0].id)
    driver.loader.reading.set()
    with pytest.raises(Unavailable, match="unplaced meanwhile"):
        await load
    assert driver.ranges == []
    assert (await driver.load(0, 2)).state is LoadState.ACTIVE


async def test_layers_with_kv_in_use_are_released_only_when_the_kv_is_freed(driver: LoaderDriver) -> None:
    resident = await driver.load(0, 2)
    assert resident.kv is not None
    lease = resident.kv.open(resident.layers, 1)
    driver.loader.unplace(CARDS[0].id)
    assert resident.state is LoadState.DRAINING
    lease.forget()
    driver.loader.sweep()
    assert driver.ranges == []


async def test_a_draining_peer_loads_nothing_more_but_promotes_its_copies(driver: LoaderDriver) -> None:
    copy = await driver.load(0, 2, standby=True)
    driver.draining[0] = True
    with pytest.raises(Unavailable, match="about to leave"):
        await driver.load(2, 4)
    assert await driver.load(0, 2) is copy


async def test_a_failed_load_leaves_nothing_behind(driver: LoaderDriver) -> None:
    driver.loader.broken = {"tiny-1"}
    await driver.load(0, 2)
    with pytest.raises(ModelFileError):
        await driver.load(0, 2, model=1, standby=True)
    assert driver.ranges == [("tiny-0", "0-2", False)]


async def test_nothing_is_released_before_the_weights_of_a_load_have_come(driver: LoaderDriver) -> None:
    copy, old = await driver.load(0, 2, model=1, standby=True), await driver.load(0, 2)
    driver.room_for((0, 2), (0, 2))
    driver.loader.unfetchable = {"tiny-0"}
    with pytest.raises(DownloadError):
        await driver.load(2, 4)
    assert [(resident is copy, resident is old) for resident in driver.loader.residents] == [(True, False), (False, True)]
    assert {copy.state, old.state} == {LoadState.ACTIVE}


async def test_a_load_that_can_never_fit_is_refused_before_its_weights_are_fetched(driver: LoaderDriver) -> None:
    await driver.load(0, 2, standby=True)
    driver.room_for((0, 2))
    driver.loader.unfetchable = {"tiny-1"}
    with pytest.raises(OutOfMemory):
        await driver.load(0, 4, model=1)
    assert driver.ranges == [("tiny-0", "0-2", True)]


async def test_what_was_released_for_a_load_that_fails_is_loaded_again(driver: LoaderDriver) -> None:
    await driver.load(0, 2, standby=True)
    driver.room_for((0, 2))
    driver.loader.broken = {"tiny-1"}
    with pytest.raises(ModelFileError):
        await driver.load(0, 2, model=1)
    await asyncio.gather(*driver.loader._restoring)
    assert driver.ranges == [("tiny-0", "0-2", True)]
    assert [resident.state for resident in driver.loader.residents] == [LoadState.ACTIVE]


async def test_two_loads_that_are_fetched_at_once_do_not_take_the_same_memory(driver: LoaderDriver) -> None:
    driver.room_for((0, 2))
    results = await asyncio.gather(driver.load(0, 2), driver.load(0, 2, model=1), return_exceptions=True)
    assert [type(result) for result in results].count(OutOfMemory) == 1
    assert len(driver.ranges) == 1


@pytest.mark.parametrize("first", [KV, 4 * KV])
async def test_requests_at_the_same_time_each_get_the_kv_that_they_ask_for(driver: LoaderDriver, first: int) -> None:
    one, other = await asyncio.gather(driver.load(0, 2, kv_tokens=first), driver.load(0, 2, kv_tokens=5 * KV - first))
    assert one.kv_tokens >= first
    assert other.kv_tokens >= 5 * KV - first
    assert [resident.kv_tokens for resident in driver.loader.residents] == [4 * KV]


async def test_other_peers_request_copies_with_place(driver: LoaderDriver, peers: Peers) -> None:
    driver.loader.register()
    links = driver.loader.links
    reply, _ = await links.request(links.id, place_request(0, 2, standby=True), timeout_s=10)
    assert isinstance(reply, Placed)
    assert driver.ranges == [("tiny-0", "0-2", True)]
    driver.draining[0] = True
    with pytest.raises(RemoteFailure, match="about to leave"):
        await links.request(links.id, place_request(2, 4), timeout_s=10)


async def test_a_request_that_expects_other_numerics_is_refused(driver: LoaderDriver) -> None:
    own, other = NumericsId("torch/f32/512/0123456789abcdef"), NumericsId("torch/f32/512/fedcba9876543210")
    driver.loader.residents.numerics = own
    with pytest.raises(NoPeer, match=other):
        await driver.load(0, 2, numerics=other)
    assert not driver.ranges
    await driver.load(0, 2, numerics=own)
    await driver.load(2, 3)
    assert len(driver.ranges) == 2
