"""Plans over what the peers hold: for new sessions, and for those that lost a peer."""

import asyncio
from typing import Any

import msgspec
import pytest

from in_process.clusters import make_card, make_holding, make_peer
from in_process.placing import Cluster
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan import route as routing
from meshd.agents.session.plan.candidates import MAX_STAGES
from meshd.agents.session.plan.resume import KEPT, MIRROR, PREFILL, REPLAY, RecoveryPlan, RecoveryRequest
from meshd.agents.session.plan.route import mirror_targets
from meshd.errors import DoesNotFit, InvalidRequest, NoPeer, NotReady, Overloaded, RemoteFailure
from meshd.types import LayerRange, LinkStats, ModelId, Objective, PeerId, Plan, PlanId, StagePlan

CARD = make_card()
ANY = MeshOptions()
SMALL = 100 << 20
FULL = 10 << 20


def plan_of(text: str, context: int = 512) -> Plan:
    return Plan(
        id=PlanId("old"), model=CARD.id, stages=stages_of(text), prefill_chunk_tokens=128, context=context, predicted_tpot_s=0.01
    )


def stages_of(text: str) -> tuple[StagePlan, ...]:
    parts = (part.split(":") for part in text.split(","))
    return tuple(StagePlan(peer=PeerId(f"{name}-id"), layers=LayerRange.parse(layers)) for name, layers in parts)


def text_of(plan: Plan) -> str:
    return ",".join(f"{stage.peer.removesuffix('-id')}:{stage.layers}" for stage in plan.stages)


def request(old: str | None, lost: frozenset[PeerId] = frozenset(), **fields: Any) -> RecoveryRequest:
    given: dict[str, Any] = {"avoid": frozenset(), "prompt_tokens": 200, "max_tokens": 312, "known": 300}
    return RecoveryRequest(old=None if old is None else plan_of(old), lost=lost, **given | fields)


def ids(*names: str) -> frozenset[PeerId]:
    return frozenset(PeerId(f"{name}-id") for name in names)


async def recovered(cluster: Cluster, wanted: RecoveryRequest, mesh: MeshOptions = ANY) -> RecoveryPlan:
    found = await cluster.router.recover(CARD, mesh, wanted)
    assert [layer for stage in found.plan.stages for layer in stage.layers] == list(CARD.layers)
    return found


def three(*more: Any, **fields: Any) -> Cluster:
    """a, b and c serve ten layers each."""
    peers = [make_peer(name, holdings=(make_holding(start, start + 10),)) for name, start in (("a", 0), ("b", 10), ("c", 20))]
    return Cluster(*peers, *more, **fields)


def leave_memory(cluster: Cluster, name: str, memory: int) -> None:
    capability = cluster.adverts[PeerId(f"{name}-id")].capability
    cluster.change(name, capability=msgspec.structs.replace(capability, memory_free_bytes=memory))


# New sessions


async def routed(cluster: Cluster, mesh: MeshOptions = ANY) -> str:
    return text_of(await cluster.router.plan_for(CARD, mesh, prompt_tokens=100, max_tokens=100))


async def test_a_standby_copy_is_not_routed_over_while_others_hold_the_layers() -> None:
    cluster = three(make_peer("d", decode_gb_s=1000.0, holdings=(make_holding(0, 30, standby=True),)))
    assert await routed(cluster) == "a:0-10,b:10-20,c:20-30"
    cluster.lose("b")
    assert await routed(cluster) == "d:0-30"
    assert not cluster.asked


async def test_a_peer_that_leaves_is_not_routed_over_unless_nothing_else_holds_the_layers() -> None:
    leaving = make_peer("d", decode_gb_s=1000.0, holdings=(make_holding(0, 30),), draining=True)
    cluster = three(leaving)
    assert await routed(cluster) == "a:0-10,b:10-20,c:20-30"
    cluster.lose("c")
    assert await routed(cluster) == "d:0-30"


async def test_a_standby_copy_is_taken_before_a_peer_that_leaves() -> None:
    leaving = make_peer("d", decode_gb_s=1000.0, holdings=(make_holding(0, 30),), draining=True)
    cluster = three(leaving, make_peer("e", decode_gb_s=1.0, holdings=(make_holding(20, 30, standby=True),)))
    cluster.lose("c")
    assert await routed(cluster) == "a:0-10,b:10-20,e:20-30"


