"""Say with which numerics a plan computes, what that promises, and why it mixes several if it does."""

from dataclasses import dataclass
from typing import Any

from meshd.errors import MeshdError
from meshd.numerics import NumericsId, show_numerics
from meshd.planner.problem import PlanInput
from meshd.planner.search.numerics import MIXING_GAIN, Exactness, exactness
from meshd.planner.search.solve import Solution, mixed_and_one
from meshd.planner.units import show_value

_EFFECTS = {
    Exactness.PROMISED: "the same tokens whatever the split, the other requests and a recovery",
    Exactness.ONE: "no promise: a token's bits depend on what is computed beside it, so a near-tie may be decided otherwise"
    " in another run",
    Exactness.MIXED: "a near-tie may be decided otherwise than on one device",
}


@dataclass(frozen=True, slots=True)
class NumericsReport:
    """The numerics of one plan."""

    ids: tuple[NumericsId, ...]
    """Of each stage's peer, in order."""
    names: tuple[str, ...]
    """The name of each stage's peer."""
    why: str
    """Why the plan is not on one promised id, or what an inexact one would gain. Empty: there was no choice."""

    @property
    def exactness(self) -> Exactness:
        return exactness(self.ids)

    @property
    def text(self) -> str:
        """One sentence."""
        kind = self.exactness
        if not any(self.ids):
            return "numerics: not known: the peers have not measured theirs"
        if kind is Exactness.MIXED:
            listed = ", ".join(f"{name} {numerics or 'unknown'}" for name, numerics in zip(self.names, self.ids, strict=True))
        else:
            listed = show_numerics(self.ids)
        mixed = "mixed numerics" if kind is Exactness.MIXED else "numerics"
        return f"{mixed}: {listed}: {_EFFECTS[kind]}" + (f" ({self.why})" if self.why else "")

    def row(self) -> dict[str, Any]:
        return {
            "ids": list(self.ids),
            "mixed": self.exactness is Exactness.MIXED,
            "promised": self.exactness is Exactness.PROMISED,
            "why": self.why,
        }


def numerics_report(problem: PlanInput, solution: Solution) -> NumericsReport:
    """Report on the numerics of a plan. Searches again where the peers that may take part have several."""
    names = tuple(problem.profile(stage.peer).name for stage in solution.stages)
    return NumericsReport(solution.numerics, names, _why(problem, solution))


def _why(problem: PlanInput, solution: Solution) -> str:
    if solution.method == "given":
        return "the request names the stages" if exactness(solution.numerics) is Exactness.MIXED else ""
    if len({profile.numerics for profile in problem.profiles}) == 1:
        return ""
    try:
        anyhow, one = mixed_and_one(problem)
    except MeshdError:
        return ""
    mine = exactness(solution.numerics)
    if mine is Exactness.MIXED:
        if one is None:
            return "no plan on one numerics fits"
        return f"on one numerics {show_value(problem.objective, one.value)} instead of {_value(problem, solution)}"
    if anyhow is not None and exactness(anyhow.numerics) > mine and anyhow.value < solution.value:
        other = show_value(problem.objective, anyhow.value)
        return f"{other} instead of {_value(problem, solution)} without this promise: less than {MIXING_GAIN:.0%} better"
    return ""


def _value(problem: PlanInput, solution: Solution) -> str:
    return show_value(problem.objective, solution.value)
