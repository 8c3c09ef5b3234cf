"""Plans for sessions that lost a peer, over layers that other peers have."""

import pytest

from in_process.clusters import make_card, make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import NO_OPTIONS, fill_memory, ids, recover, recovery_request, text_of, three_peers
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.candidates import MAX_STAGES
from meshd.agents.session.plan.resume import KEPT, MIRROR, PREFILL, REPLAY
from meshd.errors import NoPeer, Overloaded
from meshd.types import LinkStats, Objective, PeerId


async def test_one_standby_takes_all_lost_layers() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert found.method == REPLAY
    assert found.plan.id not in ("old", (await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", ids("b")))).plan.id)
    assert found.plan.context == 512
    assert 0 < found.plan.predicted_tpot_s < found.predicted_s < found.plan.predicted_ttft_s
    assert not cluster.asked


async def test_the_lost_layers_are_split_over_two_peers() -> None:
    more = (
        make_peer("d", holdings=(make_holding(8, 16, standby=True),)),
        make_peer("e", holdings=(make_holding(13, 25, standby=True),)),
    )
    cluster = three_peers(*more)
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert [stage.peer for stage in found.plan.stages] == ["a-id", "d-id", "e-id", "c-id"]
    assert found.method == REPLAY


async def test_a_surviving_peer_takes_the_lost_layers_besides_its_own() -> None:
    cluster = Cluster(
        make_peer("a", holdings=(make_holding(0, 15), make_holding(15, 30, standby=True))),
        make_peer("b", holdings=(make_holding(15, 30),)),
    )
    found = await recover(cluster, recovery_request("a:0-15,b:15-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-15,a:15-30"
    assert found.method == REPLAY


async def test_stages_at_both_ends_are_replaced() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(0, 10, standby=True), make_holding(20, 30, standby=True))))
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("a", "c")))
    assert text_of(found.plan) == "d:0-10,b:10-20,d:20-30"
    assert found.method == REPLAY


async def test_a_copy_of_the_kv_decides_who_takes_over() -> None:
    quick = make_peer("d", decode_gb_s=12.0, prefill_gflops=200.0, holdings=(make_holding(10, 20, standby=True),))
    mirror = make_peer("e", holdings=(make_holding(10, 20, standby=True, free=0),))
    cluster = three_peers(quick, mirror)
    lost = cluster.lose("b")
    without = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost))
    assert text_of(without.plan) == "a:0-10,d:10-20,c:20-30"
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost, mirrors={1: (PeerId("e-id"), 290)}))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    assert found.method == MIRROR
    assert found.predicted_s < without.predicted_s


async def test_a_copy_at_a_lost_peer_is_not_used() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    lost = cluster.lose("b") | ids("d")
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost, mirrors={1: (PeerId("d-id"), 299)}))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30", "d is back, but without the KV"
    assert found.method == REPLAY


async def test_a_copy_at_a_very_slow_peer_is_not_worth_using() -> None:
    slow = make_peer("e", decode_gb_s=0.01, holdings=(make_holding(10, 20, standby=True),))
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, standby=True),)), slow)
    lost = cluster.lose("b")
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost, mirrors={1: (PeerId("e-id"), 299)}))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"


async def test_a_fresh_route_is_taken_if_the_expected_tokens_make_up_for_its_pause() -> None:
    slow = make_peer("d", decode_gb_s=0.05, prefill_gflops=1.0, holdings=(make_holding(10, 20, standby=True),))
    quick = make_peer("e", decode_gb_s=50.0, prefill_gflops=2000.0, holdings=(make_holding(0, 30, standby=True),))
    cluster = Cluster(
        *(make_peer(n, decode_gb_s=0.5, holdings=(make_holding(s, s + 10),)) for n, s in zip("abc", (0, 10, 20), strict=True)),
        slow,
        quick,
    )
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "e:0-30"
    assert found.method == PREFILL


async def test_near_the_end_of_the_answer_the_shorter_pause_wins() -> None:
    even = [
        make_peer(name, decode_gb_s=2.0, holdings=(make_holding(start, start + 10),))
        for name, start in (("a", 0), ("b", 10), ("c", 20))
    ]
    quick = make_peer("e", decode_gb_s=50.0, holdings=(make_holding(0, 30, standby=True),))
    cluster = Cluster(*even, quick)
    lost = cluster.lose("b")
    early = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost, prompt_tokens=250, max_tokens=3000, known=350))
    late = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost, prompt_tokens=250, max_tokens=102, known=350))
    assert (text_of(early.plan), early.method) == ("e:0-30", PREFILL)
    assert (text_of(late.plan), late.method) == ("a:0-10,e:10-20,c:20-30", REPLAY)


async def test_a_surviving_stage_needs_no_free_kv_and_a_replacement_does() -> None:
    peers = [make_peer(n, holdings=(make_holding(s, s + 10, free=0),)) for n, s in (("a", 0), ("b", 10), ("c", 20))]
    full = make_peer("d", decode_gb_s=100.0, holdings=(make_holding(10, 20, standby=True, free=480),))
    cluster = Cluster(*peers, full, make_peer("e", holdings=(make_holding(10, 20, standby=True, free=512),)))
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    cluster.lose("e")
    with pytest.raises(Overloaded, match="layers 10-20 of tiny have no KV free for 512 tokens") as caught:
        await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", ids("b")))
    assert "lost: b" in caught.value.message
    assert not cluster.asked


async def test_two_gaps_are_not_filled_with_the_same_free_kv() -> None:
    one = make_peer("d", holdings=(make_holding(0, 30, standby=True, free=900),))
    slower = make_peer("e", decode_gb_s=9.0, holdings=(make_holding(20, 30, standby=True),))
    cluster = three_peers(one, slower)
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("a", "c")))
    assert text_of(found.plan) == "d:0-10,b:10-20,e:20-30"


