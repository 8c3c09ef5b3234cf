"""Solve a planning problem: choose stages, their peers and their order."""

from dataclasses import replace

import msgspec

from meshd.errors import ContextTooLong, InvalidRequest, Unavailable
from meshd.numerics import NumericsId
from meshd.planner.eligible import check_power, eligible
from meshd.planner.model.estimate import Estimate, estimate
from meshd.planner.model.tables import CostTables
from meshd.planner.problem import PlanInput
from meshd.planner.profile import PeerProfile
from meshd.planner.search.limits import SearchLimits
from meshd.planner.search.numerics import Exactness, exactness, groups_of, limits_within, preferred
from meshd.planner.search.objectives import cheapest
from meshd.planner.search.select import EXACT_PEERS, search_for
from meshd.planner.search.shortfall import check_given, does_not_fit
from meshd.planner.stages import check_stages
from meshd.types import Objective, PeerId, StagePlan


class Solution(msgspec.Struct, frozen=True, kw_only=True):
    """The chosen stages and the predictions for them."""

    stages: tuple[StagePlan, ...]
    estimate: Estimate
    objective: Objective
    method: str
    """How the stages were found: `exact` or `heuristic` search, or `given` by the request."""
    numerics: tuple[NumericsId, ...]
    """The id of each stage's peer, in order."""

    @property
    def value(self) -> float:
        """The value that was minimised: seconds (TPOT, TTFT or period), J per token, or a share of memory."""
        return objective_value(self.estimate, self.objective)

    @property
    def peers(self) -> tuple[PeerId, ...]:
        return tuple(stage.peer for stage in self.stages)


def objective_value(predicted: Estimate, objective: Objective) -> float:
    """Return the value that `objective` minimises; inf for ENERGY if the energy is not known."""
    values = {
        Objective.LATENCY: predicted.tpot_s,
        Objective.TTFT: predicted.ttft_s,
        Objective.THROUGHPUT: predicted.period_s,
        Objective.MEMORY: predicted.memory_share,
        Objective.ENERGY: float("inf") if predicted.energy_j is None else predicted.energy_j,
    }
    return values[objective]


def solve(problem: PlanInput) -> Solution:
    """Find the best plan. The same problem always has the same solution.

    The search is exact up to `EXACT_PEERS` peers, and heuristic (`meshd.planner.search.heuristic`) beyond. Of equal plans it takes
    the one with the fewest peers, then the one whose peers' names come first. A plan on one numerics id is better than one over
    several that is not clearly faster (`meshd.planner.search.numerics`). If the best plan exceeds the time limits, the solution is
    the plan with the least TPOT or, if that also exceeds them, the plan with the least TTFT; then the same with any numerics. If
    the problem names stages, they are only checked, and the solution has these stages.

    Raises: InvalidRequest, ContextTooLong, NoPeer; DoesNotFit if no plan fits in memory; Unavailable if none of these plans keeps
    the time limits. With `resident_only`: NotReady if the resident layers form no route; Overloaded if only free KV is missing.
    """
    _check(problem)
    if problem.stages is not None:
        found = _given(problem, problem.stages)
        return _within_limits(problem, (found,))
    solution = search(problem, SearchLimits())
    if solution is None:
        raise does_not_fit(problem)
    if _keeps_limits(problem, solution):
        return solution
    others = (
        search(msgspec.structs.replace(problem, objective=other), SearchLimits(), prefer_one_numerics=one)
        for one in (True, False)
        for other in (Objective.LATENCY, Objective.TTFT)
    )
    return _within_limits(problem, (solution, *(other for other in others if other is not None)))