async def test_full_layers_are_waited_for_and_no_standby_copy_is_taken_instead() -> None:
    busy = make_peer("a", holdings=(make_holding(0, 30, free=0),))
    cluster = Cluster(busy, make_peer("b", holdings=(make_holding(0, 30, standby=True),)))
    with pytest.raises(Overloaded, match="KV free"):
        await routed(cluster)


async def test_nothing_is_placed_on_a_peer_that_leaves() -> None:
    cluster = Cluster(make_peer("a"), make_peer("b", decode_gb_s=1000.0, draining=True))
    assert await routed(cluster) == "a:0-30"
    assert [peer for peer, _ in cluster.asked] == ["a-id"]
    with pytest.raises(NoPeer, match="about to leave"):
        await cluster.router.plan_for(CARD, MeshOptions(stages="b:0-30"), prompt_tokens=1, max_tokens=1)


async def test_stages_that_somebody_named_are_placed_for_good() -> None:
    cluster = Cluster(make_peer("a"), make_peer("b"))
    await routed(cluster, MeshOptions(stages="a:0-10,b:10-30"))
    assert [place.pinned for _, place in cluster.asked] == [True, True]
    other = Cluster(make_peer("a"))
    await routed(other)
    assert [place.pinned for _, place in other.asked] == [False]


# A peer is lost


async def test_the_lost_layers_lie_on_one_standby() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert found.method == REPLAY
    assert found.plan.id not in ("old", (await recovered(cluster, request("a:0-10,b:10-20,c:20-30", ids("b")))).plan.id)
    assert found.plan.context == 512
    assert 0 < found.plan.predicted_tpot_s < found.predicted_s < found.plan.predicted_ttft_s
    assert not cluster.asked


async def test_the_lost_layers_are_cut_over_two_peers() -> None:
    more = (
        make_peer("d", holdings=(make_holding(8, 16, standby=True),)),
        make_peer("e", holdings=(make_holding(13, 25, standby=True),)),
    )
    cluster = three(*more)
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert [stage.peer for stage in found.plan.stages] == ["a-id", "d-id", "e-id", "c-id"]
    assert found.method == REPLAY


async def test_a_survivor_takes_the_lost_layers_beside_its_own() -> None:
    cluster = Cluster(
        make_peer("a", holdings=(make_holding(0, 15), make_holding(15, 30, standby=True))),
        make_peer("b", holdings=(make_holding(15, 30),)),
    )
    found = await recovered(cluster, request("a:0-15,b:15-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-15,a:15-30"
    assert found.method == REPLAY


async def test_stages_at_both_ends_are_replaced() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(0, 10, standby=True), make_holding(20, 30, standby=True))))
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("a", "c")))
    assert text_of(found.plan) == "d:0-10,b:10-20,d:20-30"
    assert found.method == REPLAY


async def test_a_copy_of_the_kv_decides_who_takes_over() -> None:
    quick = make_peer("d", decode_gb_s=12.0, prefill_gflops=200.0, holdings=(make_holding(10, 20, standby=True),))
    mirror = make_peer("e", holdings=(make_holding(10, 20, standby=True, free=0),))
    cluster = three(quick, mirror)
    lost = cluster.lose("b")
    without = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost))
    assert text_of(without.plan) == "a:0-10,d:10-20,c:20-30"
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost, mirrors={1: (PeerId("e-id"), 290)}))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    assert found.method == MIRROR
    assert found.predicted_s < without.predicted_s


async def test_a_copy_that_was_lost_too_is_not_counted_on() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    lost = cluster.lose("b") | ids("d")
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost, mirrors={1: (PeerId("d-id"), 299)}))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30", "it is here again, without the KV"
    assert found.method == REPLAY


async def test_a_copy_on_a_very_slow_peer_is_worth_less_than_computing_again() -> None:
    slow = make_peer("e", decode_gb_s=0.01, holdings=(make_holding(10, 20, standby=True),))
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, standby=True),)), slow)
    lost = cluster.lose("b")
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost, mirrors={1: (PeerId("e-id"), 299)}))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"


