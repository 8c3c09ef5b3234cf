"""Decisions that keep models placed: standby copies, lost layers and faster placements."""

from collections.abc import Sequence
from typing import Any

import pytest

from in_process.adverts import CARD, KV, advert, held, once_loaded
from in_process.clusters import MODEL, OTHER, PROMISED, make_peer, make_problem
from meshd.agents.placement.history import ServedLayers
from meshd.agents.placement.replication import ClusterState, Decision, LoadRequest, decide, grow
from meshd.planner.model.memory import stage_memory
from meshd.planner.profile import profiles_from_adverts
from meshd.types import Advert, LayerRange, ModelCard, ModelId, PeerId, StagePlan


def decided(*adverts: Advert, cards: Sequence[ModelCard] = (CARD,), **fields: Any) -> Decision:
    return decide(ClusterState(adverts=adverts, cards={card.id: card for card in cards}, **fields))


def lost(*ranges: tuple[int, int]) -> dict[Any, list[ServedLayers]]:
    return {MODEL: [ServedLayers(LayerRange(*layers), KV) for layers in ranges]}


def requests(decision: Decision) -> list[tuple[str, str, bool]]:
    return [(request.peer, str(request.layers), request.standby) for request in decision.requests]


def test_every_stage_gets_a_copy_on_a_peer_that_holds_no_layers_of_the_model() -> None:
    adverts = advert("a", held(0, 17)), advert("b", held(17, 30)), advert("c")
    assert requests(decided(*adverts)) == [("c", "0-17", True), ("c", "17-30", True)]


def test_two_peers_hold_copies_of_each_others_stages() -> None:
    adverts = advert("a", held(0, 17)), advert("b", held(17, 30))
    assert requests(decided(*adverts)) == [("b", "0-17", True), ("a", "17-30", True)]


def test_a_copy_has_the_kv_of_the_original() -> None:
    (request,) = decided(advert("a", held(0, 30, kv_tokens=4096)), advert("b")).requests
    assert request.kv_tokens == 4096


def test_the_peer_with_the_most_free_memory_gets_the_copy() -> None:
    adverts = advert("a", held(0, 30)), advert("b", memory=2 << 30), advert("c", memory=3 << 30)
    assert requests(decided(*adverts)) == [("c", "0-30", True)]


def test_a_peer_that_serves_another_stage_gets_a_copy_only_if_no_other_peer_can() -> None:
    adverts = advert("a", held(0, 15)), advert("b", held(15, 30), memory=8 << 30), advert("c", memory=2 << 30)
    assert requests(decided(*adverts))[0] == ("c", "0-15", True)


def needed(start: int, end: int, kv_tokens: int = KV) -> int:
    problem = make_problem(make_peer("any"), card=CARD, context=kv_tokens)
    return stage_memory(problem, StagePlan(peer=PeerId("any-id"), layers=LayerRange(start, end))).total_bytes


def test_a_copy_is_kept_by_a_peer_that_computes_alike_if_there_is_one() -> None:
    serving = advert("a", held(0, 15), numerics=PROMISED), advert("b", held(15, 30), numerics=PROMISED)
    roomy = advert("c", memory=64 << 30, numerics=OTHER)
    assert requests(decided(*serving, roomy)) == [("b", "0-15", True), ("a", "15-30", True)]
    assert requests(decided(advert("a", held(0, 30), numerics=PROMISED), roomy)) == [("c", "0-30", True)]


def test_half_of_the_memory_that_a_peer_offers_stays_free() -> None:
    enough = 2 * needed(0, 30)
    assert decided(advert("a", held(0, 30)), advert("b", memory=enough)).requests
    assert not decided(advert("a", held(0, 30)), advert("b", memory=enough - 2)).requests


def test_pending_requests_and_holdings_count_against_that_half() -> None:
    adverts = advert("a", held(0, 17)), advert("b", held(17, 30), memory=0)
    enough = 2 * (needed(0, 17) + needed(17, 30))
    assert len(decided(*adverts, advert("c", memory=enough)).requests) == 2
    assert requests(decided(*adverts, advert("c", memory=enough - 2)))[0] == ("c", "0-17", True)
    assert all(request.peer != "c" for request in decided(*adverts, advert("c", memory=enough - 2)).requests[1:])
    other = held(0, 10, model=ModelId("other"), weight_bytes=needed(17, 30))
    assert not any(request.peer == "c" for request in decided(*adverts, advert("c", other, memory=2 * needed(0, 17))).requests)


