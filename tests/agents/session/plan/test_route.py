"""Plans for new sessions, and plans whose stages a client moves to a peer that it names."""

import msgspec
import pytest

from in_process.clusters import make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import CARD, NO_OPTIONS, plan_of, text_of, three_peers
from meshd.agents.service import MeshOptions
from meshd.errors import InvalidRequest, NoPeer, Overloaded
from meshd.types import LearnedRates, PeerId


async def routed(cluster: Cluster, mesh: MeshOptions = NO_OPTIONS) -> str:
    return text_of(await cluster.router.plan_for(CARD, mesh, prompt_tokens=100, max_tokens=100))


async def test_a_standby_copy_is_used_only_if_no_other_peer_has_the_layers() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=1000.0, holdings=(make_holding(0, 30, standby=True),)))
    assert await routed(cluster) == "a:0-10,b:10-20,c:20-30"
    cluster.lose("b")
    assert await routed(cluster) == "d:0-30"
    assert not cluster.asked


async def test_a_leaving_peer_is_used_only_if_no_other_peer_has_the_layers() -> None:
    leaving = make_peer("d", decode_gb_s=1000.0, holdings=(make_holding(0, 30),), draining=True)
    cluster = three_peers(leaving)
    assert await routed(cluster) == "a:0-10,b:10-20,c:20-30"
    cluster.lose("c")
    assert await routed(cluster) == "d:0-30"


async def test_a_standby_copy_is_preferred_to_a_leaving_peer() -> None:
    leaving = make_peer("d", decode_gb_s=1000.0, holdings=(make_holding(0, 30),), draining=True)
    cluster = three_peers(leaving, make_peer("e", decode_gb_s=1.0, holdings=(make_holding(20, 30, standby=True),)))
    cluster.lose("c")
    assert await routed(cluster) == "a:0-10,b:10-20,e:20-30"


async def test_when_the_active_layers_are_full_no_standby_copy_is_used_instead() -> None:
    busy = make_peer("a", holdings=(make_holding(0, 30, free=0),))
    cluster = Cluster(busy, make_peer("b", holdings=(make_holding(0, 30, standby=True),)))
    with pytest.raises(Overloaded, match="KV free"):
        await routed(cluster)


async def test_nothing_is_placed_on_a_leaving_peer() -> None:
    cluster = Cluster(make_peer("a"), make_peer("b", decode_gb_s=1000.0, draining=True))
    assert await routed(cluster) == "a:0-30"
    assert [peer for peer, _ in cluster.asked] == ["a-id"]
    with pytest.raises(NoPeer, match="about to leave"):
        await cluster.router.plan_for(CARD, MeshOptions(stages="b:0-30"), prompt_tokens=1, max_tokens=1)


async def test_stages_that_the_request_names_are_pinned() -> None:
    cluster = Cluster(make_peer("a"), make_peer("b"))
    await routed(cluster, MeshOptions(stages="a:0-10,b:10-30"))
    assert [place.pinned for _, place in cluster.asked] == [True, True]
    other = Cluster(make_peer("a"))
    await routed(other)
    assert [place.pinned for _, place in other.asked] == [False]


def test_the_stages_at_the_source_or_all_are_moved_to_the_target() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=50.0, holdings=(make_holding(0, 20, standby=True),)))
    plan = plan_of("a:0-10,b:10-20,c:20-30")
    found = cluster.router.with_target(CARD, plan, PeerId("d-id"), PeerId("b-id"))
    assert text_of(found) == "a:0-10,d:10-20,c:20-30"
    assert found.id != plan.id
    assert 0 < found.predicted_tpot_s != plan.predicted_tpot_s
    whole = three_peers(make_peer("d", holdings=(make_holding(0, 30),)))
    assert text_of(whole.router.with_target(CARD, plan, PeerId("d-id"), None)) == "d:0-10,d:10-20,d:20-30"


def test_an_impossible_move_is_refused_with_the_reason() -> None:
    plan = plan_of("a:0-10,b:10-20,c:20-30")
    cluster = three_peers(make_peer("d", holdings=(make_holding(0, 20, free=1000),)), make_peer("e"))
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


async def test_the_predicted_time_to_first_token_includes_the_opening_of_the_stages() -> None:
    async def predicted_s(hop_s: float) -> float:
        peers = (make_peer("a", holdings=(make_holding(0, 15),)), make_peer("b", holdings=(make_holding(15, 30),)))
        plan = await Cluster(*peers, hop_s=hop_s).router.plan_for(CARD, NO_OPTIONS, prompt_tokens=10, max_tokens=10)
        return plan.predicted_ttft_s

    # OPEN, OPENED, the prompt's tokens and activations, and the answer's token; one more round trip, as TCP's first window is full
    assert await predicted_s(0.1) - await predicted_s(0.0001) == pytest.approx(5 * 0.0999 + 0.2, abs=0.05)


async def test_corrections_that_peers_have_learned_reach_the_plan() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(0, 30),)))

    async def predicted() -> tuple[float, float]:
        plan = await cluster.router.plan_for(CARD, NO_OPTIONS, prompt_tokens=1500, max_tokens=24)
        return plan.predicted_ttft_s, plan.predicted_tpot_s

    ttft_s, tpot_s = await predicted()
    ((peer, advert),) = cluster.adverts.items()
    learned = LearnedRates(decode=(1.0, 3.0, 1.0), prefill=(1.0, 1.0, 2.0, 1.0), step_overhead_s=0.0)
    cluster.adverts[peer] = msgspec.structs.replace(advert, learned=learned)
    slower_ttft_s, slower_tpot_s = await predicted()
    assert slower_tpot_s == pytest.approx(3 * tpot_s, rel=0.1)
    assert 1.8 * ttft_s < slower_ttft_s < 2.1 * ttft_s
