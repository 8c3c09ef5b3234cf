"""Composes the agents of one peer: constructs them and connects them."""

from collections.abc import Callable
from functools import partial

from meshd.agents.admin.event_relay import EventRelay
from meshd.agents.admin.listings import Listings
from meshd.agents.admin.metrics import EventMetrics, PeerCollector
from meshd.agents.admin.model_files import PullEvents
from meshd.agents.admin.plan_rows import PlanRows
from meshd.agents.admin.reach import ReachChecker
from meshd.agents.admin.story_collector import StoryCollector
from meshd.agents.admin.trace_collector import TraceCollector
from meshd.agents.membership.adverts.publisher import SelfDescription
from meshd.agents.membership.membership import Membership
from meshd.agents.observe.rows import RowFeed
from meshd.agents.observe.spans import Spans
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.observe.work import WorkMeter
from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.free_memory import FreeMemory
from meshd.agents.placement.keeper import Keeper
from meshd.agents.placement.loader import Loader
from meshd.agents.placement.preload import Preload
from meshd.agents.placement.ready.stages import SharedStages
from meshd.agents.placement.resident import HoldingChanges, ResidentModels
from meshd.agents.placement.restart.restore import Restorer
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
from meshd.agents.stage.batch.learning import StepLearning
from meshd.agents.stage.host import StageHost
from meshd.agents.trust.exchange import TrustExchange
from meshd.models.cards import shown_to_peers
from meshd.peer.parts import Parts
from meshd.peer.peer import Peer
from meshd.types import Advert, DeviceStatus, ModelId, ModelSpec, PeerId, SessionId


def compose(parts: Parts) -> Peer:
    """Construct a peer's agents and connect them. Must be called inside the event loop."""
    signals, settings, clock, links, library = parts.signals, parts.settings, parts.clock, parts.links, parts.library
    story, events, spans = Story(clock), EventStream(parts.me, parts.name, clock), Spans()
    holdings = ResidentModels(parts.backend.arena(parts.capability.memory_free_bytes), numerics=parts.capability.numerics)
    work = WorkMeter(events, clock)
    memory = FreeMemory(parts.capability.memory_free_bytes, holdings, parts.measure_free_bytes, clock)

    def coordinates(session: SessionId) -> bool:
        return session in coordinator.answers

    def stages_changed() -> None:
        memory.forget()
        signals.sessions_changed()

    shared_stages = SharedStages(holdings, memory.spare_bytes, stages_changed)
    stages = _stages(parts, holdings, shared_stages, memory, story, spans, work, coordinates)
    drainer = Drainer(links=links, clock=clock, stages=lambda: stages.sessions, on_change=signals.changed)
    loader = _loader(parts, holdings, shared_stages, memory, drainer)
    membership = _membership(parts, holdings, memory, stages, drainer, events)
    names, adverts = membership.name_of, membership.adverts
    placer = PlacementClient(links=links, library=library, adverts=adverts, names=names, clock=clock)
    router = parts.router(me=parts.me, library=library, placer=placer, adverts=adverts, suspects=membership.suspects)
    preload = Preload(settings.models, library, placer, router.covered, clock)
    journal, deputy, locator = _journal(parts, adverts, coordinates)
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
        weight_server=_weight_server(parts, stages),
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
        exchange=_exchange(parts, membership),
        work=work,
        sensors=parts.sensors,
        supervisor=parts.supervisor,
    )
    _subscribe(parts, memory, peer)
    _measure(parts, memory, peer)
    return peer


def _weight_server(parts: Parts, stages: StageHost) -> WeightServer:
    limiter = RateLimiter(parts.clock, busy=lambda: stages.sessions > 0, link_stats=parts.prober.stats)
    return WeightServer(parts.links, parts.library, limiter)


def _exchange(parts: Parts, membership: Membership) -> TrustExchange:
    notices = membership.notices
    return TrustExchange(parts.trust, parts.links, parts.clock, notices.add, notices.withdraw, membership.events.publish)


def _journal(
    parts: Parts, adverts: Callable[[], list[Advert]], coordinates: Callable[[SessionId], bool]
) -> tuple[JournalWriters, Deputy, Locator]:
    journal = JournalWriters(parts.me, parts.links, parts.clock, adverts)
    deputy = Deputy(
        parts.links, parts.clock, on_orphan=parts.signals.orphaned, on_dropped=journal.on_dropped, coordinates=coordinates
    )
    return journal, deputy, Locator(parts.me, parts.links, deputy, parts.clock)


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
    shared_stages: SharedStages,
    memory: FreeMemory,
    story: Story,
    spans: Spans,
    work: WorkMeter,
    coordinates: Callable[[SessionId], bool],
) -> StageHost:
    links = parts.links

    def spec_of(model: ModelId) -> ModelSpec | None:
        card = parts.library.cards().get(model)
        return card.spec if card is not None else None

    return StageHost(
        me=parts.me,
        links=links,
        residents=holdings,
        shared_stages=shared_stages,
        learning=StepLearning(parts.me, parts.capability.rates, parts.clock),
        compute=parts.compute,
        clock=parts.clock,
        telemetry=parts.telemetry,
        story=story,
        spans=spans,
        work=work,
        spec_of=spec_of,
        spare_bytes=memory.spare_bytes,
        outputs_limit_bytes=parts.settings.outputs_limit_bytes,
        may_coordinate=lambda peer, session: coordinates(session) if peer == parts.me else peer in links.peers(),
        on_change=parts.signals.sessions_changed,
    )


def _loader(parts: Parts, holdings: ResidentModels, shared_stages: SharedStages, memory: FreeMemory, drainer: Drainer) -> Loader:
    return Loader(
        links=parts.links,
        library=parts.library,
        weights=parts.weights,
        residents=holdings,
        backend=parts.backend,
        stages=shared_stages,
        compute=parts.compute,
        clock=parts.clock,
        spare_bytes=memory.spare_bytes,
        on_change=parts.signals.layers_changed,
        placements=parts.placements,
        layer_times=parts.layer_times,
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
        other_coordinator=locator.other_coordinator,
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
