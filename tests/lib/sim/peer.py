"""One simulated peer: the real agents, composed over the simulated network, clock and compute."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from meshd.agents.links.rpc import MAX_REQUESTS, MAX_TASKS
from meshd.agents.membership.table import PeerTable
from meshd.agents.placement.model_library import ModelLibrary, ModelText
from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.service import MeshOptions
from meshd.agents.session.answer import Answer
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.store import MAX_RECORDS
from meshd.agents.session.plan.candidates import PeerRules
from meshd.agents.session.plan.resume import RecoveryPlan, RecoveryRequest
from meshd.agents.session.plan.route import Router
from meshd.agents.session.recovery import Recovered
from meshd.agents.stage.steps import ActiveStage
from meshd.compose import Parts, PeerSettings, PeerSignals, compose
from meshd.kernels.kv import BlockTable
from meshd.types import Advert, Capability, LayerRange, ModelCard, ModelId, PeerId, Plan, Rates
from sim.compute import SimCompute
from sim.loop import Owner, SimClock, SimLoop
from sim.network import SimLinks, SimNetwork, SimProber
from sim.toy import MIB, Meter, Speed, ToyBackend, toy_text

if TYPE_CHECKING:
    from sim.checks import Checks

T = TypeVar("T")
MAX_SESSIONS, QUEUE_LIMIT, QUEUE_WAIT_S = 16, 64, 60.0
DRAIN_S = 8.0
READ_LAYER_S = 0.1


@dataclass(slots=True)
class PeerSpec:
    """What a peer is; the same over all its lives."""

    id: PeerId
    name: str
    memory_bytes: int = 1024 * MIB
    speed: Speed = field(default_factory=Speed)
    outputs_bytes: int = 64 * 1024
    copies: int = 2


class NoTelemetry:
    """Counts nothing."""

    def __getattr__(self, name: str) -> Any:
        return _nothing


def _nothing(*_: object, **__: object) -> None:
    pass


class SimFile:
    """A model's file: there is nothing in it."""

    def tensor(self, name: str) -> Any:
        raise NotImplementedError

    def __contains__(self, name: str) -> bool:
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def release_pages(self) -> None:
        """It has none."""

    def close(self) -> None:
        pass


class SimStore:
    """Every peer has the models' files on its disk."""

    def __init__(self, cards: tuple[ModelCard, ...]) -> None:
        self._cards = {card.id: card for card in cards}

    def get(self, key: str) -> ModelCard | None:
        return next((card for card in self._cards.values() if key in (card.id, card.ref, card.name)), None)

    def list(self) -> list[ModelCard]:
        return list(self._cards.values())

    def open(self, stored: ModelCard) -> SimFile:
        return SimFile()


class SimLibrary(ModelLibrary):
    """The library over files that are not read."""

    async def refresh(self) -> None:
        self.local = {card.id: card for card in self.store.list()}  # type: ignore[misc]

    async def text(self, card: ModelCard) -> ModelText:
        return toy_text(card)

    def open(self, card: ModelCard) -> Any:
        return SimFile()


class SimWeights:
    """What a placement uses of `meshd.agents.placement.weights.provider.WeightProvider`: everything is on disk."""

    def __init__(self, cards: tuple[ModelCard, ...], clock: SimClock, rng: random.Random) -> None:
        self._cards = {card.id: card for card in cards}
        self._clock = clock
        self._rng = rng

    async def card(self, model: ModelId, ref: str) -> ModelCard:
        return self._cards[model]

    async def fill(self, card: ModelCard, ref: str, layers: LayerRange, progress: Callable[[float], None]) -> None:
        for share in (0.5, 1.0):
            await self._clock.sleep(self._rng.random() * READ_LAYER_S * len(layers))
            progress(share)