async def test_the_links_to_and_from_a_peer_decide_between_equal_peers() -> None:
    cluster = three_peers(*(make_peer(name, holdings=(make_holding(10, 20, standby=True),)) for name in "de"))
    slow = LinkStats(rtt_s=0.02, bandwidth_bytes_s=1.25e8, hop_s=0.01)

    def slowed(name: str, other: str) -> None:
        links = cluster.adverts[PeerId(f"{name}-id")].links
        cluster.change(name, links={**links, PeerId(f"{other}-id"): slow})

    lost = cluster.lose("b")
    for source, target in (("a", "d"), ("d", "c")):
        before = dict(cluster.adverts)
        slowed(source, target)
        found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost))
        assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
        cluster.adverts = before
    for source, target in (("c", "d"), ("d", "a")):
        slowed(source, target)
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30", "no activations use these directions"


async def test_over_a_slow_link_a_copy_saves_sending_the_kept_outputs() -> None:
    cluster = three_peers(*(make_peer(name, holdings=(make_holding(10, 20, standby=True),)) for name in "de"))
    thin = LinkStats(rtt_s=2e-4, bandwidth_bytes_s=2e6, hop_s=1e-4)
    cluster.change("a", links={**cluster.adverts[PeerId("a-id")].links, PeerId("e-id"): thin})
    lost = cluster.lose("b")
    found = await recover(
        cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost, max_tokens=110, mirrors={1: (PeerId("e-id"), 299)})
    )
    assert (text_of(found.plan), found.method) == ("a:0-10,e:10-20,c:20-30", MIRROR)


async def test_a_peer_that_no_longer_advertises_its_layers_has_lost_its_kv() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    cluster.change("b", holdings=())
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30"))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"


async def test_a_surviving_stage_continues_on_layers_that_are_draining() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, standby=True),)))
    cluster.change("a", holdings=(make_holding(0, 10, state="draining", free=0),))
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"


async def test_a_peer_to_avoid_is_used_only_if_there_is_no_other_plan() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=0.1, prefill_gflops=1.0, holdings=(make_holding(10, 20, standby=True),)))
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", avoid=ids("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    cluster.lose("d")
    fill_memory(cluster, "a", "c")
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", avoid=ids("b")))
    assert text_of(found.plan) == "a:0-10,b:10-20,c:20-30"
    assert found.method == REPLAY, "the KV at b is not used"


async def test_a_peer_to_avoid_is_not_used_while_others_can_load_its_layers() -> None:
    cluster = three_peers()
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", avoid=ids("b")))
    assert "b-id" not in found.plan.peers
    assert {peer for peer, _ in cluster.asked} <= {"a-id", "c-id"}


async def test_a_session_that_no_other_peers_can_serve_returns_to_those_that_refused_it() -> None:
    """They may have had no room for a moment. They load nothing for it: its next plan would avoid what they load as well."""
    cluster = three_peers(make_peer("d"))
    fill_memory(cluster, "d")
    found = await recover(cluster, recovery_request(None, avoid=ids("a", "b", "c")))
    assert text_of(found.plan) == "a:0-10,b:10-20,c:20-30"
    assert not cluster.asked


async def test_a_silent_peer_is_used_if_there_is_no_other_plan() -> None:
    cluster = three_peers()
    fill_memory(cluster, "a", "c")
    cluster.suspects = [cluster.adverts[PeerId("b-id")]]
    cluster.lose("b")
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30"))
    assert (text_of(found.plan), found.method) == ("a:0-10,b:10-20,c:20-30", REPLAY)


async def test_a_leaving_peer_keeps_its_stage_but_gets_another_only_if_no_other_peer_can_take_it() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=0.1, prefill_gflops=1.0, holdings=(make_holding(10, 20, standby=True),)))
    cluster.change("a", draining=True, holdings=(make_holding(0, 20),))
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    cluster.lose("d")
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", ids("b")))
    assert text_of(found.plan) == "a:0-10,a:10-20,c:20-30"
    assert not cluster.asked


async def test_a_recovery_obeys_only_the_peers_option() -> None:
    cluster = three_peers(
        make_peer("d", decode_gb_s=100.0, holdings=(make_holding(10, 20, standby=True),)),
        make_peer("e", holdings=(make_holding(10, 20, standby=True),)),
    )
    lost = cluster.lose("b")
    mesh = MeshOptions(peers=("a", "b", "c", "e"), min_peers=5, objective=Objective.ENERGY, stages="a:0-10,b:10-20,c:20-30")
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost), mesh)
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    with pytest.raises(NoPeer, match="not in the cluster now: b"):
        await recover(cluster, recovery_request("b:0-30", lost), MeshOptions(peers=("b",)))


async def test_without_an_old_plan_the_best_route_is_found() -> None:
    cluster = three_peers()
    found = await recover(cluster, recovery_request(None))
    assert text_of(found.plan) == "a:0-10,b:10-20,c:20-30"
    assert found.method == PREFILL


async def test_with_nothing_lost_everything_is_kept() -> None:
    found = await recover(three_peers(), recovery_request("a:0-10,b:10-20,c:20-30"))
    assert (text_of(found.plan), found.method) == ("a:0-10,b:10-20,c:20-30", KEPT)


async def test_a_plan_has_a_bounded_number_of_stages() -> None:
    layers = 2 * MAX_STAGES + 2
    card = make_card(layers)
    peers = [
        make_peer(name, holdings=tuple(make_holding(at, at + 1) for at in range(first, layers, 2)))
        for name, first in (("a", 0), ("b", 1))
    ]
    with pytest.raises(Overloaded, match="in all stages at once"):
        await Cluster(*peers).router.recover(card, NO_OPTIONS, recovery_request(None))