async def test_a_fresh_route_is_taken_when_it_pays_over_the_tokens_to_come() -> None:
    slow = make_peer("d", decode_gb_s=0.05, prefill_gflops=1.0, holdings=(make_holding(10, 20, standby=True),))
    quick = make_peer("e", decode_gb_s=50.0, prefill_gflops=2000.0, holdings=(make_holding(0, 30, standby=True),))
    cluster = Cluster(
        *(make_peer(n, decode_gb_s=0.5, holdings=(make_holding(s, s + 10),)) for n, s in zip("abc", (0, 10, 20), strict=True)),
        slow,
        quick,
    )
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "e:0-30"
    assert found.method == PREFILL


async def test_near_the_end_of_the_answer_the_shorter_pause_counts() -> None:
    even = [
        make_peer(name, decode_gb_s=2.0, holdings=(make_holding(start, start + 10),))
        for name, start in (("a", 0), ("b", 10), ("c", 20))
    ]
    quick = make_peer("e", decode_gb_s=50.0, holdings=(make_holding(0, 30, standby=True),))
    cluster = Cluster(*even, quick)
    lost = cluster.lose("b")
    early = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost, prompt_tokens=250, max_tokens=3000, known=350))
    late = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost, prompt_tokens=250, max_tokens=102, known=350))
    assert (text_of(early.plan), early.method) == ("e:0-30", PREFILL)
    assert (text_of(late.plan), late.method) == ("a:0-10,e:10-20,c:20-30", REPLAY)


async def test_a_survivor_needs_no_second_reservation_and_a_replacement_does() -> None:
    peers = [make_peer(n, holdings=(make_holding(s, s + 10, free=0),)) for n, s in (("a", 0), ("b", 10), ("c", 20))]
    full = make_peer("d", decode_gb_s=100.0, holdings=(make_holding(10, 20, standby=True, free=480),))
    cluster = Cluster(*peers, full, make_peer("e", holdings=(make_holding(10, 20, standby=True, free=512),)))
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    cluster.lose("e")
    with pytest.raises(Overloaded, match="layers 10-20 of tiny have no KV free for 512 tokens") as caught:
        await recovered(cluster, request("a:0-10,b:10-20,c:20-30", ids("b")))
    assert "lost: b" in caught.value.message
    assert not cluster.asked


async def test_two_gaps_do_not_share_room_for_one() -> None:
    one = make_peer("d", holdings=(make_holding(0, 30, standby=True, free=900),))
    slower = make_peer("e", decode_gb_s=9.0, holdings=(make_holding(20, 30, standby=True),))
    cluster = three(one, slower)
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("a", "c")))
    assert text_of(found.plan) == "d:0-10,b:10-20,e:20-30"


async def test_the_way_there_and_on_decides_between_equals() -> None:
    cluster = three(*(make_peer(name, holdings=(make_holding(10, 20, standby=True),)) for name in "de"))
    slow = LinkStats(rtt_s=0.02, bandwidth_bytes_s=1.25e8, hop_s=0.01)

    def slowed(name: str, other: str) -> None:
        links = cluster.adverts[PeerId(f"{name}-id")].links
        cluster.change(name, links={**links, PeerId(f"{other}-id"): slow})

    lost = cluster.lose("b")
    for source, target in (("a", "d"), ("d", "c")):
        before = dict(cluster.adverts)
        slowed(source, target)
        found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost))
        assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
        cluster.adverts = before
    for source, target in (("c", "d"), ("d", "a")):
        slowed(source, target)
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30", "nothing goes these ways"


async def test_over_a_thin_link_a_copy_saves_what_would_have_to_be_sent() -> None:
    cluster = three(*(make_peer(name, holdings=(make_holding(10, 20, standby=True),)) for name in "de"))
    thin = LinkStats(rtt_s=2e-4, bandwidth_bytes_s=2e6, hop_s=1e-4)
    cluster.change("a", links={**cluster.adverts[PeerId("a-id")].links, PeerId("e-id"): thin})
    lost = cluster.lose("b")
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost, max_tokens=110, mirrors={1: (PeerId("e-id"), 299)}))
    assert (text_of(found.plan), found.method) == ("a:0-10,e:10-20,c:20-30", MIRROR)


