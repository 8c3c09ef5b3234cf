import msgspec
import pytest

from in_process.clusters import make_peer, make_problem
from meshd.errors import InvalidRequest
from meshd.planner.search.solve import Solution, solve
from meshd.types import Objective

SMALL = 150 << 20


def names(solution: Solution) -> list[str]:
    return [stage.name for stage in solution.estimate.stages]


def test_a_faster_peer_gets_more_layers() -> None:
    problem = make_problem(make_peer("a", decode_gb_s=5.0), make_peer("b", decode_gb_s=15.0), objective=Objective.THROUGHPUT)
    layers = {stage.name: len(stage.layers) for stage in solve(problem).estimate.stages}
    assert layers["b"] > 1.5 * layers["a"]


def test_throughput_splits_a_model_that_latency_leaves_whole() -> None:
    peers = [make_peer(name) for name in "abc"]
    solution = solve(make_problem(*peers, objective=Objective.THROUGHPUT))
    assert len(solution.stages) == 3
    assert solution.value == solution.estimate.period_s < solve(make_problem(peers[0])).estimate.tpot_s


def test_memory_and_ttft_of_a_long_prompt_use_all_peers() -> None:
    peers = [make_peer(name) for name in "abc"]
    spread = solve(make_problem(*peers, objective=Objective.MEMORY))
    assert spread.estimate.memory_share < solve(make_problem(peers[0])).estimate.memory_share
    quick = solve(make_problem(*peers, objective=Objective.TTFT, prompt_tokens=2000, context=4096))
    assert len(quick.stages) == 3


def test_energy_prefers_the_frugal_peer_and_needs_measured_power() -> None:
    hungry, frugal = make_peer("hungry", decode_gb_s=20.0, power_w=200.0), make_peer("frugal", decode_gb_s=10.0, power_w=5.0)
    solution = solve(make_problem(hungry, frugal, objective=Objective.ENERGY))
    assert names(solution) == ["frugal"]
    assert solution.value == pytest.approx(solution.estimate.tpot_s * 5.0)
    unknown = make_peer("unknown", power_w=None)
    with pytest.raises(InvalidRequest, match="the power of unknown was not measured") as caught:
        solve(make_problem(hungry, unknown, objective=Objective.ENERGY))
    assert caught.value.param == "objective"
    named = make_problem(hungry, unknown, objective=Objective.ENERGY, peers=(hungry.id,))
    assert names(solve(named)) == ["hungry"]


@pytest.mark.parametrize("objective", list(Objective))
def test_equal_plans_go_to_fewer_peers_then_to_the_first_names(objective: Objective) -> None:
    peers = [make_peer(name, memory=SMALL if objective is not Objective.MEMORY else 4 << 30) for name in "dbca"]
    problem = make_problem(*peers, objective=objective, prompt_tokens=100)
    solution = solve(problem)
    assert names(solution) == sorted(names(solution))
    assert names(solution)[0] == "a"
    shuffled = msgspec.structs.replace(problem, profiles=tuple(reversed(peers)))
    assert solve(shuffled).stages == solution.stages
