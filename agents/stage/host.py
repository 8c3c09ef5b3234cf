"""This peer's part in the sessions that run through it: takes their messages and hands them to the part that acts on them.

A plan names who may send what: a message from any other peer is dropped. KV and outputs outlive the stage that computed them: they
stay for the stage that follows in a later epoch, until that one says what it needs, the session is closed, or its lease runs out.

    opening   OPEN              -> a stage that runs
    runner    events            -> the stage's machine, and the steps that it starts
    sender    what a step makes -> the next stage, or the first stage and the coordinator
    leases    RENEW, CLOSE, time -> how long KV stays
    mirror/   MIRROR, KV_OFFER  -> copies of KV on other peers
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from meshd.agents.device.compute import ComputeQueue
from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.story import Story
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage import session as fsm
from meshd.agents.stage.kv import KvCache
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
    FetchProgress,
    KvBlocks,
    KvOffer,
    KvStored,
    Mirror,
    Mirrored,
    Open,
    ProgressData,
    Prompt,
    Renew,
    Resume,
    SessionMessage,
    Taken,
    Token,
)
from meshd.telemetry import Telemetry
from meshd.types import ModelId, PeerId, SessionId

log = getLogger(__name__)

_SWEEP_S = 0.5


@dataclass(slots=True)
class StageHost:
    """All sessions' stages on this peer."""

    me: PeerId
    links: Links
    holdings: ResidentModels
    compute: ComputeQueue
    clock: Clock
    telemetry: Telemetry
    story: Story
    outputs_limit_bytes: int
    """Budget for outputs that are kept to be sent again."""
    peer_linked: Callable[[PeerId], bool]
    on_change: Callable[[], None]
    """Called when something that the advert reports has changed."""
    _active: dict[tuple[SessionId, int], ActiveStage] = field(default_factory=dict)
    _ready: Scheduler = field(default_factory=Scheduler)
    _caches: KvCache = field(init=False)
    _runner: StageRunner = field(init=False)
    _leases: SessionLeases = field(init=False)
    _opener: StageOpener = field(init=False)
    _mirrors_out: OutgoingMirrors = field(init=False)
    _mirrors_in: IncomingMirrors = field(init=False)

    def __post_init__(self) -> None:
        me, links, story, on_change = self.me, self.links, self.story, self.on_change
        caches = self._caches = KvCache(Outputs(self.outputs_limit_bytes))
        mirrors = self._mirrors_out = OutgoingMirrors(me, links, story)
        self._runner = StageRunner(
            me=me,
            links=links,
            residents=self.holdings,
            compute=self.compute,
            clock=self.clock,
            telemetry=self.telemetry,
            story=story,
            caches=caches,
            mirrors=mirrors,
            on_change=on_change,
            active=self._active,
            ready=self._ready,
        )
        self._leases = SessionLeases(me, links, self.clock, story, caches, self._runner, self.peer_linked, on_change)
        self._opener = StageOpener(me, self.holdings, story, caches, self._leases, self._runner, on_change)
        self._mirrors_in = IncomingMirrors(links, self.holdings, caches, story, self._leases.admit_copy, on_change)

    def register(self) -> None:
        """Take the session messages from the links."""
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
        self.links.register(KvOffer, self._mirrors_in.on_offer)
        self.links.register(KvBlocks, self._mirrors_in.on_blocks)

    @property
    def sessions(self) -> int:
        """Stages that run; copies and KV that is kept are not counted."""
        return len(self._active)

    def rows(self, name_of: Callable[[ModelId], str]) -> list[dict[str, Any]]:
        """For `/mesh/v1/sessions`."""
        return session_rows(self._active.values(), self._caches, name_of)

    async def run(self) -> None:
        """Free what leases no longer hold. Cancel: everything is freed."""
        try:
            while True:
                await self.clock.sleep(_SWEEP_S)
                self._leases.sweep()
                self._mirrors_out.tick()
        finally:
            self._leases.free_all("this peer stops")

    def on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        """Take the last stage's token as the first stage's next step."""
        active = self._active.get((message.session, 0))
        if active is None or active.open.epoch != message.epoch or message.final:
            return
        if sender != active.peer_of(len(active.open.plan.stages) - 1):
            log.warning("session %s: TOKEN from %.8s, which is not its last stage", message.session, sender)
        elif not 0 <= message.token < active.resident.card.spec.vocab:
            error = ProtocolViolation(f"token {message.token} is outside the vocabulary")
            self._runner.fail(active, message.step, error, sender)
        else:
            self._runner.apply(active, fsm.StepArrived(token_step(active, message)))

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """End the stages that pass steps over a lost link: the coordinator may still have its own link with that peer."""
        for active in list(self._active.values()):
            stages = len(active.open.plan.stages)
            neighbours = {active.peer_of((active.open.stage + offset) % stages) for offset in (-1, 1)}
            if peer in neighbours and peer != self.me:
                error = PeerLost(f"the link with its neighbour is down: {reason}")
                self._runner.fail(active, active.machine.next_position, error, peer)
        self._mirrors_out.on_peer_gone(peer, reason)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """End the stages of a session whose message a peer could not take."""
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
                error="the stage does not run here",
            )
            try_send(self.links.send, sender, mirrored)
        return None

    def _on_fetch_progress(self, sender: PeerId, message: FetchProgress, payload: memoryview) -> ProgressData:
        since = self._runner.computing_since
        computing_s = self.clock.monotonic() - since if since is not None else 0.0
        stages = [
            (active.open.stage, active.machine.next_position, active.machine.sent_to, computing_s)
            for active in self._active.values()
            if active.open.session == message.session and active.open.epoch == message.epoch
        ]
        return ProgressData(request=message.request, stages=tuple(sorted(stages)))

    def _stage_for(self, sender: PeerId, message: SessionMessage, *, stage: int, source: int | str) -> ActiveStage | None:
        """Find the stage that a message is for.

        Returns: None if no such stage runs in the message's epoch, or if the plan names another sender.
        """
        active = self._active.get((message.session, stage))
        if active is None or active.open.epoch != message.epoch:
            return None
        expected = active.open.coordinator if isinstance(source, str) else _peer_at(active, source)
        if sender != expected:
            log.warning("session %s: %s from %.8s, which has no part in it", message.session, type(message).__name__, sender)
            return None
        return active


def _peer_at(active: ActiveStage, stage: int) -> PeerId | None:
    return active.peer_of(stage) if 0 <= stage < len(active.open.plan.stages) else None
