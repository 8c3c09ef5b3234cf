"""The placement client: repairs, which load layers that no peer has."""

import pytest

from in_process.clusters import make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import CARD, ids, stages_of
from meshd.errors import RemoteFailure
from meshd.types import LayerRange


async def test_a_repair_gives_up_after_three_peers_and_raises_the_last_error() -> None:
    cluster = Cluster(*(make_peer(name) for name in "abcde"))
    cluster.refusing = dict.fromkeys(ids(*"abcde"), "download_failed")
    with pytest.raises(RemoteFailure, match="no more"):
        await cluster.placer.repair(CARD, [LayerRange(3, 7)], kv_tokens=512)
    assert len(cluster.asked) == 3


async def test_a_repair_returns_when_the_layers_are_advertised() -> None:
    cluster = Cluster(make_peer("a", holdings=(make_holding(3, 7, kv_tokens=128),)))
    cluster.advert_delay_s = 0.1
    stages = await cluster.placer.repair(CARD, [LayerRange(3, 7)], kv_tokens=512)
    assert [(holding.kv_tokens_total, holding.state) for holding in cluster.live()[0].holdings] == [
        (128, "active"),
        (512, "active"),
    ]
    assert stages == stages_of("a:3-7")
