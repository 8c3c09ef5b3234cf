"""Composes the agents of one peer. The daemon gives it a real device and network, the simulator simulated ones."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from logging import getLogger

from meshd.agents.admin.event_relay import EventRelay
from meshd.agents.admin.listings import Listings
from meshd.agents.admin.metrics import EventMetrics, PeerCollector
from meshd.agents.admin.model_files import PullEvents
from meshd.agents.admin.plan_rows import PlanRows
from meshd.agents.admin.reach import ReachChecker
from meshd.agents.admin.story_collector import StoryCollector
from meshd.agents.admin.trace_collector import TraceCollector
from meshd.agents.device.compute import ComputeQueue
from meshd.agents.device.sensors import DeviceSensors
from meshd.agents.links.link_table import STOPS
from meshd.agents.links.links import Links
from meshd.agents.links.open import DialOutcome
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.adverts.publisher import SelfDescription
from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.membership import Membership
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.membership.sources import Source
from meshd.agents.observe.rows import RowFeed
from meshd.agents.observe.spans import Spans
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.observe.work import WorkMeter
from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.free_memory import FreeMemory
from meshd.agents.placement.keeper import Keeper
from meshd.agents.placement.loader import Loader
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.preload import Preload
from meshd.agents.placement.resident import HoldingChanges, ResidentModels
from meshd.agents.placement.restart.placements import Placements
from meshd.agents.placement.restart.restore import Restorer
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.serve import RateLimiter, WeightServer
from meshd.agents.session.admission import Admission
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.locator import Locator
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.session.plan.drain import Drainer
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.agents.session.plan.route import Router
from meshd.agents.signals import Signal
from meshd.agents.stage.host import StageHost
from meshd.agents.stage.learning import StepLearning
from meshd.agents.supervisor import Supervisor
from meshd.agents.trust.exchange import TrustExchange
from meshd.agents.trust.trust import Trust
from meshd.clock import Clock
from meshd.kernels.backend import Backend
from meshd.models.cards import shown_to_peers
from meshd.models.store.progress import PullProgress
from meshd.protocol.messages import Error, HandedOver, HandOver, Hello, Token
from meshd.telemetry import Telemetry
from meshd.types import Advert, Capability, DeviceStatus, PeerId, SessionId

log = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerSignals:
    """Signals that connect an agent to agents that are constructed after it."""

    link_up: Signal[PeerId, Hello, tuple[str, int]] = field(default_factory=Signal)
    link_down: Signal[PeerId, str] = field(default_factory=Signal)
    dialled: Signal[DialOutcome] = field(default_factory=Signal)
    """What a dial showed, or why another device's connection made no link."""
    peer_gone: Signal[PeerId, str] = field(default_factory=Signal)
    """A peer's link is down, and the peer table already has this change."""
    advert_received: Signal[Advert] = field(default_factory=Signal)
    changed: Signal[()] = field(default_factory=Signal[()])
    """Something in this peer's advert changed."""
    sessions_changed: Signal[()] = field(default_factory=Signal[()])
    """A stage session opened or closed on this peer."""
    layers_changed: Signal[()] = field(default_factory=Signal[()])
    """Layers were loaded or freed on this peer."""
    pull_progress: Signal[PullProgress] = field(default_factory=Signal)
    """A step of a pull of a model to this peer's disk."""
    orphaned: Signal[SessionId, PeerId] = field(default_factory=Signal)
    """The coordinator of a session is gone, and this peer has the session's record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """The settings that agents need, and the limits of a peer's queues."""

    models: tuple[str, ...] = ()
    """References of the models to place at the start."""
    mirror: bool = False
    copies: int
    """Number of copies of each layer that the keeper maintains in the cluster."""
    max_sessions: int
    queue_limit: int
    queue_wait_s: float
    outputs_limit_bytes: int
    """Memory for stage outputs that are kept in case they must be sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a peer's agents are composed from. The simulator passes a simulated device, network and storage."""

    me: PeerId
    name: str
    version: str
    incarnation: int
    settings: PeerSettings
    signals: PeerSignals
    """`links`, `prober` and `library` must have been constructed with the same signals."""
    clock: Clock
    telemetry: Telemetry
    capability: Capability
    """This device's capability, measured when the daemon starts."""
    measure_free_bytes: Callable[[], int]
    """Measures the free memory, in bytes."""
    backend: Backend
    compute: ComputeQueue
    links: Links
    prober: LinkProber
    table: PeerTable
    library: ModelLibrary
    weights: WeightProvider
    devices: DeviceList
    """The devices that may send jobs over MQTT."""
    placements: Placements
    """What was placed on this peer when it last ran."""
    trust: Trust
    supervisor: Supervisor
    sensors: DeviceSensors | None = None
    """None: what the device shows of itself is not read."""
    router: type[Router] = Router
    coordinator: type[Coordinator] = Coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """All agents of one peer."""

    events: EventStream
    story: Story
    holdings: ResidentModels
    compute: ComputeQueue
    links: Links
    prober: LinkProber
    library: ModelLibrary
    stages: StageHost
    drainer: Drainer
    membership: Membership
    devices: DeviceList
    loader: Loader
    weight_server: WeightServer
    placer: PlacementClient
    router: Router
    preload: Preload
    restorer: Restorer
    journal: JournalWriters
    deputy: Deputy
    locator: Locator
    coordinator: Coordinator
    keeper: Keeper
    story_collector: StoryCollector
    trace_collector: TraceCollector
    listings: Listings
    rows: RowFeed
    relay: EventRelay
    reach: ReachChecker
    exchange: TrustExchange
    work: WorkMeter
    sensors: DeviceSensors | None
    supervisor: Supervisor

    def register(self) -> None:
        """Register the agents' handlers of messages from other peers."""
        for agent in (
            self.library,
            self.weight_server,
            self.stages,
            self.loader,
            self.membership,
            self.devices,
            self.coordinator,
            self.deputy,
            self.drainer,
            self.story_collector,
            self.trace_collector,
            self.relay,
            self.reach,
            self.exchange,
        ):
            agent.register()
        self.locator.register(self.coordinator)
        self.links.register(Token, self._on_token)
        self.links.register(HandOver, self._on_hand_over)
        self.links.register(Error, self._on_error)

    @asynccontextmanager
    async def running(self, sources: Iterable[Source]) -> AsyncIterator[None]:
        """Run all agents inside the block, restarting those that fail. On exit they are cancelled and their memory is freed."""
        supervise = self.supervisor.supervise
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self.links.run(supervise)),
                    tasks.create_task(supervise("models on disk", self.library.run)),
                    tasks.create_task(self.membership.run(sources, supervise)),
                    tasks.create_task(supervise("keys of MQTT devices", self.devices.run)),
                    tasks.create_task(supervise("link measurements", self.prober.run)),
                    tasks.create_task(supervise("stages", self.stages.run)),
                    tasks.create_task(supervise("coordinator", self.coordinator.run)),
                    tasks.create_task(supervise("journal", self.journal.run)),
                    tasks.create_task(supervise("deputy", self.deputy.run)),
                    tasks.create_task(supervise("models to place", self.preload.run)),
                    tasks.create_task(supervise("layers of before", self.restorer.run)),
                    tasks.create_task(supervise("placement keeper", self.keeper.run)),
                    tasks.create_task(supervise("rows for readers of events", self.rows.run)),
                    tasks.create_task(supervise("events of other peers", self.relay.run)),
                    tasks.create_task(supervise("rotations", self.exchange.run)),
                    tasks.create_task(supervise("known peers", self.exchange.trust.known.run)),
                    tasks.create_task(supervise("work of the stages", self.work.run)),
                ]
                if self.sensors is not None:
                    running.append(tasks.create_task(supervise("sensors of the device", self.sensors.run)))
                try:
                    yield
                finally:
                    for task in running:
                        task.cancel()
        finally:
            self.stages.close()
            await self.coordinator.close()
            await self.library.close()
            await self.loader.close()
            await self.weight_server.close()
            self.compute.close()

    async def leave(self, close_clients: Callable[[], Awaitable[None]]) -> None:
        """Hand over sessions, close the clients' connections, then close the links.

        The clients' connections are closed first, because a coordinator without links would send clients an error about lost peers.
        """
        self.journal.flush()
        self.coordinator.leave()
        await close_clients()
        await self.router.close()
        await self.links.close(STOPS)

    async def drain(self, timeout_s: float, on_waiting: Callable[[str], None]) -> None:
        """Refuse new work, and wait at most `timeout_s` until all sessions of this peer have ended or moved to other peers.

        `on_waiting` is called with a description of what this peer waits for.
        """
        await self.drainer.leave(timeout_s, on_waiting, answers=lambda: len(self.coordinator.answers))

    def _on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        # Stages come before the coordinator: the first stage must start its next step before the token is sent to the client.
        self.stages.on_token(sender, message, payload)
        self.coordinator.on_token(sender, message, payload)

    def _on_hand_over(self, sender: PeerId, message: HandOver, payload: memoryview) -> HandedOver:
        has_kv, has_record = self.stages.on_hand_over(sender, message), self.deputy.on_hand_over(sender, message)
        return HandedOver(request=message.request, known=has_kv or has_record)

    def _on_error(self, sender: PeerId, message: Error, payload: memoryview) -> None:
        if message.request:
            return  # the reply to a request that already timed out or was cancelled
        log.warning("%s (%.8s) reports: %s (%s)", self.membership.name_of(sender), sender, message.message, message.code)
        if message.session is not None:
            self.stages.on_error(sender, message)
            self.coordinator.on_error(sender, message)


