"""Opens stages: checks OPEN, reserves KV or takes over the KV of an older epoch, and creates the stage."""

from collections.abc import Callable
from dataclasses import dataclass

from meshd.agents.observe.story import Story
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage import session as fsm
from meshd.agents.stage.kv import KvManager, SessionKv, StageCache
from meshd.agents.stage.leases import SessionLeases
from meshd.agents.stage.runner import StageRunner
from meshd.agents.stage.steps import ActiveStage, token_ids
from meshd.errors import InvalidRequest, NoPeer, ProtocolViolation
from meshd.kernels.sampler import Sampler, needs_past_tokens
from meshd.kernels.sampling_rules import check_sampling
from meshd.protocol.messages import Open, Opened
from meshd.types import PeerId


@dataclass(slots=True)
class StageOpener:
    """Handles OPEN."""

    me: PeerId
    residents: ResidentModels
    story: Story
    kv_manager: KvManager
    leases: SessionLeases
    runner: StageRunner
    on_change: Callable[[], None]

    def on_open(self, sender: PeerId, message: Open, payload: memoryview) -> Opened:
        """Open a stage of a session for one epoch. A repeated OPEN gets the same answer.

        Raises: ProtocolViolation or InvalidRequest if OPEN is invalid; InvalidSampling if the request is; Superseded as
        `SessionLeases.check_coordinator` does; NoPeer
        if the layers are not in memory; OutOfMemory if the pool has too few free blocks.
        """
        running = self.runner.active.get((message.session, message.stage))
        if running is not None and running.open.epoch == message.epoch and running.open.coordinator == sender:
            return running.opened(message.request)
        self._check(sender, message)
        sampler = self._sampler(message, payload)
        session_kv = self.kv_manager.get(message.session)
        if session_kv is not None:
            self._check_epoch(session_kv, message)
        session_kv = self.leases.begin_epoch(message.session, sender, message.epoch, message.predecessors)
        if session_kv is not None and not message.resume:
            self.kv_manager.drop_where(session_kv, lambda cache: cache.epoch < message.epoch)
        active = self._reserve(message, sampler)
        self.runner.active[active.key] = active
        machine = active.machine
        kept_outputs = [machine.kept_from, machine.kept_to]
        self.story.note(
            message.session, "opened", epoch=message.epoch, stage=message.stage, held=machine.held, outputs=kept_outputs
        )
        self.on_change()
        return active.opened(message.request)

    def _check(self, sender: PeerId, message: Open) -> None:
        stages = message.plan.stages
        if message.coordinator != sender:
            raise ProtocolViolation("OPEN names another coordinator than its sender")
        if not 0 <= message.stage < len(stages) or stages[message.stage].peer != self.me:
            raise InvalidRequest(f"stage {message.stage} of the plan does not belong to this peer")
        if message.prompt_tokens < 1 or message.max_tokens < 1:
            raise InvalidRequest("a session needs at least one prompt token and one answer token")
        if not 0 <= message.answered < message.max_tokens:
            raise InvalidRequest(
                f"{message.answered} of {message.max_tokens} answer tokens exist already: none is left to generate"
            )
        if message.plan.prefill_chunk_tokens < 1:
            raise InvalidRequest("a prefill chunk needs at least one token")
        if stages[message.stage].attention:
            raise InvalidRequest("this peer does not hold attention shards for others", hint="plan without them")

    def _check_epoch(self, session_kv: SessionKv, message: Open) -> None:
        self.leases.check_coordinator(session_kv, message.coordinator, message.epoch)
        layers = message.plan.stages[message.stage].layers
        if any(cache.epoch == message.epoch and cache.layers == layers and not cache.source for cache in session_kv.caches):
            raise InvalidRequest(f"stage {message.stage} has failed in epoch {message.epoch}", hint="open a later one")

    def _sampler(self, message: Open, payload: memoryview) -> Sampler | None:
        """Create the last stage's sampler, with all known tokens if a penalty depends on them. Returns: None for any other stage.

        Raises: NoPeer; ProtocolViolation; InvalidSampling if the model can't use the parameters.
        """
        if message.stage < len(message.plan.stages) - 1:
            return None
        if message.sampling is None:
            raise ProtocolViolation("OPEN of the last stage has no sampling parameters")
        resident = self.residents.of(message.plan.model)
        if not resident:
            raise NoPeer("this peer has no layers of this model in memory", hint="place it first")
        vocab = resident[0].card.spec.vocab
        check_sampling(message.sampling, vocab)
        if not needs_past_tokens(message.sampling, message.answered):
            return Sampler(message.sampling)
        ids = token_ids(payload, message.prompt_tokens + message.answered, vocab).tolist()
        return Sampler(message.sampling, ids[: message.prompt_tokens], ids[message.prompt_tokens :])

    def _reserve(self, message: Open, sampler: Sampler | None) -> ActiveStage:
        layers = message.plan.stages[message.stage].layers
        last = message.stage == len(message.plan.stages) - 1
        tokens = message.prompt_tokens + message.max_tokens
        expires = self.leases.expiry(message.lease_ms)
        session_kv = self.kv_manager.enter(message.session, message.coordinator, message.epoch, expires)
        try:
            cache = self.kv_manager.adopt(session_kv, message.plan.model, layers, tokens) if message.resume else None
            if cache is None:
                cache = self.kv_manager.reserve(session_kv, self.residents.find(message.plan.model, layers), layers, tokens)
        finally:
            self.kv_manager.forget_if_empty(session_kv)
        if not last:
            self.kv_manager.assign_log(session_kv, cache)
        return _active_stage(message, cache, sampler, last=last)


def _active_stage(message: Open, cache: StageCache, sampler: Sampler | None, *, last: bool) -> ActiveStage:
    lease, outputs = cache.lease, cache.log
    assert lease.resident.weights is not None
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
    if outputs is not None:
        machine.kept_from, machine.kept_to = outputs.kept_from, outputs.kept_to
        outputs.pinned = message.resume
    lease.acquire()
    return ActiveStage(message, lease.resident, lease.resident.weights.stage(cache.layers), cache, lease.table, sampler, machine)
