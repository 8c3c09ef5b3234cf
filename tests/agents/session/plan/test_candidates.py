"""What holds for every way to go on, whatever the cluster."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from in_process.clusters import MODEL, make_advert, make_card, make_holding, make_peer
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.candidates import Candidate, CandidateSearch, PeerRules, candidate_search
from meshd.agents.session.plan.resume import RecoveryRequest, expected_held, method_of, resume_positions
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
def scenes(draw: st.DrawFn) -> tuple[CandidateSearch, list[Advert], PeerRules]:
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
    allowed = PeerRules(standby=rng.random() < 0.8, leaving=rng.random() < 0.3, avoided=rng.random() < 0.3)
    return candidate_search(CARD, adverts, MeshOptions(), request, PeerId("p0-id"), allowed), adverts, allowed


def usable(search: CandidateSearch, adverts: list[Advert], allowed: PeerRules) -> Iterator[tuple[PeerId, Holding]]:
    """Where layers may be taken by the rules, reservations of the session aside."""
    for advert in adverts:
        if (advert.draining and not allowed.leaving) or (advert.peer in search.request.avoid and not allowed.avoided):
            continue
        for held in advert.holdings:
            if held.state == "active" and (allowed.standby or not held.standby) and held.kv_tokens_free >= CONTEXT:
                yield advert.peer, held


def has_own(search: CandidateSearch, stage: StagePlan, allowed: PeerRules) -> bool:
    """Whether the session has reserved these layers there."""
    request = search.request
    assert request.old is not None
    there = [old for number, old in enumerate(request.old.stages) if old.peer == stage.peer and number in search.surviving]
    there += [request.old.stages[number] for number, (peer, _) in request.copies.items() if peer == stage.peer]
    if allowed.avoided and stage.peer in request.avoid:
        there += [old for old in request.old.stages if old.peer == stage.peer]
    return any(stage.layers in old.layers for old in there)


@settings(max_examples=400, deadline=None)
@given(scenes())
def test_every_plan_is_whole_and_stays_within_the_rules(drawn: tuple[CandidateSearch, list[Advert], PeerRules]) -> None:
    search, adverts, allowed = drawn
    found = search.best()
    if found is None:
        return
    assert [layer for stage in found.stages for layer in stage.layers] == list(range(LAYERS))
    free = list(usable(search, adverts, allowed))
    for stage in found.stages:
        strange = any(peer == stage.peer and stage.layers in held.layers for peer, held in free)
        assert strange or has_own(search, stage, allowed), stage
    for peer in {stage.peer for stage in found.stages}:
        strange_only = [stage for stage in found.stages if stage.peer == peer and not has_own(search, stage, allowed)]
        assert len(strange_only) <= sum(held.kv_tokens_free // CONTEXT for other, held in free if other == peer)
    held = expected_held(search.request, found.stages, search.surviving)
    assert found.method == method_of(held, resume_positions(held, search.request.known), search.request.known)
    assert 0 < found.pause_s < found.cost_s


@settings(max_examples=400, deadline=None)
@given(scenes())
def test_there_is_a_plan_unless_layers_or_room_are_missing(drawn: tuple[CandidateSearch, list[Advert], PeerRules]) -> None:
    search, adverts, allowed = drawn
    short = search.shortage()
    if search.best() is not None:
        assert not short.missing
        assert not short.busy
    elif not short.missing and not short.busy:
        # Every layer has somebody: then only the room for several stages in one holding can be what is missing.
        assert all(held.kv_tokens_free < 2 * CONTEXT for _, held in usable(search, adverts, allowed) if len(held.layers) == LAYERS)


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_a_survivor_keeps_its_stage_or_the_change_pays(drawn: tuple[CandidateSearch, list[Advert], PeerRules]) -> None:
    search, _, _ = drawn
    found = search.best()
    assert search.request.old is not None
    if found is None or len(search.surviving) < len(search.request.old.stages):
        return
    present = search.judge(tuple(StagePlan(peer=stage.peer, layers=stage.layers) for stage in search.request.old.stages))
    assert present.method == "kept"
    assert found.cost_s <= present.cost_s


@settings(max_examples=200, deadline=None)
@given(scenes())
def test_a_better_plan_is_clearly_better(drawn: tuple[CandidateSearch, list[Advert], PeerRules]) -> None:
    search, _, _ = drawn
    found: Candidate | None = search.better(1)
    assert search.request.old is not None
    if found is None:
        return
    assert len(search.surviving) == len(search.request.old.stages)
    present = search.judge(search.request.old.stages)
    assert found.estimate.tpot_s <= 0.9 * present.estimate.tpot_s
    assert found.cost_s < present.cost_s


@pytest.mark.parametrize(
    ("layers", "text"), [([], []), ([3], ["3-4"]), ([0, 1, 2], ["0-3"]), ([0, 2, 3, 7], ["0-1", "2-4", "7-8"])], ids=str
)
def test_ranges(layers: list[int], text: list[str]) -> None:
    assert [str(run) for run in ranges_of(layers)] == text