async def test_a_peer_that_restarted_has_no_kv_even_if_nobody_noticed() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    cluster.change("b", holdings=())
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30"))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"


async def test_the_layers_of_a_survivor_may_be_on_their_way_out() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    cluster.change("a", holdings=(make_holding(0, 10, state="draining", free=0),))
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"


async def test_a_peer_to_avoid_is_used_only_if_there_is_no_other_way() -> None:
    cluster = three(make_peer("d", decode_gb_s=0.1, prefill_gflops=1.0, holdings=(make_holding(10, 20, standby=True),)))
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", avoid=ids("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    cluster.lose("d")
    for name in ("a", "c"):
        leave_memory(cluster, name, FULL)
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", avoid=ids("b")))
    assert text_of(found.plan) == "a:0-10,b:10-20,c:20-30"
    assert found.method == REPLAY, "what lies there is not counted on"


async def test_a_peer_to_avoid_is_not_used_while_others_can_load_its_layers() -> None:
    cluster = three()
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", avoid=ids("b")))
    assert "b-id" not in found.plan.peers
    assert {peer for peer, _ in cluster.asked} <= {"a-id", "c-id"}


async def test_a_silent_peer_is_better_than_none() -> None:
    cluster = three()
    for name in ("a", "c"):
        leave_memory(cluster, name, FULL)
    cluster.suspects = [cluster.adverts[PeerId("b-id")]]
    cluster.lose("b")
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30"))
    assert (text_of(found.plan), found.method) == ("a:0-10,b:10-20,c:20-30", REPLAY)


async def test_a_peer_that_leaves_keeps_its_stage_and_gets_another_only_if_nobody_else_can() -> None:
    cluster = three(make_peer("d", decode_gb_s=0.1, prefill_gflops=1.0, holdings=(make_holding(10, 20, standby=True),)))
    cluster.change("a", draining=True, holdings=(make_holding(0, 20),))
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    cluster.lose("d")
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", ids("b")))
    assert text_of(found.plan) == "a:0-10,a:10-20,c:20-30"
    assert not cluster.asked


async def test_of_the_wishes_only_the_peers_still_count() -> None:
    cluster = three(
        make_peer("d", decode_gb_s=100.0, holdings=(make_holding(10, 20, standby=True),)),
        make_peer("e", holdings=(make_holding(10, 20, standby=True),)),
    )
    lost = cluster.lose("b")
    mesh = MeshOptions(peers=("a", "b", "c", "e"), min_peers=5, objective=Objective.ENERGY, stages="a:0-10,b:10-20,c:20-30")
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost), mesh)
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    with pytest.raises(NoPeer, match="not in the cluster now: b"):
        await recovered(cluster, request("b:0-30", lost), MeshOptions(peers=("b",)))


async def test_without_any_plan_yet_the_best_route_is_found() -> None:
    cluster = three()
    found = await recovered(cluster, request(None))
    assert text_of(found.plan) == "a:0-10,b:10-20,c:20-30"
    assert found.method == PREFILL


async def test_with_nothing_lost_everything_is_kept() -> None:
    found = await recovered(three(), request("a:0-10,b:10-20,c:20-30"))
    assert (text_of(found.plan), found.method) == ("a:0-10,b:10-20,c:20-30", KEPT)


async def test_a_plan_has_a_bounded_number_of_stages() -> None:
    layers = 2 * MAX_STAGES + 2
    card = make_card(layers)
    peers = [
        make_peer(name, holdings=tuple(make_holding(at, at + 1) for at in range(first, layers, 2)))
        for name, first in (("a", 0), ("b", 1))
    ]
    with pytest.raises(Overloaded, match="in all stages at a time"):
        await Cluster(*peers).router.recover(card, ANY, request(None))


# Nobody holds the layers


async def test_what_is_missing_is_loaded_and_nothing_else() -> None:
    cluster = three(make_peer("d"))
    for name in ("a", "c"):
        leave_memory(cluster, name, FULL)
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert [(peer, str(place.layers), place.kv_tokens, place.standby) for peer, place in cluster.asked] == [
        ("d-id", "10-20", 4096, False)
    ]


async def test_layers_with_kv_for_too_few_tokens_are_loaded_anew() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, kv_tokens=256, standby=True),)))
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert [str(place.layers) for _, place in cluster.asked] == ["10-20"]
    assert found.method == REPLAY


