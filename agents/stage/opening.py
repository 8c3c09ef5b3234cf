"""Opens stages: checks OPEN, reserves KV or takes over the KV of an older epoch, prepares the stage, and creates it.

An accepted OPEN reserves memory at once. What takes longer is done on a worker thread, and OPENED follows.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

from meshd.agents.observe.story import Story
from meshd.agents.placement.ready.stages import SharedStages
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage.flow.session import StageSession, StageState
from meshd.agents.stage.kv import KvManager, SessionKv
from meshd.agents.stage.leases import SessionLeases
from meshd.agents.stage.preparing import PreparingStage, PreparingStages
from meshd.agents.stage.runner import StageRunner
from meshd.agents.stage.steps import ActiveStage, Drafter, ShardClient, token_ids
from meshd.errors import InvalidRequest, MeshdError, NoPeer, NotReady, ProtocolViolation, Unavailable
from meshd.kernels.backend import Stage
from meshd.kernels.sampling.rules import check_sampling
from meshd.kernels.sampling.sampler import Sampler, needs_past_tokens
from meshd.protocol.messages import Open, Opened
from meshd.types import PeerId

_LONGEST_PREPARE_MS = 60_000
"""A stage that takes longer is not opened (SPEC.md, section 8)."""
_MANY_TOKENS = 4096
"""So many known tokens are counted on a worker thread: it takes 0.1 us for each."""


@dataclass(frozen=True, slots=True)
class _Preparation(Awaitable[Opened]):
    """The rest of an accepted OPEN, which is awaited or closed."""

    run: Callable[[], Coroutine[Any, Any, Opened]]
    give_up: Callable[[MeshdError], None]

    def __await__(self) -> Generator[Any, Any, Opened]:
        return self.run().__await__()

    def close(self) -> None:
        """Free what the stage has reserved, because nothing awaits it: its coordinator has too many requests under way."""
        self.give_up(Unavailable("the stage was not prepared: too many requests of its coordinator are under way"))


@dataclass(slots=True)
class StageOpener:
    """Handles OPEN."""

    me: PeerId
    residents: ResidentModels
    story: Story
    kv_manager: KvManager
    leases: SessionLeases
    runner: StageRunner
    stages: SharedStages
    preparing: PreparingStages
    on_change: Callable[[], None]
    drafter_of: Callable[[Open], Drafter | None]
    """See `StageHost.drafter_of`."""
    shards_of: Callable[[Open], ShardClient | None]
    """See `StageHost.shards_of`."""

    def on_open(self, sender: PeerId, message: Open, payload: memoryview) -> Opened | Awaitable[Opened]:
        """Open a stage of a session for one epoch. A repeated OPEN gets the same answer.

        Raises: ProtocolViolation or InvalidRequest if OPEN is invalid; InvalidSampling if the request is; Superseded as
        `SessionLeases.check_coordinator` does; NoPeer if the layers are not in memory, or if the plan expects other numerics;
        OutOfMemory if their share of KV has too little left. The awaitable also raises OutOfMemory if there is no room for the
        weights that the stage needs; NotReady if they are not read in time; Unavailable if the session ended meanwhile.
        """
        running = self.runner.active.get((message.session, message.stage))
        if running is not None and running.open.epoch == message.epoch and running.open.coordinator == sender:
            return running.opened(message.request)
        preparing = self.preparing.get(message.session, message.stage)
        if preparing is not None and preparing.open.epoch == message.epoch and preparing.open.coordinator == sender:
            return _repeated(preparing, message.request)
        self._check(sender, message)
        make_sampler = self._sampler_maker(message, payload)
        session_kv = self.kv_manager.get(message.session)
        if session_kv is not None:
            self._check_epoch(session_kv, message)
        session_kv = self.leases.begin_epoch(message.session, sender, message.epoch, message.predecessors)
        if session_kv is not None and not message.resume:
            self.kv_manager.drop_where(session_kv, lambda cache: cache.epoch < message.epoch)
        accepted = self._reserve(message, make_sampler)
        try:
            stage = self.stages.find(accepted.resident, accepted.cache.layers)
            if stage is None or (make_sampler is not None and len(payload) > 4 * _MANY_TOKENS):
                return _Preparation(partial(self._prepare, accepted), partial(self.preparing.end, accepted))
            return self._open(accepted, stage, make_sampler() if make_sampler is not None else None).opened(message.request)
        except Exception as error:
            self.preparing.end(accepted, _described(error))
            raise

    async def _prepare(self, accepted: PreparingStage) -> Opened:
        """Prepare a stage on worker threads, and open it. Cancel: frees what the stage has reserved."""
        work = asyncio.ensure_future(self._prepared(accepted))
        error: MeshdError = Unavailable("this peer is about to stop")
        try:
            seconds = min(accepted.open.deadline_ms or _LONGEST_PREPARE_MS, _LONGEST_PREPARE_MS) / 1000
            either: set[asyncio.Future[Any]] = {work, accepted.outcome}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if accepted.outcome.done():
                accepted.outcome.result()  # raises why it ended
            if not work.done():
                raise NotReady(f"stage {accepted.open.stage} is not prepared within {seconds:g} s")
            return self._open(accepted, *work.result()).opened(accepted.open.request)
        except Exception as caught:
            error = _described(caught)
            raise
        finally:
            if not work.cancel() and not work.cancelled():
                work.exception()  # marks it as seen: the stage ended in the same moment
            self.preparing.end(accepted, error)

    async def _prepared(self, accepted: PreparingStage) -> tuple[Stage, Sampler | None]:
        stage = await self.stages.prepare(accepted.resident, accepted.cache.layers)
        return stage, await asyncio.to_thread(accepted.make_sampler) if accepted.make_sampler is not None else None

    def _open(self, accepted: PreparingStage, stage: Stage, sampler: Sampler | None) -> ActiveStage:
        message = accepted.open
        active = _active_stage(accepted, stage, sampler)
        active.drafter = self.drafter_of(message) if not message.stage else None
        active.shards = self.shards_of(message)
        self.runner.active[active.key] = active
        self.preparing.opened(accepted, active)
        machine = active.machine
        kept_outputs = [machine.kept_from, machine.kept_to]
        self.story.note(
            message.session, "opened", epoch=message.epoch, stage=message.stage, held=machine.held, outputs=kept_outputs
        )
        self.on_change()
        return active

    def _check(self, sender: PeerId, message: Open) -> None:
        stages = message.plan.stages
        if message.coordinator != sender:
            raise ProtocolViolation("OPEN names another coordinator than its sender")
        if not 0 <= message.stage < len(stages) or stages[message.stage].peer != self.me:
            raise InvalidRequest(f"stage {message.stage} of the plan does not belong to this peer")
        self.residents.check_numerics(message.plan.numerics_of(message.stage))
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

    def _sampler_maker(self, message: Open, payload: memoryview) -> Callable[[], Sampler] | None:
        """Check what the last stage's sampler needs: its parameters, and all known tokens if a penalty depends on them.

        Returns: a function that makes the sampler; None for any other stage.
        Raises: NoPeer; ProtocolViolation; InvalidSampling if the model can't use the parameters.
        """
        if message.stage < len(message.plan.stages) - 1:
            return None
        sampling = message.sampling
        if sampling is None:
            raise ProtocolViolation("OPEN of the last stage has no sampling parameters")
        resident = self.residents.of(message.plan.model)
        if not resident:
            raise NoPeer("this peer has no layers of this model in memory", hint="place it first")
        vocab = resident[0].card.spec.vocab
        check_sampling(sampling, vocab)
        if not needs_past_tokens(sampling, message.answered):
            return partial(Sampler, sampling)
        ids = token_ids(payload, message.prompt_tokens + message.answered, vocab)
        prompt, answer = ids[: message.prompt_tokens], ids[message.prompt_tokens :]
        return lambda: Sampler(sampling, prompt.tolist(), answer.tolist())

    def _reserve(self, message: Open, make_sampler: Callable[[], Sampler] | None) -> PreparingStage:
        """Reserve the KV of a stage, or take over that of an older epoch."""
        layers = message.plan.stages[message.stage].layers
        last = message.stage == len(message.plan.stages) - 1
        tokens = message.prompt_tokens + message.max_tokens
        expires = self.leases.expiry(message.lease_ms)
        session_kv = self.kv_manager.enter(message.session, message.coordinator, message.epoch, expires)
        try:
            model, chunk = message.plan.model, message.plan.prefill_chunk_tokens
            resident = self.residents.find(model, layers)
            cache = self.kv_manager.adopt(session_kv, resident, model, layers, tokens, chunk) if message.resume else None
            if cache is None:
                cache = self.kv_manager.reserve(session_kv, resident, layers, tokens, chunk)
        finally:
            self.kv_manager.forget_if_empty(session_kv)
        if not last:
            self.kv_manager.assign_log(session_kv, cache, message.plan.wire_dtype)
        if cache.log is not None:
            cache.log.pinned = message.resume
        assert cache.lease.resident is not None
        accepted = PreparingStage(message, session_kv, cache, cache.lease.resident, make_sampler)
        self.preparing.begin(accepted)
        return accepted


async def _repeated(preparing: PreparingStage, request: int) -> Opened:
    """Answer a repeated OPEN of a stage that is being prepared."""
    active = await asyncio.shield(preparing.outcome)
    return active.opened(request)


def _active_stage(accepted: PreparingStage, stage: Stage, sampler: Sampler | None) -> ActiveStage:
    message, cache = accepted.open, accepted.cache
    held_from, held = cache.startable
    machine = StageSession(
        prompt_tokens=message.prompt_tokens,
        known_tokens=message.prompt_tokens + message.answered,
        max_tokens=message.prompt_tokens + message.max_tokens,
        token_credit=message.credit,
        first=message.stage == 0,
        last=message.stage == len(message.plan.stages) - 1,
        state=StageState.OPEN if message.resume else StageState.IDLE,
        held=held,
        held_from=held_from,
        chunk_tokens=message.plan.prefill_chunk_tokens,
    )
    if cache.log is not None:
        machine.kept_from, machine.kept_to = cache.log.kept_from, cache.log.kept_to
    return ActiveStage(message, accepted.resident, stage, cache, sampler, machine)


def _described(error: Exception) -> MeshdError:
    return error if isinstance(error, MeshdError) else MeshdError(f"the stage could not be prepared: {error}")
