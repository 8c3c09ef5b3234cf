import msgspec
import pytest

from in_process.clusters import make_card, make_holding, make_network, make_peer, make_problem
from meshd.errors import ContextTooLong, DoesNotFit, InvalidRequest, NoPeer, NotReady, Overloaded, Unavailable
from meshd.planner.network import Network
from meshd.planner.search.plan import build_plan
from meshd.planner.search.solve import Solution, solve
from meshd.planner.stages import parse_stages, stages_text
from meshd.types import LayerRange, Objective, PlanId, StagePlan

SMALL = 150 << 20


def names(solution: Solution) -> list[str]:
    return [stage.name for stage in solution.estimate.stages]


def test_one_device_that_fits_is_not_split() -> None:
    solution = solve(make_problem(make_peer("a"), make_peer("b"), make_peer("c")))
    assert names(solution) == ["a"]
    assert solution.estimate.back.decode_s == 0.0


def test_a_much_faster_peer_is_worth_its_hops() -> None:
    problem = make_problem(make_peer("slow", decode_gb_s=1.0, memory=4 << 30), make_peer("fast", decode_gb_s=50.0, memory=SMALL))
    assert set(names(solve(problem))) == {"slow", "fast"}


def test_a_slow_peer_is_left_out_and_a_far_one_too() -> None:
    near = [make_peer(name, memory=SMALL) for name in ("a", "b")]
    slow = make_peer("slow", decode_gb_s=0.1)
    assert set(names(solve(make_problem(*near, slow)))) == {"a", "b"}
    far = make_peer("far", decode_gb_s=50.0, memory=SMALL)
    problem = make_problem(*near, far, network=make_network(near))
    assert set(names(solve(problem))) == {"a", "b"}


def test_stages_are_uneven_as_the_peers_are() -> None:
    problem = make_problem(make_peer("a", decode_gb_s=5.0), make_peer("b", decode_gb_s=15.0), objective=Objective.THROUGHPUT)
    layers = {stage.name: len(stage.layers) for stage in solve(problem).estimate.stages}
    assert layers["b"] > 1.5 * layers["a"]


def test_throughput_splits_where_latency_does_not() -> None:
    peers = [make_peer(name) for name in "abc"]
    solution = solve(make_problem(*peers, objective=Objective.THROUGHPUT))
    assert len(solution.stages) == 3
    assert solution.value == solution.estimate.period_s < solve(make_problem(peers[0])).estimate.tpot_s


def test_memory_spreads_and_a_long_prompt_pipelines() -> None:
    peers = [make_peer(name) for name in "abc"]
    spread = solve(make_problem(*peers, objective=Objective.MEMORY))
    assert spread.estimate.memory_share < solve(make_problem(peers[0])).estimate.memory_share
    quick = solve(make_problem(*peers, objective=Objective.TTFT, prompt_tokens=2000, context=4096))
    assert len(quick.stages) == 3


def test_energy_takes_the_frugal_peer_and_needs_measured_power() -> None:
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


def test_peers_that_cannot_take_layers_are_not_asked() -> None:
    peers = [make_peer("attic", roles=("storage",)), make_peer("new", decode_gb_s=0.0), make_peer("b", decode_gb_s=0.5)]
    assert names(solve(make_problem(*peers))) == ["b"]
    with pytest.raises(NoPeer, match=r"attic: its role leaves out compute; new: its rates are not measured yet"):
        solve(make_problem(*peers[:2]))


def test_the_context_has_bounds() -> None:
    with pytest.raises(ContextTooLong, match="8192"):
        solve(make_problem(make_peer("a"), context=8193))
    with pytest.raises(InvalidRequest):
        solve(make_problem(make_peer("a"), context=0))


def test_given_stages_are_predicted_as_they_are() -> None:
    peers = (make_peer("a"), make_peer("b"))
    stages = parse_stages("b:0-3,a:3-30", peers, 30)
    solution = solve(make_problem(*peers, stages=stages))
    assert (solution.stages, solution.method) == (stages, "given")
    assert solution.estimate.tpot_s > solve(make_problem(*peers)).estimate.tpot_s


def test_given_stages_that_do_not_fit_say_where() -> None:
    peers = (make_peer("a", memory=90 << 20), make_peer("b"))
    with pytest.raises(DoesNotFit, match="a lacks") as caught:
        solve(make_problem(*peers, stages=parse_stages("a:0-15,b:15-30", peers, 30)))
    assert caught.value.missing_bytes > 0


