import numpy as np
import pytest

from in_process.clusters import make_holding, make_peer, make_problem
from meshd.planner.model.estimate import estimate
from meshd.planner.model.tables import CostTables, mean_chunk_start, range_sums
from meshd.types import LayerRange, StagePlan


def test_sums_over_every_range() -> None:
    table = range_sums(np.array([[1.0, 2.0, 4.0]]))[0]
    assert (table[0, 3], table[1, 2], table[1, 3]) == (7.0, 2.0, 6.0)
    assert np.isinf(table[np.tril_indices(4)]).all()


def test_tables_agree_with_the_estimate_of_the_same_stages() -> None:
    problem = make_problem(make_peer("a"), make_peer("b", decode_gb_s=3.0), prompt_tokens=300)
    tables = CostTables(problem, problem.profiles)
    stages = tuple(StagePlan(peer=f"{name}-id", layers=LayerRange(*cut)) for name, cut in (("a", (0, 11)), ("b", (11, 30))))
    predicted = estimate(problem, stages)
    for place, part in enumerate(predicted.stages):
        cut = place, part.layers.start, part.layers.end
        assert tables.decode[cut] == pytest.approx(part.decode_s)
        assert tables.chunk[cut] == pytest.approx(part.prefill_chunk_s)
    assert (tables.hop[0, 1], tables.back[1, 0]) == (predicted.hops[0].decode_s, predicted.back.decode_s)


def test_a_stage_over_resident_layers_is_within_one_holding_with_free_kv() -> None:
    held = (make_holding(0, 4), make_holding(6, 9, free=10))
    possible = CostTables(
        make_problem(make_peer("a", holdings=held), resident_only=True), (make_peer("a", holdings=held),)
    ).possible
    assert {(start, end) for start, end in zip(*np.nonzero(possible[0] == 0), strict=True)} == {
        (start, end) for end in range(5) for start in range(end)
    }


def test_the_mean_start_of_chunks() -> None:
    assert (mean_chunk_start(128, 1.0), mean_chunk_start(128, 3.0)) == (0.0, 128.0)
