"""Which peers load missing layers."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in_process.clusters import make_card, make_holding, make_network, make_peer, make_problem, random_problem
from meshd.errors import DoesNotFit, NoPeer
from meshd.planner.model.memory import RESERVE, stage_memory
from meshd.planner.network import Network
from meshd.planner.problem import PlanInput
from meshd.planner.search.repair import repair
from meshd.types import LayerRange, LinkStats, StagePlan

MISSING = (LayerRange(10, 20),)
NEEDED = 10 * 2_212_000 + (64 << 20) + (4 << 20)


def text(stages: tuple[StagePlan, ...]) -> str:
    return ",".join(f"{stage.peer.removesuffix('-id')}:{stage.layers}" for stage in stages)


def test_only_missing_layers_are_loaded_and_by_the_fastest_peer() -> None:
    problem = make_problem(make_peer("slow", decode_gb_s=2.0), make_peer("quick", decode_gb_s=20.0))
    assert text(repair(problem, MISSING, kv_tokens=512)) == "quick:10-20"


def test_of_equal_peers_the_one_with_the_most_free_memory_loads() -> None:
    problem = make_problem(make_peer("a", memory=200 << 20), make_peer("b", memory=900 << 20), make_peer("c", memory=400 << 20))
    assert text(repair(problem, MISSING, kv_tokens=512)) == "b:10-20"


def test_a_peer_with_the_file_is_preferred_over_slow_links() -> None:
    peers = [make_peer(name) for name in "ab"]
    stored = msgspec.structs.replace(peers[1], stored=True)
    problem = make_problem(peers[0], stored, network=make_network(peers, bandwidth=1e6))
    assert text(repair(problem, MISSING, kv_tokens=512)) == "b:10-20"


def test_without_the_file_the_peer_with_the_fastest_link_to_it_loads() -> None:
    source = msgspec.structs.replace(make_peer("s", memory=0), stored=True)
    peers = [make_peer(name) for name in "ab"]
    slow, quick = (LinkStats(rtt_s=2e-4, bandwidth_bytes_s=rate, hop_s=1e-4) for rate in (1e6, 1e8))
    links = {(source.id, peers[0].id): slow, (source.id, peers[1].id): quick}
    problem = make_problem(source, *peers, network=Network(links))
    assert text(repair(problem, MISSING, kv_tokens=512)) == "b:10-20"


@pytest.mark.parametrize("before", [True, False])
def test_the_peer_nearest_to_the_holder_of_adjacent_layers_loads(before: bool) -> None:
    neighbour = make_peer("n", memory=0, holdings=(make_holding(0, 10) if before else make_holding(20, 30),))
    peers = [make_peer(name) for name in "ab"]
    near, far = (LinkStats(rtt_s=2 * hop, bandwidth_bytes_s=1e8, hop_s=hop) for hop in (1e-4, 5e-2))
    used = {
        (neighbour.id, peer.id) if before else (peer.id, neighbour.id): link for peer, link in zip(peers, (far, near), strict=True)
    }
    others = {(target, source): near for source, target in used}
    problem = make_problem(neighbour, *peers, network=Network(used | others))
    assert text(repair(problem, MISSING, kv_tokens=512)) == "b:10-20"


def test_layers_that_fit_on_no_single_peer_are_split() -> None:
    problem = make_problem(*(make_peer(name, memory=90 << 20) for name in "abc"))
    stages = repair(problem, MISSING, kv_tokens=512)
    assert len({stage.peer for stage in stages}) == len(stages) > 1
    assert [layer for stage in stages for layer in stage.layers] == list(MISSING[0])


def test_several_runs_share_a_peers_memory() -> None:
    peers = [make_peer("a", decode_gb_s=50.0, memory=150 << 20), make_peer("b", decode_gb_s=5.0, memory=150 << 20)]
    stages = repair(make_problem(*peers), (LayerRange(5, 15), LayerRange(18, 28)), kv_tokens=512)
    assert text(stages) == "a:5-15,b:18-28"


def test_idle_holdings_are_not_unloaded() -> None:
    problem = make_problem(make_peer("a", memory=20 << 20, holdings=(make_holding(0, 30, kv_tokens=100_000),)))
    with pytest.raises(DoesNotFit):
        repair(problem, MISSING, kv_tokens=512)


def test_the_error_names_the_layers_and_the_missing_bytes() -> None:
    problem = make_problem(make_peer("a", memory=10 << 20), make_peer("b", memory=50 << 20))
    with pytest.raises(
        DoesNotFit, match=r"layers 10-20 of tiny fit nowhere: .* KV for 512 tokens on b, which may take 45"
    ) as caught:
        repair(problem, MISSING, kv_tokens=512)
    assert caught.value.missing_bytes == pytest.approx(NEEDED + 512 * 10 * 1536 - 0.9 * (50 << 20), rel=0.1)
    assert repair(make_problem(make_peer("b", memory=50 << 20 | caught.value.missing_bytes * 2)), MISSING, kv_tokens=512)


def test_no_eligible_peer_is_an_error() -> None:
    leaving, attention = make_peer("a", draining=True), make_peer("b", roles=("attention",))
    with pytest.raises(NoPeer, match="a: it is about to leave; b: its role leaves out compute"):
        repair(make_problem(leaving, attention), MISSING, kv_tokens=512)
    with pytest.raises(NoPeer, match="no live peer can take layers; start"):
        repair(make_problem(make_peer("c"), peers=()), MISSING, kv_tokens=512)


@st.composite
def repairs(draw: st.DrawFn) -> tuple[PlanInput, tuple[LayerRange, ...], int]:
    layers = draw(st.integers(2, 10))
    problem = random_problem(random.Random(draw(st.integers(0, 1 << 30))), draw(st.integers(1, 4)), layers)
    cuts = sorted(draw(st.sets(st.integers(0, layers), min_size=2, max_size=4)))
    missing = tuple(LayerRange(*span) for span in zip(cuts[::2], cuts[1::2], strict=False))
    return problem, missing, draw(st.sampled_from([32, 512, 20_000]))


@settings(max_examples=200, deadline=None)
@given(repairs())
def test_a_repair_has_exactly_the_missing_layers_and_fits(drawn: tuple[PlanInput, tuple[LayerRange, ...], int]) -> None:
    problem, missing, kv_tokens = drawn
    try:
        stages = repair(problem, missing, kv_tokens=kv_tokens)
    except (DoesNotFit, NoPeer):
        return
    assert [layer for stage in stages for layer in stage.layers] == [layer for run in missing for layer in run]
    asked = msgspec.structs.replace(problem, context=kv_tokens)
    for profile in problem.profiles:
        used = sum(stage_memory(asked, stage).total_bytes for stage in stages if stage.peer == profile.id)
        assert used <= profile.memory_free_bytes * (1 - RESERVE)
        assert not used or problem.peers is None or profile.id in problem.peers


def test_the_first_layers_need_memory_for_the_embedding_too() -> None:
    card = make_card(30)
    only = make_problem(make_peer("a", memory=(64 << 20) + 10 * 2_212_000 + (20 << 20)), card=card)
    assert repair(only, MISSING, kv_tokens=64)
    with pytest.raises(DoesNotFit):
        repair(only, (LayerRange(0, 10),), kv_tokens=64)