def compose(parts: Parts) -> Peer:
    """Construct a peer's agents and connect them. Must be called inside the event loop."""
    signals, settings, clock, links, library = parts.signals, parts.settings, parts.clock, parts.links, parts.library
    story, events, spans = Story(clock), EventStream(parts.me, parts.name, clock), Spans()
    holdings, work = ResidentModels(), WorkMeter(events, clock)
    memory = FreeMemory(parts.capability.memory_free_bytes, holdings, parts.measure_free_bytes, clock)
    stages = _stages(parts, holdings, story, spans, work, coordinates=lambda session: session in coordinator.answers)
    drainer = Drainer(links=links, clock=clock, stages=lambda: stages.sessions, on_change=signals.changed)
    loader = _loader(parts, holdings, memory, drainer)
    membership = _membership(parts, holdings, memory, stages, drainer, events)
    names, adverts, me = membership.name_of, membership.adverts, parts.me
    placer = PlacementClient(links=links, library=library, adverts=adverts, names=names, clock=clock)
    router = parts.router(me=parts.me, library=library, placer=placer, adverts=adverts, suspects=membership.suspects)
    preload = Preload(settings.models, library, placer, router.covered, clock)
    journal = JournalWriters(me, links, clock, adverts)

    def coordinates(session: SessionId) -> bool:
        return session in coordinator.answers

    deputy = Deputy(links, clock, on_orphan=signals.orphaned, on_dropped=journal.on_dropped, coordinates=coordinates)
    locator = Locator(me, links, deputy, clock)
    coordinator = _coordinator(parts, router, preload, journal, deputy, locator, membership, drainer, story, spans)
    listings = Listings(membership, library, coordinator, stages, PlanRows(adverts, names))
    rows = RowFeed(events, listings.by_key, clock)
    restorer = Restorer(me=parts.me, placements=parts.placements, loader=loader, placer=placer, adverts=adverts, clock=clock)
    peer = Peer(
        events=events,
        story=story,
        holdings=holdings,
        compute=parts.compute,
        links=links,
        prober=parts.prober,
        library=library,
        stages=stages,
        drainer=drainer,
        membership=membership,
        devices=parts.devices,
        loader=loader,
        weight_server=WeightServer(
            links, library, RateLimiter(clock, busy=lambda: stages.sessions > 0, link_stats=parts.prober.stats)
        ),
        placer=placer,
        router=router,
        preload=preload,
        restorer=restorer,
        journal=journal,
        deputy=deputy,
        locator=locator,
        coordinator=coordinator,
        keeper=_keeper(parts, membership),
        story_collector=StoryCollector(parts.me, links, story, clock, names),
        trace_collector=TraceCollector(parts.me, links, spans, story, names),
        listings=listings,
        rows=rows,
        relay=EventRelay(links, events, rows, names, clock),
        reach=ReachChecker(links, membership, clock),
        exchange=TrustExchange(
            parts.trust, links, clock, membership.notices.add, membership.notices.withdraw, membership.events.publish
        ),
        work=work,
        sensors=parts.sensors,
        supervisor=parts.supervisor,
    )
    _subscribe(parts, memory, peer)
    _measure(parts, memory, peer)
    return peer


