"""Placements on request: the steps that a caller sees, pinning, the KV that fits, failures and unloading."""

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from in_process.adverts import CARD, advert, held
from in_process.clusters import MODEL, OTHER, PROMISED, make_holding, make_peer
from in_process.peers import Peer, Peers
from in_process.placing import Cluster
from meshd.agents.cluster_service import PlacementStep
from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.plan_input import CONTEXTS_OF_KV, ONE_NUMERICS_CONTEXT
from meshd.agents.service import MeshOptions
from meshd.clock import SystemClock
from meshd.errors import DoesNotFit, ModelFileError, NoPeer, OutOfMemory, PeerFault, RemoteFailure, Unavailable
from meshd.protocol.messages import Unplace, Unplaced
from meshd.types import Advert, LayerRange, Objective, PeerId
from texts.headers import text_header

SPLIT = MeshOptions(stages="a:0-10,b:10-30")


async def placed(
    cluster: Cluster, mesh: MeshOptions, *, context: int | None = None, steps: list[PlacementStep] | None = None
) -> list[PlacementStep]:
    """Place the model. Returns: `steps` (None: a new list) with the placement's steps appended."""
    steps = [] if steps is None else steps
    async for step in cluster.placer.place(CARD, mesh, context=context):
        steps.append(step)
    return steps


async def test_each_peer_is_asked_for_its_stage_and_its_steps_end_with_active() -> None:
    cluster = Cluster(make_peer("a"), make_peer("b"))
    steps = await placed(cluster, SPLIT, context=512)
    assert [(peer, str(request.layers)) for peer, request in cluster.asked] == [("a-id", "0-10"), ("b-id", "10-30")]
    assert {(step.name, str(step.layers), step.state) for step in steps[-2:]} == {("a", "0-10", "active"), ("b", "10-30", "active")}
    assert all(step.state == "loading" for step in steps[:-2])


async def test_a_placement_takes_less_kv_rather_than_mix_numerics_down_to_a_limit() -> None:
    def cluster(memory: int) -> Cluster:
        peers = (make_peer(name, numerics=PROMISED, memory=memory) for name in "ab")
        return Cluster(*peers, make_peer("c", numerics=OTHER, memory=memory))

    roomy = cluster(4 << 30)
    await placed(roomy, MeshOptions())
    full = {peer for peer, _ in roomy.asked}
    tight = cluster(310 << 20)
    await placed(tight, MeshOptions())
    assert {peer for peer, _ in tight.asked} <= {"a-id", "b-id"}
    assert full <= {"a-id", "b-id"}
    assert ONE_NUMERICS_CONTEXT <= min(request.kv_tokens for _, request in tight.asked) < CARD.spec.context_length
    needed = cluster(310 << 20)
    await placed(needed, MeshOptions(), context=CARD.spec.context_length)
    assert "c-id" in {peer for peer, _ in needed.asked}


async def test_a_failed_stage_is_a_step_and_then_the_error() -> None:
    cluster = Cluster(make_peer("a"), make_peer("b"))
    cluster.refusing = {PeerId("b-id"): "out_of_memory"}
    steps: list[PlacementStep] = []
    with pytest.raises(RemoteFailure, match="no more"):
        await placed(cluster, SPLIT, context=512, steps=steps)
    assert [(step.name, step.message) for step in steps if step.state == "failed"] == [("b", "no more")]


@pytest.mark.parametrize(
    ("mesh", "pinned"),
    [
        (MeshOptions(), False),
        (MeshOptions(objective=Objective.LATENCY), False),
        (MeshOptions(objective=Objective.THROUGHPUT), True),
        (MeshOptions(stages="a:0-30"), True),
        (MeshOptions(peers=("a",)), True),
        (MeshOptions(min_peers=1), True),
    ],
)
async def test_a_placement_is_pinned_unless_it_was_chosen_for_speed_alone(mesh: MeshOptions, pinned: bool) -> None:
    cluster = Cluster(make_peer("a"))
    await placed(cluster, mesh)
    assert [request.pinned for _, request in cluster.asked] == [pinned]


async def test_kv_is_reserved_for_several_contexts_if_memory_allows() -> None:
    cluster = Cluster(make_peer("a", memory=64 << 30))
    await placed(cluster, MeshOptions())
    assert [request.kv_tokens for _, request in cluster.asked] == [CARD.spec.context_length * CONTEXTS_OF_KV]


async def test_the_usual_context_is_halved_until_it_fits_but_not_below_the_requested_one() -> None:
    tight = make_peer("a", memory=250 << 20)
    cluster = Cluster(tight)
    await placed(cluster, MeshOptions())
    ((_, request),) = cluster.asked
    assert 512 <= request.kv_tokens < CARD.spec.context_length
    with pytest.raises(DoesNotFit):
        await placed(Cluster(tight), MeshOptions(), context=CARD.spec.context_length)