def test_copies_count_the_serving_peer() -> None:
    adverts = advert("a", held(0, 30)), advert("b"), advert("c"), advert("d")
    assert not decided(*adverts, copies=1).requests
    assert requests(decided(*adverts, copies=3)) == [("b", "0-30", True), ("c", "0-30", True)]


def test_layers_that_two_peers_serve_need_no_copy() -> None:
    assert not decided(advert("a", held(0, 30)), advert("b", held(0, 15)), advert("c", held(15, 30)), advert("d")).requests


@pytest.mark.parametrize(
    "unfit",
    [
        advert("b", draining=True),
        advert("b", roles=("storage",)),
        advert("b", held(0, 30, state="draining")),
        advert("b", gb_s=0.0),
    ],
    ids=["draining", "does not compute", "is unloading these layers", "not measured"],
)
def test_an_unfit_peer_gets_no_copy(unfit: Advert) -> None:
    assert not decided(advert("a", held(0, 30)), unfit).requests


def test_suspects_and_peers_that_refused_get_no_copy() -> None:
    adverts = advert("a", held(0, 30)), advert("b")
    assert not decided(*adverts, suspects={PeerId("b")}).requests
    assert not decided(*adverts, refused={(PeerId("b"), MODEL)}).requests


def test_a_model_that_is_still_loading_is_not_copied() -> None:
    assert not decided(advert("a", held(0, 15)), advert("b", held(15, 30, state="loading")), advert("c")).requests


def test_a_pending_request_is_not_repeated() -> None:
    adverts = advert("a", held(0, 30)), advert("b"), advert("c")
    asked = decided(*adverts).requests
    assert len(asked) == 1
    assert not decided(*adverts, pending=asked).requests


def test_idle_copies_of_another_model_count_as_free_memory_for_a_placement() -> None:
    def free(**fields: Any) -> int:
        (profile,) = profiles_from_adverts([advert("a", held(0, 30, **fields), memory=1000)], ModelId("other"))
        return profile.memory_free_bytes

    whole = 30 * 2_212_000 + KV * 30 * CARD.kv_bytes_per_token_layer()
    assert free(standby=True) == 1000 + whole
    assert free() == free(standby=True, kv_tokens_free=0) == free(standby=True, state="loading") == 1000


def test_the_copy_of_a_lost_stage_takes_over() -> None:
    adverts = advert("a", held(0, 17)), advert("c", held(17, 30, standby=True))
    decision = decided(*adverts, lost={MODEL: [ServedLayers(LayerRange(17, 30), KV, pinned=True)]}, copies=1)
    assert decision.requests == (LoadRequest(PeerId("c"), MODEL, LayerRange(17, 30), KV, standby=False, pinned=True),)


def test_lost_layers_without_a_copy_are_placed_on_another_peer() -> None:
    decision = decided(advert("a", held(0, 17)), advert("c"), lost=lost((17, 30)), copies=1)
    assert sorted((request.layers, request.standby) for request in decision.requests) == [(LayerRange(17, 30), False)]


def test_only_the_missing_layers_of_a_lost_stage_are_placed() -> None:
    decision = decided(advert("a", held(0, 20)), advert("c"), lost=lost((10, 30)), copies=1)
    assert {layer for request in decision.requests for layer in request.layers} == set(range(20, 30))


def test_lost_layers_are_placed_with_less_kv_if_memory_is_short() -> None:
    adverts = advert("a", held(0, 17), memory=0), advert("c", memory=260 << 20)
    (request,) = decided(*adverts, lost={MODEL: [ServedLayers(LayerRange(17, 30), 65_536)]}, copies=1).requests
    assert 512 <= request.kv_tokens < 65_536


def test_lost_layers_go_to_a_peer_that_serves_none_of_the_model_if_there_is_one() -> None:
    """A route can use only one contiguous range of layers of each peer."""
    adverts = advert("a", held(0, 10), memory=8 << 30), advert("b", held(10, 20)), advert("c", memory=1 << 30)
    assert requests(decided(*adverts, lost=lost((20, 30)), copies=1)) == [("c", "20-30", False)]
    assert {request.peer for request in decided(*adverts[:2], lost=lost((20, 30)), copies=1).requests} <= {"a", "b"}
    assert decided(*adverts[:2], lost=lost((20, 30)), copies=1).requests


