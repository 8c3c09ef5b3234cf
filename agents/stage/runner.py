"""Runs the stages of this peer: executes the commands of their state machines and computes their steps, a batch at a time.

Events reach a machine only through `apply`. The compute thread has at most one batch at a time, and never waits: a batch that needs
attention of other peers is parked, and another one is computed meanwhile. A parked batch that can continue comes first; otherwise
`schedule` chooses.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.links.backlog import Backlog
from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.story import Story
from meshd.agents.stage.batch.compute import BatchComputation, BatchStep, Cut, Outcome, StepOutput
from meshd.agents.stage.batch.measure import BatchJob, StepMeter
from meshd.agents.stage.batch.pacing import PromptPacing
from meshd.agents.stage.batch.parked import ParkedBatches, Parts
from meshd.agents.stage.batch.schedule import Pick, Ready, StageKey, schedule
from meshd.agents.stage.flow import events as fsm
from meshd.agents.stage.flow.session import StageState
from meshd.agents.stage.kv import KvManager
from meshd.agents.stage.mirror.outgoing import OutgoingMirrors
from meshd.agents.stage.sender import StageSender
from meshd.agents.stage.steps import ActiveStage
from meshd.clock import Clock
from meshd.errors import MeshdError, ProtocolViolation, UsageError
from meshd.protocol.messages import Failed, RunningStep, StepKind, Tokens
from meshd.types import PeerId, SessionId

log = getLogger(__name__)


@dataclass(slots=True)
class StageRunner:
    """Executes the commands of the stages that run on this peer, and submits their steps to the compute thread."""

    me: PeerId
    links: Links
    compute: ComputeQueue
    clock: Clock
    story: Story
    meter: StepMeter
    pacing: PromptPacing
    kv_manager: KvManager
    mirrors: OutgoingMirrors
    on_change: Callable[[], None]
    active: dict[tuple[SessionId, int], ActiveStage]
    """Running stages, by session and index in the plan."""
    sender: StageSender = field(init=False)
    parked: ParkedBatches = field(init=False)
    """The batches that wait at a cut."""
    job: BatchJob | None = None
    """The batch that the compute thread has. None: it has none."""
    _choosing: bool = False
    """Whether the next batch is about to be chosen."""

    def __post_init__(self) -> None:
        self.sender = StageSender(self.me, self.links, Backlog(self.links, on_room=self._choose_soon), self.fail)
        self.parked = ParkedBatches(self.clock, self.fail, self._choose_soon, self._abandoned, self.meter.waited)

    def apply(self, active: ActiveStage, event: fsm.Event) -> None:
        """Pass an event to a stage's machine, execute its commands, and start the next batch if the compute thread is free."""
        self._apply(active, event)
        self._choose_soon()

    def take_tokens(self, active: ActiveStage, message: Tokens) -> None:
        """Make the first stage's next step of sampled tokens, and of guesses of those after them."""
        drafter = active.drafter
        is_new = active.open.prompt_tokens + message.index >= active.machine.known_to
        drafts = drafter.after(message.tokens) if drafter is not None and is_new else ()
        self.apply(active, fsm.TokensArrived(message.index, message.tokens, drafts))
        if drafter is not None and active.machine.state is not StageState.ENDED and (ahead := drafter.ahead()):
            self.apply(active, fsm.TokensGuessed(ahead))

    def _apply(self, active: ActiveStage, event: fsm.Event) -> None:
        was_ready = active.machine.state is StageState.READY
        for command in active.machine.handle(event):
            self._execute(active, command)
        if active.machine.state is StageState.READY and not was_ready:
            active.ready_since = self.clock.monotonic()

    def _execute(self, active: ActiveStage, command: fsm.Command) -> None:
        match command:
            case fsm.Deliver(sent):
                self.sender.deliver(active, sent)
            case fsm.DeliverTokens(sampled):
                self.sender.deliver_tokens(active, sampled)
            case fsm.Acknowledge():
                self.sender.acknowledge(active, command)
            case fsm.Truncate(start):
                active.cache.lease.kv.truncate(active.cache.layers, start, active.cache.filled)
                if active.cache.log is not None:
                    self.kv_manager.outputs.cut(active.cache.log, start)
            case fsm.BeginAt(start):
                self._begin(active, start)
            case fsm.RejectStep(step, reason):
                error = ProtocolViolation(f"stage {active.open.stage} can't take the step: {reason}")
                self.fail(active, error, active.source_of(step))
            case fsm.RefuseResume(reason):
                error = ProtocolViolation(f"stage {active.open.stage} can't follow RESUME: {reason}")
                self.fail(active, error, active.open.coordinator)
            case fsm.FreeKv(reason):
                self._free(active, reason)

    def fail(self, active: ActiveStage, error: MeshdError, blame: PeerId | None) -> None:
        """Report a failure to the coordinator and end the stage. Its KV and outputs are kept for the next epoch.

        blame: the peer at fault. None: the request itself is wrong.
        """
        if active.machine.state is StageState.ENDED:
            return
        log.warning("session %s stage %d failed: %s", active.open.session, active.open.stage, error)
        self.story.note(
            active.open.session, "failed", epoch=active.open.epoch, stage=active.open.stage, reason=str(error), blame=blame
        )
        failed = Failed(
            session=active.open.session,
            epoch=active.open.epoch,
            step=active.machine.due,
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

    def progress(self, session: SessionId) -> RunningStep | None:
        """Describe the session's step that is computed or waits at a cut; else what the compute thread does. None: nothing."""
        jobs = [*([self.job] if self.job is not None else []), *self.parked.jobs]
        job = next((job for job in jobs if any(part.active.open.session == session for part in job.batch)), self.job)
        return job.progress(self.clock.monotonic(), session) if job is not None else None

    def unpin(self, active: ActiveStage) -> None:
        """Make the stage's kept outputs evictable again, unless some of them are or may still be to be sent."""
        if active.cache.log is not None and not active.machine.replaying and active.machine.state is not StageState.OPEN:
            active.cache.log.pinned = False

    def _begin(self, active: ActiveStage, start: int) -> None:
        """Start the epoch at position `start`: drop KV and outputs from there on, and caches that the epoch does not use."""
        cache, epoch = active.cache, active.open.epoch
        cache.restart(start)
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
        if active.cache.log is not None and active.machine.computed > active.cache.filled:
            self.kv_manager.outputs.cut(active.cache.log, active.cache.filled)  # the rest may come from wrong guesses
        self.apply(active, fsm.StageEnded(reason))
        self.unpin(active)
        self.parked.end(active)

    def _free(self, active: ActiveStage, reason: str) -> None:
        active.cache.lease.release()
        active.resident.stages.leave(active.cache.layers)
        log.debug("session %s stage %d ended: %s", active.open.session, active.open.stage, reason)
        self.on_change()

    def _choose_soon(self) -> None:
        """Choose the next batch after the messages that have arrived by now, whose steps belong to it, too.

        The tokens of a batch's sessions are as many messages: a batch chosen at the first one would have a single step.
        """
        if self.job is None and not self._choosing:
            self._choosing = True
            asyncio.get_running_loop().call_soon(self._choose)

    def _choose(self) -> None:
        """Give the compute thread its next batch, if it has none: one that has waited at a cut, or a new one."""
        self._choosing = False
        if self.job is not None:
            return
        resumed = self.parked.take_ready()
        if resumed is not None:
            self._submit(*resumed)
            return
        picks = self._schedule()
        batch = tuple([self._begun(pick.key, pick.tokens) for pick in picks])
        if batch:
            self.pacing.chosen(batch[0].active.stage, by_budget=any(pick.by_budget for pick in picks))
            self._submit(BatchJob(batch, BatchComputation(batch), submitted_at=self.clock.monotonic()), [])

    def _submit(self, job: BatchJob, parts: Parts) -> None:
        self.job = job
        work, failed = partial(self._compute, job, parts), partial(self._compute_failed, job)
        self.compute.submit(work, partial(self._paused_or_computed, job), failed)

    def _schedule(self) -> tuple[Pick, ...]:
        ready = [
            Ready(key, active.layers_key, active.largest(step), step.prefill, not active.open.stage, active.ready_since)
            for key, active in self.active.items()
            if (step := active.machine.ready) is not None
            and not self.sender.must_wait(active, step)
            and not (active.shards is not None and self.parked.full)
        ]
        return schedule(ready, self._budget)

    def _budget(self, key: StageKey, decodes: int) -> int:
        """How many tokens of a prompt a pass takes. Sessions whose decode step is not ready would wait behind it as well."""
        active = self.active[key]
        step = active.machine.ready
        assert step is not None
        others = [other for other in self.active.values() if other.layers_key == active.layers_key]
        decoding = [other.machine.computed for other in others if other.decodes]
        prompts = sum(ready.prefill for other in others if (ready := other.machine.ready) is not None)
        return self.pacing.budget(active, step.start, decodes, decoding, prompts)

    def _begun(self, key: StageKey, tokens: int) -> BatchStep:
        active = self.active[key]
        since = active.ready_since
        self._apply(active, fsm.StepBegun(tokens))
        assert active.machine.computing is not None
        return BatchStep(active, active.machine.computing, since)

    def _compute(self, job: BatchJob, parts: Parts) -> Cut | list[Outcome]:
        """Compute a batch up to its next cut, or to its end. Runs on the compute thread."""
        job.resumed_at = self.clock.monotonic()
        if job.started_at is None:
            job.started_at = job.resumed_at
        found = job.computation.run(parts)
        job.ended_at, job.resumed_at = self.clock.monotonic(), None
        return found

    def _paused_or_computed(self, job: BatchJob, found: Cut | list[Outcome]) -> None:
        self.job = None
        if isinstance(found, list):
            self._computed(job, found)
        else:
            self.parked.park(job, found)  # first: what the other peers compute takes longest
            self._choose_soon()

    def _computed(self, job: BatchJob, outcomes: list[Outcome]) -> None:
        """Send the outputs of a batch, then start the next one."""
        job.sent_at = self.clock.monotonic()
        self.sender.collect()
        try:
            for (active, step, _), outcome in zip(job.batch, outcomes, strict=True):
                self._deliver(active, step, outcome)
        finally:
            self.sender.flush()
        whole_s = self.clock.monotonic() - job.submitted_at
        self._choose_soon()
        asyncio.get_running_loop().call_soon(self._account, job, outcomes, whole_s)  # after it, because the next batch waits

    def _account(self, job: BatchJob, outcomes: list[Outcome], whole_s: float) -> None:
        """Copy new KV to mirrors, and learn from the times of a batch. `whole_s`: from its choice until its outputs were sent."""
        for part, outcome in zip(job.batch, outcomes, strict=True):
            if isinstance(outcome, StepOutput) and part.active.machine.state is not StageState.ENDED:
                self.mirrors.on_kv_grown(part.active)
        self.meter.measured(job, outcomes, whole_s)

    def _deliver(self, active: ActiveStage, step: fsm.StageStep, outcome: Outcome) -> None:
        if isinstance(outcome, MeshdError):
            self._failed(active, step, outcome)
            return
        if active.machine.state is not StageState.ENDED and step.kind is not StepKind.REFILL:
            active.cache.extend(step.committed, step.committed)
            if active.cache.log is not None and outcome.payload is not None:
                # Before the next step begins: it may take these rows back.
                self.kv_manager.outputs.append(active.cache.log, step.start, step.tokens, outcome.payload)
        self._apply(active, fsm.StepComputed(outcome, outcome.tokens, outcome.finish is not None))

    def _abandoned(self, job: BatchJob, errors: list[MeshdError]) -> None:
        """Free what the steps of a parked batch held: all their stages have ended."""
        for (active, step, _), error in zip(job.batch, errors, strict=True):
            self._failed(active, step, error)
        self._choose_soon()

    def _compute_failed(self, job: BatchJob, error: Exception) -> None:
        """End the stages of a batch whose computation raised an error that is not of one step."""
        self.job = None
        log.exception("computing a batch of %d steps failed", len(job.batch), exc_info=error)
        for active, step, _ in job.batch:
            self._failed(active, step, MeshdError(f"computing step {step.start} failed: {error}"))
        self._choose_soon()

    def _failed(self, active: ActiveStage, step: fsm.StageStep, error: MeshdError) -> None:
        blame = active.source_of(step) if isinstance(error, ProtocolViolation) else self.me
        self.fail(active, error, None if isinstance(error, UsageError) else blame)
        self._apply(active, fsm.StepComputed(None))
