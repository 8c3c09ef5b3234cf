"""Runs the stages of this peer: executes the commands of their state machines and computes their steps, one at a time.

Events reach a machine only through `apply`. The compute thread has at most one step at a time; the scheduler chooses the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.links.backlog import Backlog
from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.spans import Span, SpanKind, Spans
from meshd.agents.observe.story import Story
from meshd.agents.observe.work import WorkMeter
from meshd.agents.stage import session as fsm
from meshd.agents.stage.kv import KvManager
from meshd.agents.stage.learning import StepLearning
from meshd.agents.stage.mirror.outgoing import OutgoingMirrors
from meshd.agents.stage.scheduler import Scheduler
from meshd.agents.stage.sender import StageSender
from meshd.agents.stage.steps import ActiveStage, StepOutput, arrival_of, compute_step, note_arrival
from meshd.clock import Clock
from meshd.errors import MeshdError, ProtocolViolation, UsageError
from meshd.kernels.wire import wire_bytes
from meshd.protocol.messages import Failed, RunningStep
from meshd.telemetry import Phase, Telemetry
from meshd.types import PeerId, SessionId

log = getLogger(__name__)


@dataclass(slots=True, eq=False)
class StepJob:
    """A step that was given to the compute thread."""

    active: ActiveStage
    step: fsm.Step
    submitted_at: float
    started_at: float | None = None
    """When the compute thread began it. None: the thread does other work, such as measuring layers that were just loaded."""
    ended_at: float = 0.0
    """When the compute thread had computed it."""
    sent_at: float = 0.0
    """When this peer began to send its output."""

    def progress(self, now: float) -> RunningStep:
        """Describe what the compute thread does: this step, or the other work that the step waits for."""
        if self.started_at is None:
            return RunningStep(session=None, epoch=0, stage=0, step=0, tokens=0, running_s=now - self.submitted_at)
        plan, machine = self.active.open.plan, self.active.machine
        share = self.step.tokens / machine.known_tokens
        return RunningStep(
            session=self.active.open.session,
            epoch=self.active.open.epoch,
            stage=self.active.open.stage,
            step=self.step.position,
            tokens=self.step.tokens,
            running_s=now - self.started_at,
            predicted_s=plan.predicted_ttft_s * share if self.step.prefill else plan.predicted_tpot_s,
        )


@dataclass(slots=True)
class StageRunner:
    """Executes the commands of the stages that run on this peer, and submits their steps to the compute thread."""

    me: PeerId
    links: Links
    learning: StepLearning
    compute: ComputeQueue
    clock: Clock
    telemetry: Telemetry
    story: Story
    spans: Spans
    work: WorkMeter
    kv_manager: KvManager
    mirrors: OutgoingMirrors
    on_change: Callable[[], None]
    active: dict[tuple[SessionId, int], ActiveStage]
    """Running stages, by session and index in the plan."""
    ready: Scheduler
    sender: StageSender = field(init=False)
    job: StepJob | None = None
    """The step that the compute thread has. None: it has none."""

    def __post_init__(self) -> None:
        self.sender = StageSender(self.me, self.links, Backlog(self.links, on_room=self._pump), self.fail)

    def apply(self, active: ActiveStage, event: fsm.Event) -> None:
        """Pass an event to a stage's machine, execute its commands, and start the next step if the compute thread is free."""
        if isinstance(event, fsm.StepArrived):
            note_arrival(event.step, self.clock.monotonic())
        for command in active.machine.handle(event):
            match command:
                case fsm.Compute(step):
                    self.ready.put(active, step)
                case fsm.Deliver(step, output, skip):
                    assert isinstance(output, StepOutput)
                    self.sender.deliver(active, step, output, skip)
                case fsm.BeginAt(start):
                    self._begin(active, start)
                case fsm.Replay(position, tokens):
                    self.sender.replay(active, position, tokens)
                case fsm.RejectStep(step, reason):
                    error = ProtocolViolation(f"stage {active.open.stage} can't take the step: {reason}")
                    self.fail(active, step.position, error, active.source_of(step))
                case fsm.RefuseResume(reason):
                    error = ProtocolViolation(f"stage {active.open.stage} can't follow RESUME: {reason}")
                    self.fail(active, active.machine.next_position, error, active.open.coordinator)
                case fsm.FreeKv(reason):
                    self._free(active, reason)
        self._pump()

    def fail(self, active: ActiveStage, position: int, error: MeshdError, blame: PeerId | None) -> None:
        """Report a failure to the coordinator and end the stage. Its KV and outputs are kept for the next epoch.

        blame: the peer at fault. None: the request itself is wrong.
        """
        if active.machine.state is fsm.StageState.ENDED:
            return
        log.warning("session %s stage %d failed: %s", active.open.session, active.open.stage, error)
        self.story.note(
            active.open.session, "failed", epoch=active.open.epoch, stage=active.open.stage, reason=str(error), blame=blame
        )
        failed = Failed(
            session=active.open.session,
            epoch=active.open.epoch,
            step=position,
            stage=active.open.stage,
            code=error.code,
            message=str(error),
            blame=blame,
        )
        try_send(self.links.send, active.open.coordinator, failed)
        self._end(active, error.message)

    def end_before(self, session: SessionId, epoch: int, reason: str) -> None:
        """End the session's stages of epochs before `epoch`."""
        for active in [active for active in self.active.values() if active.open.session == session]:
            if active.open.epoch < epoch:
                self._end(active, reason)

    def unpin(self, active: ActiveStage) -> None:
        """Make the stage's kept outputs evictable again, unless some of them are still to be sent."""
        if active.cache.log is not None and not active.machine.replaying:
            active.cache.log.pinned = False

    def _begin(self, active: ActiveStage, start: int) -> None:
        """Start the epoch at position `start`: drop KV and outputs from there on, and caches that the epoch does not use."""
        cache, epoch = active.cache, active.open.epoch
        cache.filled = cache.epoch_start = start
        cache.mirrored = False
        if cache.log is not None:
            self.kv_manager.outputs.cut(cache.log, start)
        session_kv = self.kv_manager.get(active.open.session)
        assert session_kv is not None
        self.kv_manager.drop_before(session_kv, epoch)
        send_from = active.machine.send_from
        self.story.note(active.open.session, "resumed", epoch=epoch, stage=active.open.stage, start=start, send_from=send_from)
        self.on_change()

    def _end(self, active: ActiveStage, reason: str) -> None:
        """End a stage. Its KV and outputs stay, and the stage remains a user of its blocks until its running step ends."""
        if self.active.get(active.key) is active:
            del self.active[active.key]
        self.mirrors.stop(active)
        self.apply(active, fsm.StageEnded(reason))
        self.unpin(active)

    def _free(self, active: ActiveStage, reason: str) -> None:
        active.cache.lease.release()
        log.debug("session %s stage %d ended: %s", active.open.session, active.open.stage, reason)
        self.on_change()

    def _pump(self) -> None:
        while self.job is None and (ready := self.ready.take(self.sender.must_wait)) is not None:
            active, step = ready
            if active.machine.computing is not step:
                continue
            if active.machine.state is fsm.StageState.ENDED:
                self.apply(active, fsm.StepComputed(step.position, None))
                continue
            self.job = StepJob(active, step, submitted_at=self.clock.monotonic())
            if step.prefill and active.open.stage > 0:
                self.sender.send_taken(active, step)
            self.compute.submit(
                partial(self._compute, active, step, self.job),
                partial(self._computed, active, step),
                partial(self._compute_failed, active, step),
            )

    def _compute(self, active: ActiveStage, step: fsm.Step, job: StepJob) -> StepOutput:
        """Compute a step. Runs on the compute thread."""
        job.started_at = self.clock.monotonic()
        output = compute_step(active, step)
        job.ended_at = self.clock.monotonic()
        return output

    def _computed(self, active: ActiveStage, step: fsm.Step, output: StepOutput) -> None:
        job, self.job = self.job, None
        if job is not None:
            job.sent_at = self.clock.monotonic()
        cache = active.cache
        if active.machine.state is not fsm.StageState.ENDED:
            cache.filled = step.end
        # The output is sent before the bookkeeping below, because the next stage waits for it.
        self.apply(active, fsm.StepComputed(step.position, output))
        predicted_s = 0.0
        if job is not None:
            whole_s = self.clock.monotonic() - job.submitted_at
            predicted_s = self.learning.observe(active.resident, active.stage.layers, step, output.stage_s, whole_s)
        if active.machine.state is not fsm.StageState.ENDED:
            if cache.log is not None and output.hidden is not None:
                self.kv_manager.outputs.append(cache.log, step.position, output.hidden)
            self.mirrors.on_kv_grown(active)
        if job is not None:
            self._measure(job, output, predicted_s)

    def _measure(self, job: StepJob, output: StepOutput, predicted_s: float) -> None:
        """Count a computed step for metrics, traces and readers of events."""
        active, step = job.active, job.step
        phase: Phase = "prefill" if step.prefill else "decode"
        model, layers = active.resident.card.name, str(active.stage.layers)
        self.telemetry.stage_step(model, layers, phase, output.stage_s)
        self.telemetry.prediction("prefill_step" if step.prefill else "decode_step", predicted_s, output.stage_s)
        sent_bytes = 0 if output.hidden is None else wire_bytes(output.hidden, active.open.plan.wire_dtype)
        opened = active.open
        self.work.add(
            opened.session,
            opened.stage,
            phase,
            model=model,
            layers=layers,
            tokens=step.tokens,
            busy_s=output.stage_s,
            sent_bytes=sent_bytes,
        )
        if job.started_at is not None:
            arrived = arrival_of(step)
            self.telemetry.step_wait(phase, job.started_at - arrived)
            kind = SpanKind.PREFILL if step.prefill else SpanKind.DECODE
            times = arrived, job.started_at, job.ended_at, job.sent_at
            self.spans.add(opened.session, Span(kind, opened.epoch, opened.stage, step.position, step.tokens, *times))

    def _compute_failed(self, active: ActiveStage, step: fsm.Step, error: Exception) -> None:
        self.job = None
        blame = (
            None if isinstance(error, UsageError) else active.source_of(step) if isinstance(error, ProtocolViolation) else self.me
        )
        if not isinstance(error, MeshdError):
            log.exception("session %s stage %d: computing failed", active.open.session, active.open.stage, exc_info=error)
            error = MeshdError(f"computing step {step.position} failed: {error}")
        self.fail(active, step.position, error, blame)
        self.apply(active, fsm.StepComputed(step.position, None))
