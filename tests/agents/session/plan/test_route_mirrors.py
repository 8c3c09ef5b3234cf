"""Which peers mirror the KV of a plan's stages."""

from typing import Any

import msgspec
import pytest

from in_process.clusters import make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import plan_of, three_peers
from meshd.agents.session.plan.mirror_targets import mirror_targets
from meshd.types import ModelId


def mirrors(cluster: Cluster, text: str) -> str:
    plan = mirror_targets(plan_of(text), cluster.live())
    return ",".join("-" if stage.mirror is None else stage.mirror.removesuffix("-id") for stage in plan.stages)


def test_a_stage_is_mirrored_at_another_peer_that_has_its_layers() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(0, 20, standby=True),)))
    assert mirrors(cluster, "a:0-10,b:10-20,c:20-30") == "d,d,-"


def test_a_mirror_outside_the_plan_is_preferred() -> None:
    cluster = three_peers()
    cluster.change("b", holdings=(make_holding(10, 20), make_holding(0, 10, standby=True)))
    assert mirrors(cluster, "a:0-10,b:10-20,c:20-30") == "b,-,-"
    apart = make_peer("d", holdings=(make_holding(0, 10, standby=True),))
    cluster.adverts[apart.id] = Cluster(apart).live()[0]
    assert mirrors(cluster, "a:0-10,b:10-20,c:20-30") == "d,-,-"


@pytest.mark.parametrize(
    "holding",
    [
        make_holding(0, 10, free=400),
        make_holding(1, 10),
        make_holding(0, 10, state="loading"),
        msgspec.structs.replace(make_holding(0, 10), model=ModelId("other")),
    ],
    ids=["no room", "not all layers", "loading", "another model"],
)
def test_no_mirror_at_a_peer_that_cannot_hold_the_kv(holding: Any) -> None:
    assert mirrors(three_peers(make_peer("d", holdings=(holding,))), "a:0-10,b:10-20,c:20-30") == "-,-,-"


def test_no_mirror_at_a_leaving_peer_or_beyond_a_peers_free_kv() -> None:
    leaving = make_peer("d", holdings=(make_holding(0, 30),), draining=True)
    assert mirrors(three_peers(leaving), "a:0-10,b:10-20,c:20-30") == "-,-,-"
    tight = make_peer("d", holdings=(make_holding(0, 30, standby=True, free=1100),))
    assert mirrors(three_peers(tight), "a:0-10,b:10-20,c:20-30") == "d,d,-"
