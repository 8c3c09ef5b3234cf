"""Stages for layers of a running session, compared with a list of all covers of a gap."""

import random
from itertools import pairwise, product

from in_process.clusters import make_holding, make_peer, make_problem, random_links
from meshd.planner.model.estimate import estimate
from meshd.planner.problem import PlanInput
from meshd.planner.session.pause import compute_s
from meshd.planner.session.reroute import HeldKv, Reroute, reserve_all, reserve_in
from meshd.types import LayerRange, PeerId, StagePlan

A, B, C = (make_peer(name, holdings=(make_holding(0, 30),)) for name in "abc")


def stages(text: str) -> tuple[StagePlan, ...]:
    parts = (part.split(":") for part in text.split(","))
    return tuple(StagePlan(peer=PeerId(f"{name}-id"), layers=LayerRange.parse(layers)) for name, layers in parts)


def problem_of(*peers: object, known: int = 300, **fields: object) -> PlanInput:
    return make_problem(*peers, prompt_tokens=known, resident_only=True, **fields)  # type: ignore[arg-type]


def test_the_cheapest_cover_of_a_gap_is_found() -> None:
    rng = random.Random(3)
    for _ in range(20):
        peers = [
            make_peer(
                name, decode_gb_s=10 ** rng.uniform(0, 2), prefill_gflops=10 ** rng.uniform(1, 3), holdings=(make_holding(8, 22),)
            )
            for name in "xyz"
        ]
        problem = problem_of(A, B, *peers, network=random_links(rng, [A, B, *peers]), peers=tuple(peer.id for peer in peers))
        found = Reroute(problem, 50).fill(LayerRange(10, 20), A.id, B.id)
        assert found is not None
        others = [stages(f"{one.name}:10-{cut},{two.name}:{cut}-20") for one, two, cut in product(peers, peers, range(11, 20))]
        others += [stages(f"{one.name}:10-20") for one in peers]
        cheapest = min(_serial_s(problem, other, 50) for other in others)
        assert _serial_s(problem, found, 50) <= cheapest * (1 + 1e-9)


def _serial_s(problem: PlanInput, gap: tuple[StagePlan, ...], ahead: int) -> float:
    """Compute the cost that `fill` minimises, without the code of `fill`."""
    whole = (*stages("a:0-10"), *gap, *stages("b:20-30"))
    predicted = estimate(problem, whole)
    decode = sum(part.decode_s for part in predicted.stages[1:-1]) + sum(hop.decode_s for hop in predicted.hops)
    known = problem.prompt_tokens
    again = sum(
        compute_s(problem, problem.profile(stage.peer), 0, known)[stage.layers.start : stage.layers.end].sum() for stage in gap
    )
    sends = sum(problem.network.hop_s(one.peer, other.peer, known * problem.activation_bytes) for one, other in pairwise(whole))
    return float(ahead * decode + again + sends)


def test_the_peer_with_the_kv_gets_the_stage() -> None:
    slower = make_peer("b", decode_gb_s=9.0, holdings=(make_holding(0, 30),))
    problem = problem_of(A, slower)
    assert Reroute(problem, 10).whole() == stages("a:0-30")
    assert Reroute(problem, 10, [HeldKv(slower.id, LayerRange(0, 30), 299)]).whole() == stages("b:0-30")
    assert Reroute(problem, 10, [HeldKv(slower.id, LayerRange(0, 30), 299)]).whole(under_way=False) == stages("a:0-30")
    assert Reroute(problem, 10, [HeldKv(PeerId("gone"), LayerRange(0, 30), 299)]).whole() == stages("a:0-30")


def test_without_peers_there_is_no_route() -> None:
    problem = problem_of(A, peers=())
    assert Reroute(problem, 10).whole() is None
    assert Reroute(problem, 10).fill(LayerRange(0, 3), None, None) is None
    assert Reroute(problem_of(make_peer("d", holdings=(make_holding(0, 20),))), 10).whole() is None


def test_kv_is_reserved_in_the_fullest_holding_with_enough() -> None:
    roomy, tight = make_holding(0, 30, free=4096), make_holding(5, 15, free=600)
    assert reserve_in((roomy, tight), LayerRange(5, 10), 512) == (roomy, make_holding(5, 15, free=88))
    assert reserve_in((roomy, tight), LayerRange(5, 16), 512) == (make_holding(0, 30, free=3584), tight)
    assert reserve_in((tight, make_holding(0, 30, state="loading")), LayerRange(5, 16), 512) is None


def test_stages_that_share_a_holding_need_kv_for_each() -> None:
    problem = problem_of(make_peer("a", holdings=(make_holding(0, 30, free=1100),)))
    two, three = stages("a:0-10,a:10-30"), stages("a:0-10,a:10-20,a:20-30")
    left = reserve_all(problem, two)
    assert left is not None
    assert left.profiles[0].holdings[0].kv_tokens_free == 1100 - 2 * 512
    assert reserve_all(problem, three) is None
