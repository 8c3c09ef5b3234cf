"""One running answer on its coordinator: the session's machine, the messages it asks for, and the client's end of it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from logging import getLogger

import numpy as np

from meshd.agents import session as fsm
from meshd.agents.links import Links
from meshd.agents.service import Finished, TextDelta
from meshd.agents.text import Assembler
from meshd.clock import Clock
from meshd.errors import MeshdError, PeerFault, PeerLost, RemoteFailure
from meshd.protocol.messages import Close, Credit, Error, Failed, Message, Open, Opened, Prompt, Renew, Token
from meshd.types import FinishReason, PeerId, Plan, SamplingParams, SessionId

log = getLogger(__name__)

LEASE_S = 10.0
RENEW_S = 3.0
_OPEN_TIMEOUT_S = 10.0
_LEAST_STEP_S = 15.0
"""A step may take this long before it counts as lost, however fast it was predicted: the peer may be busy with others."""
_PATIENCE = 20.0
"""And this many times its prediction."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one answer needs of its request."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    ignore_eos: bool


@dataclass(slots=True)
class Answer:
    """Implements `service.Generation`."""

    session: SessionId
    work: Work
    links: Links
    clock: Clock
    me: PeerId
    names: Callable[[PeerId], str]
    assembler: Assembler
    on_end: Callable[["Answer"], None]
    machine: fsm.Session = field(init=False)
    plan: Plan | None = None
    started: float = field(init=False)
    first_token_at: float | None = None
    last_token_at: float = 0.0
    progress_at: float = field(init=False)
    renewed_at: float = field(init=False)
    read: int = 0
    """Answer tokens that the client's side has taken."""
    _inbox: deque[fsm.EmitToken | fsm.EmitEnd] = field(default_factory=deque)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.machine = fsm.Session(self.session)
        self.started = self.progress_at = self.renewed_at = self.clock.monotonic()

    @property
    def prompt_tokens(self) -> int:
        return len(self.work.prompt)

    @property
    def predicted_tpot_s(self) -> float:
        return self.plan.predicted_tpot_s if self.plan else 0.0

    @property
    def plan_header(self) -> str:
        stages = self.plan.stages if self.plan else ()
        return ",".join(f"{self.names(stage.peer)}:{stage.layers}" for stage in stages)

    @property
    def ended(self) -> bool:
        return self.machine.state in fsm.TERMINAL

    @property
    def measured_tpot_s(self) -> float:
        """Mean over the answer so far; 0 before the second token."""
        tokens = len(self.machine.tokens)
        if self.first_token_at is None or tokens < 2:
            return 0.0
        return (self.last_token_at - self.first_token_at) / (tokens - 1)

    @property
    def ttft_s(self) -> float:
        return self.first_token_at - self.started if self.first_token_at is not None else 0.0

    async def open(self, plan: Plan) -> None:
        """Reserve the stages and start the prefill. Raises: what a stage answered. Cancel: the session ends everywhere."""
        self.plan = plan
        try:
            self._apply(fsm.Planned(plan))
            await self._open_stages(plan)
        except asyncio.CancelledError:
            self._apply(fsm.CancelRequested())
            raise
        if self.machine.error is not None:
            raise self.machine.error

    async def _open_stages(self, plan: Plan) -> None:
        epoch = self.machine.epoch
        results = await asyncio.gather(
            *(self._open_stage(plan, stage) for stage in range(len(plan.stages))), return_exceptions=True
        )
        for stage, result in enumerate(results):
            if isinstance(result, MeshdError):
                self._apply(fsm.StageFailed(epoch, stage, result))
            elif isinstance(result, BaseException):
                raise result
        for stage in range(len(plan.stages)):
            if not self.ended:
                self._apply(fsm.StageOpened(epoch, stage))

    async def _open_stage(self, plan: Plan, stage: int) -> None:
        message = Open(
            request=self.links.next_request(),
            session=self.session,
            epoch=self.machine.epoch,
            plan=plan,
            stage=stage,
            coordinator=self.me,
            prompt_tokens=self.prompt_tokens,
            max_tokens=self.work.max_tokens,
            sampling=self.work.sampling,
            ignore_eos=self.work.ignore_eos,
            lease_ms=int(LEASE_S * 1000),
            credit=self.machine.credit,
        )
        reply, _ = await self.links.request(plan.stages[stage].peer, message, timeout_s=_OPEN_TIMEOUT_S)
        if not isinstance(reply, Opened):
            raise PeerFault(f"OPEN was answered with {type(reply).__name__}")

    # What the network tells

    def on_token(self, message: Token) -> None:
        """From the last stage."""
        now = self.clock.monotonic()
        self.progress_at = self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
        finish = FinishReason(message.finish) if message.final else None
        self._apply(fsm.TokenArrived(message.epoch, message.index, message.token, message.logprobs, finish))

    def on_failed(self, message: Failed) -> None:
        """From any stage."""
        where = (
            self.names(self.plan.stages[message.stage].peer) if self.plan and message.stage < len(self.plan.stages) else "a peer"
        )
        text = f"{where} could not go on: {message.message}"
        lost = message.code == PeerLost.code
        error = PeerLost(text, hint="ask again") if lost else RemoteFailure(text, remote_code=message.code, hint="ask again")
        self._apply(fsm.StageFailed(message.epoch, message.stage, error))

    def on_error(self, message: Error) -> None:
        """A peer answered a message of this session with ERROR."""
        error = RemoteFailure(message.message, remote_code=message.code, hint="ask again")
        self._apply(fsm.StageFailed(self.machine.epoch, 0, error))

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        self._apply(fsm.PeerGone(peer, f"{self.names(peer)}: {reason}"))

    def tick(self, now: float) -> None:
        """Renew the leases and look at the deadline."""
        if self.ended or self.plan is None:
            return
        if now - self.renewed_at >= RENEW_S:
            self.renewed_at = now
            for peer in dict.fromkeys(self.plan.peers):
                self._send(peer, Renew(session=self.session, epoch=self.machine.epoch, lease_ms=int(LEASE_S * 1000)))
        if len(self.machine.tokens) >= self.machine.credit or self.machine.state is fsm.State.OPENING:
            self.progress_at = now  # it waits for its client, or OPEN has a deadline of its own
        predicted = self.plan.predicted_tpot_s if self.first_token_at is not None else self.plan.predicted_ttft_s
        if now - self.progress_at > max(_LEAST_STEP_S, _PATIENCE * predicted):
            self._apply(fsm.DeadlinePassed(f"{now - self.progress_at:.0f} s of silence"))

    # What the machine commands

    def _apply(self, event: fsm.Event) -> None:
        for command in self.machine.handle(event):
            match command:
                case fsm.SendPrompt(epoch, plan):
                    self._send_prompt(epoch, plan)
                case fsm.EmitToken() | fsm.EmitEnd():
                    self._inbox.append(command)
                    self._wake.set()
                case fsm.GrantCredit(epoch, peer, index):
                    self._send(peer, Credit(session=self.session, epoch=epoch, index=index))
                case fsm.CloseStages(epoch, peers, reason):
                    for peer in peers:
                        self._send(peer, Close(session=self.session, epoch=epoch, reason=reason))
                case fsm.OpenStages():
                    pass  # `open` awaits the stages itself
            if isinstance(command, fsm.EmitEnd):
                self.on_end(self)

    def _send_prompt(self, epoch: int, plan: Plan) -> None:
        self.progress_at = self.clock.monotonic()
        ids = np.asarray(self.work.prompt, dtype="<i4")
        chunk = plan.prefill_chunk_tokens
        for step, position in enumerate(range(0, len(ids), chunk)):
            part = ids[position : position + chunk]
            message = Prompt(
                session=self.session,
                epoch=epoch,
                step=step,
                position=position,
                tokens=len(part),
                last=position + len(part) == len(ids),
            )
            self._send(plan.stages[0].peer, message, part.data.cast("B"))

    def _send(self, peer: PeerId, message: Message, payload: memoryview | None = None) -> None:
        """Send; a peer that is gone is told by its link, so nothing is raised here."""
        try:
            self.links.send(peer, message, payload)
        except MeshdError as error:
            log.debug("%s to %.8s not sent: %s", type(message).__name__, peer, error)

    # The client's end

    async def events(self) -> AsyncIterator[TextDelta | Finished]:
        """See `service.Generation.events`. Cancel: the session ends."""
        try:
            while isinstance(item := await self._next(), fsm.EmitToken):
                self.read = item.index + 1
                end_of_sequence = item.finish is FinishReason.STOP
                delta = self.assembler.push(item.token, item.logprobs, end_of_sequence=end_of_sequence)
                if delta is not None:
                    yield delta
                if self.assembler.stopped:
                    self._apply(fsm.StopMatched())
                    yield self._finished(FinishReason.STOP)
                    return
                self._apply(fsm.TokensRead(self.read))
            if item.error is not None:
                raise item.error
            if (delta := self.assembler.finish()) is not None:
                yield delta
            yield self._finished(FinishReason.STOP if self.assembler.stopped else item.reason)
        finally:
            await self.cancel()

    async def _next(self) -> fsm.EmitToken | fsm.EmitEnd:
        while not self._inbox:
            self._wake.clear()
            await self._wake.wait()
        return self._inbox.popleft()

    def _finished(self, reason: FinishReason) -> Finished:
        return Finished(
            reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.read,
            ttft_s=self.ttft_s,
            tpot_s=self.measured_tpot_s,
        )

    async def cancel(self) -> None:
        """See `service.Generation.cancel`."""
        if not self.ended:
            self._apply(fsm.CancelRequested())
