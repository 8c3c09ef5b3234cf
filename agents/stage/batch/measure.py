"""Measures the batches of this peer: for metrics, traces, readers of events and predictions."""

from dataclasses import dataclass

from meshd.agents.observe.spans import Span, SpanKind, Spans
from meshd.agents.observe.work import WorkMeter
from meshd.agents.stage.batch.compute import BatchComputation, BatchStep, Outcome, StepOutput
from meshd.agents.stage.batch.learning import StepLearning
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.steps import ActiveStage, StepInput
from meshd.protocol.messages import RunningStep
from meshd.telemetry import Phase, Predicted, Telemetry
from meshd.types import SessionId


@dataclass(slots=True, eq=False)
class BatchJob:
    """A batch that was given to the compute thread."""

    batch: tuple[BatchStep, ...]
    computation: BatchComputation
    submitted_at: float
    started_at: float | None = None
    """When the compute thread began it. None: the thread does other work, such as measuring layers that were just loaded."""
    resumed_at: float | None = None
    """When the compute thread began what it computes now. None: the batch waits at a cut, or for the compute thread."""
    cuts: int = 0
    """Number of cuts that the batch has come to."""
    ended_at: float = 0.0
    """When the compute thread had computed it."""
    sent_at: float = 0.0
    """When this peer began to send its outputs."""

    def progress(self, now: float, session: SessionId) -> RunningStep:
        """Describe what the compute thread does: the session's step if it is in the batch, else the first one, or other work.

        Waiting at a cut is no computation: `running_s` does not grow meanwhile. The cut has a deadline of its own.
        """
        if self.started_at is None:
            return RunningStep(session=None, epoch=0, stage=0, step=0, tokens=0, running_s=now - self.submitted_at)
        active, step, _ = next((part for part in self.batch if part.active.open.session == session), self.batch[0])
        resumed_at = self.resumed_at  # read once: the compute thread sets it
        running_s = self.computation.compute_s + (now - resumed_at if resumed_at is not None else 0.0)
        return RunningStep(
            session=active.open.session,
            epoch=active.open.epoch,
            stage=active.open.stage,
            step=step.start,
            tokens=step.tokens,
            running_s=running_s,
            predicted_s=sum(_planned_s(part.active, part.step) for part in self.batch),
        )


def _planned_s(active: ActiveStage, step: StageStep) -> float:
    """How long the plan expects a step to take, at the most: in a batch it takes less."""
    plan = active.open.plan
    if step.prefill:
        return plan.predicted_ttft_s * step.tokens / active.machine.known_tokens
    return plan.predicted_tpot_s * step.tokens


@dataclass(slots=True)
class StepMeter:
    """Counts computed steps, and learns from each pass."""

    learning: StepLearning
    telemetry: Telemetry
    spans: Spans
    work: WorkMeter

    def waited(self, seconds: float) -> None:
        """Count how long a batch has waited at one cut for the peers that hold a part of its KV."""
        self.telemetry.cut_wait(seconds)

    def measured(self, job: BatchJob, outcomes: list[Outcome], whole_s: float) -> None:
        """Count a computed batch. `whole_s`: from its submission until its outputs were sent."""
        outputs = [outcome for outcome in outcomes if isinstance(outcome, StepOutput)]
        if len(outputs) == len(job.batch) and not job.cuts:  # predictions are of attention that is computed here
            self._learn(job.batch, sum(output.step_s for output in outputs), whole_s)
        for part, outcome in zip(job.batch, outcomes, strict=True):
            if isinstance(outcome, StepOutput):
                self._count(job, part, outcome)

    def _learn(self, batch: tuple[BatchStep, ...], compute_s: float, whole_s: float) -> None:
        active, first, _ = batch[0]
        steps = [step for _, step, _ in batch]
        predicted_s = self.learning.observe(active.resident, active.stage.layers, steps, compute_s, whole_s)
        what: Predicted = "batch" if len(batch) > 1 else "prefill_step" if first.prefill else "decode_step"
        self.telemetry.prediction(what, predicted_s, compute_s)

    def _count(self, job: BatchJob, part: BatchStep, output: StepOutput) -> None:
        active, step, since = part
        phase: Phase = "prefill" if step.prefill else "decode"
        opened, layers = active.open, str(active.stage.layers)
        model = active.resident.card.name
        self.telemetry.stage_step(model, layers, phase, output.step_s)
        sent_bytes = 0 if output.payload is None else output.payload.nbytes
        self.work.add(
            opened.session,
            opened.stage,
            phase,
            model=model,
            layers=layers,
            tokens=step.tokens,
            busy_s=output.step_s,
            sent_bytes=sent_bytes,
        )
        if job.started_at is not None:
            self.telemetry.step_wait(phase, job.started_at - since)
            kind = SpanKind.PREFILL if step.prefill else SpanKind.DECODE
            arrived = step.data.arrived_at if isinstance(step.data, StepInput) else since
            times = arrived, job.started_at, job.ended_at, job.sent_at
            self.spans.add(opened.session, Span(kind, opened.epoch, opened.stage, step.start, step.tokens, *times))
