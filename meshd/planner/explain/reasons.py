"""Find the reasons for a plan. Most are found by solving a changed problem and comparing its solution with the plan."""

from collections.abc import Iterator
from dataclasses import replace

import msgspec

from meshd.errors import MeshdError
from meshd.numerics import show_numerics
from meshd.planner.eligible import eligible, exclusions
from meshd.planner.model.estimate import Estimate, estimate, peer_memory
from meshd.planner.model.memory import capacity_bytes, memory_table, missing_bytes
from meshd.planner.problem import PlanInput
from meshd.planner.search.limits import SearchLimits
from meshd.planner.search.numerics import exactness
from meshd.planner.search.solve import Solution, objective_value, search
from meshd.planner.units import show_bytes, show_value
from meshd.types import LayerRange, Objective, PeerId, StagePlan

MIN_GAIN = 0.01
"""A constraint binds if the best plan without it has a value that is lower by more than this share."""
UNLIMITED_BYTES = 1 << 50
"""Memory of a peer in a problem without memory limits: more than any model needs."""


class SingleDevice(msgspec.Struct, frozen=True, kw_only=True):
    """The prediction for one device that computes all layers alone."""

    peer: PeerId
    name: str
    missing_bytes: int
    """Free memory that the device lacks. 0: the whole model fits on the device."""
    estimate: Estimate


