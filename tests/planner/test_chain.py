import pytest

from in_process.clusters import make_peer
from meshd.planner.chain import Chain, LayerRun


@pytest.mark.parametrize("first_layer", [0, 10])
def test_runs_become_stages_on_the_indexed_peers(first_layer: int) -> None:
    peers = [make_peer(name) for name in "abc"]
    stages = Chain(1.0, (LayerRun(2, 0, 4), LayerRun(0, 4, 5))).stages(peers, first_layer)
    cuts = [(stage.layers.start - first_layer, stage.layers.end - first_layer) for stage in stages]
    assert [stage.peer for stage in stages] == ["c-id", "a-id"]
    assert cuts == [(0, 4), (4, 5)]