class CountingRouter(Router):
    """The router, how often it decided, and how much of our real time that took."""

    plans = 0
    recoveries = 0
    searches = 0
    searching_s = 0.0

    def _timed(self, search: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return search()
        finally:
            self.searches += 1
            self.searching_s += time.perf_counter() - began

    def _route(self, card: ModelCard, mesh: MeshOptions, context: int, prompt_tokens: int) -> Plan:
        search = super()._route
        return self._timed(lambda: search(card, mesh, context, prompt_tokens))

    def _resident(
        self, card: ModelCard, mesh: MeshOptions, need: RecoveryRequest, allowed: PeerRules, silent: Sequence[Advert] = ()
    ) -> RecoveryPlan | None:
        search = super()._resident
        return self._timed(lambda: search(card, mesh, need, allowed, silent))

    async def plan_for(self, card: ModelCard, mesh: MeshOptions, *, prompt_tokens: int, max_tokens: int) -> Plan:
        self.plans += 1
        return await super().plan_for(card, mesh, prompt_tokens=prompt_tokens, max_tokens=max_tokens)

    async def recover(self, card: ModelCard, mesh: MeshOptions, need: RecoveryRequest) -> RecoveryPlan:
        self.recoveries += 1
        return await super().recover(card, mesh, need)

    def better(self, card: ModelCard, mesh: MeshOptions, need: RecoveryRequest) -> RecoveryPlan | None:
        self.recoveries += 1
        search = super().better
        return self._timed(lambda: search(card, mesh, need))


class CountingCoordinator(Coordinator):
    """The coordinator, and how its answers went on after changes of plan."""

    methods: Counter[str]

    def _on_recovered(self, answer: Answer, recovered: Recovered) -> None:
        self.methods[recovered.method] += 1
        super()._on_recovered(answer, recovered)


class Life:
    """One incarnation of a peer. Must be constructed in its owner's context."""

    def __init__(
        self,
        loop: SimLoop,
        network: SimNetwork,
        rng: random.Random,
        meter: Meter,
        owner: Owner,
        spec: PeerSpec,
        cards: tuple[ModelCard, ...],
    ) -> None:
        self.spec = spec
        self.owner = owner
        self.loop = loop
        self.dead = False
        self.leaving = False
        self.handlers: list[asyncio.Task[None]] = []
        """Of clients' connections."""
        self.usual: Counter[str] = Counter()
        """Tasks that it always has."""
        self.clock = clock = SimClock(loop, random.Random(rng.random()))
        self.incarnation = int.from_bytes(clock.random_bytes(8), "big") >> 1
        self.compute = SimCompute(loop, random.Random(rng.random()), meter, spec.speed)
        signals = PeerSignals()
        self.links = SimLinks(
            network, owner, spec.id, spec.name, self.incarnation, clock, on_up=signals.link_up, on_down=signals.link_down
        )
        self.agents = compose(self._parts(network, rng, meter, cards, signals))
        self.stages = self.agents.stages
        self.holdings = self.agents.holdings
        self.drainer = self.agents.drainer
        self.router = cast("CountingRouter", self.agents.router)
        self.coordinator = cast("CountingCoordinator", self.agents.coordinator)
        self.coordinator.methods = Counter()

    def _parts(
        self, network: SimNetwork, rng: random.Random, meter: Meter, cards: tuple[ModelCard, ...], signals: PeerSignals
    ) -> Parts:
        """What stands for the device, its network and its files."""
        table = PeerTable()
        links: Any = self.links
        prober: Any = SimProber(self.links, network, self.clock, on_change=signals.changed)
        store: Any = SimStore(cards)
        weights: Any = SimWeights(cards, self.clock, random.Random(rng.random()))
        backend: Any = ToyBackend(meter, self.spec.speed)
        return Parts(
            me=self.spec.id,
            name=self.spec.name,
            version="sim",
            incarnation=self.incarnation,
            settings=PeerSettings(
                copies=self.spec.copies,
                max_sessions=MAX_SESSIONS,
                queue_limit=QUEUE_LIMIT,
                queue_wait_s=QUEUE_WAIT_S,
                outputs_limit_bytes=self.spec.outputs_bytes,
            ),
            signals=signals,
            clock=self.clock,
            telemetry=cast("Any", NoTelemetry()),
            capability=_capability(self.spec),
            measure_free_bytes=lambda: self.spec.memory_bytes,
            backend=backend,
            compute=self.compute,
            links=links,
            prober=prober,
            table=table,
            library=SimLibrary(links=links, store=store, adverts=table.adverts, on_change=signals.changed),
            weights=weights,
            router=CountingRouter,
            coordinator=CountingCoordinator,
        )

    async def run(self) -> None:
        """Be up until cancelled."""
        self.agents.register()
        await self.agents.library.refresh()
        async with self.agents.running([]):
            await asyncio.Event().wait()

    async def leave(self) -> None:
        """As a daemon does on SIGTERM."""
        self.leaving = True
        await self.agents.drain(DRAIN_S, lambda text: None)
        await self.agents.leave(self._close_connections)

    async def _close_connections(self) -> None:
        """Cancel the handlers of clients' connections, as the HTTP server does."""
        handlers = [handler for handler in self.handlers if not handler.done()]
        for handler in handlers:
            handler.cancel()
        if handlers:
            await asyncio.wait(handlers, timeout=5.0)

    # What the checks look at

    def tables(self, load: ResidentLayers) -> list[BlockTable]:
        """Of all KV that somebody uses in this load: what is kept of sessions, and what a step is under way on."""
        leases = {id(cache.lease): cache.lease for session_kv in self.stages._kv_manager for cache in session_kv.caches}
        for active in (*self.stages._active.values(), *self._computing()):
            leases[id(active.cache.lease)] = active.cache.lease
        return [lease.table for lease in leases.values() if lease.resident is load]

    def _computing(self) -> Iterator[ActiveStage]:
        """Stages that have ended, perhaps, while a step of theirs waits or computes."""
        for active, step in (*self.stages._ready._decodes, *self.stages._ready._prefills):
            if active.machine.computing is step:
                yield active
        for work in self.compute.works():
            if isinstance(work, partial) and work.args and isinstance(work.args[0], ActiveStage):
                yield work.args[0]

    def queues(self) -> list[tuple[str, int, int]]:
        """(what, how many wait, how many may)."""
        coordinator, links = self.coordinator, self.links.dispatcher
        rows = [
            ("answers", len(coordinator.answers), MAX_SESSIONS + QUEUE_LIMIT),
            ("retained answers", len(coordinator.retained), 256),
            ("requests of peers", len(links._tasks), MAX_TASKS),
            ("own requests", len(links._waiting), MAX_REQUESTS),
            ("journal entries", len(self.agents.journal), MAX_SESSIONS + QUEUE_LIMIT + 2 * 256),
            ("steps that are ready", len(self.stages._ready._decodes) + len(self.stages._ready._prefills), 4 * MAX_SESSIONS),
            ("records of others", len(self.agents.deputy.store), MAX_RECORDS),
            ("bytes of kept outputs", self.stages._kv_manager.outputs.used_bytes, self.spec.outputs_bytes),
        ]
        rows += [("tasks of an answer", len(answer.tasks), 64) for answer in coordinator.answers.values()]
        rows += [("caches of a session", len(session_kv.caches), 32) for session_kv in self.stages._kv_manager]
        return rows

    def left_over(self) -> list[str]:
        """What should be gone when all sessions are over."""
        coordinator = self.coordinator
        left = [f"answer {answer.session[:6]} {answer.machine.state.value}" for answer in coordinator.answers.values()]
        left += [f"stage {active.open.stage} of {active.open.session[:6]}" for active in self.stages._active.values()]
        left += [
            f"a lease of {session_kv.session[:6]} with {len(session_kv.caches)} caches" for session_kv in self.stages._kv_manager
        ]
        if coordinator.admission.running or coordinator.admission.waiting:
            left.append(f"{coordinator.admission.running} tickets taken, {coordinator.admission.waiting} waiting")
        if self.stages._kv_manager.outputs.used_bytes or self.stages._kv_manager.outputs._logs:
            left.append(f"{self.stages._kv_manager.outputs.used_bytes} bytes of kept outputs")
        if any(load.sessions for load in self.holdings):
            left.append("loads that count sessions")
        if self.usual and (more := self.tasks() - self.usual):
            left.append(f"more tasks than there were: {dict(more)}")
        return left

    def tasks(self) -> Counter[str]:
        """Those that are not done, by what they run."""
        return Counter(str(getattr(task.get_coro(), "__qualname__", task)) for task in self.owner.tasks.values() if not task.done())


def _capability(spec: PeerSpec) -> Capability:
    return Capability(
        backend="toy",
        processor="sim",
        threads=1,
        memory_total_bytes=spec.memory_bytes,
        memory_free_bytes=spec.memory_bytes,
        rates=Rates(
            decode_bytes_s=50 * MIB / spec.speed.token_layer_s,
            prefill_flops_s=25 * MIB / (spec.speed.token_layer_s * spec.speed.prefill_share),
            memory_bytes_s=1e10,
            attention_bytes_s=1e9,
            disk_bytes_s=1e9,
            layer_overhead_s=1e-5,
        ),
    )


class SimPeer:
    """A device: its process may die and start again, freeze, and go on."""

    def __init__(
        self,
        loop: SimLoop,
        network: SimNetwork,
        rng: random.Random,
        meter: Meter,
        spec: PeerSpec,
        cards: tuple[ModelCard, ...],
        checks: "Checks",
    ) -> None:
        self.spec = spec
        self.life: Life | None = None
        self.lives = 0
        self.frozen = False
        self._loop = loop
        self._network = network
        self._rng = rng
        self._meter = meter
        self._cards = cards
        self._checks = checks
        self._done = Counter[str]()
        self._searching_s = 0.0

    @property
    def id(self) -> PeerId:
        return self.spec.id

    @property
    def name(self) -> str:
        return self.spec.name

    def done(self) -> Counter[str]:
        """What was done in all lives."""
        return self._done + (_done(self.life) if self.life is not None else Counter())

    @property
    def searching_s(self) -> float:
        """Real time that the router took for its decisions, in all lives."""
        return self._searching_s + (self.life.router.searching_s if self.life is not None else 0.0)

    def start(self) -> Life:
        """A new incarnation, with nothing in memory."""
        assert self.life is None
        self.lives += 1
        owner = Owner(self.spec.name)
        context = owner.context()
        self.life = life = context.run(
            Life, self._loop, self._network, random.Random(self._rng.random()), self._meter, owner, self.spec, self._cards
        )
        owner.after = partial(self._checks.after, life)
        self._loop.create_task(life.run(), context=context)  # its owner keeps it
        return life

    def kill(self, *, silently: bool = False) -> None:
        """SIGKILL, or, silently, a power cut: the others are told nothing."""
        life, self.life = self.life, None
        if life is None:
            return
        self._done += _done(life)
        self._searching_s += life.router.searching_s
        life.owner.stopped = True
        self._network.detach(life.links, "connection closed", silently=silently)
        self._bury(life)
        self.frozen = False

    async def stop(self) -> None:
        """SIGTERM."""
        life = self.life
        if life is None:
            return
        leaving = self._loop.create_task(life.leave(), context=life.owner.context())
        await asyncio.wait([leaving], timeout=30.0)
        if self.life is life:
            self.kill()

    def set_slow(self, slow: float) -> None:
        """So many times slower than usual."""
        self.spec.speed.slow = slow
        if self.life is not None:
            self.life.compute.speed_changed()

    def freeze(self) -> None:
        if self.life is not None and not self.frozen:
            self.frozen = self.life.owner.stopped = True
            self._network.stands_still(self.id)

    def thaw(self) -> None:
        if self.life is not None and self.frozen:
            self.frozen = False
            self._loop.resume(self.life.owner)
            self._network.moves_again(self.id)

    def _bury(self, life: Life) -> None:
        """What a killed process leaves is cancelled where nobody hears of it: it has no links, and nothing of it is checked."""
        life.dead = life.owner.dead = True
        life.owner.after = None
        self._loop.resume(life.owner)
        for task in list(life.owner.tasks.values()):
            task.cancel()


def _done(life: Life) -> Counter[str]:
    router = life.router
    counted = Counter(steps=life.compute.jobs, plans=router.plans, recoveries=router.recoveries, searches=router.searches)
    return life.coordinator.methods + counted