async def test_loading_takes_less_kv_where_memory_is_short() -> None:
    cluster = three(make_peer("d", memory=120 << 20))
    for name in ("a", "c"):
        leave_memory(cluster, name, FULL)
    await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert [place.kv_tokens for _, place in cluster.asked] == [1024]


async def test_nothing_fits_and_the_error_says_what_is_missing() -> None:
    cluster = three(make_peer("d", memory=SMALL // 4))
    for name in ("a", "c"):
        leave_memory(cluster, name, FULL)
    lost = cluster.lose("b")
    with pytest.raises(DoesNotFit, match=r"layers 10-20 of tiny fit nowhere: they need [\d.]+ MiB .* \(d\) \(lost: b\)") as caught:
        await recovered(cluster, request("a:0-10,b:10-20,c:20-30", lost))
    assert 10 << 20 < caught.value.missing_bytes < 200 << 20
    assert caught.value.hint
    assert not cluster.asked


async def test_a_peer_that_cannot_load_is_replaced_by_another() -> None:
    cluster = three(make_peer("d", decode_gb_s=100.0), make_peer("e", decode_gb_s=50.0))
    cluster.refusing[PeerId("d-id")] = "out_of_memory"
    found = await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    assert [peer for peer, _ in cluster.asked] == ["d-id", "e-id"]


async def test_when_no_peer_can_load_the_error_says_so() -> None:
    cluster = three()
    cluster.refusing = dict.fromkeys(ids("a", "c"), "download_failed")
    with pytest.raises(NoPeer, match="no live peer can take layers") as caught:
        await recovered(cluster, request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert "lost: b" in caught.value.message
    assert len(cluster.asked) == 2


async def test_a_slow_load_is_shared_and_told_with_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_REQUEST_WAIT_S", 0.05)
    cluster = three(make_peer("d", decode_gb_s=100.0))
    cluster.load_s = 0.3
    lost = cluster.lose("b")
    wanted = request("a:0-10,b:10-20,c:20-30", lost)
    tries = await asyncio.gather(*(cluster.router.recover(CARD, ANY, wanted) for _ in range(3)), return_exceptions=True)
    for error in tries:
        assert isinstance(error, NotReady)
        assert error.progress == 0.5
        assert "layers 10-20 of tiny are being loaded" in error.message
    assert len(cluster.asked) == 1
    monkeypatch.setattr(routing, "_REQUEST_WAIT_S", 5.0)
    found = await recovered(cluster, wanted)
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert len(cluster.asked) == 1
    await cluster.router.close()


async def test_layers_that_another_peer_has_asked_for_are_waited_for() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, state="loading"),)), make_peer("e", decode_gb_s=100.0))
    wanted = request("a:0-10,b:10-20,c:20-30", cluster.lose("b"))
    task = asyncio.ensure_future(recovered(cluster, wanted))
    await asyncio.sleep(0.1)
    assert not task.done()
    cluster.change("d", holdings=(make_holding(10, 20),))
    assert text_of((await task).plan) == "a:0-10,d:10-20,c:20-30"
    assert not cluster.asked


async def test_a_load_that_another_peer_has_asked_for_and_that_fails_is_to_be_tried_again() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(10, 20, state="loading"),)))
    wanted = request("a:0-10,b:10-20,c:20-30", cluster.lose("b"))
    task = asyncio.ensure_future(recovered(cluster, wanted))
    await asyncio.sleep(0.05)
    cluster.change("d", holdings=())
    with pytest.raises(NotReady, match="layers 10-20 of tiny lie on no live peer yet"):
        await task
    await recovered(cluster, wanted)
    assert [str(place.layers) for _, place in cluster.asked] == ["10-20"]


async def test_a_model_with_nothing_left_takes_the_place_of_what_is_idle() -> None:
    old = make_holding(0, 20, kv_tokens=128)
    cluster = Cluster(make_peer("a", memory=150 << 20, holdings=(old,)))
    found = await recovered(cluster, request("b:0-30", ids("b"), prompt_tokens=100, max_tokens=156, known=120))
    assert text_of(found.plan) == "a:0-30"
    assert [str(place.layers) for _, place in cluster.asked] == ["0-30"]