def _keeper(parts: Parts, membership: Membership) -> Keeper:
    return Keeper(
        me=parts.me,
        links=parts.links,
        adverts=membership.adverts,
        suspects=membership.suspects,
        cards=parts.library.cards,
        names=membership.name_of,
        clock=parts.clock,
        copies=parts.settings.copies,
        placements=parts.placements,
    )


def _stages(
    parts: Parts,
    holdings: ResidentModels,
    story: Story,
    spans: Spans,
    work: WorkMeter,
    coordinates: Callable[[SessionId], bool],
) -> StageHost:
    links = parts.links
    return StageHost(
        me=parts.me,
        links=links,
        residents=holdings,
        learning=StepLearning(parts.me, parts.capability.rates, parts.clock),
        compute=parts.compute,
        clock=parts.clock,
        telemetry=parts.telemetry,
        story=story,
        spans=spans,
        work=work,
        outputs_limit_bytes=parts.settings.outputs_limit_bytes,
        may_coordinate=lambda peer, session: coordinates(session) if peer == parts.me else peer in links.peers(),
        on_change=parts.signals.sessions_changed,
    )


def _loader(parts: Parts, holdings: ResidentModels, memory: FreeMemory, drainer: Drainer) -> Loader:
    return Loader(
        links=parts.links,
        library=parts.library,
        weights=parts.weights,
        residents=holdings,
        backend=parts.backend,
        compute=parts.compute,
        clock=parts.clock,
        spare_bytes=memory.spare_bytes,
        on_change=parts.signals.layers_changed,
        placements=parts.placements,
        draining=lambda: drainer.draining,
    )


