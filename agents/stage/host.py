"""Receives the session messages of this peer's stages and passes each to the component that handles it.

    opening    OPEN                       -> a new stage
    steps      PROMPT, ACTIVATION, TOKEN  -> steps of a stage
    runner     a stage's events           -> its state machine, and the steps to compute
    sender     a step's output            -> the next stage, or the first stage and the coordinator
    leases     RENEW, CLOSE, time         -> how long KV stays
    mirror/    MIRROR, EXPECT_COPY        -> copies of KV on other peers

A session's plan determines which peer may send each message; a message from any other peer is dropped. KV and outputs outlive the
stage that computed them. They are kept for stages of a later epoch, until that epoch resumes without them, the session is closed,
or the session's lease runs out.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.spans import Spans
from meshd.agents.observe.story import Story
from meshd.agents.observe.work import WorkMeter
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage import session as fsm
from meshd.agents.stage.kv import KvManager
from meshd.agents.stage.learning import StepLearning
from meshd.agents.stage.leases import SessionLeases
from meshd.agents.stage.mirror.incoming import IncomingMirrors
from meshd.agents.stage.mirror.outgoing import OutgoingMirrors
from meshd.agents.stage.opening import StageOpener
from meshd.agents.stage.outputs import Outputs
from meshd.agents.stage.rows import session_rows
from meshd.agents.stage.runner import StageRunner
from meshd.agents.stage.scheduler import Scheduler
from meshd.agents.stage.steps import ActiveStage, activation_step, prompt_step, token_step
from meshd.clock import Clock
from meshd.errors import PeerLost, ProtocolViolation, RemoteFailure
from meshd.protocol.messages import (
    Activation,
    Close,
    Credit,
    Error,
    ExpectCopy,
    FetchProgress,
    HandOver,
    KvBlocks,
    KvOffer,
    KvStored,
    Lane,
    Mirror,
    Mirrored,
    Open,
    ProgressData,
    Prompt,
    Renew,
    Resume,
    SessionMessage,
    StageProgress,
    Taken,
    Token,
)
from meshd.telemetry import Telemetry
from meshd.types import ModelId, PeerId, SessionId

log = getLogger(__name__)

_SWEEP_S = 0.5
"""Interval at which expired leases are freed and the timeouts of copies advance."""
_LONGEST_IDLE_S = 3600.0
"""A lane that was idle for longer than this is reported as idle for this long, as is a lane that is not up."""


@dataclass(slots=True)
class StageHost:
    """The stages of all sessions on this peer."""

    me: PeerId
    links: Links
    residents: ResidentModels
    learning: StepLearning
    compute: ComputeQueue
    clock: Clock
    telemetry: Telemetry
    story: Story
    spans: Spans
    work: WorkMeter
    outputs_limit_bytes: int
    """Memory budget for kept outputs."""
    may_coordinate: Callable[[PeerId, SessionId], bool]
    """Whether a peer may still coordinate a session: it is linked, or it is this peer and does so."""
    on_change: Callable[[], None]
    """Called when something that the advert reports has changed."""
    _active: dict[tuple[SessionId, int], ActiveStage] = field(default_factory=dict)
    _ready: Scheduler = field(default_factory=Scheduler)
    _kv_manager: KvManager = field(init=False)
    _runner: StageRunner = field(init=False)
    _leases: SessionLeases = field(init=False)
    _opener: StageOpener = field(init=False)
    _mirrors_out: OutgoingMirrors = field(init=False)
    _mirrors_in: IncomingMirrors = field(init=False)

    def __post_init__(self) -> None:
        me, links, story, on_change = self.me, self.links, self.story, self.on_change
        kv_manager = self._kv_manager = KvManager(Outputs(self.outputs_limit_bytes))
        mirrors = self._mirrors_out = OutgoingMirrors(me, links, story)
        self._runner = StageRunner(
            me=me,
            links=links,
            learning=self.learning,
            compute=self.compute,
            clock=self.clock,
            telemetry=self.telemetry,
            story=story,
            spans=self.spans,
            work=self.work,
            kv_manager=kv_manager,
            mirrors=mirrors,
            on_change=on_change,
            active=self._active,
            ready=self._ready,
        )
        self._leases = SessionLeases(me, links, self.clock, story, kv_manager, self._runner, self.may_coordinate, on_change)
        self._opener = StageOpener(me, self.residents, story, kv_manager, self._leases, self._runner, on_change)
        self._mirrors_in = IncomingMirrors(me, links, self.residents, kv_manager, self._leases, story, on_change)

    def register(self) -> None:
        """Register the handlers of session messages."""
        self.links.register(Open, self._opener.on_open)
        self.links.register(Resume, self._on_resume)
        self.links.register(Prompt, self._on_prompt)
        self.links.register(Activation, self._on_activation)
        self.links.register(Credit, self._on_credit)
        self.links.register(Taken, self._on_taken)
        self.links.register(Renew, self._leases.on_renew)
        self.links.register(Close, self._leases.on_close)
        self.links.register(FetchProgress, self._on_fetch_progress)
        self.links.register(Mirror, self._on_mirror)
        self.links.register(KvStored, self._mirrors_out.on_stored)
        self.links.register(ExpectCopy, self._mirrors_in.on_expect)
        self.links.register(KvOffer, self._mirrors_in.on_offer)
        self.links.register(KvBlocks, self._mirrors_in.on_blocks)

    @property
    def sessions(self) -> int:
        """Number of running stages, without copies and without KV kept for a later epoch."""
        return len(self._active)

    def rows(self, name_of: Callable[[ModelId], str]) -> list[dict[str, Any]]:
        """Return the rows of `/mesh/v1/sessions`."""
        return session_rows(self._active.values(), self._kv_manager, name_of)

    async def run(self) -> None:
        """Free sessions whose lease ran out, and advance the timeouts of copies, until cancelled."""
        while True:
            await self.clock.sleep(_SWEEP_S)
            self._leases.sweep()
            self._mirrors_out.tick()

    def close(self) -> None:
        """Free all sessions."""
        self._leases.free_all("this peer stops")

    def on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        """Start the first stage's next step with the token that the last stage sampled."""
        active = self._active.get((message.session, 0))
        if active is None or active.open.epoch != message.epoch or message.final:
            return
        if sender != active.peer_of(len(active.open.plan.stages) - 1):
            log.warning("session %s: TOKEN from %.8s dropped: its last stage runs on another peer", message.session, sender)
        elif not 0 <= message.token < active.resident.card.spec.vocab:
            error = ProtocolViolation(f"token {message.token} is outside the model's vocabulary")
            self._runner.fail(active, message.step, error, sender)
        else:
            self._runner.apply(active, fsm.StepArrived(token_step(active, message)))

    def on_hand_over(self, sender: PeerId, message: HandOver) -> bool:
        """See `SessionLeases.on_hand_over`."""
        return self._leases.on_hand_over(sender, message)

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """Fail the stages that exchange steps with `peer`, and the copies on `peer`, after the link with it went down.

        The coordinator may still have its own link with `peer`, so it would not notice the loss by itself.
        """
        for active in list(self._active.values()):
            stages = len(active.open.plan.stages)
            neighbours = {active.peer_of((active.open.stage + offset) % stages) for offset in (-1, 1)}
            if peer in neighbours and peer != self.me:
                error = PeerLost(f"the link with the neighbouring stage's peer is down: {reason}")
                self._runner.fail(active, active.machine.next_position, error, peer)
        self._mirrors_out.on_peer_gone(peer, reason)
        self._leases.on_peer_gone(peer)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """Fail the stages of a session after a peer of the session's plan rejected a message of the session."""
        for active in [active for (session, _), active in self._active.items() if session == message.session]:
            if sender in active.open.plan.peers:
                error = RemoteFailure(message.message, remote_code=message.code)
                self._runner.fail(active, active.machine.next_position, error, sender)

    def _on_resume(self, sender: PeerId, message: Resume, payload: memoryview) -> None:
        active = self._stage_for(sender, message, stage=message.stage, source="coordinator")
        if active is not None:
            self._runner.apply(active, fsm.StageResumed(message.start, message.send_from))
            self._runner.unpin(active)

    def _on_prompt(self, sender: PeerId, message: Prompt, payload: memoryview) -> None:
        active = self._stage_for(sender, message, stage=0, source="coordinator")
        if active is not None:
            self._runner.apply(active, fsm.StepArrived(prompt_step(active, message, payload)))

    def _on_activation(self, sender: PeerId, message: Activation, payload: memoryview) -> None:
        active = self._stage_for(sender, message, stage=message.stage, source=message.stage - 1)
        if active is not None:
            self._runner.apply(active, fsm.StepArrived(activation_step(active, message, payload)))

    def _on_credit(self, sender: PeerId, message: Credit, payload: memoryview) -> None:
        active = self._stage_for(sender, message, stage=0, source="coordinator")
        if active is not None:
            self._runner.apply(active, fsm.CreditGranted(message.index, message.hold))

    def _on_taken(self, sender: PeerId, message: Taken, payload: memoryview) -> None:
        active = self._stage_for(sender, message, stage=message.stage - 1, source=message.stage)
        if active is not None:
            self._runner.apply(active, fsm.StepTaken(message.step))
            self._runner.unpin(active)

    def _on_mirror(self, sender: PeerId, message: Mirror, payload: memoryview) -> Awaitable[None] | None:
        active = self._stage_for(sender, message, stage=message.stage, source="coordinator")
        if active is not None and active.machine.state is not fsm.StageState.OPEN:
            return self._mirrors_out.mirror(active, message)
        if message.target is not None:
            mirrored = Mirrored(
                session=message.session,
                epoch=message.epoch,
                stage=message.stage,
                target=message.target,
                held=0,
                filled=0,
                error="the stage does not run on this peer",
            )
            try_send(self.links.send, sender, mirrored)
        return None

    def _on_fetch_progress(self, sender: PeerId, message: FetchProgress, payload: memoryview) -> ProgressData:
        stages = [
            StageProgress(
                stage=active.open.stage,
                due=active.machine.next_position,
                sent=active.machine.sent_to,
                idle_s=min(self.links.idle_s(active.input_peer, Lane.BULK), _LONGEST_IDLE_S),
            )
            for active in self._active.values()
            if (active.open.session, active.open.epoch, active.open.coordinator) == (message.session, message.epoch, sender)
        ]
        job = self._runner.job
        return ProgressData(
            request=message.request,
            stages=tuple(sorted(stages, key=lambda progress: progress.stage)),
            running=job.progress(self.clock.monotonic()) if job is not None else None,
        )

    def _stage_for(self, sender: PeerId, message: SessionMessage, *, stage: int, source: int | str) -> ActiveStage | None:
        """Find the stage that a message is for. `source` is the stage that may send it, or "coordinator".

        Returns: None if no such stage runs in the message's epoch, or if another peer sent the message.
        """
        active = self._active.get((message.session, stage))
        if active is None or active.open.epoch != message.epoch:
            return None
        expected = active.open.coordinator if isinstance(source, str) else _peer_at(active, source)
        if sender != expected:
            log.warning(
                "session %s: %s from %.8s dropped: the plan does not let that peer send it",
                message.session,
                type(message).__name__,
                sender,
            )
            return None
        return active


def _peer_at(active: ActiveStage, stage: int) -> PeerId | None:
    return active.peer_of(stage) if 0 <= stage < len(active.open.plan.stages) else None