def search(problem: PlanInput, limits: SearchLimits, *, prefer_one_numerics: bool = True) -> Solution | None:
    """Find the best plan by the problem's objective within `limits`, whose peers are indices into `eligible(problem)`.

    The time limits of the problem and its `stages` are ignored. With `prefer_one_numerics`, plans on one id are searched besides,
    and the best of all is chosen by `meshd.planner.search.numerics.preferred`; otherwise ids do not matter.

    Returns: the solution; None if there is no such plan.
    Raises: the errors of `eligible`.
    """
    peers = eligible(problem)
    limits = replace(limits, least=max(limits.least, problem.min_peers))
    best = _search_among(problem, peers, limits)
    if best is None or not prefer_one_numerics:
        return best
    found = [best]
    for group in groups_of(peers):
        members, within = tuple(peers[place] for place in group), limits_within(limits, group)
        if within is None or len(group) < within.least or exactness([members[0].numerics]) >= exactness(best.numerics):
            continue  # no plan of the group can be allowed, or more exact than the best
        alike = _search_among(problem, members, within)
        found += [] if alike is None else [alike]
    return preferred(found)


def mixed_and_one(problem: PlanInput) -> tuple[Solution | None, Solution | None]:
    """Find the best plan with any numerics, and the best one on a single id; None where there is no such plan.

    Raises: the errors of `eligible`.
    """
    peers = eligible(problem)
    limits = SearchLimits(least=problem.min_peers)
    anyhow = _search_among(problem, peers, limits)
    groups = [tuple(peers[place] for place in group) for group in groups_of(peers)]
    found = (_search_among(problem, group, limits) for group in groups if len(group) >= limits.least)
    return anyhow, preferred(solution for solution in found if solution is not None)


def needs_mixing(problem: PlanInput, solution: Solution) -> bool:
    """Whether the solution is over several numerics because no plan on one of them fits."""
    if solution.method == "given" or exactness(solution.numerics) is not Exactness.MIXED:
        return False
    return mixed_and_one(problem)[1] is None


def _search_among(problem: PlanInput, peers: tuple[PeerProfile, ...], limits: SearchLimits) -> Solution | None:
    """Find the best plan over these peers, whose indices the limits name."""
    chain = cheapest(CostTables(problem, peers), problem.objective, limits, search_for(len(peers)))
    if chain is None:
        return None
    stages = chain.stages(peers)
    return Solution(
        stages=stages,
        estimate=estimate(problem, stages),
        objective=problem.objective,
        method="exact" if len(peers) <= EXACT_PEERS else "heuristic",
        numerics=problem.numerics(stages),
    )


def _check(problem: PlanInput) -> None:
    longest = problem.card.spec.context_length
    if problem.context > longest:
        raise ContextTooLong(
            f"context {problem.context} is too long: {problem.card.name} has {longest} tokens",
            hint=f"ask for {longest} tokens or fewer",
        )
    if problem.context < 1 or problem.prompt_tokens < 1:
        raise InvalidRequest("the context and the prompt must have at least one token", param="context")


def _given(problem: PlanInput, stages: tuple[StagePlan, ...]) -> Solution:
    check_stages(stages, problem)
    if problem.objective is Objective.ENERGY:
        named = {stage.peer for stage in stages}
        check_power([profile for profile in problem.profiles if profile.id in named])
    check_given(problem, stages)
    return Solution(
        stages=stages,
        estimate=estimate(problem, stages),
        objective=problem.objective,
        method="given",
        numerics=problem.numerics(stages),
    )


def _keeps_limits(problem: PlanInput, solution: Solution) -> bool:
    longest = (problem.max_ttft_s, solution.estimate.ttft_s), (problem.max_tpot_s, solution.estimate.tpot_s)
    return all(limit is None or seconds <= limit for limit, seconds in longest)


def _within_limits(problem: PlanInput, solutions: tuple[Solution, ...]) -> Solution:
    """Return the first solution that keeps the time limits. Raises: Unavailable if none does."""
    for solution in solutions:
        if _keeps_limits(problem, solution):
            return solution
    limits = (("TTFT", problem.max_ttft_s), ("TPOT", problem.max_tpot_s))
    asked = " and ".join(f"{name} {limit * 1e3:.4g} ms" for name, limit in limits if limit is not None)
    ttft = min(solution.estimate.ttft_s for solution in solutions)
    tpot = min(solution.estimate.tpot_s for solution in solutions)
    raise Unavailable(
        f"no plan keeps {asked}: the lowest predictions are TTFT {ttft * 1e3:.4g} ms and TPOT {tpot * 1e3:.4g} ms",
        hint="allow more time, or add a faster device",
    )