def test_lost_layers_go_to_a_peer_that_computes_alike_even_if_it_serves_others_of_the_model() -> None:
    serving, other = advert("a", held(0, 15), numerics=PROMISED), advert("b", numerics=OTHER)
    decision = decided(serving, other, lost=lost((15, 30)), copies=1)
    assert requests(decision) == [("a", "15-30", False)]
    spare = advert("c", memory=1 << 30, numerics=PROMISED)
    assert requests(decided(serving, other, spare, lost=lost((15, 30)), copies=1)) == [("c", "15-30", False)]
    full = advert("a", held(0, 15), numerics=PROMISED, memory=1 << 20)
    assert requests(decided(full, other, lost=lost((15, 30)), copies=1)) == [("b", "15-30", False)]


def test_lost_layers_that_fit_nowhere_are_reported() -> None:
    decision = decided(advert("a", held(0, 17), memory=0), advert("c", memory=1 << 20), lost=lost((17, 30)))
    assert not decision.requests
    assert "tiny has lost layers 17-30" in decision.missing[0]


def test_a_model_that_would_stay_incomplete_is_left_alone() -> None:
    """It is being unplaced: one peer has unloaded its layers, and the other peer will soon."""
    assert decided(advert("a", held(0, 10)), advert("c"), lost=lost((20, 30))) == Decision((), ())


def test_a_model_that_is_active_nowhere_is_left_alone() -> None:
    assert decided(advert("a"), advert("c"), lost=lost((0, 30))) == Decision((), ())


def test_the_layers_of_a_draining_peer_count_as_lost() -> None:
    adverts = advert("a", held(0, 30), draining=True), advert("b")
    assert {(request.peer, request.standby) for request in decided(*adverts).requests} == {("b", False)}
    copied = advert("a", held(0, 30), draining=True), advert("b", held(0, 30, standby=True)), advert("c")
    assert requests(decided(*copied)) == [("b", "0-30", False), ("c", "0-30", True)]


def test_an_unplaced_model_is_not_placed_again() -> None:
    assert not decided(advert("c", held(0, 30, standby=True)), advert("d"), unplaced={MODEL}).requests


def test_a_much_faster_peer_gets_the_model() -> None:
    grown = grow(CARD, [advert("a", held(0, 30)), advert("b", gb_s=40.0)])
    assert {request.peer for request in grown} == {"b"}
    assert not any(request.standby for request in grown)
    assert not grow(CARD, once_loaded([advert("a", held(0, 30)), advert("b", gb_s=40.0)], grown))


@pytest.mark.parametrize(
    "adverts",
    [
        [advert("a", held(0, 30)), advert("b", gb_s=10.5)],
        [advert("a", held(0, 30, pinned=True)), advert("b", gb_s=40.0)],
        [advert("a", held(0, 30)), advert("b", gb_s=40.0, draining=True)],
        [advert("a", held(0, 30)), advert("b", gb_s=40.0, memory=1 << 20)],
        [advert("a", held(0, 30, layer_decode_s=1.0)), advert("b")],
    ],
    ids=["hardly faster", "pinned", "draining", "too small", "slow only by times that no other peer has measured"],
)
def test_a_placement_is_not_changed_without_a_clear_gain(adverts: list[Advert]) -> None:
    assert not grow(CARD, adverts)


@pytest.mark.parametrize("layers", [(0, 1024), (25, 31), (30, 31), (1000, 1024)])
@pytest.mark.parametrize("draining", [False, True])
def test_layers_that_the_model_does_not_have_are_ignored(layers: tuple[int, int], draining: bool) -> None:
    adverts = [advert("a", held(0, 30)), advert("b"), advert("c", held(*layers), held(*layers, standby=True), draining=draining)]
    decision = decided(*adverts, lost=lost(layers))
    assert {str(request.layers) for request in decision.requests} == {"0-30"}
    gone = decided(advert("a", held(0, 12)), advert("c", held(*layers), draining=True), advert("b"), lost=lost((12, 30), layers))
    assert {request.layers for request in gone.requests} <= {LayerRange(0, 12), LayerRange(12, 30)}