def _membership(
    parts: Parts, holdings: ResidentModels, memory: FreeMemory, stages: StageHost, drainer: Drainer, events: EventStream
) -> Membership:
    return Membership(
        description=SelfDescription(
            peer=parts.me,
            name=parts.name,
            incarnation=parts.incarnation,
            version=parts.version,
            capability=parts.capability,
            memory_free_bytes=memory.free_bytes,
            holdings=lambda: tuple(resident.holding() for resident in holdings),
            models=lambda: tuple(map(shown_to_peers, parts.library.local.values())),
            learned=stages.learning.learned,
            sessions=lambda: stages.sessions,
            draining=lambda: drainer.draining,
            device=parts.sensors.latest if parts.sensors is not None else DeviceStatus,
        ),
        links=parts.links,
        prober=parts.prober,
        clock=parts.clock,
        events=events,
        on_advert=parts.signals.advert_received,
        on_gone=parts.signals.peer_gone,
        table=parts.table,
    )


def _coordinator(
    parts: Parts,
    router: Router,
    preload: Preload,
    journal: JournalWriters,
    deputy: Deputy,
    locator: Locator,
    membership: Membership,
    drainer: Drainer,
    story: Story,
    spans: Spans,
) -> Coordinator:
    settings, clock, adverts = parts.settings, parts.clock, membership.adverts
    retrier = PlanRetrier(
        parts.links,
        router,
        adverts,
        clock,
        settings.mirror,
        take=partial(locator.fetch, take=True),
        coordinated_elsewhere=locator.coordinated_elsewhere,
    )
    return parts.coordinator(
        me=parts.me,
        links=parts.links,
        library=parts.library,
        router=router,
        admission=Admission(
            running=settings.max_sessions, waiting=settings.queue_limit, wait_s=settings.queue_wait_s, now=parts.clock.monotonic
        ),
        retrier=retrier,
        mover=Mover(retrier, router, adverts, clock),
        journal=journal,
        deputy=deputy,
        locator=locator,
        clock=clock,
        telemetry=parts.telemetry,
        story=story,
        spans=spans,
        events=membership.events,
        names=membership.name_of,
        readiness_of=preload.readiness,
        leaving=lambda: drainer.leaving,
    )


def _subscribe(parts: Parts, memory: FreeMemory, peer: Peer) -> None:
    signals, membership = parts.signals, peer.membership

    def peer_gone(gone: PeerId, reason: str) -> None:
        # The coordinator comes first, since it starts the recovery, which the other agents must not delay.
        peer.coordinator.on_peer_gone(gone, reason)
        peer.stages.on_peer_gone(gone, reason)
        peer.journal.on_peer_gone(gone)
        peer.deputy.on_peer_gone(gone)
        peer.keeper.changed()
        peer.relay.on_peer_gone(gone)

    signals.link_up.subscribe(membership.on_up, peer.exchange.on_up, lambda other, hello, address: peer.devices.greet(other))
    signals.link_down.subscribe(membership.on_down, peer.exchange.on_down)
    signals.dialled.subscribe(membership.on_dialled)
    signals.peer_gone.subscribe(peer_gone)
    signals.advert_received.subscribe(peer.keeper.note)
    signals.changed.subscribe(membership.changed)
    signals.sessions_changed.subscribe(peer.loader.sweep, membership.changed)
    signals.layers_changed.subscribe(memory.forget, HoldingChanges(peer.holdings, peer.events).changed, membership.changed)
    signals.pull_progress.subscribe(PullEvents(peer.events, parts.clock).on_step)
    signals.orphaned.subscribe(peer.coordinator.take_over)


def _measure(parts: Parts, memory: FreeMemory, peer: Peer) -> None:
    """Add the metrics of the agents to the peer's telemetry."""
    peer.events.on_publish = EventMetrics(parts.telemetry, parts.clock).count
    parts.telemetry.collect_from(
        PeerCollector(
            table=parts.table,
            links=parts.links,
            prober=parts.prober,
            holdings=peer.holdings,
            memory=memory,
            memory_total_bytes=parts.capability.memory_total_bytes,
            stages=peer.stages,
            coordinator=peer.coordinator,
            journal=peer.journal,
            deputy=peer.deputy,
            stream=peer.events,
            supervisor=parts.supervisor,
        )
    )
