"""Plans of sessions in a cluster with several numerics: first plans, recoveries, moves and mirrors."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from in_process.clusters import OTHER, PROMISED, UNPROMISED, make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import (
    CARD,
    NO_OPTIONS,
    fill_memory,
    plan_of,
    recover,
    recovery_request,
    text_of,
)
from meshd.agents.session.plan.mirror_targets import mirror_targets
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.resume import MIRROR, REPLAY, RecoveryRequest, changed_numerics
from meshd.numerics import NumericsId
from meshd.planner.profile import PeerProfile
from meshd.types import LayerRange, PeerId

OLD = "a:0-10,b:10-20,c:20-30"
ALIKE = (PROMISED,) * 3


def serving(*more: PeerProfile) -> Cluster:
    """Make a cluster of a, b and c, which hold ten layers each and compute alike, and of the peers in `more`."""
    peers = [
        make_peer(name, numerics=PROMISED, holdings=(make_holding(start, start + 10),))
        for name, start in (("a", 0), ("b", 10), ("c", 20))
    ]
    return Cluster(*peers, *more)


def holder(name: str, numerics: NumericsId, gb_s: float = 10.0, start: int = 10, end: int = 20, **fields: bool) -> PeerProfile:
    return make_peer(
        name, numerics=numerics, decode_gb_s=gb_s, prefill_gflops=10 * gb_s, holdings=(make_holding(start, end, **fields),)
    )


async def test_a_lost_stage_goes_to_a_slower_peer_with_its_own_numerics() -> None:
    cluster = serving(holder("d", OTHER, 100.0), holder("e", PROMISED, 2.0))
    found = await recover(cluster, recovery_request(OLD, cluster.lose("b"), numerics=ALIKE))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    assert found.plan.numerics == ALIKE
    assert changed_numerics(plan_of(OLD, *ALIKE), found.plan) == ()


async def test_without_such_a_peer_another_takes_it_and_the_change_is_known() -> None:
    cluster = serving(holder("d", OTHER))
    found = await recover(cluster, recovery_request(OLD, cluster.lose("b"), numerics=ALIKE))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert found.plan.numerics == (PROMISED, OTHER, PROMISED)
    assert changed_numerics(plan_of(OLD, *ALIKE), found.plan) == (LayerRange(10, 20),)
    assert not cluster.asked


async def test_a_copy_of_the_kv_on_other_numerics_counts_only_if_nothing_else_does() -> None:
    copy = holder("d", OTHER, standby=True)
    mirrors = {1: (PeerId("d-id"), 299)}
    cluster = serving(copy, holder("e", PROMISED, 2.0, standby=True))
    found = await recover(cluster, recovery_request(OLD, cluster.lose("b"), numerics=ALIKE, mirrors=mirrors))
    assert (text_of(found.plan), found.method) == ("a:0-10,e:10-20,c:20-30", REPLAY)
    cluster = serving(copy)
    found = await recover(cluster, recovery_request(OLD, cluster.lose("b"), numerics=ALIKE, mirrors=mirrors))
    assert (text_of(found.plan), found.method) == ("a:0-10,d:10-20,c:20-30", MIRROR)


async def test_each_layer_of_a_mixed_plan_keeps_its_own_numerics() -> None:
    old, numerics = "a:0-10,x:10-20,c:20-30", (PROMISED, OTHER, PROMISED)
    cluster = serving(holder("y", OTHER, 2.0))
    found = await recover(cluster, recovery_request(old, numerics=numerics, lost=frozenset({PeerId("x-id")})))
    assert text_of(found.plan) == "a:0-10,y:10-20,c:20-30"
    assert found.plan.numerics == numerics


async def test_a_part_of_a_holding_serves_where_the_plan_was_mixed() -> None:
    old, numerics = "a:0-10,x:10-20,c:20-30", (PROMISED, OTHER, PROMISED)
    cluster = Cluster(
        holder("c", PROMISED, start=20, end=30), holder("w", PROMISED, start=0, end=30), holder("y", OTHER, 2.0, start=0, end=30)
    )
    lost = frozenset({PeerId("a-id"), PeerId("x-id")})
    found = await recover(cluster, recovery_request(old, lost, numerics=numerics))
    assert text_of(found.plan) == "w:0-10,y:10-20,c:20-30"


async def test_missing_layers_are_loaded_by_a_peer_with_the_numerics_of_the_others() -> None:
    cluster = serving(make_peer("d", numerics=OTHER, decode_gb_s=100.0), make_peer("e", numerics=PROMISED, decode_gb_s=2.0))
    fill_memory(cluster, "a", "c")
    found = await recover(cluster, recovery_request(OLD, cluster.lose("b"), numerics=ALIKE))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    [(peer, place)] = cluster.asked
    assert (peer, place.numerics) == ("e-id", PROMISED)


def test_a_running_session_moves_to_no_other_numerics_however_fast() -> None:
    for numerics, moves in ((OTHER, False), (PROMISED, True)):
        cluster = serving(holder("d", numerics, 50.0, start=0, end=30))
        found = cluster.router.better(CARD, NO_OPTIONS, recovery_request(OLD, numerics=ALIKE, max_tokens=2000))
        assert (found is not None) is moves


def test_a_target_that_a_user_names_may_have_other_numerics_and_the_plan_says_so() -> None:
    cluster = serving(holder("d", OTHER))
    plan = cluster.router.with_target(CARD, plan_of(OLD, *ALIKE), PeerId("d-id"), PeerId("b-id"))
    assert plan.numerics == (PROMISED, OTHER, PROMISED)


def test_a_first_plan_keeps_to_one_numerics_although_a_mixed_one_is_a_little_faster() -> None:
    cluster = serving(holder("d", OTHER, 12.0, start=10, end=30))
    plan = cluster.router.route(CARD, NO_OPTIONS, 512, 128)
    assert (text_of(plan), plan.numerics) == (OLD, ALIKE)


async def test_a_plan_over_fragments_keeps_to_one_numerics_if_one_has_all_layers() -> None:
    fragments = make_peer("d", numerics=PROMISED, holdings=(make_holding(0, 10), make_holding(20, 30)))
    cluster = Cluster(fragments, holder("e", PROMISED), holder("f", OTHER, 100.0))
    plan = await cluster.router.plan_for(CARD, NO_OPTIONS, prompt_tokens=200, max_tokens=312)
    assert text_of(plan) == "d:0-10,e:10-20,d:20-30"
    assert not cluster.asked


@pytest.mark.parametrize(("numerics", "mirror"), [(PROMISED, "d"), (OTHER, "e")])
def test_a_mirror_with_the_stages_own_numerics_is_preferred(numerics: NumericsId, mirror: str) -> None:
    cluster = serving(holder("d", numerics, standby=True), holder("e", PROMISED, standby=True))
    plan = mirror_targets(plan_of(OLD, *ALIKE), cluster.live())
    assert plan.stages[1].mirror == f"{mirror}-id"
    only = serving(holder("d", OTHER, standby=True))
    assert mirror_targets(plan_of(OLD, *ALIKE), only.live()).stages[1].mirror == "d-id"


def test_changes_are_listed_by_layers_and_unknown_ids_are_none() -> None:
    old = plan_of("a:0-10,b:10-30", PROMISED, UNPROMISED)
    assert changed_numerics(None, old) == ()
    assert changed_numerics(old, plan_of("a:0-30", PROMISED)) == (LayerRange(10, 30),)
    assert changed_numerics(old, plan_of("a:0-5,b:5-30", OTHER, UNPROMISED)) == (LayerRange(0, 10),)
    assert changed_numerics(plan_of("a:0-30"), old) == ()
    assert changed_numerics(old, plan_of("a:0-30")) == ()


class Requests:
    """Stands in for the retrier: makes the recovery request of a session that runs under `OLD`."""

    def recovery_request(self, answer: object, avoid: frozenset[PeerId]) -> RecoveryRequest:
        return recovery_request(OLD, numerics=ALIKE, avoid=avoid)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((holder("d", OTHER, 100.0), holder("e", PROMISED, 2.0)), "a:0-10,e:10-20,c:20-30"),
        (
            (
                holder("d", OTHER, 100.0),
                holder("e", PROMISED, 2.0, start=10, end=15),
                holder("f", PROMISED, 2.0, start=15, end=20),
            ),
            "a:0-10,e:10-15,f:15-20,c:20-30",
        ),
        ((holder("d", OTHER), holder("x", OTHER, 2.0)), "a:0-10,d:10-20,c:20-30"),
    ],
    ids=["one peer", "two peers", "other numerics"],
)
async def test_a_stage_leaves_a_draining_peer_for_its_own_numerics_first(more: tuple[PeerProfile, ...], expected: str) -> None:
    cluster = serving(*more)
    cluster.change("b", draining=True)
    answer: Any = SimpleNamespace(card=CARD, record=SimpleNamespace(mesh=NO_OPTIONS))
    mover = Mover(cast("Any", Requests()), cluster.router, cluster.live, cast("Any", None))
    plan = await mover._plan_without(answer, plan_of(OLD, *ALIKE), frozenset({PeerId("b-id")}))
    assert text_of(plan) == expected
