import pytest

from in_process.clusters import make_holding, make_peer, make_problem
from meshd.errors import NoPeer, NotReady
from meshd.planner.eligible import eligible, exclusions


def test_each_excluded_peer_has_its_reason() -> None:
    peers = (
        make_peer("good"),
        make_peer("attic", roles=("storage",)),
        make_peer("leaving", draining=True),
        make_peer("new", decode_gb_s=0.0),
        make_peer("other"),
    )
    problem = make_problem(*peers, peers=tuple(peer.id for peer in peers[:-1]))
    assert exclusions(problem) == {
        "attic-id": "its role leaves out compute",
        "leaving-id": "it is about to leave",
        "new-id": "its rates are not measured yet",
        "other-id": "the request does not name it",
    }
    assert [peer.name for peer in eligible(problem)] == ["good"]


def test_peers_are_ordered_by_name() -> None:
    assert [peer.name for peer in eligible(make_problem(*map(make_peer, "cab")))] == ["a", "b", "c"]


def test_too_few_peers_that_hold_layers_is_not_ready_but_too_few_peers_is_no_peer() -> None:
    holder, empty = make_peer("a", holdings=(make_holding(0, 30),)), make_peer("b")
    with pytest.raises(NotReady, match="2 peers must hold layers of it, and 1 do so now"):
        eligible(make_problem(holder, empty, resident_only=True, min_peers=2))
    with pytest.raises(NoPeer, match="2 peers are needed and 1 can take layers"):
        eligible(make_problem(holder, make_peer("b", draining=True), resident_only=True, min_peers=2))
