"""Properties of the decisions for random clusters: they respect memory, converge, and do not depend on the order of adverts."""

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from in_process.adverts import advert, held, once_loaded
from in_process.clusters import MODEL, make_card
from meshd.agents.placement.history import HELD, ServedLayers
from meshd.agents.placement.replication import ClusterState, LoadRequest, decide
from meshd.types import Holding, ModelCard, PeerId


@st.composite
def clusters(draw_from: st.DrawFn) -> ClusterState:
    rng = random.Random(draw_from(st.integers(0, 2**32)))
    card = make_card(rng.randrange(2, 13))
    count = card.spec.layers
    adverts = []
    for name in "abcdef"[: rng.randrange(1, 7)]:
        holdings = [_random_holding(rng, count) for _ in range(rng.choice([0, 1, 1, 2]))]
        memory = int(10 ** rng.uniform(7.5, 9.7))
        adverts.append(advert(name, *holdings, memory=memory, draining=rng.random() < 0.15))
    lost = {ServedLayers(_random_holding(rng, count).layers, 2048, rng.random() < 0.2) for _ in range(rng.randrange(3))}
    return ClusterState(
        adverts=adverts,
        cards={MODEL: card},
        lost={MODEL: lost} if lost else {},
        suspects={PeerId(name) for name in "abcdef" if rng.random() < 0.1},
        refused={(PeerId(name), MODEL) for name in "abcdef" if rng.random() < 0.1},
        copies=rng.choice([1, 2, 2, 3]),
    )


def _random_holding(rng: random.Random, count: int) -> Holding:
    start = rng.choice([0, 0, rng.randrange(count)])
    end = rng.choice([count, rng.randrange(start + 1, count + 1)])
    state = rng.choice(["active"] * 6 + ["loading", "draining", "failed"])
    return held(
        start, end, kv_tokens=rng.choice([512, 2048, 8192]), state=state, standby=rng.random() < 0.3, pinned=rng.random() < 0.1
    )


def _bytes(card: ModelCard, request: LoadRequest) -> int:
    weights = sum(card.layer_bytes[request.layers.start : request.layers.end])
    return weights + request.kv_tokens * len(request.layers) * card.kv_bytes_per_token_layer()


def _is_new(cluster: ClusterState, request: LoadRequest) -> bool:
    holdings = next(advert.holdings for advert in cluster.adverts if advert.peer == request.peer)
    return not any(each.layers == request.layers and each.state in HELD for each in holdings)


@given(clusters())
def test_no_request_exceeds_a_peers_memory(cluster: ClusterState) -> None:
    card = cluster.cards[MODEL]
    for each in cluster.adverts:
        free = each.capability.memory_free_bytes
        offered = free + sum(
            held.weight_bytes + held.kv_tokens_total * len(held.layers) * card.kv_bytes_per_token_layer() for held in each.holdings
        )
        new = [request for request in decide(cluster).requests if request.peer == each.peer and _is_new(cluster, request)]
        for number, request in enumerate(new):
            left = free - sum(_bytes(card, other) for other in new[: number + 1])
            assert left >= (offered / 2 if request.standby else 0)


@given(clusters())
def test_no_layer_is_loaded_twice_on_a_peer_or_on_an_unfit_peer(cluster: ClusterState) -> None:
    new = [request for request in decide(cluster).requests if _is_new(cluster, request)]
    by_peer = {each.peer: each for each in cluster.adverts}
    for number, request in enumerate(new):
        present = [each.layers for each in by_peer[request.peer].holdings if each.state in HELD]
        present += [other.layers for other in new[:number] if other.peer == request.peer]
        assert not set(request.layers).intersection(layer for layers in present for layer in layers)
        assert not by_peer[request.peer].draining
        assert request.peer not in cluster.suspects
        assert (request.peer, MODEL) not in cluster.refused


@given(clusters())
def test_requests_that_are_met_are_soon_followed_by_none(cluster: ClusterState) -> None:
    cards = list(cluster.cards.values())
    for _ in range(3):
        asked = decide(cluster).requests
        cluster = replace(cluster, adverts=once_loaded(cluster.adverts, asked, cards))
    assert not decide(cluster).requests


@given(clusters(), st.randoms())
def test_the_requests_do_not_depend_on_the_order_of_adverts(cluster: ClusterState, rng: random.Random) -> None:
    shuffled = list(cluster.adverts)
    rng.shuffle(shuffled)
    assert decide(replace(cluster, adverts=shuffled)) == decide(cluster)
