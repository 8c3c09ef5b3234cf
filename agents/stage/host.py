"""Receives the session messages of this peer's stages and passes each to the component that handles it.

    opening    OPEN                   -> a new stage
    steps      STEPS                  -> steps of a stage
    flow/      a stage's events       -> the order of its steps, and what is to be sent
    batch/     the ready steps        -> the next batch, and its outputs
    runner     commands and batches   -> the components here
    sender     a step's output        -> the next stage, or the first stage and the coordinator
    leases     RENEW, CLOSE, time     -> how long KV stays
    mirror/    MIRROR, EXPECT_COPY    -> copies of KV on other peers

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
from meshd.agents.placement.ready.stages import SharedStages
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage.batch.learning import StepLearning
from meshd.agents.stage.batch.measure import StepMeter
from meshd.agents.stage.batch.pacing import PromptPacing
from meshd.agents.stage.flow import events as fsm
from meshd.agents.stage.flow.session import StageState
from meshd.agents.stage.kv import KvManager
from meshd.agents.stage.leases import SessionLeases
from meshd.agents.stage.mirror.incoming import IncomingMirrors
from meshd.agents.stage.mirror.outgoing import OutgoingMirrors
from meshd.agents.stage.mirror.unplaced import UnplacedKv
from meshd.agents.stage.opening import StageOpener
from meshd.agents.stage.outputs import Outputs
from meshd.agents.stage.preparing import PreparingStages
from meshd.agents.stage.rows import session_rows
from meshd.agents.stage.runner import StageRunner
from meshd.agents.stage.steps import ActiveStage, Drafter, ShardClient, received_step
from meshd.clock import Clock
from meshd.errors import PeerLost, ProtocolViolation, RemoteFailure
from meshd.protocol.messages import (
    Ack,
    Close,
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
    Renew,
    Resume,
    SessionMessage,
    StageProgress,
    Step,
    Steps,
    Tokens,
)
from meshd.telemetry import Telemetry
from meshd.types import ModelId, ModelSpec, PeerId, SessionId

log = getLogger(__name__)

_SWEEP_S = 0.5
"""Interval at which expired leases are freed and the timeouts of copies advance."""
_COORDINATOR = -1
"""In place of a stage's index: the peer that coordinates the session."""
_LONGEST_IDLE_S = 3600.0
"""A lane that was idle for longer than this is reported as idle for this long, as is a lane that is not up."""


