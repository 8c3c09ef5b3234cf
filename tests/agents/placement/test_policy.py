"""Keeping models placed, as pure decisions: what is asked for when peers leave, join and are short of memory."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.adverts import CARD, KV, advert, held
from in_process.clusters import MODEL, make_card, make_problem
from meshd.agents.placement.policy import (
    HELD,
    ClusterState,
    Decision,
    HoldingHistory,
    LoadRequest,
    ServedLayers,
    apply_request,
    decide,
    grow,
    orphaned_copies,
)
from meshd.planner.model.memory import stage_memory
from meshd.planner.profile import profiles_from_adverts
from meshd.types import Advert, Holding, LayerRange, ModelCard, ModelId, PeerId, StagePlan


def decided(*adverts: Advert, cards: Sequence[ModelCard] = (CARD,), **fields: Any) -> Decision:
    return decide(ClusterState(adverts=adverts, cards={card.id: card for card in cards}, **fields))


def lost(*ranges: tuple[int, int]) -> dict[Any, list[ServedLayers]]:
    return {MODEL: [ServedLayers(LayerRange(*layers), KV) for layers in ranges]}


def requests(decision: Decision) -> list[tuple[str, str, bool]]:
    return [(request.peer, str(request.layers), request.standby) for request in decision.requests]


def loaded(adverts: Sequence[Advert], asked: Sequence[LoadRequest], cards: Sequence[ModelCard] = (CARD,)) -> list[Advert]:
    """The adverts once every request is met."""
    by_peer = {advert.peer: advert for advert in adverts}
    by_model = {card.id: card for card in cards}
    for request in asked:
        after = apply_request(by_peer[request.peer], request, by_model[request.model])
        ready = tuple(msgspec.structs.replace(each, state="active") for each in after.holdings)
        by_peer[request.peer] = msgspec.structs.replace(after, holdings=ready)
    return list(by_peer.values())


# Copies


def test_every_stage_of_a_model_gets_a_copy_on_a_peer_that_has_none_of_it() -> None:
    mesh = advert("a", held(0, 17)), advert("b", held(17, 30)), advert("c")
    assert requests(decided(*mesh)) == [("c", "0-17", True), ("c", "17-30", True)]


def test_two_peers_hold_each_others_stages() -> None:
    mesh = advert("a", held(0, 17)), advert("b", held(17, 30))
    assert requests(decided(*mesh)) == [("b", "0-17", True), ("a", "17-30", True)]


def test_a_copy_has_the_kv_of_the_original() -> None:
    (request,) = decided(advert("a", held(0, 30, kv_tokens=4096)), advert("b")).requests
    assert request.kv_tokens == 4096


def test_the_roomiest_peer_takes_the_copy() -> None:
    mesh = advert("a", held(0, 30)), advert("b", memory=2 << 30), advert("c", memory=3 << 30)
    assert requests(decided(*mesh)) == [("c", "0-30", True)]


def test_a_peer_that_serves_another_stage_is_only_taken_if_no_other_can() -> None:
    mesh = advert("a", held(0, 15)), advert("b", held(15, 30), memory=8 << 30), advert("c", memory=2 << 30)
    assert requests(decided(*mesh))[0] == ("c", "0-15", True)


def needed(start: int, end: int, kv_tokens: int = KV) -> int:
    problem = make_problem(card=CARD, context=kv_tokens)
    return stage_memory(problem, StagePlan(peer=PeerId("any"), layers=LayerRange(start, end))).total_bytes


def test_half_of_what_a_peer_offers_stays_free() -> None:
    enough = 2 * needed(0, 30)
    assert decided(advert("a", held(0, 30)), advert("b", memory=enough)).requests
    assert not decided(advert("a", held(0, 30)), advert("b", memory=enough - 2)).requests


def test_what_is_asked_for_and_what_is_held_already_counts_against_the_half() -> None:
    mesh = advert("a", held(0, 17)), advert("b", held(17, 30), memory=0)
    enough = 2 * (needed(0, 17) + needed(17, 30))
    assert len(decided(*mesh, advert("c", memory=enough)).requests) == 2
    assert requests(decided(*mesh, advert("c", memory=enough - 2)))[0] == ("c", "0-17", True)
    assert all(request.peer != "c" for request in decided(*mesh, advert("c", memory=enough - 2)).requests[1:])
    other = held(0, 10, model=ModelId("other"), weight_bytes=needed(17, 30))
    assert not any(request.peer == "c" for request in decided(*mesh, advert("c", other, memory=2 * needed(0, 17))).requests)


def test_one_copy_is_no_standby_at_all_and_three_are_two() -> None:
    mesh = advert("a", held(0, 30)), advert("b"), advert("c"), advert("d")
    assert not decided(*mesh, copies=1).requests
    assert requests(decided(*mesh, copies=3)) == [("b", "0-30", True), ("c", "0-30", True)]


def test_layers_that_others_serve_too_need_no_copy() -> None:
    assert not decided(advert("a", held(0, 30)), advert("b", held(0, 15)), advert("c", held(15, 30)), advert("d")).requests


@pytest.mark.parametrize(
    "unfit",
    [
        advert("b", draining=True),
        advert("b", roles=("storage",)),
        advert("b", held(0, 30, state="draining")),
        advert("b", gb_s=0.0),
    ],
    ids=["leaves", "does not compute", "lets go of them just now", "not measured"],
)
def test_who_gets_no_copy(unfit: Advert) -> None:
    assert not decided(advert("a", held(0, 30)), unfit).requests


def test_suspects_and_those_who_refused_get_no_copy() -> None:
    mesh = advert("a", held(0, 30)), advert("b")
    assert not decided(*mesh, suspects={PeerId("b")}).requests
    assert not decided(*mesh, refused={(PeerId("b"), MODEL)}).requests


def test_a_model_that_is_not_whole_yet_is_not_copied() -> None:
    assert not decided(advert("a", held(0, 15)), advert("b", held(15, 30, state="loading")), advert("c")).requests


def test_what_is_asked_for_already_is_not_asked_for_again() -> None:
    mesh = advert("a", held(0, 30)), advert("b"), advert("c")
    asked = decided(*mesh).requests
    assert len(asked) == 1
    assert not decided(*mesh, pending=asked).requests


def test_idle_copies_of_another_model_are_free_memory_to_a_placement() -> None:
    def free(**fields: Any) -> int:
        (profile,) = profiles_from_adverts([advert("a", held(0, 30, **fields), memory=1000)], ModelId("other"))
        return profile.memory_free_bytes

    whole = 30 * 2_212_000 + KV * 30 * CARD.kv_bytes_per_token_layer()
    assert free(standby=True) == 1000 + whole
    assert free() == free(standby=True, kv_tokens_free=0) == free(standby=True, state="loading") == 1000


# Losses


def test_the_copy_of_a_lost_stage_takes_over() -> None:
    mesh = advert("a", held(0, 17)), advert("c", held(17, 30, standby=True))
    decision = decided(*mesh, lost={MODEL: [ServedLayers(LayerRange(17, 30), KV, pinned=True)]}, copies=1)
    assert decision.requests == (LoadRequest(PeerId("c"), MODEL, LayerRange(17, 30), KV, standby=False, pinned=True),)


def test_lost_layers_without_a_copy_are_placed_anew() -> None:
    decision = decided(advert("a", held(0, 17)), advert("c"), lost=lost((17, 30)), copies=1)
    assert sorted((request.layers, request.standby) for request in decision.requests) == [(LayerRange(17, 30), False)]


def test_only_what_is_missing_of_a_lost_stage_is_placed_anew() -> None:
    decision = decided(advert("a", held(0, 20)), advert("c"), lost=lost((10, 30)), copies=1)
    assert {layer for request in decision.requests for layer in request.layers} == set(range(20, 30))


def test_lost_layers_are_placed_with_less_kv_if_memory_is_short() -> None:
    mesh = advert("a", held(0, 17), memory=0), advert("c", memory=260 << 20)
    (request,) = decided(*mesh, lost={MODEL: [ServedLayers(LayerRange(17, 30), 65_536)]}, copies=1).requests
    assert 512 <= request.kv_tokens < 65_536


def test_lost_layers_go_to_a_peer_that_serves_none_unless_only_others_are_left() -> None:
    """A route takes one run of layers on each peer."""
    mesh = advert("a", held(0, 10), memory=8 << 30), advert("b", held(10, 20)), advert("c", memory=1 << 30)
    assert requests(decided(*mesh, lost=lost((20, 30)), copies=1)) == [("c", "20-30", False)]
    assert {request.peer for request in decided(*mesh[:2], lost=lost((20, 30)), copies=1).requests} <= {"a", "b"}
    assert decided(*mesh[:2], lost=lost((20, 30)), copies=1).requests


def test_lost_layers_that_fit_nowhere_are_told() -> None:
    decision = decided(advert("a", held(0, 17), memory=0), advert("c", memory=1 << 20), lost=lost((17, 30)))
    assert not decision.requests
    assert "tiny has lost layers 17-30" in decision.missing[0]


def test_a_model_that_would_not_be_whole_again_is_left_alone() -> None:
    """One peer let go of it already and the other will soon: it is being unplaced."""
    assert decided(advert("a", held(0, 10)), advert("c"), lost=lost((20, 30))) == Decision((), ())


def test_a_model_that_is_active_nowhere_is_left_alone() -> None:
    assert decided(advert("a"), advert("c"), lost=lost((0, 30))) == Decision((), ())


def test_what_a_leaving_peer_holds_counts_as_lost() -> None:
    mesh = advert("a", held(0, 30), draining=True), advert("b")
    assert {(request.peer, request.standby) for request in decided(*mesh).requests} == {("b", False)}
    copied = advert("a", held(0, 30), draining=True), advert("b", held(0, 30, standby=True)), advert("c")
    assert requests(decided(*copied)) == [("b", "0-30", False), ("c", "0-30", True)]


def test_a_model_that_was_let_go_is_not_kept() -> None:
    assert not decided(advert("c", held(0, 30, standby=True)), advert("d"), let_go={MODEL}).requests


# What is lost, and what was let go


def test_a_peer_that_is_gone_has_lost_what_it_held() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a", held(0, 17)), advert("b", held(17, 30, pinned=True))])
    ledger.look([advert("a", held(0, 17))])
    assert ledger.lost == {MODEL: {ServedLayers(LayerRange(17, 30), KV, pinned=True)}}


def test_a_restarted_peer_has_lost_what_it_held() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a", held(0, 17)), advert("b", held(17, 30))])
    ledger.look([advert("a", held(0, 17)), advert("b", incarnation=2)])
    assert ledger.lost == {MODEL: {ServedLayers(LayerRange(17, 30), KV)}}


def test_what_was_loaded_and_lost_between_two_looks_is_lost() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a"), advert("b")])
    ledger.note(advert("b", held(17, 30)))
    ledger.look([advert("a", held(0, 17))])
    assert ledger.lost == {MODEL: {ServedLayers(LayerRange(17, 30), KV)}}


def test_what_was_loaded_and_unplaced_between_two_looks_is_not_lost() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a", held(0, 17)), advert("b")])
    ledger.note(advert("b", held(17, 30)))
    ledger.note(advert("b"))
    ledger.look([advert("a", held(0, 17)), advert("b")])
    ledger.look([advert("a", held(0, 17))])
    assert not ledger.lost


def test_a_loss_is_made_good_once_the_layers_are_active_elsewhere() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a", held(0, 17)), advert("b", held(17, 30))])
    ledger.look([advert("a", held(0, 17)), advert("c", held(17, 30, state="loading"))])
    assert ledger.lost
    ledger.look([advert("a", held(0, 17)), advert("c", held(17, 30, standby=True))])
    assert ledger.lost
    ledger.look([advert("a", held(0, 17)), advert("c", held(17, 30))])
    assert not ledger.lost


def test_what_was_unplaced_is_not_lost() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a", held(0, 17)), advert("b", held(17, 30))])
    ledger.look([advert("b", held(17, 30))])
    ledger.look([advert("b")])
    assert not ledger.lost
    assert not ledger.let_go


def test_a_copy_that_was_being_loaded_when_its_model_was_unplaced_is_an_orphan() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a", held(0, 30)), advert("b", held(0, 30, standby=True, state="loading"))])
    ledger.look([advert("a"), advert("b", held(0, 30, standby=True, state="loading"))])
    after = [advert("a"), advert("b", held(0, 30, standby=True))]
    ledger.look(after)
    assert ledger.let_go == {MODEL}
    assert orphaned_copies(after, ledger.let_go) == [("b", MODEL)]
    ledger.look([advert("a"), advert("b")])
    assert not ledger.let_go


def test_a_copy_whose_original_died_is_no_orphan() -> None:
    ledger = HoldingHistory()
    ledger.look([advert("a", held(0, 30)), advert("b", held(0, 30, standby=True))])
    ledger.look([advert("b", held(0, 30, standby=True))])
    assert not ledger.let_go


def test_a_model_that_is_placed_again_is_no_longer_let_go() -> None:
    ledger = HoldingHistory()
    copy = advert("b", held(0, 30, standby=True))
    ledger.look([advert("a", held(0, 30)), copy])
    ledger.look([advert("a"), copy])
    assert ledger.let_go
    ledger.look([advert("a", held(0, 30, state="loading")), copy])
    assert not ledger.let_go


# Growth


def test_a_much_faster_peer_gets_the_model() -> None:
    grown = grow(CARD, [advert("a", held(0, 30)), advert("b", gb_s=40.0)])
    assert {request.peer for request in grown} == {"b"}
    assert not any(request.standby for request in grown)
    assert not grow(CARD, loaded([advert("a", held(0, 30)), advert("b", gb_s=40.0)], grown))


@pytest.mark.parametrize(
    "adverts",
    [
        [advert("a", held(0, 30)), advert("b", gb_s=10.5)],
        [advert("a", held(0, 30, pinned=True)), advert("b", gb_s=40.0)],
        [advert("a", held(0, 30)), advert("b", gb_s=40.0, draining=True)],
        [advert("a", held(0, 30)), advert("b", gb_s=40.0, memory=1 << 20)],
        [advert("a", held(0, 30, layer_decode_s=1.0)), advert("b")],
    ],
    ids=["hardly faster", "pinned", "leaving", "too small", "slow only by what nobody else has measured"],
)
def test_what_is_no_reason_to_place_a_model_anew(adverts: list[Advert]) -> None:
    assert not grow(CARD, adverts)


# Whatever the mesh looks like


@st.composite
def meshes(draw_from: st.DrawFn) -> ClusterState:
    rng = random.Random(draw_from(st.integers(0, 2**32)))
    card = make_card(rng.randrange(2, 13))
    count = card.spec.layers
    adverts = []
    for name in "abcdef"[: rng.randrange(1, 7)]:
        holdings = [_random_holding(rng, count) for _ in range(rng.choice([0, 1, 1, 2]))]
        memory = int(10 ** rng.uniform(7.5, 9.7))
        adverts.append(advert(name, *holdings, memory=memory, draining=rng.random() < 0.15))
    pieces = {ServedLayers(_random_holding(rng, count).layers, 2048, rng.random() < 0.2) for _ in range(rng.randrange(3))}
    return ClusterState(
        adverts=adverts,
        cards={MODEL: card},
        lost={MODEL: pieces} if pieces else {},
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


def _is_new(mesh: ClusterState, request: LoadRequest) -> bool:
    holdings = next(advert.holdings for advert in mesh.adverts if advert.peer == request.peer)
    return not any(each.layers == request.layers and each.state in HELD for each in holdings)


@given(meshes())
def test_nothing_is_placed_where_memory_does_not_allow_it(mesh: ClusterState) -> None:
    card = mesh.cards[MODEL]
    for each in mesh.adverts:
        free = each.capability.memory_free_bytes
        offered = free + sum(
            held.weight_bytes + held.kv_tokens_total * len(held.layers) * card.kv_bytes_per_token_layer() for held in each.holdings
        )
        new = [request for request in decide(mesh).requests if request.peer == each.peer and _is_new(mesh, request)]
        for number, request in enumerate(new):
            left = free - sum(_bytes(card, other) for other in new[: number + 1])
            assert left >= (offered / 2 if request.standby else 0)


@given(meshes())
def test_no_layer_is_loaded_twice_on_a_peer_nor_on_one_that_should_get_none(mesh: ClusterState) -> None:
    new = [request for request in decide(mesh).requests if _is_new(mesh, request)]
    by_peer = {each.peer: each for each in mesh.adverts}
    for number, request in enumerate(new):
        there = [each.layers for each in by_peer[request.peer].holdings if each.state in HELD]
        there += [other.layers for other in new[:number] if other.peer == request.peer]
        assert not set(request.layers).intersection(layer for layers in there for layer in layers)
        assert not by_peer[request.peer].draining
        assert request.peer not in mesh.suspects
        assert (request.peer, MODEL) not in mesh.refused


@given(meshes())
def test_once_the_wishes_are_met_there_are_soon_no_more(mesh: ClusterState) -> None:
    cards = list(mesh.cards.values())
    for _ in range(3):
        asked = decide(mesh).requests
        mesh = replace(mesh, adverts=loaded(mesh.adverts, asked, cards))
    assert not decide(mesh).requests


@given(meshes(), st.randoms())
def test_the_same_adverts_give_the_same_wishes_in_any_order(mesh: ClusterState, rng: random.Random) -> None:
    shuffled = list(mesh.adverts)
    rng.shuffle(shuffled)
    assert decide(replace(mesh, adverts=shuffled)) == decide(mesh)
