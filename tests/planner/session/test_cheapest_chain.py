"""The search for the cheapest cover of a gap, compared with a list of all covers."""

import random
from itertools import combinations, pairwise, product

import numpy as np
import pytest

from meshd.planner.chain import Array, LayerRun
from meshd.planner.session.cheapest_chain import CoverCosts, cover

RANDOM_GAPS = 150


def random_gap(rng: random.Random, peers: int, layers: int) -> CoverCosts:
    source = np.random.default_rng(rng.randrange(1 << 30))
    stage = source.uniform(0.1, 5, (peers, layers + 1, layers + 1))
    stage[source.uniform(size=stage.shape) < 0.4] = np.inf
    stage[:, *np.tril_indices(layers + 1)] = np.inf

    def sometimes(*shape: int) -> Array | None:
        return source.uniform(0, 3, shape) if rng.random() < 0.5 else None

    link = source.uniform(0, 3, (peers, peers))
    np.fill_diagonal(link, 0.0)
    return CoverCosts(stage, link, sometimes(peers), sometimes(peers), sometimes(peers, peers))


def price(gap: CoverCosts, runs: list[LayerRun]) -> float:
    total = sum(float(gap.stage[run]) for run in runs)
    total += sum(float(gap.link[one.peer, other.peer]) for one, other in pairwise(runs))
    total += 0.0 if gap.before is None else float(gap.before[runs[0].peer])
    total += 0.0 if gap.after is None else float(gap.after[runs[-1].peer])
    return total + (0.0 if gap.back is None else float(gap.back[runs[-1].peer, runs[0].peer]))


def every_chain(peers: int, layers: int) -> list[list[LayerRun]]:
    chains = []
    for inner in product([False, True], repeat=layers - 1):
        cuts = [0, *(cut for cut, taken in enumerate(inner, start=1) if taken), layers]
        spans = list(pairwise(cuts))
        places = product(range(peers), repeat=len(spans))
        chains += [[LayerRun(peer, *span) for peer, span in zip(chosen, spans, strict=True)] for chosen in places]
    return chains


@pytest.mark.parametrize(("peers", "layers"), [(1, 4), (2, 4), (3, 3)])
def test_no_other_chain_is_cheaper(peers: int, layers: int) -> None:
    rng = random.Random(peers * 10 + layers)
    chains = every_chain(peers, layers)
    found_none = 0
    for _ in range(RANDOM_GAPS):
        gap = random_gap(rng, peers, layers)
        best = min(price(gap, chain) for chain in chains)
        found = cover(gap)
        if found is None:
            found_none += 1
            assert best == np.inf
        else:
            assert found.value == pytest.approx(best)
            assert price(gap, list(found.runs)) == pytest.approx(best)
    assert found_none < RANDOM_GAPS


def test_of_equal_chains_one_run_on_the_first_peer_is_found() -> None:
    stage = np.full((2, 4, 4), np.inf)
    for start, end in combinations(range(4), 2):
        stage[:, start, end] = end - start
    chain = cover(CoverCosts(stage, np.zeros((2, 2))))
    assert chain is not None
    assert chain.runs == (LayerRun(0, 0, 3),)


def test_a_peer_may_have_several_stages() -> None:
    stage = np.full((2, 4, 4), np.inf)
    stage[0, 0, 1] = stage[0, 2, 3] = stage[1, 1, 2] = 1.0
    chain = cover(CoverCosts(stage, np.ones((2, 2)) - np.eye(2)))
    assert chain is not None
    assert chain.runs == (LayerRun(0, 0, 1), LayerRun(1, 1, 2), LayerRun(0, 2, 3))
    assert chain.value == 5.0