def test_given_stages_need_power_for_energy_too() -> None:
    peers = (make_peer("a", power_w=None),)
    with pytest.raises(InvalidRequest, match="was not measured"):
        solve(make_problem(*peers, stages=parse_stages("a:0-30", peers, 30), objective=Objective.ENERGY))


def test_routes_go_over_what_is_resident() -> None:
    a = make_peer("a", decode_gb_s=1.0, holdings=(make_holding(0, 20),))
    b = make_peer("b", holdings=(make_holding(10, 30),))
    c = make_peer("c", decode_gb_s=100.0, holdings=(make_holding(0, 30, state="loading"), make_holding(4, 5)))
    solution = solve(make_problem(a, b, c, resident_only=True))
    assert stages_text(solution.stages, (a, b)) == "a:0-10,b:10-30"


def test_layers_that_lie_nowhere_are_named() -> None:
    a = make_peer("a", holdings=(make_holding(0, 12),))
    b = make_peer("b", holdings=(make_holding(20, 30),))
    with pytest.raises(NotReady, match="layers 12-20 are resident on no peer") as caught:
        solve(make_problem(a, b, resident_only=True))
    assert caught.value.progress == pytest.approx(22 / 30)


def test_what_must_be_placed_first_is_not_ready() -> None:
    whole = make_peer("a", holdings=(make_holding(0, 30),))
    empty = make_peer("b")
    for problem in (
        make_problem(empty, resident_only=True),
        make_problem(whole, empty, resident_only=True, min_peers=2),
        make_problem(whole, make_peer("c", holdings=(make_holding(0, 12),)), resident_only=True, context=5000),
        make_problem(make_peer("d", holdings=(make_holding(0, 10), make_holding(20, 30))), resident_only=True),
    ):
        with pytest.raises(NotReady):
            solve(problem)
    ends = make_peer("d", holdings=(make_holding(0, 10), make_holding(20, 30)))
    with pytest.raises(NotReady, match="one run per peer"):
        solve(make_problem(ends, make_peer("e", holdings=(make_holding(10, 20),)), resident_only=True))


def test_kv_that_others_hold_is_a_queue_not_a_placement() -> None:
    busy = msgspec.structs.replace(make_holding(0, 30), kv_tokens_free=100)
    peer = make_peer("a", holdings=(busy,))
    with pytest.raises(Overloaded, match="a 100"):
        solve(make_problem(peer, resident_only=True))
    with pytest.raises(Overloaded, match="a has no KV free for 512 tokens"):
        solve(make_problem(peer, resident_only=True, stages=parse_stages("a:0-30", (peer,), 30)))


def test_given_stages_must_be_resident_for_a_route() -> None:
    peer = make_peer("a", holdings=(make_holding(0, 29),))
    stages = (StagePlan(peer=peer.id, layers=LayerRange(0, 30)),)
    with pytest.raises(NotReady, match="a does not hold layers 0-30"):
        solve(make_problem(peer, resident_only=True, stages=stages))


def test_time_limits_turn_the_plan_or_are_refused() -> None:
    peers = [make_peer(name) for name in "abc"]
    free = solve(make_problem(*peers, objective=Objective.THROUGHPUT))
    single = solve(make_problem(*peers))
    between = (free.estimate.tpot_s + single.estimate.tpot_s) / 2
    held = solve(make_problem(*peers, objective=Objective.THROUGHPUT, max_tpot_s=between))
    assert held.estimate.tpot_s <= between < free.estimate.tpot_s
    with pytest.raises(Unavailable, match=r"no plan keeps TTFT 0\.001 ms: the best predicted are"):
        solve(make_problem(*peers, max_ttft_s=1e-6))


def test_unmeasured_links_do_not_stop_a_plan() -> None:
    peers = [make_peer(name, memory=SMALL) for name in "ab"]
    solution = solve(make_problem(*peers, network=Network({})))
    assert solution.estimate.hops[0].link == "not measured"


def test_a_plan_for_the_wire() -> None:
    problem = make_problem(make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    solution = solve(problem)
    plan = build_plan(PlanId("p1"), problem, solution)
    assert (plan.id, plan.model, plan.context, plan.prefill_chunk_tokens) == ("p1", problem.card.id, 512, 128)
    assert plan.peers == solution.peers
    assert (plan.predicted_ttft_s, plan.predicted_tpot_s) == (solution.estimate.ttft_s, solution.estimate.tpot_s)