@dataclass(slots=True)
class StageHost:
    """The stages of all sessions on this peer."""

    me: PeerId
    links: Links
    residents: ResidentModels
    shared_stages: SharedStages
    learning: StepLearning
    compute: ComputeQueue
    clock: Clock
    telemetry: Telemetry
    story: Story
    spans: Spans
    work: WorkMeter
    spec_of: Callable[[ModelId], ModelSpec | None]
    """Returns the spec of a model that is known in the cluster."""
    spare_bytes: Callable[[], int]
    """Returns the bytes that may still be reserved on this peer."""
    outputs_limit_bytes: int
    """Memory budget for kept outputs."""
    may_coordinate: Callable[[PeerId, SessionId], bool]
    """Whether a peer may still coordinate a session: it is linked, or it is this peer and does so."""
    on_change: Callable[[], None]
    """Called when something that the advert reports has changed."""
    drafter_of: Callable[[Open], Drafter | None] = lambda message: None
    """Makes what guesses the tokens of a session, at its first stage."""
    shards_of: Callable[[Open], ShardClient | None] = lambda message: None
    """Makes what asks the peers that hold a part of a session's KV."""
    _active: dict[tuple[SessionId, int], ActiveStage] = field(default_factory=dict)
    _kv_manager: KvManager = field(init=False)
    _runner: StageRunner = field(init=False)
    _preparing: PreparingStages = field(init=False)
    _leases: SessionLeases = field(init=False)
    _opener: StageOpener = field(init=False)
    _mirrors_out: OutgoingMirrors = field(init=False)
    _mirrors_in: IncomingMirrors = field(init=False)

    def __post_init__(self) -> None:
        me, links, story, on_change = self.me, self.links, self.story, self.on_change
        kv_manager = self._kv_manager = KvManager(
            Outputs(self.outputs_limit_bytes), UnplacedKv(self.residents.arena, self.spec_of, self.spare_bytes)
        )
        mirrors = self._mirrors_out = OutgoingMirrors(me, links, story)
        self._runner = StageRunner(
            me=me,
            links=links,
            compute=self.compute,
            clock=self.clock,
            story=story,
            meter=StepMeter(self.learning, self.telemetry, self.spans, self.work),
            pacing=PromptPacing(self.learning),
            kv_manager=kv_manager,
            mirrors=mirrors,
            on_change=on_change,
            active=self._active,
        )
        self._preparing = PreparingStages(kv_manager, on_change)
        self._leases = SessionLeases(
            me, links, self.clock, story, kv_manager, self._runner, self._preparing, self.may_coordinate, on_change
        )
        self._opener = StageOpener(
            me=me,
            residents=self.residents,
            story=story,
            kv_manager=kv_manager,
            leases=self._leases,
            runner=self._runner,
            stages=self.shared_stages,
            preparing=self._preparing,
            on_change=on_change,
            drafter_of=self.drafter_of,
            shards_of=self.shards_of,
        )
        self._mirrors_in = IncomingMirrors(me, links, self.residents, kv_manager, self._leases, story, on_change)

    def register(self) -> None:
        """Register the handlers of session messages."""
        self.links.register(Open, self._opener.on_open)
        self.links.register(Resume, self._on_resume)
        self.links.register(Steps, self._on_steps)
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
        """Number of stages that run or are being prepared, without copies and without KV kept for a later epoch."""
        return len(self._active) + len(self._preparing)

    def rows(self, name_of: Callable[[ModelId], str]) -> list[dict[str, Any]]:
        """Return the rows of `/mesh/v1/sessions`."""
        return session_rows(self._active.values(), self._kv_manager, name_of)

    async def run(self) -> None:
        """Free sessions whose lease ran out, and advance the timeouts of copies and of waiting passes, until cancelled."""
        while True:
            await self.clock.sleep(_SWEEP_S)
            self._leases.sweep()
            self._mirrors_out.tick()
            self._runner.parked.sweep()

    def close(self) -> None:
        """Free all sessions."""
        self._leases.free_all("this peer stops")

    def on_tokens(self, sender: PeerId, message: Tokens, payload: memoryview) -> bool:
        """Make the first stage's next step of the tokens that the last stage sampled. Returns: whether it is on this peer."""
        active = self._active.get((message.session, 0))
        if active is None or active.open.epoch != message.epoch:
            return False
        vocab = active.resident.card.spec.vocab
        if sender != active.peer_of(len(active.open.plan.stages) - 1):
            log.warning("session %s: TOKENS from %.8s dropped: its last stage runs on another peer", message.session, sender)
        elif message.finish:
            pass  # there is no next step
        elif max(message.tokens) >= vocab:
            error = ProtocolViolation(f"token {max(message.tokens)} is outside the vocabulary of {vocab}")
            self._runner.fail(active, error, sender)
        else:
            self._runner.take_tokens(active, message)
        return True

    def on_hand_over(self, sender: PeerId, message: HandOver) -> bool:
        """See `SessionLeases.on_hand_over`."""
        return self._leases.on_hand_over(sender, message)

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """Fail the stages that exchange steps with `peer` or have KV there, and the copies on `peer`, after its link went down.

        The coordinator may still have its own link with `peer`, so it would not notice the loss by itself.
        """
        for active in list(self._active.values()):
            stages = len(active.open.plan.stages)
            neighbours = {active.peer_of((active.open.stage + offset) % stages) for offset in (-1, 1)}
            if peer in neighbours | active.holders and peer != self.me:
                which = "the neighbouring stage's peer" if peer in neighbours else "the peer that holds a part of its KV"
                self._runner.fail(active, PeerLost(f"the link with {which} is down: {reason}"), peer)
        self._mirrors_out.on_peer_gone(peer, reason)
        self._leases.on_peer_gone(peer)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """Fail the stages of a session after a peer of the session's plan rejected a message of the session."""
        for active in [active for (session, _), active in self._active.items() if session == message.session]:
            if sender in active.open.plan.peers:
                error = RemoteFailure(message.message, remote_code=message.code)
                self._runner.fail(active, error, sender)

    def _on_resume(self, sender: PeerId, message: Resume, payload: memoryview) -> None:
        active = self._stage_for(sender, message, stage=message.stage, source=_COORDINATOR)
        if active is not None:
            self._runner.apply(active, fsm.StageResumed(message.start, message.send_from))
            self._runner.unpin(active)

    def _on_steps(self, sender: PeerId, message: Steps, payload: memoryview) -> None:
        whole = sum(step.size for step in message.steps)
        begin, now = 0, self.clock.monotonic()
        for step in message.steps:
            part = payload[begin : begin + step.size]
            begin += step.size
            active = self._stage_for(sender, step, stage=step.stage, source=step.stage - 1 if step.stage else _COORDINATOR)
            if active is None:
                continue
            try:
                if whole != len(payload):
                    raise ProtocolViolation(f"steps are torn: {len(payload)} bytes, but their sizes add up to {whole}")
                if step.kind.lane is not message.send_lane:
                    raise ProtocolViolation(f"a {step.kind} step came on the lane of {message.steps[0].kind} steps")
                received = received_step(active, step, part, now)
            except ProtocolViolation as error:
                self._runner.fail(active, error, sender)
            else:
                self._runner.apply(active, fsm.StepArrived(received))

    def on_ack(self, sender: PeerId, message: Ack) -> None:
        """Let a stage send more, because the next stage has room; or the first and the last one, because the coordinator has."""
        before = message.stage - 1
        for stage in {0, before}:
            running = self._active.get((message.session, stage))
            granted = running is not None and message.stage == len(running.open.plan.stages)
            if not granted and stage != before:
                continue
            active = self._stage_for(sender, message, stage=stage, source=_COORDINATOR if granted else message.stage)
            if active is not None:
                acknowledged = fsm.OutputAcknowledged(message.next_seq, message.credit)
                self._runner.apply(active, fsm.TokensGranted(message.credit) if granted else acknowledged)
                self._runner.unpin(active)

    def _on_mirror(self, sender: PeerId, message: Mirror, payload: memoryview) -> Awaitable[None] | None:
        active = self._stage_for(sender, message, stage=message.stage, source=_COORDINATOR)
        if active is not None and active.machine.state is not StageState.OPEN:
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
                due=active.machine.due,
                sent=active.machine.sent_to,
                idle_s=min(self.links.idle_s(active.input_peer, Lane.BULK), _LONGEST_IDLE_S),
            )
            for active in self._active.values()
            if (active.open.session, active.open.epoch, active.open.coordinator) == (message.session, message.epoch, sender)
        ]
        return ProgressData(
            request=message.request,
            stages=tuple(sorted(stages, key=lambda progress: progress.stage)),
            running=self._runner.progress(message.session),
        )

    def _stage_for(self, sender: PeerId, message: SessionMessage | Step, *, stage: int, source: int) -> ActiveStage | None:
        """Find the stage that a message is for. `source`: the stage that may send it, or `_COORDINATOR`.

        Returns: None if no such stage runs in the message's epoch, or if another peer sent the message.
        """
        active = self._active.get((message.session, stage))
        if active is None or active.open.epoch != message.epoch:
            return None
        expected = active.open.coordinator if source == _COORDINATOR else _peer_at(active, source)
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
