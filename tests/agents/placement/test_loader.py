"""This peer's loads: which give way to which, what a standby copy is, and what becomes of one that is wanted for itself."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from in_process.clusters import make_card
from in_process.peers import Peers
from meshd.agents.device.compute import ComputeThread
from meshd.agents.placement.loader import Loader
from meshd.agents.placement.loads import LoadState, ResidentLayers, ResidentModels
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.sources import WeightSources
from meshd.clock import SystemClock
from meshd.errors import ModelFileError, OutOfMemory, RemoteFailure, Unavailable
from meshd.kernels.kv import BLOCK_TOKENS, KVPool
from meshd.kernels.registry import make_backend
from meshd.models.store.store import Store
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
    """Reads weights from a made-up model instead of a file on a disk."""

    __slots__ = ("broken",)

    async def _fill(self, load: ResidentLayers, ref: str) -> None:
        """Nothing has to come to this disk."""

    def _read(self, load: ResidentLayers, progress: Callable[[float], None]) -> None:
        source = TinyLlama(SPEC, kinds={"token_embd": "Q8_0"})
        if load.card.name in getattr(self, "broken", ()):
            raise ModelFileError("torn")
        ends = {"embedding": load.layers.start == 0, "head": load.layers.end == SPEC.layers}
        load.weights = self.backend.load(SPEC, load.layers, source, progress=progress, **ends)
        load.pool = KVPool(SPEC, load.layers, load.kv_tokens // BLOCK_TOKENS, BLOCK_TOKENS)


class Placing:
    """A placement with so much memory, and what it told."""

    def __init__(self, placement: FromMemory, budget: list[int], draining: list[bool]) -> None:
        self.placement, self.budget, self.draining = placement, budget, draining

    async def load(self, start: int, end: int, *, model: int = 0, kv_tokens: int = KV, **how: bool) -> ResidentLayers:
        return await self.placement.place(wish(start, end, model=model, kv_tokens=kv_tokens, **how))

    def room_for(self, *loads: tuple[int, int]) -> None:
        """Leave memory for just so many loads of these layers."""
        self.budget[0] = sum(sized(start, end) for start, end in loads)

    @property
    def ranges(self) -> list[tuple[str, str, bool]]:
        return [(load.card.name, str(load.layers), load.standby) for load in self.placement.holdings]


def wish(start: int, end: int, *, model: int = 0, kv_tokens: int = KV, **how: bool) -> Place:
    card = CARDS[model]
    layers = LayerRange(start, end)
    return Place(request=1, model=card.id, ref=card.ref, layers=layers, kv_tokens=kv_tokens, deadline_ms=10_000, **how)


def sized(start: int, end: int, kv_tokens: int = KV) -> int:
    ends = 50_000 * ((start == 0) + (end == SPEC.layers))
    return (end - start) * (300_000 + kv_tokens * CARDS[0].kv_bytes_per_token_layer()) + ends


@pytest.fixture
async def place(peers: Peers, tmp_path: Path) -> AsyncIterator[Placing]:
    links = peers.start("a").links
    library = ModelLibrary(links=links, store=Store(tmp_path), adverts=list, on_change=lambda: None)
    library.local |= {card.id: card for card in CARDS}
    holdings, budget, draining = ResidentModels(attention_bytes_s=1e9), [1 << 30], [False]
    compute = ComputeThread()
    sources = WeightSources(links.id, links, adverts=list, names=str, clock=SystemClock(), link_stats=dict)
    placement = FromMemory(
        links=links,
        library=library,
        weights=WeightProvider(links, library, sources, SystemClock()),
        holdings=holdings,
        backend=make_backend("torch", 1),
        compute=compute,
        clock=SystemClock(),
        free_bytes=lambda: budget[0] - holdings.reserved_bytes,
        on_change=lambda: None,
        draining=lambda: draining[0],
    )
    yield Placing(placement, budget, draining)
    await placement.close()
    compute.close()


async def test_a_copy_is_told_as_one_in_the_advert(place: Placing) -> None:
    load = await place.load(0, 2, standby=True)
    assert load.holding().standby
    assert load.holding().state == "active"


async def test_a_copy_that_is_wanted_for_itself_is_loaded_already(place: Placing) -> None:
    copy = await place.load(0, 2, standby=True)
    assert await place.load(0, 2, pinned=True) is copy
    assert not copy.standby
    assert copy.pinned
    assert await place.load(0, 2, standby=True) is copy
    assert not copy.standby


async def test_a_wish_that_comes_while_the_copy_still_loads_counts_too(place: Placing) -> None:
    copy, load = await asyncio.gather(place.load(0, 2, standby=True), place.load(0, 2))
    assert copy is load
    assert not load.standby


async def test_copies_of_any_model_give_way_to_an_ordinary_load(place: Placing) -> None:
    await place.load(0, 2, standby=True)
    await place.load(2, 4, model=1)
    place.room_for((0, 2), (2, 4))
    await place.load(0, 2, model=1)
    assert place.ranges == [("tiny-1", "2-4", False), ("tiny-1", "0-2", False)]


async def test_a_copy_gives_way_before_an_idle_load_of_the_same_model(place: Placing) -> None:
    await place.load(0, 2)
    await place.load(0, 2, model=1, standby=True)
    place.room_for((0, 2), (2, 4))
    await place.load(2, 4)
    assert place.ranges == [("tiny-0", "0-2", False), ("tiny-0", "2-4", False)]


async def test_a_copy_in_use_stays_and_the_load_is_refused(place: Placing) -> None:
    copy = await place.load(0, 2, standby=True)
    place.room_for((0, 2))
    assert copy.pool is not None
    table = copy.pool.allocate(1)
    with pytest.raises(OutOfMemory):
        await place.load(0, 2, model=1)
    copy.pool.free(table)
    await place.load(0, 2, model=1)
    assert place.ranges == [("tiny-1", "0-2", False)]


async def test_nothing_gives_way_to_a_copy(place: Placing) -> None:
    await place.load(0, 2)
    await place.load(0, 2, model=1, standby=True)
    place.room_for((0, 2), (0, 2))
    with pytest.raises(OutOfMemory):
        await place.load(2, 4, standby=True)
    assert place.ranges == [("tiny-0", "0-2", False), ("tiny-1", "0-2", True)]


async def test_a_copy_that_covers_an_ordinary_load_does_not_replace_it(place: Placing) -> None:
    """It may have less KV, and it may have to go at any time."""
    small = await place.load(1, 2, kv_tokens=4 * KV)
    await place.load(0, 2, standby=True)
    assert small.state is LoadState.ACTIVE
    await place.load(0, 3)
    assert place.ranges == [("tiny-0", "0-3", False)]


async def test_unplacing_a_model_lets_its_copies_go(place: Placing) -> None:
    await place.load(0, 2)
    await place.load(2, 4, standby=True)
    assert place.placement.unplace(CARDS[0].id) == sum(sized(*layers) for layers in ((0, 2), (2, 4)))
    assert place.ranges == []


async def test_kv_that_is_kept_without_a_session_holds_up_the_letting_go(place: Placing) -> None:
    load = await place.load(0, 2)
    assert load.pool is not None
    table = load.pool.allocate(1)
    place.placement.unplace(CARDS[0].id)
    assert load.state is LoadState.DRAINING
    load.pool.free(table)
    place.placement.sweep()
    assert place.ranges == []


async def test_a_peer_that_leaves_loads_nothing_more_but_promotes_what_it_has(place: Placing) -> None:
    copy = await place.load(0, 2, standby=True)
    place.draining[0] = True
    with pytest.raises(Unavailable, match="about to leave"):
        await place.load(2, 4)
    assert await place.load(0, 2) is copy


async def test_a_copy_that_can_not_be_read_leaves_nothing_behind(place: Placing) -> None:
    place.placement.broken = {"tiny-1"}
    await place.load(0, 2)
    with pytest.raises(ModelFileError):
        await place.load(0, 2, model=1, standby=True)
    assert place.ranges == [("tiny-0", "0-2", False)]


async def test_other_peers_ask_for_copies_by_place(place: Placing, peers: Peers) -> None:
    place.placement.register()
    links = place.placement.links
    reply, _ = await links.request(links.id, wish(0, 2, standby=True), timeout_s=10)
    assert isinstance(reply, Placed)
    assert place.ranges == [("tiny-0", "0-2", True)]
    place.draining[0] = True
    with pytest.raises(RemoteFailure, match="about to leave"):
        await links.request(links.id, wish(2, 4), timeout_s=10)
