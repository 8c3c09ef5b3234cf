import msgspec
import pytest

from in_process.clusters import make_holding, make_peer, make_problem
from meshd.errors import DoesNotFit, NotReady, Overloaded
from meshd.planner.search.solve import solve
from meshd.planner.stages import parse_stages
from meshd.types import LayerRange, StagePlan

SMALL = 150 << 20


def test_the_error_has_the_missing_bytes_and_a_hint() -> None:
    peers = (make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    with pytest.raises(DoesNotFit, match=r"8000 does not fit: .* MiB of memory are missing on the 2 peers") as caught:
        solve(make_problem(*peers, context=8000))
    error = caught.value
    assert error.hint.startswith("a context of 500 fits")
    roomier = make_peer("a", memory=SMALL + error.missing_bytes), make_peer("b", memory=SMALL + error.missing_bytes)
    assert solve(make_problem(*roomier, context=8000))
    with pytest.raises(DoesNotFit, match="take a smaller model"):
        solve(make_problem(make_peer("a", memory=1 << 20), context=100))


def test_the_error_for_given_stages_names_the_peer_that_lacks_memory() -> None:
    peers = (make_peer("a", memory=90 << 20), make_peer("b"))
    with pytest.raises(DoesNotFit, match="a lacks") as caught:
        solve(make_problem(*peers, stages=parse_stages("a:0-15,b:15-30", peers, 30)))
    assert caught.value.missing_bytes > 0


def test_layers_that_no_peer_holds_are_named() -> None:
    a = make_peer("a", holdings=(make_holding(0, 12),))
    b = make_peer("b", holdings=(make_holding(20, 30),))
    with pytest.raises(NotReady, match="layers 12-20 are resident on no peer") as caught:
        solve(make_problem(a, b, resident_only=True))
    assert caught.value.progress == pytest.approx(22 / 30)


def test_a_model_that_must_be_placed_first_is_not_ready() -> None:
    whole = make_peer("a", holdings=(make_holding(0, 30),))
    empty = make_peer("b")
    for problem in (
        make_problem(empty, resident_only=True),
        make_problem(whole, empty, resident_only=True, min_peers=2),
        make_problem(whole, make_peer("c", holdings=(make_holding(0, 12),)), resident_only=True, context=5000),
        make_problem(make_peer("d", holdings=(make_holding(0, 10), make_holding(20, 30))), resident_only=True),
    ):
        with pytest.raises(NotReady):
            solve(problem)
    ends = make_peer("d", holdings=(make_holding(0, 10), make_holding(20, 30)))
    with pytest.raises(NotReady, match="one run per peer"):
        solve(make_problem(ends, make_peer("e", holdings=(make_holding(10, 20),)), resident_only=True))


def test_kv_in_use_by_other_sessions_is_overloaded_and_not_unready() -> None:
    busy = msgspec.structs.replace(make_holding(0, 30), kv_tokens_free=100)
    peer = make_peer("a", holdings=(busy,))
    with pytest.raises(Overloaded, match="a 100"):
        solve(make_problem(peer, resident_only=True))
    with pytest.raises(Overloaded, match="a has no KV free for 512 tokens"):
        solve(make_problem(peer, resident_only=True, stages=parse_stages("a:0-30", (peer,), 30)))


def test_a_route_over_given_stages_needs_them_resident() -> None:
    peer = make_peer("a", holdings=(make_holding(0, 29),))
    stages = (StagePlan(peer=peer.id, layers=LayerRange(0, 30)),)
    with pytest.raises(NotReady, match="a does not hold layers 0-30"):
        solve(make_problem(peer, resident_only=True, stages=stages))
