import pytest

from in_process.clusters import make_holding, make_network, make_peer, make_problem
from meshd.planner.explain.reasons import bindings, excluded_peers, runner_up, single_devices
from meshd.planner.problem import PlanInput
from meshd.planner.search.solve import solve
from meshd.planner.stages import parse_stages
from meshd.types import Objective

SMALL = 150 << 20


def binding_names(problem: PlanInput) -> list[str]:
    return [row.constraint for row in bindings(problem, solve(problem))]


def test_binding_memory_is_reported_with_its_peer() -> None:
    problem = make_problem(make_peer("big", decode_gb_s=2.0), make_peer("quick", decode_gb_s=100.0, memory=SMALL))
    solution = solve(problem)
    [binding] = bindings(problem, solution)
    assert binding.constraint == "memory"
    assert "memory of quick" in binding.reason
    assert binding.value_if_lifted is not None
    assert binding.value_if_lifted < solution.value


def test_other_constraints_bind_too() -> None:
    a, b = make_peer("a", decode_gb_s=1.0, holdings=(make_holding(0, 30),)), make_peer("b", decode_gb_s=50.0)
    assert binding_names(make_problem(a, b, resident_only=True)) == ["resident_only"]
    assert binding_names(make_problem(a, b, peers=(a.id,))) == ["peers"]
    assert binding_names(make_problem(a, b, min_peers=2)) == ["min_peers"]
    assert binding_names(make_problem(a, b, stages=parse_stages("a:0-30", (a, b), 30))) == ["stages"]


def test_without_a_constraint_the_largest_part_of_the_time_binds() -> None:
    peers = (make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    alone = make_problem(make_peer("a"))
    [computing] = bindings(alone, solve(alone))
    assert (computing.constraint, computing.reason) == ("compute", "computing layers 0-30 on a takes 100% of a token's time")
    apart = make_problem(*peers, network=make_network(peers, hop_s=0.5), objective=Objective.MEMORY)
    [hop] = bindings(apart, solve(apart))
    assert (hop.constraint, hop.reason[:8], hop.value_if_lifted) == ("network", "the hop ", None)


def test_the_runner_up_lacks_a_chosen_peer() -> None:
    problem = make_problem(*(make_peer(name, decode_gb_s=rate) for name, rate in (("a", 10.0), ("b", 8.0), ("c", 6.0))))
    solution = solve(problem)
    second = runner_up(problem, solution)
    assert second is not None
    assert (solution.peers, second.peers) == (("a-id",), ("b-id",))
    assert second.value > solution.value


def test_there_is_no_runner_up_for_the_only_peer_or_for_given_stages() -> None:
    a, b = make_peer("a"), make_peer("b")
    alone, given = make_problem(a), make_problem(a, b, stages=parse_stages("a:0-30", (a, b), 30))
    assert runner_up(alone, solve(alone)) is None
    assert runner_up(given, solve(given)) is None


def test_each_excluded_peer_has_its_reason() -> None:
    problem = make_problem(
        make_peer("a"),
        make_peer("attic", roles=("storage",)),
        make_peer("new", decode_gb_s=0.0),
        make_peer("tiny", memory=1 << 20),
        make_peer("slow", decode_gb_s=0.1),
    )
    solution = solve(problem)
    rows = {row.name: row for row in excluded_peers(problem, solution)}
    assert rows["attic"].reason == "its role leaves out compute"
    assert rows["new"].reason == "its rates are not measured yet"
    assert rows["tiny"].reason.startswith("no layer fits: 1.0 MiB may be used")
    assert rows["slow"].reason.startswith("it would slow the plan down: TPOT")
    assert rows["slow"].value_with_it is not None
    assert rows["slow"].value_with_it > solution.value
    assert rows["tiny"].value_with_it is None
    assert "a" not in rows


def test_given_stages_are_the_reason_for_other_peers() -> None:
    a, b = make_peer("a"), make_peer("b")
    problem = make_problem(a, b, stages=parse_stages("a:0-30", (a, b), 30))
    [row] = excluded_peers(problem, solve(problem))
    assert (row.name, row.reason) == ("b", "the request names the stages")


def test_single_devices_are_ordered_by_fit_then_by_value() -> None:
    problem = make_problem(
        make_peer("full", decode_gb_s=90.0, memory=SMALL),
        make_peer("slow", decode_gb_s=1.0),
        make_peer("quick", decode_gb_s=9.0),
        make_peer("attic", roles=("storage",)),
        min_peers=2,
    )
    rows = single_devices(problem)
    assert [row.name for row in rows] == ["quick", "slow", "full"]
    assert [row.missing_bytes > 0 for row in rows] == [False, False, True]
    assert rows[0].estimate.tpot_s == pytest.approx(solve(make_problem(problem.profiles[2])).value)
