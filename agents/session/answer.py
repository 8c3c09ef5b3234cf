"""One answer on its coordinator: the session's machine, the messages it asks for, and the client's end of it.

The text is made here, token by token, whether anybody reads or not, so that every reader, on this peer or on the next one, sees
the same sequence of deltas.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import msgspec
import numpy as np

from meshd.agents.links.links import Links
from meshd.agents.observe.story import Story
from meshd.agents.placement.model_library import ModelText
from meshd.agents.service import Finished, TextDelta
from meshd.agents.session import session as fsm
from meshd.agents.session.journal.record import AnswerToken, SessionRecord
from meshd.agents.session.plan.resume import StageHeld, method_of
from meshd.agents.session.text import Assembler, StopMatcher
from meshd.clock import Clock
from meshd.errors import Cancelled, MeshdError, PeerFault, PeerLost, RemoteFailure
from meshd.kernels.sampler import needs_known
from meshd.protocol.messages import Close, Credit, Error, Failed, Message, Open, Opened, Prompt, Renew, Resume, Token
from meshd.types import FinishReason, ModelCard, PeerId, Plan, SessionId, TokenLogprobs

log = getLogger(__name__)

LEASE_S = 10.0
RENEW_S = 3.0
_DISTRUST_S = 30.0
OPEN_TIMEOUT_S = 5.0
"""A stage only reserves memory that is there: whoever takes longer is not to be waited for."""


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """What every answer of a peer needs of that peer."""

    me: PeerId
    links: Links
    clock: Clock
    story: Story
    names: Callable[[PeerId], str]
    on_replan: Callable[["Answer", fsm.Replan], None]
    """Find a plan, and tell it with `planned` or `plan_failed`."""
    on_opened: Callable[["Answer"], None]
    """All stages of a plan are open."""
    on_token: Callable[["Answer", int, int, TokenLogprobs | None], None]
    on_recovered: Callable[["Answer", "Recovered"], None]
    """A token came after a change of plan."""
    on_end: Callable[["Answer"], None]
    """It ended, or is suspended."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """One change of plan in a running answer."""

    epoch: int
    method: str
    """`kept`, `mirror`, `replay` or `prefill`: the dearest thing that had to be done."""
    reason: str
    pause_s: float
    """From the last token before it to the first one after."""


@dataclass(slots=True)
class Answer:
    """Implements `service.Generation`."""

    record: SessionRecord
    card: ModelCard
    text: ModelText
    around: AnswerContext
    machine: fsm.Session = field(init=False)
    handed_over: bool = False
    """Its last coordinator gave it up to this peer."""
    started: float = field(init=False)
    first_token_at: float | None = None
    last_token_at: float = 0.0
    progress_at: float = field(init=False)
    renewed_at: float = field(init=False)
    ended_at: float = 0.0
    unread_since: float = field(init=False)
    readers: int = 0
    recoveries: list[Recovered] = field(default_factory=list)
    mirrors: dict[int, tuple[PeerId, int]] = field(default_factory=dict)
    """Stage of the present plan -> who has a copy of its KV, and how many positions of it."""
    distrusted: dict[PeerId, float] = field(default_factory=dict)
    """Peers that were at fault in this session, and until when they get no part of it."""
    tokens: list[AnswerToken] = field(default_factory=list)
    _assembler: Assembler = field(init=False)
    _deltas: list[TextDelta] = field(default_factory=list)
    _finished: Finished | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    _search: "asyncio.Task[None] | None" = None
    _changing: tuple[int, str, str] | None = None
    """(epoch, method, reason) of a change of plan that no token has followed yet."""
    _reason: str = ""
    opened: "asyncio.Future[None]" = field(init=False)
    """Done when the first plan is open; failed when there is none."""

    def __post_init__(self) -> None:
        now = self.around.clock.monotonic()
        self.started = self.progress_at = self.renewed_at = self.unread_since = self.ended_at = now
        self.machine = fsm.Session(self.record.session, len(self.record.prompt))
        self._assembler = Assembler(
            decoder=self.text.tokenizer.stream(after=self.record.prompt[-1] if self.record.prompt else None),
            vocabulary=self.text.tokenizer,
            stops=StopMatcher(self.record.stop),
            with_logprobs=self.record.sampling.logprobs is not None,
        )
        self.opened = asyncio.get_running_loop().create_future()
        self._restore()

    def _restore(self) -> None:
        """Stand where the record ends."""
        if not (self.record.tokens or self.record.epoch):
            return
        machine = self.machine
        machine.state, machine.epoch = fsm.SessionState.SUSPENDED, self.record.epoch
        machine.plan = machine.rooted = self.record.plan
        for token, logprobs in self.record.tokens:
            machine.tokens.append(token)
            self.tokens.append((token, logprobs))
            self._push(token, logprobs, end_of_sequence=self._ends(token))
        machine.credit += len(machine.tokens)
        finish = self._restored_finish()
        if finish is FinishReason.CANCELLED:
            machine.state, machine.finish = fsm.SessionState.CANCELLED, finish
        elif finish is not None:
            machine.state, machine.finish = fsm.SessionState.FINISHED, finish
            self._finish(finish)

    def _ends(self, token: int) -> bool:
        return token in self.card.end_of_sequence and not self.record.ignore_eos

    def _restored_finish(self) -> FinishReason | None:
        """The record's, or what its tokens say: its coordinator may have gone before it told the end."""
        if self.record.finish:
            return FinishReason(self.record.finish)
        if self._assembler.stopped:
            return FinishReason.STOP
        return self._finish_at(len(self.tokens) - 1, self.tokens[-1][0]) if self.tokens else None

    def _finish_at(self, index: int, token: int) -> FinishReason | None:
        """Whether the answer ends with this token, as its last stage tells it too."""
        if self._ends(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if index + 1 == self.record.max_tokens else None

    # What it is

    @property
    def session(self) -> SessionId:
        return self.record.session

    @property
    def edge(self) -> bytes:
        return self.record.edge

    @property
    def prompt_tokens(self) -> int:
        return len(self.record.prompt)

    @property
    def plan(self) -> Plan | None:
        return self.machine.plan

    @property
    def predicted_tpot_s(self) -> float:
        return self.plan.predicted_tpot_s if self.plan else 0.0

    @property
    def plan_header(self) -> str:
        return header_of(self.plan, self.around.names) if self.plan else ""

    @property
    def running(self) -> bool:
        return self.machine.state in fsm.RUNNING or self.machine.state is fsm.SessionState.NEW

    @property
    def ended(self) -> bool:
        return self.machine.state in fsm.TERMINAL

    @property
    def status(self) -> str:
        """See `service.Generation.status`."""
        names = {
            fsm.SessionState.SUSPENDED: "suspended",
            fsm.SessionState.FINISHED: "completed",
            fsm.SessionState.FAILED: "failed",
            fsm.SessionState.CANCELLED: "cancelled",
        }
        if self.released:
            return "suspended"
        return names.get(self.machine.state, "in_progress" if self.machine.tokens else "queued")

    @property
    def released(self) -> bool:
        """It goes on at another peer."""
        return self.machine.state is fsm.SessionState.CANCELLED and self.machine.error is not None

    @property
    def error(self) -> MeshdError | None:
        over = self.machine.state in (fsm.SessionState.SUSPENDED, fsm.SessionState.FAILED) or self.released
        return self.machine.error if over else None

    @property
    def measured_tpot_s(self) -> float:
        """Mean over what was made here; 0 before the second token."""
        made = len(self.machine.tokens) - len(self.record.tokens)
        if self.first_token_at is None or made < 2:
            return 0.0
        return (self.last_token_at - self.first_token_at) / (made - 1)

    @property
    def ttft_s(self) -> float:
        return self.first_token_at - self.started if self.first_token_at is not None else 0.0

    def snapshot(self) -> SessionRecord:
        """The record as of now."""
        finish = self._finished.reason.value if self._finished else self.machine.finish.value if self.machine.finish else ""
        return msgspec.structs.replace(
            self.record,
            coordinator=self.around.me,
            epoch=self.machine.epoch,
            plan=self.machine.rooted,
            tokens=tuple(self.tokens),
            finish=finish,
            suspended=self.machine.state is fsm.SessionState.SUSPENDED,
        )

    # What its coordinator does

    def planned(self, plan: Plan, reason: str = "") -> None:
        """A plan to go on with, or to move to for this reason; the answer opens it by itself."""
        self._reason = reason or self._reason
        self._apply(fsm.Planned(plan))

    def plan_failed(self, error: MeshdError) -> None:
        """There is none now."""
        self._apply(fsm.PlanFailed(error))

    def hold(self, index: int | None) -> None:
        """Make no answer token from `index` on, before the plan changes; None: go on as before."""
        if self.plan is not None and self.machine.state is fsm.SessionState.DECODING:
            credit = self.machine.credit if index is None else min(index, self.machine.credit)
            message = Credit(session=self.session, epoch=self.machine.epoch, index=credit, hold=index is not None)
            self.send(self.plan.stages[0].peer, message)

    def resume(self) -> None:
        """Go on, if it is suspended."""
        if self.machine.state is fsm.SessionState.SUSPENDED:
            now = self.around.clock.monotonic()
            self.started = self.progress_at = self.renewed_at = self.unread_since = now
            self.first_token_at = None
            self._apply(fsm.ResumeRequested())

    def release(self, why: str = "another peer has taken this answer over") -> None:
        """Another peer coordinates it from now on."""
        if not self.ended:
            self._apply(fsm.Released(Cancelled(why)))

    def reclaim(self, record: SessionRecord, used: int) -> None:
        """Another peer had gone on with it up to this record, in epochs up to `used`, and gave it back."""
        self.handed_over = True
        tokens = tuple((token, logprobs, self._finish_at(index, token)) for index, (token, logprobs) in enumerate(record.tokens))
        self._apply(fsm.Reclaimed(used, tokens))

    def overdue(self, reason: str, blame: PeerId | None) -> None:
        """Nothing came for too long, and who is to blame, if that is known."""
        if self.machine.state in fsm.RUNNING:
            self._distrust(blame)
            self._apply(fsm.DeadlinePassed(reason, blame))

    async def cancel(self) -> None:
        """See `service.Generation.cancel`."""
        self.end()

    def end(self) -> None:
        """Cancel it."""
        if not self.ended:
            self._apply(fsm.CancelRequested())

    def suspend(self) -> None:
        """Let go of everything but the tokens."""
        if self.running:
            self._apply(fsm.Suspend())

    def renew(self, now: float) -> None:
        """Tell everyone who holds something of it that it lives."""
        if self.machine.holders and now - self.renewed_at >= RENEW_S:
            self.renewed_at = now
            for peer in sorted(self.machine.holders):
                self.send(peer, Renew(session=self.session, epoch=self.machine.epoch, lease_ms=int(LEASE_S * 1000)))

    @property
    def waits_for_client(self) -> bool:
        return len(self.machine.tokens) >= self.machine.credit

    # What the network tells

    def on_token(self, message: Token) -> None:
        """From the last stage."""
        finish = FinishReason(message.finish) if message.final else None
        self._apply(fsm.TokenArrived(message.epoch, message.index, message.token, message.logprobs, finish))

    def on_failed(self, message: Failed) -> None:
        """From any stage."""
        plan = self.plan
        where = self.around.names(plan.stages[message.stage].peer) if plan and message.stage < len(plan.stages) else "a peer"
        text = f"{where} could not go on: {message.message}"
        error = PeerLost(text) if message.code == PeerLost.code else RemoteFailure(text, remote_code=message.code)
        self._failed(message.epoch, message.stage, error, message.blame)

    def on_garbage(self, epoch: int, sender: PeerId, what: str) -> None:
        """The last stage sent what can't be."""
        error = PeerFault(f"{self.around.names(sender)} sent {what}")
        self._failed(epoch, len(self.plan.stages) - 1 if self.plan else 0, error, sender)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """A peer answered a message of this session with ERROR."""
        self._failed(self.machine.epoch, 0, RemoteFailure(message.message, remote_code=message.code), sender)

    def _failed(self, epoch: int, stage: int, error: MeshdError, blame: PeerId | None) -> None:
        if epoch == self.machine.epoch:
            self._distrust(blame)
        self._apply(fsm.StageFailed(epoch, stage, error, blame))

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """The link with it is down."""
        self.mirrors = {stage: held for stage, held in self.mirrors.items() if held[0] != peer}
        self._apply(fsm.PeerGone(peer, f"{self.around.names(peer)}: {reason}"))

    def mirrored(self, stage: int, peer: PeerId, held: int | None) -> None:
        """A copy of a stage's KV has so many positions; None: there is none."""
        if held is None:
            self.mirrors.pop(stage, None)
        elif self.machine.state in fsm.RUNNING:
            self.mirrors[stage] = peer, held
            self.machine.holders.add(peer)

    def _distrust(self, peer: PeerId | None) -> None:
        if peer is not None:
            self.distrusted[peer] = self.around.clock.monotonic() + _DISTRUST_S

    # What the machine commands

    def _apply(self, event: fsm.Event) -> None:
        for command in self.machine.handle(event):
            self._do(command)

    def _do(self, command: fsm.Command) -> None:
        match command:
            case fsm.EmitToken():
                self._emit(command)
            case fsm.OpenStages():
                self._open_stages(command)
            case fsm.ResumeStages():
                self._resume_stages(command)
            case fsm.SendPrompt(epoch, plan, start):
                self._send_prompt(epoch, plan, start)
                self._opened()
            case fsm.Replan():
                self._reason = command.reason
                self.touch()
                self.around.story.note(self.session, "lost", reason=command.reason, tokens=len(self.tokens))
                self.around.on_replan(self, command)
            case fsm.GrantCredit(epoch, peer, index):
                self.send(peer, Credit(session=self.session, epoch=epoch, index=index))
            case fsm.CloseStages(epoch, peers, reason):
                for peer in peers:
                    self.send(peer, Close(session=self.session, epoch=epoch, reason=reason))
            case fsm.EmitSuspended(error):
                self._over("suspended", str(error) if error else "nobody reads it")
            case fsm.EmitEnd(reason, error):
                if error is None and reason is not FinishReason.CANCELLED:
                    self._finish(reason)
                self._over(reason.value, str(error or ""))

    def _over(self, what: str, why: str) -> None:
        self.ended_at = self.around.clock.monotonic()
        self.around.story.note(self.session, what, tokens=len(self.tokens), why=why)
        for task in self._tasks:
            task.cancel()
        if not self.opened.done():
            if self.machine.error is not None:
                self.opened.set_exception(self.machine.error)
                self.opened.exception()  # told to whoever waits; nobody may
            else:
                self.opened.cancel()
        self.touch()
        self.around.on_end(self)

    def _opened(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)
        self.around.on_opened(self)

    def _open_stages(self, command: fsm.OpenStages) -> None:
        self.progress_at = self.around.clock.monotonic()
        self.touch()
        self.around.story.note(self.session, "planned", epoch=command.epoch, plan=self.plan_header, tokens=command.answered)
        for stage in range(len(command.plan.stages)):
            self.spawn(self._open_stage(command, stage))

    async def _open_stage(self, command: fsm.OpenStages, stage: int) -> None:
        plan, epoch = command.plan, command.epoch
        peer = plan.stages[stage].peer
        try:
            reply, _ = await self.around.links.request(
                peer, self._open(command, stage), self._ids_for(plan, stage), timeout_s=OPEN_TIMEOUT_S
            )
            if not isinstance(reply, Opened):
                raise PeerFault(f"OPEN was answered with {type(reply).__name__}")
        except MeshdError as error:
            if self.machine.begun and epoch == self.machine.epoch:
                self._distrust(peer)
            self._apply(fsm.StageFailed(epoch, stage, error, peer))
        else:
            self._apply(fsm.StageOpened(epoch, stage, StageHeld(reply.held, reply.mirrored, reply.kept_from, reply.kept_to)))

    def _open(self, command: fsm.OpenStages, stage: int) -> Open:
        return Open(
            request=self.around.links.next_request(),
            session=self.session,
            epoch=command.epoch,
            plan=command.plan,
            stage=stage,
            coordinator=self.around.me,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.record.max_tokens,
            sampling=self.record.sampling,
            ignore_eos=self.record.ignore_eos,
            lease_ms=int(LEASE_S * 1000),
            credit=command.credit,
            answered=command.answered,
            resume=command.epoch > 1,
            handed_over=self.handed_over,
        )

    def _ids_for(self, plan: Plan, stage: int) -> memoryview | None:
        """All known tokens, for a last stage whose penalties look back on them."""
        looks_back = needs_known(self.record.sampling, len(self.tokens))
        return self._known_ids().data.cast("B") if looks_back and stage == len(plan.stages) - 1 else None

    def _known_ids(self) -> "np.ndarray[Any, np.dtype[np.int32]]":
        return np.asarray([*self.record.prompt, *self.machine.tokens], dtype="<i4")

    def _resume_stages(self, command: fsm.ResumeStages) -> None:
        self.mirrors.clear()
        method = method_of(command.held, command.positions, self.machine.known)
        self._changing = (command.epoch, method, self._reason)
        self.around.story.note(
            self.session,
            "resumed",
            epoch=command.epoch,
            method=method,
            stages=[
                {"held": held.held, "start": position.start, "send_from": position.send_from}
                for held, position in zip(command.held, command.positions, strict=True)
            ],
        )
        for stage, position in enumerate(command.positions):
            message = Resume(
                session=self.session, epoch=command.epoch, stage=stage, start=position.start, send_from=position.send_from
            )
            self.send(command.plan.stages[stage].peer, message)

    def _send_prompt(self, epoch: int, plan: Plan, start: int) -> None:
        self.progress_at = self.around.clock.monotonic()
        ids = self._known_ids()
        chunk = plan.prefill_chunk_tokens
        for step in range(start, len(ids), chunk):
            part = ids[step : step + chunk]
            message = Prompt(session=self.session, epoch=epoch, step=step, tokens=len(part), last=step + len(part) == len(ids))
            self.send(plan.stages[0].peer, message, part.data.cast("B"))

    def send(self, peer: PeerId, message: Message, payload: memoryview | None = None) -> None:
        """Send; a peer that is gone is told by its link, so nothing is raised here."""
        try:
            self.around.links.send(peer, message, payload)
        except MeshdError as error:
            log.debug("%s to %.8s not sent: %s", type(message).__name__, peer, error)

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run beside the answer, and end with it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def search(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a search for a plan in place of the last one."""
        if self._search is not None:
            self._search.cancel()
        self._search = self.spawn(work)

    # Text

    def _emit(self, command: fsm.EmitToken) -> None:
        now = self.around.clock.monotonic()
        if self._changing is not None:
            epoch, method, reason = self._changing
            pause_s = now - (self.last_token_at or self.started)
            recovered = Recovered(epoch, method, reason, pause_s)
            self.recoveries.append(recovered)
            self.around.on_recovered(self, recovered)
            self.around.story.note(self.session, "goes on", epoch=epoch, method=method, pause_ms=round(1000 * pause_s, 1))
            self._changing = None
        self.progress_at = self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
        self.tokens.append((command.token, command.logprobs))
        self.around.on_token(self, command.index, command.token, command.logprobs)
        self._push(command.token, command.logprobs, end_of_sequence=command.finish is FinishReason.STOP)
        if self._assembler.stopped and self._finished is None:
            self._finish(FinishReason.STOP)
            self._apply(fsm.StopMatched())
        self.touch()

    def _push(self, token: int, logprobs: TokenLogprobs | None, *, end_of_sequence: bool) -> None:
        if self._assembler.stopped:
            return
        delta = self._assembler.push(token, logprobs, end_of_sequence=end_of_sequence)
        if delta is not None:
            self._deltas.append(delta)

    def _finish(self, reason: FinishReason) -> None:
        """The text is complete."""
        if self._finished is not None:
            return
        if (delta := self._assembler.finish()) is not None:
            self._deltas.append(delta)
        self._finished = Finished(
            reason=FinishReason.STOP if self._assembler.stopped else reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=len(self.tokens),
            ttft_s=self.ttft_s,
            tpot_s=self.measured_tpot_s,
        )

    # The client's end

    def so_far(self) -> tuple[tuple[TextDelta, ...], Finished | None]:
        """See `service.Generation.so_far`."""
        return tuple(self._deltas), self._finished

    async def events(self) -> AsyncIterator[TextDelta | Finished]:
        """See `service.Generation.events`. Cancel, or closing: if nobody else reads it is suspended, but for background answers."""
        self.readers += 1
        read = 0
        try:
            while True:
                while read < len(self._deltas):
                    read += 1
                    yield self._deltas[read - 1]
                if self._finished is not None:
                    yield self._finished
                    return
                self._raise_if_over()
                self._read_up_to(len(self.machine.tokens))
                changed = self._changed
                if read == len(self._deltas) and self._finished is None:
                    await changed.wait()
        finally:
            self.readers -= 1
            self.unread_since = self.around.clock.monotonic()
            if not self.readers and not self.record.background:
                self.suspend()

    def _raise_if_over(self) -> None:
        if self.running:
            return
        if self.machine.error is not None:
            raise self.machine.error
        raise Cancelled("the answer was ended before its end", hint="ask again")

    def _read_up_to(self, index: int) -> None:
        if self.machine.state in fsm.RUNNING:
            self._apply(fsm.TokensRead(index))

    def read_ahead(self) -> None:
        """A background answer goes on whether it is read or not."""
        if self.record.background:
            self._read_up_to(len(self.machine.tokens))

    async def until(self, condition: Callable[[], object], within_s: float) -> None:
        """Wait until it holds, or the time is over. Looked at with each token, plan, end and `touch`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not condition():
                    await self._changed.wait()

    def touch(self) -> None:
        """Wake whoever waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()


def header_of(plan: Plan, names: Callable[[PeerId], str]) -> str:
    """`name:0-12,name:12-30`."""
    return ",".join(f"{names(stage.peer)}:{stage.layers}" for stage in plan.stages)