# A running session, and better plans


def moved(cluster: Cluster, old: str, mesh: MeshOptions = ANY, **fields: Any) -> RecoveryPlan | None:
    return cluster.router.better(CARD, mesh, request(old, **fields))


def test_a_much_faster_peer_is_worth_a_move() -> None:
    cluster = three(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, holdings=(make_holding(0, 30),)))
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000)
    assert found is not None
    assert text_of(found.plan) == "d:0-30"
    assert found.method == PREFILL


def test_one_stage_is_moved_by_copying_its_kv() -> None:
    cluster = Cluster(
        make_peer("a", holdings=(make_holding(0, 10),)),
        make_peer("b", decode_gb_s=2.0, prefill_gflops=20.0, holdings=(make_holding(10, 20),)),
        make_peer("c", holdings=(make_holding(20, 30),)),
        make_peer("d", prefill_gflops=5.0, holdings=(make_holding(10, 20),)),
    )
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000)
    assert found is not None
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert found.method == MIRROR
    assert found.predicted_s < 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {"holdings": (make_holding(0, 30, standby=True),)},
        {"holdings": (make_holding(0, 30),), "draining": True},
        {"holdings": (make_holding(0, 30, free=100),)},
        {"holdings": (make_holding(0, 29),)},
    ],
    ids=["standby", "leaving", "full", "not all layers"],
)
def test_no_move_to_a_peer_that_new_sessions_do_not_get(fields: dict[str, Any]) -> None:
    cluster = three()
    fast = Cluster(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, **fields)).live()[0]
    cluster.adverts[fast.peer] = fast
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000)
    assert found is None or found.plan.peers != ("d-id",)
    assert found is None or fields["holdings"][0].layers == LayerRange(0, 29)


@pytest.mark.parametrize(("gb_s", "moves"), [(8.0, False), (3.0, True)])
def test_no_move_for_little(gb_s: float, moves: bool) -> None:
    cluster = Cluster(
        make_peer("a", holdings=(make_holding(0, 10),)),
        make_peer("b", decode_gb_s=gb_s, holdings=(make_holding(10, 20),)),
        make_peer("c", holdings=(make_holding(20, 30),)),
        make_peer("d", holdings=(make_holding(10, 20),)),
    )
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=3000, known=2000)
    assert (found is not None) == moves


def test_no_move_of_an_answer_that_soon_ends() -> None:
    cluster = three(make_peer("d", decode_gb_s=50.0, holdings=(make_holding(0, 30),)))
    assert moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=102) is None


def test_no_move_that_the_request_rules_out() -> None:
    cluster = three(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, holdings=(make_holding(0, 30),)))
    old = "a:0-10,b:10-20,c:20-30"
    for mesh in (
        MeshOptions(stages=old),
        MeshOptions(peers=("a", "b", "c")),
        MeshOptions(peers=("x",)),
        MeshOptions(min_peers=4),
        MeshOptions(objective=Objective.ENERGY),
    ):
        assert moved(cluster, old, mesh, max_tokens=2000) is None
    assert moved(cluster, old, MeshOptions(peers=("b", "d")), max_tokens=2000) is not None


def test_a_session_that_lost_a_peer_is_no_matter_of_better_plans() -> None:
    cluster = three(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, holdings=(make_holding(0, 30),)))
    cluster.lose("b")
    assert moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000) is None
    assert cluster.router.better(CARD, ANY, request(None)) is None


# Moves that somebody asked for


def test_stages_are_moved_to_a_target() -> None:
    cluster = three(make_peer("d", decode_gb_s=50.0, holdings=(make_holding(0, 20, standby=True),)))
    plan = plan_of("a:0-10,b:10-20,c:20-30")
    found = cluster.router.with_target(CARD, plan, PeerId("d-id"), PeerId("b-id"))
    assert text_of(found) == "a:0-10,d:10-20,c:20-30"
    assert found.id != plan.id
    assert 0 < found.predicted_tpot_s != plan.predicted_tpot_s
    whole = three(make_peer("d", holdings=(make_holding(0, 30),)))
    assert text_of(whole.router.with_target(CARD, plan, PeerId("d-id"), None)) == "d:0-10,d:10-20,d:20-30"


