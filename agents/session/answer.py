"""One answer on its coordinator: runs the session's state machine, carries out its commands, and serves the client's readers.

Three parts keep their own state: messages to the stages (`stages/client.py`), tokens and text (`output.py`), and faults
(`recovery_history.py`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from meshd.agents.links.links import Links
from meshd.agents.observe.events import AnswerContinued, PlanChosen, SessionChanged
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.service import NO_SECRET, AnswerSecret, Finished, TextDelta
from meshd.agents.session import events as fsm
from meshd.agents.session.journal.record import SessionRecord, followed_by
from meshd.agents.session.output import AnswerOutput
from meshd.agents.session.plan.resume import changed_numerics, method_of
from meshd.agents.session.recovery_history import NEAR_TIE, Recovered, RecoveryHistory
from meshd.agents.session.session import RUNNING, TERMINAL, Session, SessionState
from meshd.agents.session.stages.client import StageClient, at_fault, is_refusal
from meshd.agents.session.tasks import AnswerTasks
from meshd.agents.text.model_texts import ModelText
from meshd.clock import Clock
from meshd.errors import Cancelled, MeshdError, Unavailable
from meshd.numerics import show_numerics
from meshd.protocol.messages import Tokens
from meshd.types import FinishReason, ModelCard, PeerId, Plan, SessionId, TokenLogprobs

_PROMPT_END_TOKENS = 16
"""How many tokens `prompt_end` shows. `<think>` and the white space after it have up to eight."""


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """The parts of the peer that its answers use, and the callbacks with which they report to the coordinator."""

    me: PeerId
    links: Links
    clock: Clock
    story: Story
    events: EventStream
    names: Callable[[PeerId], str]
    on_replan: Callable[["Answer", fsm.Replan], None]
    """Called when the answer needs another plan. The callee must then call the answer's `planned` or `plan_failed`."""
    on_opened: Callable[["Answer"], None]
    """Called when all stages of a plan are open."""
    on_token: Callable[["Answer", int, int, TokenLogprobs | None], None]
    on_recovered: Callable[["Answer", Recovered], None]
    """Called at the first token after a change of plan."""
    on_superseded: Callable[["Answer", PeerId], None]
    """Called when the answer, which has no readers here, turned out to have another coordinator. The callee must hand it over."""
    on_end: Callable[["Answer"], None]
    """Called when the answer has ended or is suspended."""


