"""Explain a plan, as text for people and as data for programs."""

from typing import Any

import msgspec

from meshd.planner.explain.numerics import numerics_report
from meshd.planner.explain.reasons import (
    BindingConstraint,
    ExcludedPeer,
    SingleDevice,
    bindings,
    excluded_peers,
    runner_up,
    single_devices,
)
from meshd.planner.model.estimate import Estimate, HopEstimate, PeerMemory, StageEstimate
from meshd.planner.problem import PlanInput
from meshd.planner.search.numerics import Exactness
from meshd.planner.search.solve import Solution, objective_value
from meshd.planner.stages import stages_text
from meshd.planner.units import show_bytes, show_rate, show_seconds, show_value

_PURPOSES = ("layers", "embedding", "head", "kv", "working", "runtime")


def explain(problem: PlanInput, solution: Solution) -> dict[str, Any]:
    """Explain a plan as a dict that JSON can encode.

    The lines of `text` summarise the plan: stages, speed and memory. The lines of `explanation` give the reasons for it. The other
    keys have the same content as data. The reasons need further searches, so `explain` takes several times as long as `solve`.
    """
    reasons = _Explanation(problem, solution)
    return {
        "object": "mesh.plan",
        "model": problem.card.name,
        "plan": stages_text(solution.stages, problem.profiles),
        "objective": problem.objective.value,
        "method": solution.method,
        "context": problem.context,
        "prompt_tokens": problem.prompt_tokens,
        "numerics": reasons.numerics.row(),
        "predicted": _predicted(solution.estimate),
        "stages": [_stage_row(stage) for stage in solution.estimate.stages],
        "hops": [reasons.hop_row(hop) for hop in (*solution.estimate.hops, solution.estimate.back)],
        "memory": [reasons.memory_row(peer) for peer in solution.estimate.memory],
        "alone": [_alone_row(row) for row in reasons.alone],
        "split_is_slower": reasons.faster_alone is not None,
        "binding": [msgspec.to_builtins(binding) for binding in reasons.bindings],
        "runner_up": reasons.runner_up_row(),
        "left_out": [msgspec.to_builtins(row) for row in reasons.left_out],
        "text": reasons.text(),
        "explanation": reasons.explanation(),
    }


class _Explanation:
    """The reasons for one plan, computed once, and their text."""

    def __init__(self, problem: PlanInput, solution: Solution) -> None:
        self.problem, self.solution = problem, solution
        self.alone: tuple[SingleDevice, ...] = single_devices(problem)
        self.bindings: tuple[BindingConstraint, ...] = bindings(problem, solution)
        self.left_out: tuple[ExcludedPeer, ...] = excluded_peers(problem, solution)
        self.runner_up = runner_up(problem, solution)
        self.numerics = numerics_report(problem, solution)
        self.names = {profile.id: profile.name for profile in problem.profiles}

    @property
    def faster_alone(self) -> SingleDevice | None:
        """The fastest device that can hold the whole model, if its TPOT alone is below the plan's.

        None: no such device is faster, or the plan has only one stage.
        """
        fitting = [row for row in self.alone if not row.missing_bytes]
        best = min(fitting, key=lambda row: row.estimate.tpot_s, default=None)
        split = len(self.solution.stages) > 1
        return best if split and best is not None and best.estimate.tpot_s < self.solution.estimate.tpot_s else None

    def text(self) -> list[str]:
        predicted = self.solution.estimate
        rates = f"{show_rate(predicted.tpot_s)} (TPOT {show_seconds(predicted.tpot_s)})"
        ttft = f"TTFT {show_seconds(predicted.ttft_s)} for a prompt of {self.problem.prompt_tokens}"
        lines = [
            f"{self.problem.card.name}: {stages_text(self.solution.stages, self.problem.profiles)}",
            f"predicted: {rates}, {ttft}, {show_rate(predicted.period_s)} over many requests",
            f"memory at a context of {self.problem.context}: {', '.join(map(self._memory_text, predicted.memory))}",
        ]
        if any(self.numerics.ids) and self.numerics.exactness is not Exactness.PROMISED:
            lines.append(self.numerics.text)
        lines += [f"binding: {binding.reason}" for binding in self.bindings]
        return lines + self._advice()

    def _advice(self) -> list[str]:
        best, objective = self.faster_alone, self.problem.objective
        if best is None:
            return []
        figures = (
            f"{best.name} alone would do {show_rate(best.estimate.tpot_s)}, this plan {show_rate(self.solution.estimate.tpot_s)}"
        )
        if objective_value(best.estimate, objective) <= self.solution.value:
            return [f"do not split: {figures}"]
        return [f"for one answer at a time splitting does not pay: {figures}"]

    def explanation(self) -> list[str]:
        return [
            *map(_stage_text, self.solution.estimate.stages),
            *map(self._hop_text, (*self.solution.estimate.hops, self.solution.estimate.back)),
            *map(self._purposes_text, self.solution.estimate.memory),
            self.numerics.text,
            self._alone_text(),
            self._runner_up_text(),
            *(f"left out: {row.name}: {row.reason}" for row in self.left_out),
            *(f"{name} is hypothetical: its rates are scaled from a measured peer's" for name in self._hypothetical()),
        ]

    def hop_row(self, hop: HopEstimate) -> dict[str, Any]:
        row: dict[str, Any] = msgspec.to_builtins(hop)
        return row | {"source_name": self.names[hop.source], "target_name": self.names[hop.target]}

    def memory_row(self, row: PeerMemory) -> dict[str, Any]:
        use = row.use.total_bytes
        return {
            "peer": row.peer,
            "name": self.names[row.peer],
            "capacity_bytes": row.capacity_bytes,
            "used_bytes": use,
            "free_bytes": row.capacity_bytes - use,
            "share": row.share,
            **msgspec.to_builtins(row.use),
        }

    def runner_up_row(self) -> dict[str, Any] | None:
        if self.runner_up is None:
            return None
        return {
            "plan": stages_text(self.runner_up.stages, self.problem.profiles),
            "predicted": _predicted(self.runner_up.estimate),
            "value": self.runner_up.value,
            "why": self._why_lost(self.runner_up),
        }

    def _hypothetical(self) -> list[str]:
        return [profile.name for profile in self.problem.profiles if profile.hypothetical and profile.id in self.solution.peers]

    def _why_lost(self, other: Solution) -> str:
        mine, theirs = self.solution.estimate, other.estimate
        parts = {
            "its stages compute": sum(s.decode_s for s in theirs.stages) - sum(s.decode_s for s in mine.stages),
            "its hops take": _hops_s(theirs) - _hops_s(mine),
        }
        changes = [f"{what} {show_seconds(abs(by))} {'more' if by > 0 else 'less'}" for what, by in parts.items() if abs(by) > 1e-9]
        show, objective = show_value, self.problem.objective
        values = f"{show(objective, other.value)} instead of {show(objective, self.solution.value)}"
        return "; ".join([values, *changes])

    def _alone_text(self) -> str:
        if not self.alone:
            return "alone: no device can take layers"
        first = self.alone[0]
        if first.missing_bytes:
            return f"alone: no device can hold the model; {first.name} comes closest and lacks {show_bytes(first.missing_bytes)}"
        speed = f"{show_rate(first.estimate.tpot_s)}, TTFT {show_seconds(first.estimate.ttft_s)}"
        return f"alone: {first.name} would do {speed}"

    def _runner_up_text(self) -> str:
        if self.runner_up is None:
            given = self.solution.method == "given"
            return (
                "runner-up: not searched, since the request names the stages"
                if given
                else "runner-up: no plan fits without these peers"
            )
        return f"runner-up: {stages_text(self.runner_up.stages, self.problem.profiles)}: {self._why_lost(self.runner_up)}"

    def _hop_text(self, hop: HopEstimate) -> str:
        hop_name = f"hop {self.names[hop.source]} -> {self.names[hop.target]}"
        if hop.source == hop.target:
            return f"{hop_name}: none, since one device computes all layers"
        assumed = "" if hop.link == "measured" else f" ({hop.link})"
        chunk = f", {show_seconds(hop.prefill_chunk_s)} for a prefill chunk" if hop.prefill_chunk_s else ""
        return f"{hop_name}: {show_seconds(hop.decode_s)} for {hop.bytes_per_token} bytes a token{chunk}{assumed}"

    def _memory_text(self, row: PeerMemory) -> str:
        return f"{self.names[row.peer]} {show_bytes(row.use.total_bytes)} of {show_bytes(row.capacity_bytes)}"

    def _purposes_text(self, row: PeerMemory) -> str:
        sizes = ((purpose, getattr(row.use, f"{purpose}_bytes")) for purpose in _PURPOSES)
        purposes = ", ".join(f"{purpose} {show_bytes(size)}" for purpose, size in sizes if size)
        return f"memory of {self._memory_text(row)}: {purposes}"


