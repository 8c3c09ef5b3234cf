"""Better plans for running sessions: when a move is worth its cost."""

from typing import Any

import pytest

from in_process.clusters import make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import CARD, NO_OPTIONS, recovery_request, text_of, three_peers
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.resume import MIRROR, PREFILL, RecoveryPlan
from meshd.types import LayerRange, Objective


def moved(cluster: Cluster, old: str, mesh: MeshOptions = NO_OPTIONS, **fields: Any) -> RecoveryPlan | None:
    return cluster.router.better(CARD, mesh, recovery_request(old, **fields))


def test_a_much_faster_peer_is_worth_a_move() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, holdings=(make_holding(0, 30),)))
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000)
    assert found is not None
    assert text_of(found.plan) == "d:0-30"
    assert found.method == PREFILL


def test_one_stage_is_moved_by_copying_its_kv() -> None:
    cluster = Cluster(
        make_peer("a", holdings=(make_holding(0, 10),)),
        make_peer("b", decode_gb_s=2.0, prefill_gflops=20.0, holdings=(make_holding(10, 20),)),
        make_peer("c", holdings=(make_holding(20, 30),)),
        make_peer("d", prefill_gflops=5.0, holdings=(make_holding(10, 20),)),
    )
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000)
    assert found is not None
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert found.method == MIRROR
    assert found.predicted_s < 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {"holdings": (make_holding(0, 30, standby=True),)},
        {"holdings": (make_holding(0, 30),), "draining": True},
        {"holdings": (make_holding(0, 30, free=100),)},
        {"holdings": (make_holding(0, 29),)},
    ],
    ids=["standby", "leaving", "full", "not all layers"],
)
def test_no_move_to_a_peer_that_new_sessions_could_not_use(fields: dict[str, Any]) -> None:
    cluster = three_peers()
    fast = Cluster(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, **fields)).live()[0]
    cluster.adverts[fast.peer] = fast
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000)
    assert found is None or found.plan.peers != ("d-id",)
    assert found is None or fields["holdings"][0].layers == LayerRange(0, 29)


@pytest.mark.parametrize(("gb_s", "moves"), [(8.0, False), (3.0, True)])
def test_no_move_for_a_small_gain(gb_s: float, moves: bool) -> None:
    cluster = Cluster(
        make_peer("a", holdings=(make_holding(0, 10),)),
        make_peer("b", decode_gb_s=gb_s, holdings=(make_holding(10, 20),)),
        make_peer("c", holdings=(make_holding(20, 30),)),
        make_peer("d", holdings=(make_holding(10, 20),)),
    )
    found = moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=3000, known=2000)
    assert (found is not None) == moves


def test_no_move_of_an_answer_that_ends_soon() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=50.0, holdings=(make_holding(0, 30),)))
    assert moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=102) is None


def test_no_move_that_the_request_rules_out() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, holdings=(make_holding(0, 30),)))
    old = "a:0-10,b:10-20,c:20-30"
    for mesh in (
        MeshOptions(stages=old),
        MeshOptions(peers=("a", "b", "c")),
        MeshOptions(peers=("x",)),
        MeshOptions(min_peers=4),
        MeshOptions(objective=Objective.ENERGY),
    ):
        assert moved(cluster, old, mesh, max_tokens=2000) is None
    assert moved(cluster, old, MeshOptions(peers=("b", "d")), max_tokens=2000) is not None


def test_no_move_of_a_session_that_lost_a_peer() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=50.0, prefill_gflops=1000.0, holdings=(make_holding(0, 30),)))
    cluster.lose("b")
    assert moved(cluster, "a:0-10,b:10-20,c:20-30", max_tokens=2000) is None
    assert cluster.router.better(CARD, NO_OPTIONS, recovery_request(None)) is None