async def test_without_peers_that_compute_nothing_is_asked() -> None:
    cluster = Cluster(make_peer("a", roles=("storage",)))
    with pytest.raises((NoPeer, DoesNotFit)):
        await placed(cluster, MeshOptions())
    assert cluster.asked == []


async def test_a_repair_replaces_a_peer_that_can_not_load() -> None:
    cluster = Cluster(make_peer("a", decode_gb_s=40.0), make_peer("b"))
    cluster.refusing = {PeerId("a-id"): "out_of_memory"}
    (stage,) = await cluster.placer.repair(CARD, [LayerRange(3, 7)], kv_tokens=512)
    assert [peer for peer, _ in cluster.asked] == ["a-id", "b-id"]
    assert (stage.peer, str(stage.layers)) == ("b-id", "3-7")


async def test_a_repair_gives_up_after_three_peers_and_raises_the_last_error() -> None:
    cluster = Cluster(*(make_peer(name) for name in "abcde"))
    cluster.refusing = {PeerId(f"{name}-id"): "download_failed" for name in "abcde"}
    with pytest.raises(RemoteFailure, match="no more"):
        await cluster.placer.repair(CARD, [LayerRange(3, 7)], kv_tokens=512)
    assert len(cluster.asked) == 3


async def test_a_repair_returns_when_the_layers_are_advertised() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(3, 7, kv_tokens=128),)))
    cluster.advert_delay_s = 0.1
    (stage,) = await cluster.placer.repair(CARD, [LayerRange(3, 7)], kv_tokens=512)
    holdings = [(holding.kv_tokens_total, holding.state) for holding in cluster.live()[0].holdings]
    assert holdings == [(128, "active"), (512, "active")]
    assert (stage.peer, str(stage.layers)) == ("a-id", "3-7")


def test_progress_is_that_of_the_slowest_load() -> None:
    loading = [held(0, 10, state="loading", progress=0.25), held(10, 20, state="loading", progress=0.75)]
    cluster = Cluster(make_peer("a", holdings=tuple(loading)), make_peer("b", holdings=(make_holding(20, 30),)))
    assert cluster.placer.progress(MODEL) == 0.25
    assert Cluster(make_peer("a")).placer.progress(MODEL) == 1.0


@dataclass
class Holder:
    """A peer that records the UNPLACE requests that it receives, and answers that each freed 100 bytes, or refuses."""

    peer: Peer
    unplaced: list[str] = field(default_factory=list)
    refuses: bool = False

    def __post_init__(self) -> None:
        self.peer.links.register(Unplace, self._on_unplace)

    def _on_unplace(self, sender: PeerId, message: Unplace, payload: memoryview) -> Unplaced:
        self.unplaced.append(message.model)
        if self.refuses:
            raise Unavailable("not now", hint="ask again")
        return Unplaced(request=message.request, freed_bytes=100)


async def test_a_model_is_unloaded_on_every_peer_and_those_without_it_are_told_too(peers: Peers) -> None:
    own, other, idle = (Holder(peers.start(name)) for name in "abc")
    for holder in (other, idle):
        own.peer.dial(holder.peer)
        await own.peer.next_up()
    adverts: list[Advert] = [advert(own.peer.id, held(0, 10)), advert(other.peer.id, held(10, 30)), advert(idle.peer.id)]
    placer = PlacementClient(own.peer.links, cast("Any", None), lambda: adverts, str, SystemClock())
    idle.refuses = True
    assert await placer.unplace(MODEL) == 200
    assert (own.unplaced, other.unplaced, idle.unplaced) == ([MODEL], [MODEL], [MODEL])
    other.refuses = True
    with pytest.raises(PeerFault, match="not now"):
        await placer.unplace(MODEL)


async def test_a_peer_that_reserves_less_kv_than_asked_is_not_waited_for_and_is_replaced_in_a_repair() -> None:
    cluster = Cluster(make_peer("a"), make_peer("b"))
    cluster.granting = 64
    async with asyncio.timeout(4):  # less than the time that adverts are waited for
        await placed(cluster, SPLIT, context=512)
    many = Cluster(*map(make_peer, "abcd"))
    many.granting = 64
    with pytest.raises(OutOfMemory, match="reserved KV for 64 tokens, not 512"):
        await many.placer.repair(CARD, [LayerRange(0, 10)], kv_tokens=512)


async def test_a_model_whose_text_can_not_be_read_is_not_placed_and_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(0, 30),)), make_peer("b"))
    library = cluster.placer.library
    library.local[CARD.id] = CARD
    assert [card.id for card in cluster.router.answerable()] == [CARD.id]

    async def source() -> bytes:
        return text_header("{% for m in %}")

    monkeypatch.setattr(library, "text", lambda card: library.texts.get(card, source))
    try:
        with pytest.raises(ModelFileError, match="chat template can't be used"):
            await placed(cluster, SPLIT, context=512)
    finally:
        await library.close()
    assert cluster.asked == []
    assert cluster.router.answerable() == []
