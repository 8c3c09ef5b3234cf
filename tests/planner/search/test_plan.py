from in_process.clusters import make_peer, make_problem
from meshd.planner.search.plan import build_plan
from meshd.planner.search.solve import solve
from meshd.types import PlanId

SMALL = 150 << 20


def test_a_plan_has_the_stages_and_predictions_of_its_solution() -> None:
    problem = make_problem(make_peer("a", memory=SMALL), make_peer("b", memory=SMALL))
    solution = solve(problem)
    plan = build_plan(PlanId("p1"), problem, solution)
    assert (plan.id, plan.model, plan.context, plan.prefill_chunk_tokens) == ("p1", problem.card.id, 512, 128)
    assert plan.peers == solution.peers
    assert (plan.predicted_ttft_s, plan.predicted_tpot_s) == (solution.estimate.ttft_s, solution.estimate.tpot_s)
