import pytest

from in_process.clusters import make_card, make_holding, make_network, make_peer, make_problem
from meshd.errors import ContextTooLong, InvalidRequest, NoPeer, Unavailable
from meshd.planner.network import Network
from meshd.planner.search.solve import Solution, solve
from meshd.planner.stages import parse_stages, stages_text
from meshd.types import Objective

SMALL = 150 << 20


def names(solution: Solution) -> list[str]:
    return [stage.name for stage in solution.estimate.stages]


def test_one_device_that_fits_is_not_split() -> None:
    solution = solve(make_problem(make_peer("a"), make_peer("b"), make_peer("c")))
    assert names(solution) == ["a"]
    assert solution.estimate.back.decode_s == 0.0


def test_a_much_faster_peer_is_used_despite_its_hops() -> None:
    problem = make_problem(make_peer("slow", decode_gb_s=1.0, memory=4 << 30), make_peer("fast", decode_gb_s=50.0, memory=SMALL))
    assert set(names(solve(problem))) == {"slow", "fast"}


def test_slow_and_far_peers_are_not_used() -> None:
    near = [make_peer(name, memory=SMALL) for name in ("a", "b")]
    slow = make_peer("slow", decode_gb_s=0.1)
    assert set(names(solve(make_problem(*near, slow)))) == {"a", "b"}
    far = make_peer("far", decode_gb_s=50.0, memory=SMALL)
    problem = make_problem(*near, far, network=make_network(near))
    assert set(names(solve(problem))) == {"a", "b"}


def test_min_peers_and_named_peers_are_kept() -> None:
    peers = [make_peer(name) for name in "abc"]
    assert len(solve(make_problem(*peers, min_peers=3)).stages) == 3
    assert set(names(solve(make_problem(*peers, min_peers=2, peers=("b-id", "c-id"))))) == {"b", "c"}
    with pytest.raises(NoPeer, match="4 peers are needed and 3"):
        solve(make_problem(*peers, min_peers=4))
    with pytest.raises(NoPeer, match="not in the cluster now: z-id"):
        solve(make_problem(*peers, peers=("z-id",)))
    with pytest.raises(InvalidRequest, match="only 2 layers"):
        solve(make_problem(*peers, card=make_card(2), min_peers=3))


def test_peers_that_cannot_take_layers_are_not_used() -> None:
    peers = [make_peer("attic", roles=("storage",)), make_peer("new", decode_gb_s=0.0), make_peer("b", decode_gb_s=0.5)]
    assert names(solve(make_problem(*peers))) == ["b"]
    with pytest.raises(NoPeer, match=r"attic: its role leaves out compute; new: its rates are not measured yet"):
        solve(make_problem(*peers[:2]))


def test_the_context_has_bounds() -> None:
    with pytest.raises(ContextTooLong, match="8192"):
        solve(make_problem(make_peer("a"), context=8193))
    with pytest.raises(InvalidRequest):
        solve(make_problem(make_peer("a"), context=0))


def test_given_stages_are_predicted_unchanged() -> None:
    peers = (make_peer("a"), make_peer("b"))
    stages = parse_stages("b:0-3,a:3-30", peers, 30)
    solution = solve(make_problem(*peers, stages=stages))
    assert (solution.stages, solution.method) == (stages, "given")
    assert solution.estimate.tpot_s > solve(make_problem(*peers)).estimate.tpot_s


def test_given_stages_need_power_for_energy_too() -> None:
    peers = (make_peer("a", power_w=None),)
    with pytest.raises(InvalidRequest, match="was not measured"):
        solve(make_problem(*peers, stages=parse_stages("a:0-30", peers, 30), objective=Objective.ENERGY))


def test_routes_use_only_resident_layers() -> None:
    a = make_peer("a", decode_gb_s=1.0, holdings=(make_holding(0, 20),))
    b = make_peer("b", holdings=(make_holding(10, 30),))
    c = make_peer("c", decode_gb_s=100.0, holdings=(make_holding(0, 30, state="loading"), make_holding(4, 5)))
    solution = solve(make_problem(a, b, c, resident_only=True))
    assert stages_text(solution.stages, (a, b)) == "a:0-10,b:10-30"


def test_time_limits_change_the_plan_or_are_refused() -> None:
    peers = [make_peer(name) for name in "abc"]
    free = solve(make_problem(*peers, objective=Objective.THROUGHPUT))
    single = solve(make_problem(*peers))
    between = (free.estimate.tpot_s + single.estimate.tpot_s) / 2
    limited = solve(make_problem(*peers, objective=Objective.THROUGHPUT, max_tpot_s=between))
    assert limited.estimate.tpot_s <= between < free.estimate.tpot_s
    with pytest.raises(Unavailable, match=r"no plan keeps TTFT 0\.001 ms: the lowest predictions are"):
        solve(make_problem(*peers, max_ttft_s=1e-6))


def test_unmeasured_links_do_not_stop_a_plan() -> None:
    peers = [make_peer(name, memory=SMALL) for name in "ab"]
    solution = solve(make_problem(*peers, network=Network({})))
    assert solution.estimate.hops[0].link == "not measured"
