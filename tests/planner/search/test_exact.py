"""The exact search, compared with a list of all chains."""

from collections.abc import Iterator
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest

from meshd.planner.chain import Array, LayerRun
from meshd.planner.search import exact
from meshd.planner.search.exact import ChainCosts, exact_search, prepend, relaxed_bound, runs_by_length
from meshd.planner.search.limits import SearchLimits

Runs = tuple[LayerRun, ...]


def random_costs(seed: int, peers: int, layers: int, *, back: bool, worst: bool) -> ChainCosts:
    draw = np.random.default_rng(seed)
    stage = draw.uniform(1, 9, (peers, layers + 1, layers + 1))
    stage[draw.uniform(size=stage.shape) < 0.3] = np.inf
    stage[:, np.tri(layers + 1, dtype=bool)] = np.inf
    link, way_back = (draw.uniform(0, 3, (peers, peers)) * (1 - np.eye(peers)) for _ in range(2))
    return ChainCosts(stage, link, way_back if back else None, worst)


def even_costs(peers: int, layers: int) -> ChainCosts:
    """Make costs: 1 for each layer on every peer, and 0 for links."""
    stage = np.full((peers, layers + 1, layers + 1), np.inf)
    for start, end in combinations(range(layers + 1), 2):
        stage[:, start, end] = end - start
    return ChainCosts(stage, np.zeros((peers, peers)))


def every_chain(costs: ChainCosts, limits: SearchLimits) -> Iterator[tuple[float, Runs]]:
    for count in range(1, min(costs.peers, costs.layers) + 1):
        for order in permutations(range(costs.peers), count):
            if not limits.allow(order):
                continue
            for inner in combinations(range(1, costs.layers), count - 1):
                cuts = pairwise((0, *inner, costs.layers))
                runs = tuple(LayerRun(peer, *cut) for peer, cut in zip(order, cuts, strict=True))
                yield price(costs, runs), runs


def price(costs: ChainCosts, runs: Runs) -> float:
    terms = [float(costs.stage[run]) for run in runs] + [float(costs.link[one.peer, two.peer]) for one, two in pairwise(runs)]
    if costs.back is not None:
        terms.append(float(costs.back[runs[-1].peer, runs[0].peer]))
    return max(terms) if costs.worst else sum(terms)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("worst", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        SearchLimits(),
        SearchLimits(least=3),
        SearchLimits(exactly=2),
        SearchLimits(require=frozenset({2})),
        SearchLimits(forbid=frozenset({0})),
    ],
)
def test_no_chain_is_cheaper_than_the_one_found(back: bool, worst: bool, limits: SearchLimits) -> None:
    found_none = 0
    for seed in range(20):
        costs = random_costs(seed, 4, 4, back=back, worst=worst)
        cheapest = min(value for value, _ in every_chain(costs, limits))
        found = exact_search(costs, limits)
        if found is None:
            found_none += 1
            assert cheapest == np.inf
            continue
        assert found.value == pytest.approx(cheapest)
        assert price(costs, found.runs) == pytest.approx(cheapest)
        assert limits.allow([run.peer for run in found.runs])
        assert relaxed_bound(costs) <= cheapest
    assert found_none < 20


def test_of_equal_chains_the_one_with_the_fewest_then_the_first_peers_is_found() -> None:
    costs = even_costs(3, 4)
    single, double = exact_search(costs, SearchLimits()), exact_search(costs, SearchLimits(least=2))
    assert single is not None
    assert single.runs == (LayerRun(0, 0, 4),)
    assert double is not None
    assert [run.peer for run in double.runs] == [0, 1]
    without_first = exact_search(costs, SearchLimits(forbid=frozenset({0})))
    assert without_first is not None
    assert without_first.runs == (LayerRun(1, 0, 4),)


@pytest.mark.parametrize("limits", [SearchLimits(least=3), SearchLimits(exactly=3), SearchLimits(require=frozenset({5}))])
def test_no_chain_within_the_limits_is_none(limits: SearchLimits) -> None:
    assert exact_search(even_costs(4, 2), limits) is None


def test_a_layer_that_no_peer_can_take_is_none() -> None:
    costs = even_costs(2, 3)
    costs.stage[:, :2, 2:] = np.inf  # no run contains layer 1
    assert exact_search(costs, SearchLimits()) is None
    assert relaxed_bound(costs) == np.inf


@pytest.mark.parametrize("worst", [False, True])
def test_both_ways_to_prepend_a_run_agree(monkeypatch: pytest.MonkeyPatch, worst: bool) -> None:
    costs = random_costs(7, 3, 6, back=False, worst=worst)
    onward: Array = np.random.default_rng(8).uniform(0, 9, (5, costs.layers + 1))
    for peer, runs in enumerate(runs_by_length(costs)):
        broadcast = prepend(costs, peer, runs, onward)
        with monkeypatch.context() as patch:
            patch.setattr(exact, "SMALL", 0)
            np.testing.assert_array_equal(prepend(costs, peer, runs, onward), broadcast)
