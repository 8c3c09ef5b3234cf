"""The heuristic search, compared with the exact search on clusters small enough for both."""

import itertools
import random
from collections.abc import Callable
from statistics import mean

import msgspec
import numpy as np
import pytest

from in_process.clusters import make_card, make_network, make_peer, make_problem, random_problem
from meshd.errors import DoesNotFit
from meshd.planner.chain import Chain
from meshd.planner.eligible import eligible
from meshd.planner.model.estimate import estimate
from meshd.planner.model.tables import CostTables
from meshd.planner.problem import PlanInput
from meshd.planner.search.exact import ChainCosts, Search, exact_search
from meshd.planner.search.heuristic import HeuristicSearch, best_in_order, chain_value
from meshd.planner.search.limits import SearchLimits
from meshd.planner.search.objectives import cheapest
from meshd.planner.search.select import EXACT_PEERS
from meshd.planner.search.solve import solve
from meshd.types import Objective

LIMITS = (
    SearchLimits(),
    SearchLimits(least=2),
    SearchLimits(least=3),
    SearchLimits(exactly=2),
    SearchLimits(require=frozenset({1})),
    SearchLimits(require=frozenset({0, 3}), least=3),
    SearchLimits(forbid=frozenset({0})),
    SearchLimits(forbid=frozenset({1, 2})),
    SearchLimits(forbid=frozenset({0, 2}), require=frozenset({2})),
    SearchLimits(exactly=2, forbid=frozenset({0, 1})),
)


def random_costs(rng: random.Random, peers: int, layers: int, *, back: bool, worst: bool) -> ChainCosts:
    draw = np.random.default_rng(rng.randrange(1 << 30))
    stage = draw.uniform(1, 9, (peers, layers + 1, layers + 1)) * (draw.uniform(size=(peers, 1, 1)) + 0.2)
    stage[draw.uniform(size=stage.shape) < 0.3] = np.inf
    stage[:, np.tri(layers + 1, dtype=bool)] = np.inf
    ways = [draw.uniform(0, 3, (peers, peers)) for _ in range(2)]
    for way in ways:
        np.fill_diagonal(way, 0.0)
    return ChainCosts(stage, ways[0], ways[1] if back else None, worst)


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("worst", [True, False])
def test_the_best_of_all_orders_is_the_exact_answer(back: bool, worst: bool) -> None:
    rng = random.Random(1)
    found = 0
    for limits in LIMITS * 3:
        costs = random_costs(rng, 4, 4, back=back, worst=worst)
        exact = exact_search(costs, limits)
        chains = [best_in_order(costs, order, limits) for order in itertools.permutations(range(4))]
        values = [chain.value for chain in chains if chain is not None]
        assert (exact is None) == (not values)
        if exact is not None:
            assert min(values) == pytest.approx(exact.value)
            found += 1
        for chain in (exact, *chains):
            if chain is not None:
                assert_sound(costs, chain, limits)
    assert found > 15


def assert_sound(costs: ChainCosts, chain: Chain, limits: SearchLimits) -> None:
    peers = [run.peer for run in chain.runs]
    assert len(set(peers)) == len(peers)
    assert limits.allow(peers)
    assert [chain.runs[0].start, *(run.end for run in chain.runs)] == [*(run.start for run in chain.runs), costs.layers]
    assert chain_value(costs, chain.runs) == pytest.approx(chain.value)


def value(problem: PlanInput, search: Search) -> float:
    chain = cheapest(CostTables(problem, eligible(problem)), problem.objective, SearchLimits(least=problem.min_peers), search)
    return np.inf if chain is None else chain.value


@pytest.mark.parametrize("objective", list(Objective))
def test_the_gap_to_the_exact_answer_is_small(objective: Objective, record_property: Callable[[str, object], None]) -> None:
    gaps = []
    for seed in range(12):
        problem = random_problem(random.Random(seed), 8, 6)
        problem = msgspec.structs.replace(problem, objective=objective, resident_only=False, peers=None)
        exact, found = value(problem, exact_search), value(problem, HeuristicSearch())
        if np.isinf(exact):
            assert np.isinf(found)
            continue
        gaps.append(found / exact - 1)
    record_property("mean_gap", mean(gaps))
    assert len(gaps) > 6
    assert min(gaps) > -1e-9
    assert mean(gaps) < 0.03


@pytest.mark.parametrize("count", [EXACT_PEERS + 1, 25, 50])
def test_many_peers_have_a_plan_near_that_of_the_fastest(count: int) -> None:
    rng = random.Random(count)
    peers = [
        make_peer(f"p{place:02}", decode_gb_s=rng.uniform(1, 20), memory=rng.randrange(90, 120) << 20) for place in range(count)
    ]
    problem = make_problem(*peers)
    solution = solve(problem)
    assert solution.method == "heuristic"
    assert all(use.share <= 0.9 for use in solution.estimate.memory)
    assert estimate(problem, solution.stages).tpot_s == solution.value
    assert solve(problem).stages == solution.stages
    fastest = sorted(peers, key=lambda peer: -peer.rates.decode_bytes_s)[:EXACT_PEERS]
    assert solution.value <= solve(make_problem(*fastest, network=make_network(peers))).value * 1.02


def test_a_model_that_needs_more_peers_than_the_exact_search_allows() -> None:
    peers = [make_peer(f"p{place:02}", memory=120 << 20) for place in range(16)]
    card = make_card(layer_bytes=[17 << 20] * 30)
    solution = solve(make_problem(*peers, card=card))
    assert len(solution.stages) > EXACT_PEERS
    with pytest.raises(DoesNotFit) as caught:
        solve(make_problem(*peers[:12], card=card))
    assert caught.value.missing_bytes > 0