@dataclass(slots=True)
class Answer:
    """One answer that this peer coordinates. Implements `service.Generation`."""

    record: SessionRecord
    card: ModelCard
    text: ModelText
    context: AnswerContext
    secret: AnswerSecret = NO_SECRET
    """See `service.Generation.secret`."""
    machine: Session = field(init=False)
    stages: StageClient = field(init=False)
    output: AnswerOutput = field(init=False)
    recovery: RecoveryHistory = field(default_factory=RecoveryHistory)
    progress_at: float = field(init=False)
    """Monotonic time of the last progress: a plan began to open, the prompt was sent, or a token arrived."""
    ended_at: float = field(init=False)
    unread_since: float = field(init=False)
    readers: int = 0
    ignored: tuple[str, ...] = ()
    """See `service.Generation.ignored`. Empty after a takeover: the answer's headers were sent by its first coordinator."""
    opened: "asyncio.Future[None]" = field(init=False)
    """Done when all stages of the first plan are open. If the answer ends before that, the future gets the reason as an error."""
    tasks: AnswerTasks = field(default_factory=AnswerTasks)

    def __post_init__(self) -> None:
        now = self.context.clock.monotonic()
        self.progress_at = self.unread_since = self.ended_at = now
        self.machine = Session(self.record.session, len(self.record.prompt))
        links, predecessors = self.context.links, self.record.coordinators
        self.stages = StageClient(self.record, self.context.me, links, renewed_at=now, predecessors=predecessors)
        self.output = AnswerOutput(self.record, self.card, self.text, started=now)
        self.opened = asyncio.get_running_loop().create_future()

    async def restore(self) -> None:
        """Continue from the record of an answer that has run before. Must be called before anything else."""
        finish = await self.output.restore()
        tokens = [token for token, _ in self.record.tokens]
        self.machine = Session.restored(
            self.session, self.prompt_tokens, epoch=self.record.epoch, plan=self.record.plan, tokens=tokens, finish=finish
        )
        if finish not in (None, FinishReason.CANCELLED):
            self.output.finish(finish)

    @property
    def session(self) -> SessionId:
        return self.record.session

    @property
    def renderer(self) -> bytes:
        return self.record.renderer

    @property
    def prompt_tokens(self) -> int:
        return len(self.record.prompt)

    @property
    def prompt_end(self) -> str:
        """See `service.Generation.prompt_end`."""
        return self.text.table.decode(self.record.prompt[-_PROMPT_END_TOKENS:])

    @property
    def plan(self) -> Plan | None:
        return self.machine.plan

    @property
    def predicted_ttft_s(self) -> float:
        return self.plan.predicted_ttft_s if self.plan else 0.0

    @property
    def predicted_tpot_s(self) -> float:
        return self.plan.predicted_tpot_s if self.plan else 0.0

    @property
    def plan_header(self) -> str:
        return header_of(self.plan, self.context.names) if self.plan else ""

    @property
    def numerics_header(self) -> str:
        return show_numerics(self.plan.numerics) if self.plan else ""

    @property
    def running(self) -> bool:
        return self.machine.running

    @property
    def ended(self) -> bool:
        return self.machine.state in TERMINAL

    @property
    def status(self) -> str:
        """See `service.Generation.status`."""
        return self.machine.status

    @property
    def error(self) -> MeshdError | None:
        stopped = self.machine.state in (SessionState.SUSPENDED, SessionState.FAILED) or self.machine.released
        return self.machine.error if stopped else None

    @property
    def recoveries(self) -> list[Recovered]:
        return self.recovery.recoveries

    @property
    def mirrors(self) -> dict[int, tuple[PeerId, int]]:
        """Stage of the present plan -> the peer with a copy of its KV, and the number of positions in the copy."""
        return self.recovery.mirrors

    @property
    def ttft_s(self) -> float:
        return self.output.ttft_s

    @property
    def measured_tpot_s(self) -> float:
        """Mean seconds per token since the answer was requested or resumed here; 0 before the second token."""
        return self.output.tpot_s

    def snapshot(self) -> SessionRecord:
        """Returns: the session's record with all tokens so far."""
        finished, finish = self.output.finished, self.machine.finish
        return msgspec.structs.replace(
            self.record,
            coordinator=self.context.me,
            coordinators=self.stages.predecessors,
            epoch=self.machine.epoch,
            plan=self.machine.kv_plan,
            tokens=tuple(self.output.tokens),
            finish=finished.reason.value if finished else finish.value if finish else "",
            suspended=self.machine.state is SessionState.SUSPENDED,
        )

    def limit(self, max_tokens: int) -> None:
        """End the answer after at most this many tokens, because the first plan has KV for no more."""
        self.record = msgspec.structs.replace(self.record, max_tokens=max_tokens)
        self.stages.record = self.output.record = self.record

    def planned(self, plan: Plan, reason: str = "") -> None:
        """Continue under this plan: open its stages. `reason`: why a running answer changes its plan."""
        if reason:
            self.recovery.begins("move", reason)
        self._apply(fsm.Planned(plan))

    def plan_failed(self, error: MeshdError) -> None:
        """Suspend the answer, or fail it if it never ran, because no plan is possible now."""
        self._apply(fsm.PlanFailed(error))

    def hold(self, index: int | None) -> None:
        """Keep the stages from making answer token `index` and later ones until the plan has changed. None: lift the hold."""
        if self.plan is not None and self.machine.state is SessionState.DECODING:
            credit = self.machine.credit if index is None else min(index, self.machine.credit)
            self.stages.grant(self.machine.epoch, self.plan, len(self.machine.tokens), credit)

    def resume(self) -> None:
        """Continue a suspended answer."""
        if self.machine.state is SessionState.SUSPENDED:
            now = self.context.clock.monotonic()
            self.progress_at = self.stages.renewed_at = self.unread_since = now
            self.output.restart(now)
            self.recovery.begins("resume", "it was suspended")
            self._apply(fsm.ResumeRequested())

    def release(self, why: str = "another peer has taken this answer over") -> None:
        """Stop coordinating the answer and leave its stages open for the peer that coordinates them from now on."""
        if not self.ended:
            self._apply(fsm.Released(Cancelled(why)))

    def reclaim(self, coordinator: PeerId, used: int) -> None:
        """Take the answer back from another coordinator. Its tokens are not taken: this peer's stages give the same ones.

        `used`: the highest epoch that the other coordinator can have used.
        """
        self.stages.predecessors = followed_by(self.stages.predecessors, coordinator)
        self._apply(fsm.Reclaimed(used))

    def overdue(self, reason: str, blame: PeerId | None) -> None:
        """Recover the answer, because it made no progress for too long. `blame`: the peer at fault, if it is known."""
        if self.machine.state in RUNNING:
            self._distrust(blame)
            self._apply(fsm.DeadlinePassed(reason, blame))

    async def cancel(self) -> None:
        """See `service.Generation.cancel`."""
        self.end()

    def end(self) -> None:
        """Cancel the answer and free its memory on every peer. No effect after the end."""
        if not self.ended:
            self._apply(fsm.CancelRequested())

    def suspend(self) -> None:
        """Free the answer's memory on every peer, but keep its tokens, so that the answer can be resumed."""
        if self.running:
            self._apply(fsm.Suspend())

    def renew(self, now: float) -> None:
        """Renew the leases at all peers that may hold memory of this session, if they are due."""
        self.stages.renew(self.machine.holders, self.machine.epoch, now)

    def tokens_arrived(self, message: Tokens) -> None:
        """Take the tokens of one step from the last stage."""
        newest = len(message.tokens) - 1
        for place, token in enumerate(message.tokens):
            logprobs = message.logprobs[place] if message.logprobs else None
            finish = FinishReason(message.finish) if message.finish and place == newest else None
            self._apply(fsm.TokenArrived(message.epoch, message.index + place, token, logprobs, finish))

    def stage_failed(self, epoch: int, stage: int, error: MeshdError, blame: PeerId | None) -> None:
        """Recover the answer, because a stage cannot continue. `blame`: the peer at fault, if it is known."""
        if epoch == self.machine.epoch:
            self._distrust(blame)
        self._apply(fsm.StageFailed(epoch, stage, error, blame))

    def _distrust(self, peer: PeerId | None) -> None:
        self.recovery.distrust(peer, self.context.clock.monotonic())

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """Forget a lost peer's copies, and recover if the plan uses the peer."""
        self.recovery.forget_copies(peer)
        self._apply(fsm.PeerGone(peer, f"{self.context.names(peer)}: {reason}"))

    def mirrored(self, stage: int, peer: PeerId, positions: int | None) -> None:
        """Record that `peer` has a copy of the first `positions` positions of a stage's KV. None: the copy is gone."""
        if positions is None:
            self.mirrors.pop(stage, None)
        elif self.machine.state in RUNNING:
            self.mirrors[stage] = peer, positions
            self.machine.holders.add(peer)

    def _apply(self, event: fsm.Event) -> None:
        was = self.machine.state
        commands = self.machine.handle(event)
        if self.machine.state is not was:
            self._publish_state(was.value)
        for command in commands:
            self._do(command)

    def _publish_state(self, was: str) -> None:
        state, error = self.machine.state, self.machine.error
        self.context.events.publish(
            SessionChanged(
                session=self.session,
                model=self.card.name,
                state=state.value,
                was=was,
                tokens=len(self.machine.tokens),
                reason=str(error) if error is not None else "",
            )
        )

    def _do(self, command: fsm.Command) -> None:
        match command:
            case fsm.EmitToken():
                self._emit(command)
            case fsm.OpenStages():
                self._open_stages(command)
            case fsm.ResumeStages():
                self._resume_stages(command)
            case fsm.SendPrompt(epoch, plan, start):
                self.progress_at = self.context.clock.monotonic()
                self.stages.send_prompt(epoch, plan, start, self.machine.tokens)
                self._all_opened()
            case fsm.Replan():
                self.recovery.begins("loss", command.reason)
                self.output.touch()
                self._note(
                    "lost", reason=command.reason, tokens=len(self.output.tokens), blame=sorted(command.lost | command.avoid)
                )
                self.context.on_replan(self, command)
            case fsm.GrantCredit(epoch, plan, credit):
                self.stages.grant(epoch, plan, len(self.machine.tokens), credit)
            case fsm.CloseStages():
                self.stages.close(command)
            case fsm.EmitSuspended(error):
                self._stopped("suspended", str(error) if error else "nobody reads it")
            case fsm.EmitEnd(reason, error):
                if error is None and reason is not FinishReason.CANCELLED:
                    self.output.finish(reason)
                self._stopped(reason.value, str(error or ""))

    def _open_stages(self, command: fsm.OpenStages) -> None:
        self.progress_at = self.context.clock.monotonic()
        self.output.touch()
        numerics, changed = self.numerics_header, changed_numerics(self.machine.kv_plan, command.plan)
        self._note("planned", epoch=command.epoch, plan=self.plan_header, tokens=command.answered, numerics=numerics)
        self.recovery.other_numerics = changed
        if changed:
            layers = ",".join(map(str, changed))
            self._note("numerics change", epoch=command.epoch, layers=layers, effect=NEAR_TIE)
        self.context.events.publish(
            PlanChosen(
                session=self.session,
                epoch=command.epoch,
                plan=self.plan_header,
                predicted_ttft_s=self.predicted_ttft_s,
                predicted_tpot_s=self.predicted_tpot_s,
                reason=self.recovery.reason,
                numerics=numerics,
            )
        )
        for stage in range(len(command.plan.stages)):
            self.tasks.spawn(self._open_stage(command, stage))

    async def _open_stage(self, command: fsm.OpenStages, stage: int) -> None:
        try:
            held = await self.stages.open(command, stage, self.machine.tokens)
        except MeshdError as error:
            blame = at_fault(error, command.plan.stages[stage].peer)
            if self.machine.begun and command.epoch == self.machine.epoch and not is_refusal(error):
                self._distrust(blame)
            self._apply(fsm.StageFailed(command.epoch, stage, error, blame))
        else:
            self._apply(fsm.StageOpened(command.epoch, stage, held))

    def _all_opened(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)
            self.unread_since = self.context.clock.monotonic()
        self.context.on_opened(self)

    def _resume_stages(self, command: fsm.ResumeStages) -> None:
        method = method_of(command.held, command.points, self.machine.known)
        self.recovery.changed(command.epoch, method)
        stages = [
            {"held": held.held, "start": point.start, "send_from": point.send_from}
            for held, point in zip(command.held, command.points, strict=True)
        ]
        self._note("resumed", epoch=command.epoch, method=method, stages=stages)
        self.stages.resume(command)

    def _emit(self, command: fsm.EmitToken) -> None:
        now = self.context.clock.monotonic()
        recovered = self.recovery.first_token(now - (self.output.last_token_at or self.output.started))
        if recovered is not None:
            self.context.on_recovered(self, recovered)
            pause_ms = round(1000 * recovered.pause_s, 1)
            self._note("goes on", epoch=recovered.epoch, method=recovered.method, pause_ms=pause_ms)
            self.context.events.publish(
                AnswerContinued(
                    session=self.session,
                    epoch=recovered.epoch,
                    plan=self.plan_header,
                    method=recovered.method,
                    cause=recovered.cause,
                    reason=recovered.reason,
                    pause_s=recovered.pause_s,
                    other_numerics=recovered.other_numerics,
                )
            )
        self.progress_at = now
        self.output.add(command.token, command.logprobs, now)
        self.context.on_token(self, command.index, command.token, command.logprobs)
        self.output.decode(command.token, command.logprobs, end_of_sequence=command.finish is FinishReason.STOP)
        if self.output.stopped and self.output.finished is None:
            self.output.finish(FinishReason.STOP)
            self._apply(fsm.StopMatched())
        self.output.touch()

    def _stopped(self, what: str, why: str) -> None:
        """Report the end or the suspension to the story, the readers, the waiting request and the coordinator."""
        self.ended_at = self.context.clock.monotonic()
        self._note(what, tokens=len(self.output.tokens), why=why)
        self.tasks.cancel()
        if self.machine.error is not None:  # an answer is kept for minutes, and must not keep all that its error has passed
            self.machine.error.__traceback__ = self.machine.error.__cause__ = self.machine.error.__context__ = None
        if not self.opened.done():
            self.opened.set_exception(self.machine.error or self._stop_reason())
            self.opened.exception()  # marks the error as retrieved: asyncio logs an exception that nobody has awaited
        self.output.touch()
        self.context.on_end(self)

    def _note(self, what: str, **details: Any) -> None:
        self.context.story.note(self.session, what, **details)

    def so_far(self) -> tuple[tuple[TextDelta, ...], Finished | None]:
        """See `service.Generation.so_far`."""
        return tuple(self.output.deltas), self.output.finished

    async def events(self) -> AsyncIterator[TextDelta | Finished]:
        """See `service.Generation.events`.

        Cancel, or closing the iterator: suspends the answer if this was its last reader and it is not a background answer.
        """
        output, read = self.output, 0
        self.readers += 1
        try:
            while True:
                while read < len(output.deltas):
                    read += 1
                    yield output.deltas[read - 1]
                if output.finished is not None:
                    yield output.finished
                    return
                self._raise_if_stopped()
                self.read_all()
                if read == len(output.deltas) and output.finished is None:
                    await output.change()
        finally:
            self.readers -= 1
            self.unread_since = self.context.clock.monotonic()
            if not self.readers and not self.record.background:
                self.suspend()

    def _raise_if_stopped(self) -> None:
        if self.running:
            return
        raise self.machine.error.copy() if self.machine.error is not None else self._stop_reason()

    def _stop_reason(self) -> MeshdError:
        """Returns: why the answer stopped, if no error stopped it."""
        if self.machine.state is SessionState.SUSPENDED:
            return Unavailable("the answer was suspended before it was complete: this peer stops", hint="send the request again")
        return Cancelled("the answer was cancelled before it was complete", hint="send the request again")

    def read_all(self) -> None:
        """Count all tokens so far as read, which extends the credit: how far decoding may run ahead of the readers."""
        if self.machine.state in RUNNING:
            self._apply(fsm.TokensRead(len(self.machine.tokens)))


def header_of(plan: Plan, names: Callable[[PeerId], str]) -> str:
    """Returns: the plan as `name:0-12,name:12-30`."""
    return ",".join(f"{names(stage.peer)}:{stage.layers}" for stage in plan.stages)