def _predicted(predicted: Estimate) -> dict[str, Any]:
    return {
        "ttft_s": predicted.ttft_s,
        "tpot_s": predicted.tpot_s,
        "tokens_s": 1 / predicted.tpot_s,
        "throughput_tokens_s": 1 / predicted.period_s,
        "energy_j_per_token": predicted.energy_j,
        "memory_share": predicted.memory_share,
    }


def _stage_row(stage: StageEstimate) -> dict[str, Any]:
    return {
        "peer": stage.peer,
        "name": stage.name,
        "layers": str(stage.layers),
        "decode_s": stage.decode_s,
        "project_s": sum(stage.project_s),
        "attend_s": sum(stage.attend_s),
        "mix_s": sum(stage.mix_s),
        "head_s": stage.head_s,
        "overhead_s": stage.overhead_s,
        "prefill_chunk_s": stage.prefill_chunk_s,
        "decode_factor": stage.decode_factor,
        "prefill_factor": stage.prefill_factor,
        "energy_j": stage.energy_j,
    }


def _alone_row(row: SingleDevice) -> dict[str, Any]:
    return {"peer": row.peer, "name": row.name, "missing_bytes": row.missing_bytes, "predicted": _predicted(row.estimate)}


def _stage_text(stage: StageEstimate) -> str:
    parts = {
        "project": sum(stage.project_s),
        "attend": sum(stage.attend_s),
        "mix": sum(stage.mix_s),
        "head": stage.head_s,
        "overhead": stage.overhead_s,
    }
    times = ", ".join(f"{name} {show_seconds(seconds)}" for name, seconds in parts.items() if seconds)
    chunk = f"a prefill chunk {show_seconds(stage.prefill_chunk_s)}"
    return f"stage {stage.name}:{stage.layers}: {show_seconds(stage.decode_s)} a token ({times}), {chunk}{_correction_text(stage)}"


def _correction_text(stage: StageEstimate) -> str:
    """Say by how much real steps have corrected what was measured when the layers were loaded. Empty: by less than 1 %."""
    factors = {"decode": stage.decode_factor, "prefill": stage.prefill_factor}
    shown = [f"{phase} {factor:.2f} times as measured at load" for phase, factor in factors.items() if abs(factor - 1) >= 0.01]
    return f"; corrected by recent steps: {', '.join(shown)}" if shown else ""


def _hops_s(predicted: Estimate) -> float:
    return sum(hop.decode_s for hop in predicted.hops) + predicted.back.decode_s
