"""The rows of `GET /mesh/v1/plans`: the plan of each running answer, with predictions for its stages and hops."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from meshd.agents.placement.plan_input import plan_input_of
from meshd.agents.service import MeshOptions
from meshd.agents.session.answer import Answer
from meshd.errors import MeshdError
from meshd.planner.model.estimate import Estimate, HopEstimate, estimate
from meshd.types import Advert, PeerId, Plan, SessionId


@dataclass(slots=True)
class PlanRows:
    """Makes the rows. A plan's estimate is computed when it is listed first, from the measurements of that moment."""

    adverts: Callable[[], list[Advert]]
    names: Callable[[PeerId], str]
    _estimates: dict[tuple[SessionId, int], Estimate | None] = field(default_factory=dict)
    """By session and epoch. None: a peer of the plan had left by then."""

    def of(self, answers: list[Answer]) -> list[dict[str, Any]]:
        """List the plans of these answers."""
        keys = {(answer.session, answer.machine.epoch) for answer in answers}
        for key in self._estimates.keys() - keys:
            del self._estimates[key]
        return [self._row(answer, answer.plan) for answer in answers if answer.plan is not None]

    def _row(self, answer: Answer, plan: Plan) -> dict[str, Any]:
        key = answer.session, answer.machine.epoch
        if key not in self._estimates:
            self._estimates[key] = self._estimate(answer, plan)
        predicted = self._estimates[key]
        return {
            "id": plan.id,
            "session": answer.session,
            "model": plan.model,
            "epoch": answer.machine.epoch,
            "plan": answer.plan_header,
            "numerics": answer.numerics_header,
            "stages": [
                {
                    "peer": stage.peer,
                    "name": self.names(stage.peer),
                    "layers": str(stage.layers),
                    "predicted_s": predicted.stages[number].decode_s if predicted is not None else None,
                }
                for number, stage in enumerate(plan.stages)
            ],
            "hops": self._hops(plan, predicted),
            "context": plan.context,
            "predicted_ttft_s": plan.predicted_ttft_s,
            "measured_ttft_s": answer.ttft_s or None,
            "predicted_tpot_s": plan.predicted_tpot_s,
            "measured_tpot_s": answer.measured_tpot_s,
        }

    def _estimate(self, answer: Answer, plan: Plan) -> Estimate | None:
        try:
            problem = plan_input_of(
                answer.card, self.adverts(), MeshOptions(), context=plan.context, prompt_tokens=answer.prompt_tokens, leaving=True
            )
            return estimate(problem, plan.stages)
        except MeshdError:
            return None

    def _hops(self, plan: Plan, predicted: Estimate | None) -> list[dict[str, Any]]:
        """List the hops from each stage to the next one, then the one that returns the token to the first stage."""
        if predicted is not None:
            return [self._hop(hop) for hop in (*predicted.hops, predicted.back)]
        peers = [stage.peer for stage in plan.stages]
        return [self._ends(source, target) for source, target in pairwise([*peers, peers[0]])]

    def _hop(self, hop: HopEstimate) -> dict[str, Any]:
        ends = self._ends(hop.source, hop.target)
        return ends | {"bytes_per_token": hop.bytes_per_token, "predicted_s": hop.decode_s, "link": hop.link}

    def _ends(self, source: PeerId, target: PeerId) -> dict[str, Any]:
        named = {"source_name": self.names(source), "target_name": self.names(target)}
        return {"source": source, "target": target, **named, "bytes_per_token": None, "predicted_s": None, "link": ""}
