"""Properties of every recovery candidate, over random clusters."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in_process.clusters import MODEL, make_advert, make_card, make_holding, make_peer
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.candidates import Candidate, CandidateSearch, PeerRules, candidate_search
from meshd.agents.session.plan.resume import RecoveryRequest, expected_held, method_of, resume_points
from meshd.types import Advert, Holding, LayerRange, PeerId, Plan, PlanId, StagePlan, ranges_of

LAYERS = 12
CONTEXT = 512
CARD = make_card(LAYERS)


def random_stages(rng: random.Random, peers: list[PeerId]) -> tuple[StagePlan, ...]:
    cuts = sorted({0, LAYERS, *(rng.randrange(1, LAYERS) for _ in range(rng.randrange(4)))})
    return tuple(StagePlan(peer=rng.choice(peers), layers=LayerRange(*span)) for span in pairwise(cuts))


def random_adverts(rng: random.Random, old: tuple[StagePlan, ...], peers: list[PeerId]) -> list[Advert]:
    profiles = []
    for peer in peers:
        holdings = [
            make_holding(stage.layers.start, stage.layers.end, free=rng.choice([0, 600])) for stage in old if stage.peer == peer
        ]
        for _ in range(rng.randrange(3)):
            start = rng.randrange(LAYERS)
            free, state = rng.choice([0, 600, 1100, 4096]), rng.choice(["active", "active", "loading"])
            holdings.append(
                make_holding(start, rng.randrange(start + 1, LAYERS + 1), free=free, state=state, standby=rng.random() < 0.5)
            )
        profiles.append(
            make_peer(
                peer.removesuffix("-id"),
                decode_gb_s=10 ** rng.uniform(0, 2),
                prefill_gflops=10 ** rng.uniform(1, 3),
                holdings=tuple(holdings),
                draining=rng.random() < 0.15,
            )
        )
    return [make_advert(profile, profiles, hop_s=10 ** rng.uniform(-4, -2)) for profile in profiles]


@st.composite
def searches(draw: st.DrawFn) -> tuple[CandidateSearch, list[Advert], PeerRules]:
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    peers = [PeerId(f"p{number}-id") for number in range(rng.randrange(1, 6))]
    old = random_stages(rng, peers)
    adverts = random_adverts(rng, old, peers)
    request = RecoveryRequest(
        old=Plan(id=PlanId("old"), model=MODEL, stages=old, prefill_chunk_tokens=128, context=CONTEXT),
        lost=frozenset(peer for peer in peers if rng.random() < 0.4),
        avoid=frozenset(peer for peer in peers if rng.random() < 0.2),
        prompt_tokens=200,
        max_tokens=312,
        known=rng.randrange(200, 512),
        mirrors={number: (rng.choice(peers), rng.randrange(512)) for number in range(len(old)) if rng.random() < 0.6},
    )
    adverts = [advert for advert in adverts if advert.peer not in request.lost or rng.random() < 0.3]
    rules = PeerRules(standby=rng.random() < 0.8, leaving=rng.random() < 0.3, avoided=rng.random() < 0.3)
    return candidate_search(CARD, adverts, MeshOptions(), request, PeerId("p0-id"), rules), adverts, rules


def usable(search: CandidateSearch, adverts: list[Advert], rules: PeerRules) -> Iterator[tuple[PeerId, Holding]]:
    """Yield the holdings that the rules allow and that have free KV for the session, besides what the session has reserved."""
    for advert in adverts:
        if (advert.draining and not rules.leaving) or (advert.peer in search.request.avoid and not rules.avoided):
            continue
        for holding in advert.holdings:
            if holding.state == "active" and (rules.standby or not holding.standby) and holding.kv_tokens_free >= CONTEXT:
                yield advert.peer, holding


def has_reserved(search: CandidateSearch, stage: StagePlan, rules: PeerRules) -> bool:
    """Whether the session has reserved the stage's layers at the stage's peer."""
    request = search.request
    assert request.old is not None
    reserved = [old for number, old in enumerate(request.old.stages) if old.peer == stage.peer and number in search.surviving]
    reserved += [request.old.stages[number] for number, (peer, _) in request.copies.items() if peer == stage.peer]
    if rules.avoided and stage.peer in request.avoid:
        reserved += [old for old in request.old.stages if old.peer == stage.peer]
    return any(stage.layers in old.layers for old in reserved)


@settings(max_examples=400, deadline=None)
@given(searches())
def test_the_best_candidate_has_every_layer_once_and_obeys_the_rules(
    drawn: tuple[CandidateSearch, list[Advert], PeerRules],
) -> None:
    search, adverts, rules = drawn
    found = search.best()
    if found is None:
        return
    assert [layer for stage in found.stages for layer in stage.layers] == list(range(LAYERS))
    free = list(usable(search, adverts, rules))
    for stage in found.stages:
        unreserved = any(peer == stage.peer and stage.layers in holding.layers for peer, holding in free)
        assert unreserved or has_reserved(search, stage, rules), stage
    for peer in {stage.peer for stage in found.stages}:
        new_stages = [stage for stage in found.stages if stage.peer == peer and not has_reserved(search, stage, rules)]
        assert len(new_stages) <= sum(holding.kv_tokens_free // CONTEXT for other, holding in free if other == peer)
    held = expected_held(search.request, found.stages, search.surviving)
    assert found.method == method_of(held, resume_points(held, search.request.known), search.request.known)
    assert 0 < found.pause_s < found.cost_s


@settings(max_examples=400, deadline=None)
@given(searches())
def test_there_is_a_candidate_unless_layers_or_free_kv_are_missing(drawn: tuple[CandidateSearch, list[Advert], PeerRules]) -> None:
    search, adverts, rules = drawn
    short = search.shortage()
    if search.best() is not None:
        assert not short.missing
        assert not short.busy
    elif not short.missing and not short.busy:
        # Every layer is in a holding with free KV for one stage. The only possible reason that there is no candidate: one holding
        # would have to run two stages, and has free KV for only one of them.
        whole = [holding for _, holding in usable(search, adverts, rules) if len(holding.layers) == LAYERS]
        assert all(holding.kv_tokens_free < 2 * CONTEXT for holding in whole)


@settings(max_examples=200, deadline=None)
@given(searches())
def test_with_nothing_lost_the_plan_is_kept_unless_another_costs_less(
    drawn: tuple[CandidateSearch, list[Advert], PeerRules],
) -> None:
    search, _, _ = drawn
    found = search.best()
    assert search.request.old is not None
    if found is None or len(search.surviving) < len(search.request.old.stages):
        return
    present = search.evaluate(tuple(StagePlan(peer=stage.peer, layers=stage.layers) for stage in search.request.old.stages))
    assert present.method == "kept"
    assert found.cost_s <= present.cost_s


@settings(max_examples=200, deadline=None)
@given(searches())
def test_a_better_plan_saves_at_least_a_tenth_of_the_time_per_token(drawn: tuple[CandidateSearch, list[Advert], PeerRules]) -> None:
    search, _, _ = drawn
    found: Candidate | None = search.better(1)
    assert search.request.old is not None
    if found is None:
        return
    assert len(search.surviving) == len(search.request.old.stages)
    present = search.evaluate(search.request.old.stages)
    assert found.estimate.tpot_s <= 0.9 * present.estimate.tpot_s
    assert found.cost_s < present.cost_s


@pytest.mark.parametrize(
    ("layers", "text"), [([], []), ([3], ["3-4"]), ([0, 1, 2], ["0-3"]), ([0, 2, 3, 7], ["0-1", "2-4", "7-8"])], ids=str
)
def test_layers_are_grouped_into_ranges(layers: list[int], text: list[str]) -> None:
    assert [str(run) for run in ranges_of(layers)] == text