class BindingConstraint(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint that keeps the plan from being better."""

    constraint: str
    """`memory`, `min_peers`, `peers`, `stages` or `resident_only`. If none of these binds: `compute` or `network`."""
    reason: str
    value_if_lifted: float | None = None


class ExcludedPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer that is not in the plan."""

    peer: PeerId
    name: str
    reason: str
    value_with_it: float | None = None


def single_devices(problem: PlanInput) -> tuple[SingleDevice, ...]:
    """Predict each device alone, regardless of where layers are resident.

    Returns: the predictions, ordered by missing memory (0 if the model fits), then by the objective.
    """
    free = msgspec.structs.replace(problem, resident_only=False, stages=None, peers=None, min_peers=1)
    excluded = exclusions(free)
    whole = LayerRange(0, problem.card.spec.layers)
    rows = []
    for profile in problem.profiles:
        if profile.id in excluded:
            continue
        predicted = estimate(free, (StagePlan(peer=profile.id, layers=whole),))
        use = predicted.memory[0]
        missing = missing_bytes(use.use.total_bytes, use.capacity_bytes)
        rows.append(SingleDevice(peer=profile.id, name=profile.name, missing_bytes=missing, estimate=predicted))
    return tuple(sorted(rows, key=lambda row: (row.missing_bytes, objective_value(row.estimate, problem.objective), row.name)))


def runner_up(problem: PlanInput, solution: Solution) -> Solution | None:
    """Find the best plan that lacks at least one of the peers of `solution`.

    Returns: None if there is no such plan, or if the request named the stages.
    """
    if solution.method == "given":
        return None
    places = {profile.id: place for place, profile in enumerate(eligible(problem))}
    return search(problem, SearchLimits(forbid=frozenset(places[peer] for peer in solution.peers)))


def bindings(problem: PlanInput, solution: Solution) -> tuple[BindingConstraint, ...]:
    """Find the constraints that make the plan worse, each with the value of the best plan without that constraint.

    Returns: these constraints; if there are none, the stage or hop that takes the largest part of a token's time.
    """
    found = []
    for name, reason, lifted in _lifted(problem):
        better = _search(lifted)
        if better is not None and better.value < solution.value * (1 - MIN_GAIN):
            reason = reason or f"memory of {_overfull(problem, better)}"
            text = f"{reason}: {show_value(problem.objective, better.value)} without it"
            found.append(BindingConstraint(constraint=name, reason=text, value_if_lifted=better.value))
    return tuple(found) or (_largest(solution.estimate),)


def excluded_peers(problem: PlanInput, solution: Solution) -> tuple[ExcludedPeer, ...]:
    """List every peer that the plan does not use, with the reason."""
    used = {memory.peer for memory in solution.estimate.memory}
    excluded = exclusions(problem)
    rows = []
    for profile in problem.profiles:
        if profile.id in used:
            continue
        reason, value = excluded.get(profile.id, ""), None
        if not reason:
            reason, value = _not_chosen(problem, solution, profile.id)
        rows.append(ExcludedPeer(peer=profile.id, name=profile.name, reason=reason, value_with_it=value))
    return tuple(rows)


def _lifted(problem: PlanInput) -> Iterator[tuple[str, str, PlanInput]]:
    """Yield, for each constraint of the problem: (name, reason to report, problem without the constraint).

    The reason for `memory` is empty, since the text depends on the solution of the changed problem.
    """
    change = msgspec.structs.replace
    if problem.stages is not None:
        yield "stages", "the request names the stages", change(problem, stages=None)
        return
    if problem.min_peers > 1:
        yield "min_peers", f"the request needs at least {problem.min_peers} peers", change(problem, min_peers=1)
    if problem.peers is not None:
        yield "peers", "only the named peers may take part", change(problem, peers=None)
    if problem.resident_only:
        yield "resident_only", "only layers that are resident now are used", change(problem, resident_only=False)
    elif problem.objective is not Objective.MEMORY:
        roomy = tuple(change(profile, memory_free_bytes=UNLIMITED_BYTES) for profile in problem.profiles)
        yield "memory", "", change(problem, profiles=roomy)


def _overfull(problem: PlanInput, better: Solution) -> str:
    """Name the peers whose memory is too small for the plan `better`, which was made without memory limits."""
    used = peer_memory(problem, better.stages)
    return ", ".join(problem.profile(row.peer).name for row in used if missing_bytes(row.use.total_bytes, row.capacity_bytes))


def _search(problem: PlanInput) -> Solution | None:
    try:
        return search(problem, SearchLimits())
    except MeshdError:
        return None


def _largest(predicted: Estimate) -> BindingConstraint:
    """Return the largest part of a token's time: a stage or a hop."""
    parts = [(stage.decode_s, "compute", f"computing layers {stage.layers} on {stage.name}") for stage in predicted.stages]
    names = {stage.peer: stage.name for stage in predicted.stages}
    parts += [
        (hop.decode_s, "network", f"the hop {names[hop.source]} -> {names[hop.target]}")
        for hop in (*predicted.hops, predicted.back)
    ]
    seconds, constraint, what = max(parts)
    return BindingConstraint(constraint=constraint, reason=f"{what} takes {seconds / predicted.tpot_s:.0%} of a token's time")


def _not_chosen(problem: PlanInput, solution: Solution, peer: PeerId) -> tuple[str, float | None]:
    """Find why an eligible peer got no layers.

    Returns: (reason, value of the best plan that uses this peer and no others than those of `solution`). The value is None if
    there is no such plan, or if none was searched for.
    """
    if solution.method == "given":
        return "the request names the stages", None
    capacity, least = _least_memory(problem, peer)
    if capacity < least and not problem.resident_only:
        return f"no layer fits: {show_bytes(capacity)} may be used, and the smallest stage takes {show_bytes(least)}", None
    together = msgspec.structs.replace(problem, peers=(*solution.peers, peer))
    place = next(index for index, profile in enumerate(eligible(together)) if profile.id == peer)
    found = search(together, replace(SearchLimits(), require=frozenset({place})))
    if found is None:
        return "no plan with it and the chosen peers fits", None
    value = show_value(problem.objective, found.value)
    if found.value < solution.value and exactness(found.numerics) > exactness(solution.numerics):
        own = show_numerics((problem.profile(peer).numerics,)) or "unknown"
        return f"its numerics are {own}: {value} with it, which is too little gain for mixed numerics", found.value
    if found.value <= solution.value * (1 + MIN_GAIN):
        return f"it would not help: {value} with it, {show_value(problem.objective, solution.value)} without", found.value
    return f"it would slow the plan down: {value} with it, {show_value(problem.objective, solution.value)} without", found.value


def _least_memory(problem: PlanInput, peer: PeerId) -> tuple[int, int]:
    """Return (capacity of the peer, free memory that the smallest stage and the reserve need), in bytes."""
    profile = problem.profile(peer)
    return capacity_bytes(problem, profile), missing_bytes(float(memory_table(problem, profile).min()), 0)