def test_moves_that_cannot_be() -> None:
    plan = plan_of("a:0-10,b:10-20,c:20-30")
    cluster = three(make_peer("d", holdings=(make_holding(0, 20, free=1000),)), make_peer("e"))
    move = cluster.router.with_target
    with pytest.raises(InvalidRequest, match="d does not hold layers 20-30 of tiny"):
        move(CARD, plan, PeerId("d-id"), None)
    with pytest.raises(InvalidRequest, match="the session has no stage at e"):
        move(CARD, plan, PeerId("d-id"), PeerId("e-id"))
    with pytest.raises(InvalidRequest, match="no stage that is not at a"):
        move(CARD, plan_of("a:0-30"), PeerId("a-id"), None)
    with pytest.raises(NoPeer, match="not in the cluster"):
        move(CARD, plan, PeerId("gone-id"), None)
    with pytest.raises(NoPeer, match="d has no KV free for 512 tokens"):
        move(CARD, plan_of("a:0-10,b:10-20,d:20-30"), PeerId("d-id"), None)
    cluster.change("d", draining=True)
    with pytest.raises(NoPeer, match="d is about to leave"):
        move(CARD, plan, PeerId("d-id"), PeerId("a-id"))


# Mirrors


def mirrors(cluster: Cluster, text: str) -> str:
    plan = mirror_targets(plan_of(text), cluster.live())
    return ",".join("-" if stage.mirror is None else stage.mirror.removesuffix("-id") for stage in plan.stages)


def test_each_stage_is_mirrored_where_its_layers_lie_again() -> None:
    cluster = three(make_peer("d", holdings=(make_holding(0, 20, standby=True),)))
    assert mirrors(cluster, "a:0-10,b:10-20,c:20-30") == "d,d,-"


def test_a_mirror_stands_apart_from_the_plan_if_it_can() -> None:
    cluster = three()
    cluster.change("b", holdings=(make_holding(10, 20), make_holding(0, 10, standby=True)))
    assert mirrors(cluster, "a:0-10,b:10-20,c:20-30") == "b,-,-"
    apart = make_peer("d", holdings=(make_holding(0, 10, standby=True),))
    cluster.adverts[apart.id] = Cluster(apart).live()[0]
    assert mirrors(cluster, "a:0-10,b:10-20,c:20-30") == "d,-,-"


@pytest.mark.parametrize(
    "holding",
    [
        make_holding(0, 10, free=400),
        make_holding(1, 10),
        make_holding(0, 10, state="loading"),
        msgspec.structs.replace(make_holding(0, 10), model=ModelId("other")),
    ],
    ids=["no room", "not all layers", "loading", "another model"],
)
def test_no_mirror_where_the_kv_cannot_lie(holding: Any) -> None:
    assert mirrors(three(make_peer("d", holdings=(holding,))), "a:0-10,b:10-20,c:20-30") == "-,-,-"


def test_no_mirror_on_a_peer_that_leaves_and_none_beyond_its_room() -> None:
    leaving = make_peer("d", holdings=(make_holding(0, 30),), draining=True)
    assert mirrors(three(leaving), "a:0-10,b:10-20,c:20-30") == "-,-,-"
    tight = make_peer("d", holdings=(make_holding(0, 30, standby=True, free=1100),))
    assert mirrors(three(tight), "a:0-10,b:10-20,c:20-30") == "d,d,-"


# Placing


async def test_a_repair_that_fails_for_good_raises_what_the_last_peer_said() -> None:
    cluster = Cluster(*(make_peer(name) for name in "abcde"))
    cluster.refusing = dict.fromkeys(ids(*"abcde"), "download_failed")
    with pytest.raises(RemoteFailure, match="no more"):
        await cluster.placer.repair(CARD, [LayerRange(3, 7)], kv_tokens=512)
    assert len(cluster.asked) == 3


async def test_a_repair_ends_when_the_adverts_tell_of_it() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(3, 7, kv_tokens=128),)))
    cluster.advert_delay_s = 0.1
    stages = await cluster.placer.repair(CARD, [LayerRange(3, 7)], kv_tokens=512)
    assert [(held.kv_tokens_total, held.state) for held in cluster.live()[0].holdings] == [(128, "active"), (512, "active")]
    assert stages == stages_of("a:3-7")
