"""Convert a solution into the plan that is sent to peers."""

from meshd.planner.problem import PlanInput
from meshd.planner.search.solve import Solution
from meshd.types import Plan, PlanId


def build_plan(plan_id: PlanId, problem: PlanInput, solution: Solution) -> Plan:
    """Make the plan with the stages of a solution and their predicted times."""
    return Plan(
        id=plan_id,
        model=problem.card.id,
        stages=solution.stages,
        prefill_chunk_tokens=problem.chunk_tokens,
        context=problem.context,
        predicted_ttft_s=solution.estimate.ttft_s,
        predicted_tpot_s=solution.estimate.tpot_s,
        numerics=problem.numerics(solution.stages),
    )
