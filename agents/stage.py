"""The stage: this peer's part in the sessions that run through it.

It takes steps from the network, computes them one at a time on the compute thread (decodes first), and sends what they make to the
next stage or, from the last stage, the token to the first one and to the coordinator. Who may send what is in the session's plan;
what does not come from there is dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from typing import Any

import numpy as np
import numpy.typing as npt

from meshd.agents import stage_session as fsm
from meshd.agents.compute import ComputeThread
from meshd.agents.holdings import Holdings
from meshd.agents.links import Links
from meshd.agents.steps import Active, StepInput, StepOutput, StepQueue, compute_step
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError, NoPeer, PeerLost, ProtocolViolation, RemoteFailure
from meshd.kernels.sampler import Sampler
from meshd.kernels.wire import encode
from meshd.protocol.messages import (
    Activation,
    Close,
    Closed,
    Credit,
    Error,
    Failed,
    Message,
    Open,
    Opened,
    Prompt,
    Renew,
    SessionMessage,
    Taken,
    Token,
)
from meshd.telemetry import Telemetry
from meshd.types import FinishReason, ModelId, PeerId, SessionId

log = getLogger(__name__)

_SWEEP_S = 0.5


@dataclass(slots=True)
class StageHost:
    """All sessions' stages on this peer, and the loop that computes them."""

    me: PeerId
    links: Links
    holdings: Holdings
    compute: ComputeThread
    clock: Clock
    telemetry: Telemetry
    on_change: Callable[[], None]
    """Something that the advert tells has changed."""
    _active: dict[tuple[SessionId, int], Active] = field(default_factory=dict)
    _ready: StepQueue = field(default_factory=StepQueue)
    _busy: bool = False

    def register(self) -> None:
        """Take the session messages from the links."""
        self.links.register(Open, self._on_open)
        self.links.register(Prompt, self._on_prompt)
        self.links.register(Activation, self._on_activation)
        self.links.register(Credit, self._on_credit)
        self.links.register(Taken, self._on_taken)
        self.links.register(Renew, self._on_renew)
        self.links.register(Close, self._on_close)

    @property
    def sessions(self) -> int:
        return len(self._active)

    def rows(self, name_of: Callable[[ModelId], str]) -> list[dict[str, Any]]:
        """For `/mesh/v1/sessions`."""
        return [
            {
                "id": active.open.session,
                "role": f"stage {active.open.stage}",
                "model": name_of(active.open.plan.model),
                "state": active.machine.state.value,
                "tokens": max(0, active.machine.next_position - active.open.prompt_tokens),
                "prompt_tokens": active.open.prompt_tokens,
                "epoch": active.open.epoch,
                "plan": str(active.stage.layers),
                "blocks": len(active.table.blocks),
            }
            for active in self._active.values()
        ]

    async def run(self) -> None:
        """Free what leases no longer hold. Cancel: everything is freed."""
        try:
            while True:
                await self.clock.sleep(_SWEEP_S)
                now = self.clock.monotonic()
                for active in [active for active in self._active.values() if active.expires < now]:
                    log.warning("session %s stage %d: its lease ran out", active.open.session, active.open.stage)
                    self._apply(active, fsm.Ended("the lease ran out"))
        finally:
            for active in list(self._active.values()):
                self._apply(active, fsm.Ended("this peer stops"))

    # Messages

    def _on_open(self, sender: PeerId, message: Open, payload: memoryview) -> Opened:
        known = self._active.get((message.session, message.stage))
        if known is not None and known.open.epoch == message.epoch:
            return self._opened(message, known)
        if known is not None and known.open.epoch > message.epoch:
            raise InvalidRequest(f"epoch {message.epoch} is past: session {message.session} is in {known.open.epoch}")
        self._check_open(sender, message)
        if known is not None:
            self._apply(known, fsm.Ended("a new epoch"))
        active = self._reserve(message)
        self._active[active.key] = active
        self.on_change()
        return self._opened(message, active)

    def _check_open(self, sender: PeerId, message: Open) -> None:
        stages = message.plan.stages
        if message.coordinator != sender:
            raise ProtocolViolation("OPEN names another coordinator than its sender")
        if not 0 <= message.stage < len(stages) or stages[message.stage].peer != self.me:
            raise InvalidRequest(f"stage {message.stage} of the plan is not this peer's")
        if message.prompt_tokens < 1 or message.max_tokens < 1:
            raise InvalidRequest("a session needs at least one prompt token and one answer token")
        if stages[message.stage].attention:
            raise InvalidRequest("this peer does not hold attention shards for others", hint="plan without them")

    def _reserve(self, message: Open) -> Active:
        layers = message.plan.stages[message.stage].layers
        load = self.holdings.find(message.plan.model, layers)
        if load is None or load.weights is None or load.pool is None:
            raise NoPeer(f"layers {layers} of this model are not here", hint="place them first")
        stage = load.weights.stage(layers)
        table = load.pool.allocate(message.prompt_tokens + message.max_tokens)
        load.sessions += 1
        return Active(
            open=message,
            load=load,
            stage=stage,
            table=table,
            sampler=Sampler(message.sampling),
            machine=fsm.StageSession(
                prompt_tokens=message.prompt_tokens,
                max_tokens=message.max_tokens,
                credit=message.credit,
                first=message.stage == 0,
                last=message.stage == len(message.plan.stages) - 1,
            ),
            expires=self.clock.monotonic() + message.lease_ms / 1000,
        )

    def _opened(self, message: Open, active: Active) -> Opened:
        return Opened(request=message.request, session=message.session, epoch=message.epoch, blocks=len(active.table.blocks))

    def _on_prompt(self, sender: PeerId, message: Prompt, payload: memoryview) -> None:
        active = self._of(sender, message, stage=0, source="coordinator")
        if active is None:
            return
        if len(payload) != 4 * message.tokens:
            raise ProtocolViolation(f"PROMPT tells {message.tokens} tokens and carries {len(payload)} bytes")
        ids = np.frombuffer(payload, dtype="<i4")
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < active.load.card.spec.vocab):
            raise ProtocolViolation("PROMPT carries token ids outside the vocabulary")
        step = fsm.Step(message.step, message.position, message.tokens, message.last, True, data=StepInput(ids))
        self._apply(active, fsm.StepArrived(step))

    def _on_activation(self, sender: PeerId, message: Activation, payload: memoryview) -> None:
        active = self._of(sender, message, stage=message.stage, source=message.stage - 1)
        if active is None:
            return
        prefill = message.position < active.open.prompt_tokens
        step = fsm.Step(
            message.step,
            message.position,
            message.tokens,
            message.sample,
            prefill,
            index=max(0, message.position + message.tokens - active.open.prompt_tokens),
            data=StepInput(None, message, payload),
        )
        self._apply(active, fsm.StepArrived(step))

    def on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        """The last stage's pick: the first stage's next step."""
        active = self._active.get((message.session, 0))
        if active is None or active.open.epoch != message.epoch or message.final:
            return
        if sender != active.peer_of(len(active.open.plan.stages) - 1):
            log.warning("session %s: TOKEN from %.8s, which is not its last stage", message.session, sender)
            return
        position = active.open.prompt_tokens + message.index
        ids = np.array([message.token], dtype=np.int32)
        step = fsm.Step(message.step + 1, position, 1, True, False, index=message.index + 1, data=StepInput(ids))
        self._apply(active, fsm.StepArrived(step))

    def _on_credit(self, sender: PeerId, message: Credit, payload: memoryview) -> None:
        active = self._of(sender, message, stage=0, source="coordinator")
        if active is not None:
            self._apply(active, fsm.CreditGranted(message.index))

    def _on_taken(self, sender: PeerId, message: Taken, payload: memoryview) -> None:
        active = self._of(sender, message, stage=message.stage - 1, source=message.stage)
        if active is not None:
            self._apply(active, fsm.StepTaken(message.step))

    def _on_renew(self, sender: PeerId, message: Renew, payload: memoryview) -> None:
        for active in self._all_of(sender, message):
            active.expires = self.clock.monotonic() + message.lease_ms / 1000

    def _on_close(self, sender: PeerId, message: Close, payload: memoryview) -> None:
        freed = 0
        for active in self._all_of(sender, message):
            freed += len(active.table.blocks)
            self._apply(active, fsm.Ended(message.reason))
        self._send(sender, Closed(session=message.session, epoch=message.epoch, freed_blocks=freed))

    def _of(self, sender: PeerId, message: SessionMessage, *, stage: int, source: int | str) -> Active | None:
        """The stage that this message is for, if it is of its epoch and from whom the plan says."""
        active = self._active.get((message.session, stage))
        if active is None or active.open.epoch != message.epoch:
            return None
        expected = active.open.coordinator if isinstance(source, str) else self._peer_at(active, source)
        if sender != expected:
            log.warning("session %s: %s from %.8s, which has no part in it", message.session, type(message).__name__, sender)
            return None
        return active

    def _peer_at(self, active: Active, stage: int) -> PeerId | None:
        return active.peer_of(stage) if 0 <= stage < len(active.open.plan.stages) else None

    def _all_of(self, sender: PeerId, message: SessionMessage) -> list[Active]:
        return [
            active
            for (session, _), active in self._active.items()
            if session == message.session and active.open.epoch <= message.epoch and active.open.coordinator == sender
        ]

    # The machine's commands

    def _apply(self, active: Active, event: fsm.Event) -> None:
        for command in active.machine.handle(event):
            match command:
                case fsm.Compute(step):
                    self._ready.put(active, step)
                case fsm.Deliver(step, output):
                    self._deliver(active, step, output)
                case fsm.Reject(step, reason):
                    self._fail(active, step.number, ProtocolViolation(f"stage {active.open.stage} can't take the step: {reason}"))
                case fsm.Free(reason):
                    self._free(active, reason)
        self._pump()

    def _free(self, active: Active, reason: str) -> None:
        if active.load.pool is not None:
            active.load.pool.free(active.table)
        active.load.sessions -= 1
        if self._active.get(active.key) is active:
            del self._active[active.key]
        log.debug("session %s stage %d freed: %s", active.open.session, active.open.stage, reason)
        self.on_change()

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """A link is down: a session that passes steps over it tells its coordinator, whose own link may stand."""
        for active in list(self._active.values()):
            stages = len(active.open.plan.stages)
            neighbours = {active.peer_of((active.open.stage + offset) % stages) for offset in (-1, 1)}
            if peer in neighbours and peer != self.me:
                self._fail(active, active.machine.next_number, PeerLost(f"the link with its neighbour is down: {reason}"))

    def on_error(self, sender: PeerId, message: Error) -> None:
        """A peer could not take what this stage sent it."""
        for active in [active for (session, _), active in self._active.items() if session == message.session]:
            if sender in active.open.plan.peers:
                self._fail(active, active.machine.next_number, RemoteFailure(message.message, remote_code=message.code))

    def _fail(self, active: Active, number: int, error: MeshdError) -> None:
        if active.machine.state is fsm.State.ENDED:
            return
        log.warning("session %s stage %d failed: %s", active.open.session, active.open.stage, error)
        failed = Failed(
            session=active.open.session,
            epoch=active.open.epoch,
            step=number,
            stage=active.open.stage,
            code=error.code,
            message=str(error),
        )
        self._send(active.open.coordinator, failed)
        self._apply(active, fsm.Ended(error.message))

    def _deliver(self, active: Active, step: fsm.Step, output: object) -> None:
        assert isinstance(output, StepOutput)
        try:
            if output.hidden is not None:
                self._send_activation(active, step, output, output.hidden)
            elif output.token is not None:
                self._send_token(active, step, output, output.token)
        except MeshdError as error:
            self._fail(active, step.number, error)

    def _send_activation(self, active: Active, step: fsm.Step, output: StepOutput, hidden: npt.NDArray[np.float32]) -> None:
        stage = active.open.stage + 1
        dtype = active.open.plan.wire_dtype
        message = Activation(
            session=active.open.session,
            epoch=active.open.epoch,
            step=step.number,
            stage=stage,
            position=step.position,
            tokens=step.tokens,
            hidden=hidden.shape[1],
            dtype=dtype,
            sample=step.sample,
            compute_ns=output.compute_ns,
            ids=output.ids,
        )
        self.links.send(active.peer_of(stage), message, encode(hidden, dtype))

    def _send_token(self, active: Active, step: fsm.Step, output: StepOutput, token: int) -> None:
        position = step.position + step.tokens
        index = position - active.open.prompt_tokens
        finish = ""
        if token in active.load.card.end_of_sequence and not active.open.ignore_eos:
            finish = FinishReason.STOP.value
        elif index + 1 == active.open.max_tokens:
            finish = FinishReason.LENGTH.value
        message = Token(
            session=active.open.session,
            epoch=active.open.epoch,
            step=step.number,
            index=index,
            token=token,
            logprobs=output.logprobs,
            final=bool(finish),
            finish=finish,
            compute_ns=output.compute_ns,
        )
        for peer in dict.fromkeys((active.peer_of(0), active.open.coordinator)):
            self.links.send(peer, message)

    def _send(self, peer: PeerId, message: Message) -> None:
        """Tell a peer what it could also find out by itself."""
        try:
            self.links.send(peer, message)
        except MeshdError as error:
            log.debug("%s to %.8s not sent: %s", type(message).__name__, peer, error)

    # The loop: one step at a time, decodes first

    def _pump(self) -> None:
        while not self._busy and (job := self._ready.take()) is not None:
            active, step = job
            if active.machine.computing is not step:
                continue
            if active.machine.state is fsm.State.ENDED:
                self._apply(active, fsm.StepComputed(step.number, None))
                continue
            self._busy = True
            if step.prefill and active.open.stage > 0:
                taken = Taken(session=active.open.session, epoch=active.open.epoch, step=step.number, stage=active.open.stage)
                self._send(active.peer_of(active.open.stage - 1), taken)
            self.compute.submit(
                partial(compute_step, active, step),
                partial(self._computed, active, step),
                partial(self._compute_failed, active, step),
            )

    def _computed(self, active: Active, step: fsm.Step, output: StepOutput) -> None:
        self._busy = False
        self._apply(active, fsm.StepComputed(step.number, output))  # first: the next stage waits for it
        if not step.prefill:
            self.holdings.observe_decode(active.load, len(active.stage.layers), step.position, output.forward_s)
        self.telemetry.stage_step(str(active.stage.layers), "prefill" if step.prefill else "decode", output.stage_s)

    def _compute_failed(self, active: Active, step: fsm.Step, error: Exception) -> None:
        self._busy = False
        if not isinstance(error, MeshdError):
            log.exception("session %s stage %d: computing failed", active.open.session, active.open.stage, exc_info=error)
            error = MeshdError(f"computing step {step.number} failed: {error}")
        self._fail(active, step.number, error)
        self._apply(active, fsm.StepComputed(step.number, None))
