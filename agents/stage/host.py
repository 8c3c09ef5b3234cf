"""The stage: this peer's part in the sessions that run through it.

It takes steps from the network, computes them one at a time on the compute thread (decodes first), and sends what they make to the
next stage or, from the last stage, the token to the first one and to the coordinator. Who may send what is in the session's plan;
what does not come from there is dropped. What a stage leaves, KV and outputs, stays for the stage that follows it in a later epoch,
until that one says what it needs, the session is closed, or its lease runs out.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger
from typing import Any

import numpy as np
import numpy.typing as npt

from meshd.agents.device.compute import ComputeThread
from meshd.agents.links.links import Links
from meshd.agents.observe.story import Story
from meshd.agents.placement.loads import ResidentModels
from meshd.agents.stage import session as fsm
from meshd.agents.stage.kv import KvCache, SessionKv, StageKv
from meshd.agents.stage.mirror import IncomingMirrors, OutgoingMirrors
from meshd.agents.stage.outputs import Outputs
from meshd.agents.stage.scheduler import (
    ActiveStage,
    Scheduler,
    StepOutput,
    activation_of,
    activation_step,
    compute_step,
    prompt_step,
    token_ids,
    token_of,
    token_step,
)
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError, NoPeer, PeerLost, ProtocolViolation, RemoteFailure, Superseded
from meshd.kernels.sampler import Sampler, needs_known
from meshd.kernels.wire import encode
from meshd.protocol.messages import (
    Activation,
    Close,
    Closed,
    Credit,
    Error,
    Failed,
    FetchProgress,
    KvBlocks,
    KvOffer,
    KvStored,
    Message,
    Mirror,
    Mirrored,
    Open,
    Opened,
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
_LEASE_MOST_MS = 60_000
"""A coordinator that asks for more gets this."""


@dataclass(slots=True)
class StageHost:
    """All sessions' stages on this peer, and the loop that computes them."""

    me: PeerId
    links: Links
    holdings: ResidentModels
    compute: ComputeThread
    clock: Clock
    telemetry: Telemetry
    story: Story
    outputs_limit_bytes: int
    """For outputs that are kept to be sent again."""
    peer_linked: Callable[[PeerId], bool]
    on_change: Callable[[], None]
    """Something that the advert tells has changed."""
    _caches: KvCache = field(init=False)
    _mirrors_out: OutgoingMirrors = field(init=False)
    _mirrors_in: IncomingMirrors = field(init=False)
    _active: dict[tuple[SessionId, int], ActiveStage] = field(default_factory=dict)
    _ready: Scheduler = field(default_factory=Scheduler)
    _computing_since: float | None = None
    """When the present step, of whatever session, began."""

    def __post_init__(self) -> None:
        self._caches = KvCache(Outputs(self.outputs_limit_bytes))
        self._mirrors_out = OutgoingMirrors(self.me, self.links, self.story)
        self._mirrors_in = IncomingMirrors(self.links, self.holdings, self._caches, self.story, self._admit_copy, self.on_change)

    def register(self) -> None:
        """Take the session messages from the links."""
        self.links.register(Open, self._on_open)
        self.links.register(Resume, self._on_resume)
        self.links.register(Prompt, self._on_prompt)
        self.links.register(Activation, self._on_activation)
        self.links.register(Credit, self._on_credit)
        self.links.register(Taken, self._on_taken)
        self.links.register(Renew, self._on_renew)
        self.links.register(Close, self._on_close)
        self.links.register(FetchProgress, self._on_fetch_progress)
        self.links.register(Mirror, self._on_mirror)
        self.links.register(KvStored, self._mirrors_out.on_stored)
        self.links.register(KvOffer, self._mirrors_in.on_offer)
        self.links.register(KvBlocks, self._mirrors_in.on_blocks)

    @property
    def sessions(self) -> int:
        """Stages that run; copies and what is kept are not counted."""
        return len(self._active)

    def rows(self, name_of: Callable[[ModelId], str]) -> list[dict[str, Any]]:
        """For `/mesh/v1/sessions`."""
        running = [
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
        return running + [_mirror_row(kept, cache, name_of) for kept in self._caches for cache in kept.caches if cache.source]

    async def run(self) -> None:
        """Free what leases no longer hold. Cancel: everything is freed."""
        try:
            while True:
                await self.clock.sleep(_SWEEP_S)
                now = self.clock.monotonic()
                for kept in self._caches:
                    if kept.expires < now:
                        log.warning("session %s: its lease ran out", kept.session)
                        self.story.note(kept.session, "lease ran out")
                        self._forget(kept, kept.epoch, "the lease ran out")
                self._mirrors_out.tick()
        finally:
            for kept in self._caches:
                self._forget(kept, kept.epoch, "this peer stops")

    # A session's stage comes, goes on and goes

    def _on_open(self, sender: PeerId, message: Open, payload: memoryview) -> Opened:
        known = self._active.get((message.session, message.stage))
        if known is not None and known.open.epoch == message.epoch and known.open.coordinator == sender:
            return known.opened(message.request)
        self._check_open(sender, message)
        sampler = self._sampler(message, payload)
        kept = self._caches.get(message.session)
        if kept is not None:
            self._check_epoch(kept, message)
            self._end_before(message.session, message.epoch, "a new epoch")
            if not message.resume:
                self._caches.drop_where(kept, lambda cache: cache.epoch < message.epoch)
        active = self._reserve(message, sampler)
        self._active[active.key] = active
        machine = active.machine
        kept_outputs = [machine.kept_from, machine.kept_to]
        self.story.note(
            message.session, "opened", epoch=message.epoch, stage=message.stage, held=machine.held, outputs=kept_outputs
        )
        self.on_change()
        return active.opened(message.request)

    def _check_open(self, sender: PeerId, message: Open) -> None:
        stages = message.plan.stages
        if message.coordinator != sender:
            raise ProtocolViolation("OPEN names another coordinator than its sender")
        if not 0 <= message.stage < len(stages) or stages[message.stage].peer != self.me:
            raise InvalidRequest(f"stage {message.stage} of the plan is not this peer's")
        if message.prompt_tokens < 1 or message.max_tokens < 1:
            raise InvalidRequest("a session needs at least one prompt token and one answer token")
        if not 0 <= message.answered < message.max_tokens:
            raise InvalidRequest(f"{message.answered} of {message.max_tokens} answer tokens are there: none is left to make")
        if message.plan.prefill_chunk_tokens < 1:
            raise InvalidRequest("a prefill chunk needs at least one token")
        if stages[message.stage].attention:
            raise InvalidRequest("this peer does not hold attention shards for others", hint="plan without them")

    def _check_epoch(self, kept: SessionKv, message: Open) -> None:
        self._check_coordinator(kept, message.coordinator, message.epoch, handed_over=message.handed_over)
        layers = message.plan.stages[message.stage].layers
        if any(cache.epoch == message.epoch and cache.layers == layers and not cache.source for cache in kept.caches):
            raise InvalidRequest(f"stage {message.stage} has failed in epoch {message.epoch}", hint="open a later one")

    def _check_coordinator(self, kept: SessionKv, coordinator: PeerId, epoch: int, *, handed_over: bool = False) -> None:
        """A session has one coordinator at a time; another one takes over with a higher epoch, when the first one is gone."""
        if epoch < kept.epoch:
            raise Superseded(f"epoch {epoch} is past: session {kept.session} is in {kept.epoch}")
        if coordinator != kept.coordinator:
            gone = handed_over or not (kept.coordinator == self.me or self.peer_linked(kept.coordinator))
            if not gone or epoch == kept.epoch:
                raise Superseded(f"session {kept.session} is coordinated by {kept.coordinator}, which is there")

    def _sampler(self, message: Open, payload: memoryview) -> Sampler:
        """With the tokens that are known, where they matter."""
        last = message.stage == len(message.plan.stages) - 1
        if not last or not needs_known(message.sampling, message.answered):
            return Sampler(message.sampling)
        loads = self.holdings.of(message.plan.model)
        if not loads:
            raise NoPeer("this model is not here", hint="place it first")
        ids = token_ids(payload, message.prompt_tokens + message.answered, loads[0].card.spec.vocab).tolist()
        return Sampler(message.sampling, ids[: message.prompt_tokens], ids[message.prompt_tokens :])

    def _reserve(self, message: Open, sampler: Sampler) -> ActiveStage:
        layers = message.plan.stages[message.stage].layers
        last = message.stage == len(message.plan.stages) - 1
        tokens = message.prompt_tokens + message.max_tokens
        kept = self._caches.enter(message.session, message.coordinator, message.epoch, self._expiry(message.lease_ms))
        try:
            cache = self._caches.adopt(kept, message.plan.model, layers, tokens) if message.resume else None
            if cache is None:
                cache = self._caches.reserve(kept, self.holdings.find(message.plan.model, layers), layers, tokens)
        finally:
            self._caches.forget_if_empty(kept)
        if not last:
            self._caches.take_log(kept, cache)
        return self._make(message, cache, sampler, last=last)

    def _make(self, message: Open, cache: StageKv, sampler: Sampler, *, last: bool) -> ActiveStage:
        room, kept_outputs = cache.room, cache.log
        assert room.load.weights is not None
        machine = fsm.StageSession(
            known_tokens=message.prompt_tokens + message.answered,
            max_tokens=message.prompt_tokens + message.max_tokens,
            credit=message.credit,
            first=message.stage == 0,
            last=last,
            state=fsm.StageState.OPEN if message.resume else fsm.StageState.IDLE,
            held=cache.filled,
            chunk_tokens=message.plan.prefill_chunk_tokens,
        )
        if kept_outputs is not None:
            machine.kept_from, machine.kept_to = kept_outputs.kept_from, kept_outputs.kept_to
            kept_outputs.pinned = message.resume
        room.enter()
        return ActiveStage(message, room.load, room.load.weights.stage(cache.layers), cache, room.table, sampler, machine)

    def _on_resume(self, sender: PeerId, message: Resume, payload: memoryview) -> None:
        active = self._of(sender, message, stage=message.stage, source="coordinator")
        if active is not None:
            self._apply(active, fsm.StageResumed(message.start, message.send_from))
            self._unpin(active)

    def _begin(self, active: ActiveStage, start: int) -> None:
        """All stages of the epoch are open: what none of them uses may go, and what lies beyond the start counts no more."""
        cache, epoch = active.cache, active.open.epoch
        cache.filled = cache.settled = start
        cache.mirrored = False
        if cache.log is not None:
            self._caches.outputs.cut(cache.log, start)
        kept = self._caches.get(active.open.session)
        assert kept is not None
        self._caches.settle(kept, epoch)
        sent_from = active.machine.send_from
        self.story.note(active.open.session, "resumed", epoch=epoch, stage=active.open.stage, start=start, send_from=sent_from)
        self.on_change()

    def _on_renew(self, sender: PeerId, message: Renew, payload: memoryview) -> None:
        kept = self._caches.get(message.session)
        if kept is None:
            self._tell_unknown(sender, message)
        elif kept.coordinator == sender and message.epoch >= kept.epoch:
            kept.expires = self._expiry(message.lease_ms)

    def _tell_unknown(self, sender: PeerId, message: Renew) -> None:
        """Nothing of the session is here: this peer has restarted, or a lease ran out unnoticed."""
        failed = Failed(
            session=message.session,
            epoch=message.epoch,
            step=0,
            stage=0,
            code=PeerLost.code,
            message="nothing of this session is here any more",
            blame=self.me,
        )
        self._send(sender, failed)

    def _on_close(self, sender: PeerId, message: Close, payload: memoryview) -> None:
        kept = self._caches.get(message.session)
        freed = 0
        if kept is not None and kept.coordinator == sender:
            freed = self._forget(kept, message.epoch, message.reason)
            self.story.note(message.session, "closed", epoch=message.epoch, reason=message.reason)
        self._send(sender, Closed(session=message.session, epoch=message.epoch, freed_blocks=freed))

    def _forget(self, kept: SessionKv, epoch: int, reason: str) -> int:
        """Let go of what is here of a session up to an epoch; the blocks that are or will be free."""
        self._end_before(kept.session, epoch + 1, reason)
        freed = self._caches.drop_where(kept, lambda cache: cache.epoch <= epoch)
        self.on_change()
        return freed

    def _end_before(self, session: SessionId, epoch: int, reason: str) -> None:
        for active in [active for active in self._active.values() if active.open.session == session]:
            if active.open.epoch < epoch:
                self._end(active, reason)

    def _end(self, active: ActiveStage, reason: str) -> None:
        """No more steps; KV and outputs stay, and its blocks as long as a step is under way."""
        if self._active.get(active.key) is active:
            del self._active[active.key]
        self._mirrors_out.stop(active)
        self._apply(active, fsm.StageEnded(reason))
        self._unpin(active)

    def _unpin(self, active: ActiveStage) -> None:
        """Once its kept outputs are sent, or not wanted, they are as good as others."""
        if active.cache.log is not None and not active.machine.replaying:
            active.cache.log.pinned = False

    def _expiry(self, lease_ms: int) -> float:
        return self.clock.monotonic() + min(lease_ms, _LEASE_MOST_MS) / 1000

    # Copies of KV

    def _on_mirror(self, sender: PeerId, message: Mirror, payload: memoryview) -> Awaitable[None] | None:
        active = self._of(sender, message, stage=message.stage, source="coordinator")
        if active is not None and active.machine.state is not fsm.StageState.OPEN:
            return self._mirrors_out.mirror(active, message)
        if message.target is not None:
            error = "the stage does not run here"
            told = Mirrored(
                session=message.session,
                epoch=message.epoch,
                stage=message.stage,
                target=message.target,
                held=0,
                filled=0,
                error=error,
            )
            self._send(sender, told)
        return None

    def _admit_copy(self, message: KvOffer) -> SessionKv:
        """The session's entry for an offer. Its stages of older epochs end: the epoch of the offer runs."""
        kept = self._caches.get(message.session)
        if kept is not None:
            self._check_coordinator(kept, message.coordinator, message.epoch)
            self._end_before(message.session, message.epoch, "a new epoch")
        return self._caches.enter(message.session, message.coordinator, message.epoch, self._expiry(message.lease_ms))

    # Steps and what bounds them

    def _on_prompt(self, sender: PeerId, message: Prompt, payload: memoryview) -> None:
        active = self._of(sender, message, stage=0, source="coordinator")
        if active is not None:
            self._apply(active, fsm.StepArrived(prompt_step(active, message, payload)))

    def _on_activation(self, sender: PeerId, message: Activation, payload: memoryview) -> None:
        active = self._of(sender, message, stage=message.stage, source=message.stage - 1)
        if active is not None:
            self._apply(active, fsm.StepArrived(activation_step(active, message, payload)))

    def on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        """The last stage's pick: the first stage's next step."""
        active = self._active.get((message.session, 0))
        if active is None or active.open.epoch != message.epoch or message.final:
            return
        if sender != active.peer_of(len(active.open.plan.stages) - 1):
            log.warning("session %s: TOKEN from %.8s, which is not its last stage", message.session, sender)
        elif not 0 <= message.token < active.load.card.spec.vocab:
            self._fail(active, message.step, ProtocolViolation(f"token {message.token} is outside the vocabulary"), sender)
        else:
            self._apply(active, fsm.StepArrived(token_step(active, message)))

    def _on_credit(self, sender: PeerId, message: Credit, payload: memoryview) -> None:
        active = self._of(sender, message, stage=0, source="coordinator")
        if active is not None:
            self._apply(active, fsm.CreditGranted(message.index, message.hold))

    def _on_taken(self, sender: PeerId, message: Taken, payload: memoryview) -> None:
        active = self._of(sender, message, stage=message.stage - 1, source=message.stage)
        if active is not None:
            self._apply(active, fsm.StepTaken(message.step))
            self._unpin(active)

    def _on_fetch_progress(self, sender: PeerId, message: FetchProgress, payload: memoryview) -> ProgressData:
        since = self._computing_since
        computing_s = self.clock.monotonic() - since if since is not None else 0.0
        stages = [
            (active.open.stage, active.machine.next_position, active.machine.sent_to, computing_s)
            for active in self._active.values()
            if active.open.session == message.session and active.open.epoch == message.epoch
        ]
        return ProgressData(request=message.request, stages=tuple(sorted(stages)))

    def _of(self, sender: PeerId, message: SessionMessage, *, stage: int, source: int | str) -> ActiveStage | None:
        """The stage that this message is for, if it is of its epoch and from whom the plan says."""
        active = self._active.get((message.session, stage))
        if active is None or active.open.epoch != message.epoch:
            return None
        expected = active.open.coordinator if isinstance(source, str) else self._peer_at(active, source)
        if sender != expected:
            log.warning("session %s: %s from %.8s, which has no part in it", message.session, type(message).__name__, sender)
            return None
        return active

    def _peer_at(self, active: ActiveStage, stage: int) -> PeerId | None:
        return active.peer_of(stage) if 0 <= stage < len(active.open.plan.stages) else None

    # The machine's commands

    def _apply(self, active: ActiveStage, event: fsm.Event) -> None:
        for command in active.machine.handle(event):
            match command:
                case fsm.Compute(step):
                    self._ready.put(active, step)
                case fsm.Deliver(step, output, skip):
                    self._deliver(active, step, output, skip)
                case fsm.BeginAt(start):
                    self._begin(active, start)
                case fsm.Replay(position, tokens):
                    self._replay(active, position, tokens)
                case fsm.RejectStep(step, reason):
                    error = ProtocolViolation(f"stage {active.open.stage} can't take the step: {reason}")
                    self._fail(active, step.position, error, active.source_of(step))
                case fsm.RefuseResume(reason):
                    error = ProtocolViolation(f"stage {active.open.stage} can't go on as told: {reason}")
                    self._fail(active, active.machine.next_position, error, active.open.coordinator)
                case fsm.FreeKv(reason):
                    self._free(active, reason)
        self._pump()

    def _free(self, active: ActiveStage, reason: str) -> None:
        active.cache.room.leave()
        log.debug("session %s stage %d ended: %s", active.open.session, active.open.stage, reason)
        self.on_change()

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """A link is down: a session that passes steps over it tells its coordinator, whose own link may stand."""
        for active in list(self._active.values()):
            stages = len(active.open.plan.stages)
            neighbours = {active.peer_of((active.open.stage + offset) % stages) for offset in (-1, 1)}
            if peer in neighbours and peer != self.me:
                error = PeerLost(f"the link with its neighbour is down: {reason}")
                self._fail(active, active.machine.next_position, error, peer)
        self._mirrors_out.on_peer_gone(peer, reason)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """A peer could not take what this stage sent it."""
        for active in [active for (session, _), active in self._active.items() if session == message.session]:
            if sender in active.open.plan.peers:
                error = RemoteFailure(message.message, remote_code=message.code)
                self._fail(active, active.machine.next_position, error, sender)

    def _fail(self, active: ActiveStage, position: int, error: MeshdError, blame: PeerId) -> None:
        """Tell the coordinator and take no more steps. What is here stays, for the epoch that follows."""
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
        self._send(active.open.coordinator, failed)
        self._end(active, error.message)

    def _deliver(self, active: ActiveStage, step: fsm.Step, output: object, skip: int) -> None:
        assert isinstance(output, StepOutput)
        if output.hidden is not None:
            hidden = output.hidden[skip:] if skip else output.hidden
            self._send_activation(active, step.position + skip, hidden, sample=step.sample, compute_ns=output.compute_ns)
        elif output.token is not None:
            message = token_of(active, step, output, output.token)
            for peer in dict.fromkeys((active.peer_of(0), active.open.coordinator)):
                self._pass_on(active, step.position, peer, message)

    def _replay(self, active: ActiveStage, position: int, tokens: int) -> None:
        assert active.cache.log is not None
        try:
            hidden = active.cache.log.rows(position, position + tokens)
        except MeshdError as error:
            self._fail(active, position, error, self.me)
        else:
            self._send_activation(active, position, hidden, sample=False, compute_ns=0)

    def _send_activation(
        self, active: ActiveStage, position: int, hidden: npt.NDArray[np.float32], *, sample: bool, compute_ns: int
    ) -> None:
        tokens, width = hidden.shape
        message = activation_of(active, position, tokens, width, sample=sample, compute_ns=compute_ns)
        self._pass_on(active, position, active.peer_of(message.stage), message, encode(hidden, message.dtype))

    def _pass_on(
        self, active: ActiveStage, position: int, peer: PeerId, message: Message, payload: memoryview | None = None
    ) -> None:
        """Send what the session can't go on without."""
        try:
            self.links.send(peer, message, payload)
        except MeshdError as error:
            self._fail(active, position, error, peer)

    def _send(self, peer: PeerId, message: Message) -> None:
        """Tell a peer what it could also find out by itself."""
        try:
            self.links.send(peer, message)
        except MeshdError as error:
            log.debug("%s to %.8s not sent: %s", type(message).__name__, peer, error)

    # The loop: one step at a time, decodes first

    def _pump(self) -> None:
        while self._computing_since is None and (job := self._ready.take()) is not None:
            active, step = job
            if active.machine.computing is not step:
                continue
            if active.machine.state is fsm.StageState.ENDED:
                self._apply(active, fsm.StepComputed(step.position, None))
                continue
            self._computing_since = self.clock.monotonic()
            if step.prefill and active.open.stage > 0:
                taken = Taken(session=active.open.session, epoch=active.open.epoch, step=step.position, stage=active.open.stage)
                self._send(active.peer_of(active.open.stage - 1), taken)
            self.compute.submit(
                partial(compute_step, active, step),
                partial(self._computed, active, step),
                partial(self._compute_failed, active, step),
            )

    def _computed(self, active: ActiveStage, step: fsm.Step, output: StepOutput) -> None:
        self._computing_since = None
        cache = active.cache
        if active.machine.state is not fsm.StageState.ENDED:
            cache.filled = step.end
        self._apply(active, fsm.StepComputed(step.position, output))  # first: the next stage waits for it
        if active.machine.state is not fsm.StageState.ENDED:
            if cache.log is not None and output.hidden is not None:
                self._caches.outputs.append(cache.log, step.position, output.hidden)
            self._mirrors_out.grown(active)
        if not step.prefill:
            self.holdings.observe_decode(active.load, len(active.stage.layers), step.position, output.forward_s)
        self.telemetry.stage_step(str(active.stage.layers), "prefill" if step.prefill else "decode", output.stage_s)

    def _compute_failed(self, active: ActiveStage, step: fsm.Step, error: Exception) -> None:
        self._computing_since = None
        blame = active.source_of(step) if isinstance(error, ProtocolViolation) else self.me
        if not isinstance(error, MeshdError):
            log.exception("session %s stage %d: computing failed", active.open.session, active.open.stage, exc_info=error)
            error = MeshdError(f"computing step {step.position} failed: {error}")
        self._fail(active, step.position, error, blame)
        self._apply(active, fsm.StepComputed(step.position, None))


def _mirror_row(kept: SessionKv, cache: StageKv, name_of: Callable[[ModelId], str]) -> dict[str, Any]:
    return {
        "id": kept.session,
        "role": f"mirror {cache.layers}",
        "model": name_of(cache.room.load.card.id),
        "state": "kept",
        "tokens": cache.filled,
        "prompt_tokens": 0,
        "epoch": cache.epoch,
        "plan": str(cache.layers),
        "blocks": len(cache.room.table.blocks),
    }
