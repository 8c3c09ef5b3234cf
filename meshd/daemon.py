"""One peer, composed of its agents from a `Config`. The only file that constructs them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import msgspec

from meshd import __version__
from meshd.agents.admin.story_collector import StoryCollector
from meshd.agents.admin.view import ClusterView
from meshd.agents.device.compute import ComputeThread
from meshd.agents.device.memory import measure_memory
from meshd.agents.device.probe import ProbeResult, Progress, probe
from meshd.agents.links.links import Links, LinkSettings
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.mdns import MdnsDiscovery, StaticPeers
from meshd.agents.membership.mdns_records import Announcement
from meshd.agents.membership.membership import Membership, SelfDescription
from meshd.agents.membership.sources import Source
from meshd.agents.observe.events import EventBus
from meshd.agents.observe.story import Story
from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.keeper import Keeper
from meshd.agents.placement.loader import Loader
from meshd.agents.placement.loads import ResidentModels
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.preload import Preload
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.serve import RateLimiter, WeightServer
from meshd.agents.placement.weights.sources import WeightSources
from meshd.agents.session.admission import Admission
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.locator import Locator
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.session.plan.drain import Drainer
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.agents.session.plan.route import Router
from meshd.agents.stage.host import StageHost
from meshd.api.http.app import Server, create_app, serve
from meshd.clock import Clock, SystemClock
from meshd.config import Config, require_guarded_api
from meshd.errors import ConfigError
from meshd.kernels.registry import make_backend
from meshd.models.store.store import Store
from meshd.protocol.identity import ClusterKey, Identity, load_cluster_key, load_identity, store_cluster_key
from meshd.protocol.messages import PROTOCOL_VERSION, Error, Token
from meshd.state import StateFolder, StateLock, lock_state
from meshd.telemetry import Telemetry
from meshd.types import Capability, PeerId

log = getLogger(__name__)

_QUEUE_WAIT_S = 60.0
_OUTPUTS_BYTES = 128 << 20
"""For outputs of stages that are kept to be sent again."""
_MEMORY_LOOK_S = 1.0
"""How old the figure of free memory may be: a look costs some file reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonInfo:
    """What `meshd up` tells once the daemon is up."""

    name: str
    peer: PeerId
    cluster: str
    """The cluster's public fingerprint."""
    join_code: str
    new_cluster: bool
    """This start made the cluster's key."""
    api: str
    link: str
    probe: ProbeResult


async def run_daemon(
    config: Config,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[DaemonInfo], None] = lambda info: None,
    on_progress: Progress = lambda what, fraction: None,
    on_waiting: Callable[[str], None] = lambda text: None,
) -> None:
    """Be a peer until `stop` is set, then leave: wait for what runs (`--drain-timeout`; `on_waiting` hears what for), then answers
    that still run get an error, the others a goodbye, within a second.

    Raises: ConfigError, StorageError (the folder is in use), LocalFault (the device can't be measured). Cancel: as `stop`.
    """
    require_guarded_api(config)
    folder = StateFolder.open(config.state)
    with lock_state(config.state) as lock:
        clock = SystemClock()
        cluster, new = _cluster_key(config, folder, clock)
        identity = load_identity(folder, cluster, clock.random_bytes)
        measured = await probe(
            config.cache,
            clock=clock,
            threads=config.threads,
            backend=config.wanted_backend,
            memory_cap_bytes=config.memory_bytes,
            roles=config.roles,
            progress=on_progress,
        )
        peer = Peer(config, identity, measured, clock)
        async with peer.serving(lock) as server:
            on_ready(
                DaemonInfo(
                    name=config.name,
                    peer=identity.peer,
                    cluster=identity.fingerprint,
                    join_code=cluster.code,
                    new_cluster=new,
                    api=server.url,
                    link=peer.membership.link_address,
                    probe=measured,
                )
            )
            await stop.wait()
            await peer.drainer.leave(config.drain_timeout, on_waiting)


def _cluster_key(config: Config, folder: StateFolder, clock: Clock) -> tuple[ClusterKey, bool]:
    """The folder's key, or the one that was given, or a new one (True). Raises: ConfigError, StorageError."""
    kept = load_cluster_key(folder)
    given = ClusterKey.from_code(config.key) if config.key else None
    if kept is not None and given is not None and given != kept:
        raise ConfigError(
            f"{folder.path} belongs to cluster {kept.fingerprint}, and the join code is of {given.fingerprint}",
            hint="`meshd key join CODE` moves this device, or use another folder with --state DIR",
        )
    key = kept or given or ClusterKey.generate(clock.random_bytes)
    if kept is None:
        store_cluster_key(folder, key)
    return key, kept is None and given is None


class Peer:
    """All agents of one peer, wired to one another. Must be made inside the event loop."""

    membership: Membership
    coordinator: Coordinator

    def __init__(self, config: Config, identity: Identity, measured: ProbeResult, clock: Clock) -> None:
        self._config = config
        self._identity = identity
        self._measured = measured
        self._clock = clock
        self._started = clock.monotonic()
        self._api_address = ""
        self._available = float("-inf"), 0
        self._mdns: MdnsDiscovery | None = None
        self.bus = EventBus(clock)
        self.story = Story(clock)
        self.telemetry = Telemetry()
        self.compute = ComputeThread()
        capability = measured.capability
        self.holdings = ResidentModels(capability.rates.attention_bytes_s)
        incarnation = int.from_bytes(clock.random_bytes(8), "big") >> 1
        self.links = Links(
            identity,
            config.name,
            incarnation,
            LinkSettings(host=config.link.host, port=config.link.port),
            clock,
            on_up=lambda peer, hello, address: self.membership.on_up(peer, hello, address),
            on_down=lambda peer, reason: self.membership.on_down(peer, reason),
            on_notice=lambda text: self.membership.notice(text),
        )
        self.library = ModelLibrary(
            links=self.links,
            store=Store(config.models_dir, config.hf_cache, index_url=config.pypi_index, clock=clock),
            adverts=lambda: self.membership.table.adverts(),
            on_change=lambda: self.membership.changed(),
        )
        self.prober = LinkProber(self.links, clock, on_change=lambda: self.membership.changed())
        self.stages = StageHost(
            me=identity.peer,
            links=self.links,
            holdings=self.holdings,
            compute=self.compute,
            clock=clock,
            telemetry=self.telemetry,
            story=self.story,
            outputs_limit_bytes=_OUTPUTS_BYTES,
            peer_linked=lambda peer: peer in self.links.peers(),
            on_change=self._sessions_changed,
        )
        self.drainer = Drainer(
            links=self.links,
            clock=clock,
            stages=lambda: self.stages.sessions,
            answers=lambda: len(self.coordinator.answers),
            on_change=lambda: self.membership.changed(),
        )
        self.weight_server = WeightServer(
            self.links,
            self.library,
            RateLimiter(clock, busy=lambda: self.stages.sessions > 0, link_stats=self.prober.stats),
        )
        weight_sources = WeightSources(
            me=identity.peer,
            links=self.links,
            adverts=lambda: self.membership.table.adverts(),
            names=lambda peer: self.membership.name_of(peer),
            clock=clock,
            link_stats=self.prober.stats,
        )
        self.placement = Loader(
            links=self.links,
            library=self.library,
            weights=WeightProvider(self.links, self.library, weight_sources, clock),
            holdings=self.holdings,
            backend=make_backend(capability.backend, capability.threads),
            compute=self.compute,
            clock=clock,
            free_bytes=self._free_bytes,
            on_change=self._loads_changed,
            draining=lambda: self.drainer.draining,
        )
        self.membership = Membership(
            about=SelfDescription(
                peer=identity.peer,
                name=config.name,
                incarnation=incarnation,
                version=__version__,
                capability=self._capability,
                holdings=lambda: tuple(load.holding() for load in self.holdings),
                models=lambda: tuple(self.library.local.values()),
                sessions=lambda: self.stages.sessions,
                api=lambda: self._api_address,
                draining=lambda: self.drainer.draining,
            ),
            links=self.links,
            prober=self.prober,
            clock=clock,
            bus=self.bus,
            on_advert=lambda advert: self.keeper.note(advert),
            on_gone=self._on_gone,
        )
        names, adverts = self.membership.name_of, self.membership.adverts
        self.placer = PlacementClient(links=self.links, library=self.library, adverts=adverts, names=names, clock=clock)
        self.router = Router(
            me=identity.peer,
            library=self.library,
            placer=self.placer,
            adverts=adverts,
            suspects=self.membership.suspects,
        )
        self.preload = Preload(config.models, self.library, self.placer, self.router.covered, clock)
        self.journal = JournalWriters(identity.peer, self.links, clock, adverts)
        self.deputy = Deputy(
            self.links,
            clock,
            on_orphan=lambda record: self.coordinator.take_over(record),
            on_dropped=self.journal.on_dropped,
        )
        self.locator = Locator(
            identity.peer,
            self.links,
            self.deputy,
            own=lambda session: self.coordinator.own(session),
            release=lambda session: self.coordinator.release(session),
            finish=lambda session, forget: self.coordinator.finish(session, forget),
        )
        rescuer = PlanRetrier(
            self.links,
            self.router,
            adverts,
            clock,
            config.mirror,
            take=lambda session: self.locator.fetch(session, take=True),
            elsewhere=lambda session: self.locator.elsewhere(session),
        )
        self.coordinator = Coordinator(
            me=identity.peer,
            links=self.links,
            library=self.library,
            router=self.router,
            admission=Admission(running=config.max_sessions, waiting=config.queue_limit, wait_s=_QUEUE_WAIT_S),
            rescuer=rescuer,
            mover=Mover(rescuer, self.router, adverts, clock),
            journal=self.journal,
            deputy=self.deputy,
            locator=self.locator,
            clock=clock,
            telemetry=self.telemetry,
            story=self.story,
            names=names,
            readiness_of=self.preload.readiness,
            leaving=lambda: self.drainer.leaving,
        )
        self.keeper = Keeper(
            me=identity.peer,
            links=self.links,
            adverts=adverts,
            suspects=self.membership.suspects,
            cards=self.library.cards,
            names=names,
            clock=clock,
            copies=config.copies,
        )
        self.storyteller = StoryCollector(identity.peer, self.links, self.story, clock, names)
        self.view = ClusterView(
            drainer=self.drainer,
            storyteller=self.storyteller,
            membership=self.membership,
            library=self.library,
            router=self.router,
            placer=self.placer,
            coordinator=self.coordinator,
            stages=self.stages,
            bus=self.bus,
            about=self._about,
        )

    @asynccontextmanager
    async def serving(self, lock: StateLock) -> AsyncIterator[Server]:
        """Be up inside the block. On leaving: clients get their error, the other peers a goodbye, memory is freed."""
        registered = (
            self.library,
            self.weight_server,
            self.stages,
            self.placement,
            self.membership,
            self.coordinator,
            self.deputy,
            self.locator,
            self.drainer,
            self.storyteller,
        )
        for agent in registered:
            agent.register()
        self.links.register(Token, self._on_token)
        self.links.register(Error, self._on_error)
        port = self.links.bind()
        self.membership.link_address = f"{self._config.link.host}:{port}"
        if self._identity.notice:
            self.membership.notice(self._identity.notice)
        await self.library.refresh()
        app = create_app(self.coordinator, self.view, self.telemetry, api_key=self._config.api_key, clock=self._clock)
        server = await serve(app, self._config.api.host, self._config.api.port)
        self._api_address = f"{self._config.api.host}:{server.port}"
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(coroutine)
                    for coroutine in (
                        self.links.run(),
                        self.membership.run(self._sources(port)),
                        self.prober.run(),
                        self.stages.run(),
                        self.coordinator.run(),
                        self.journal.run(),
                        self.deputy.run(),
                        self.preload.run(),
                        self.keeper.run(),
                    )
                ]
                lock.announce(self._api_address)
                log.info("up: links on %s, API on %s", self.membership.link_address, self._api_address)
                try:
                    yield server
                finally:
                    await self._leave(server)
                    for task in running:
                        task.cancel()
        finally:
            await self.placement.close()
            await self.weight_server.close()
            self.compute.close()

    async def _leave(self, server: Server) -> None:
        """Tell clients and peers, clients first: their error must not be that of a peer that is already gone."""
        self.journal.flush()
        self.coordinator.leave()
        await server.aclose()
        await self.router.close()
        await self.links.close("this peer stops")

    def _sources(self, port: int) -> list[Source]:
        sources: list[Source] = []
        if "mdns" in self._config.discovery:
            announcement = Announcement(
                peer=self._identity.peer,
                cluster=self._identity.fingerprint,
                name=self._config.name,
                port=port,
                protocol=".".join(map(str, PROTOCOL_VERSION)),
                version=__version__,
            )
            self._mdns = MdnsDiscovery(
                announcement,
                self.membership.on_sighting,
                clock=self._clock,
                interfaces=self._config.interfaces,
                host=self._config.link.host,
            )
            sources.append(self._mdns)
        if "static" in self._config.discovery and self._config.peers:
            sources.append(StaticPeers(self._config.peers, self.membership.on_sighting, clock=self._clock))
        return sources

    def _on_token(self, sender: PeerId, message: Token, payload: memoryview) -> None:
        """The first stage starts its next step before the client is served: the pipeline must not wait for it."""
        self.stages.on_token(sender, message, payload)
        self.coordinator.on_token(sender, message, payload)

    def _on_error(self, sender: PeerId, message: Error, payload: memoryview) -> None:
        """Not a reply to a request: what a peer could not take. It ends the session that it belongs to."""
        if message.request:
            return  # a reply that came too late
        log.warning("%s (%.8s) says: %s (%s)", self.membership.name_of(sender), sender, message.message, message.code)
        if message.session is not None:
            self.stages.on_error(sender, message)
            self.coordinator.on_error(sender, message)

    def _on_gone(self, peer: PeerId, reason: str) -> None:
        self.coordinator.on_peer_gone(peer, reason)
        self.stages.on_peer_gone(peer, reason)
        self.journal.on_peer_gone(peer)
        self.deputy.on_peer_gone(peer)
        self.keeper.changed()

    def _sessions_changed(self) -> None:
        self.placement.sweep()
        blocks = sum(load.pool.blocks_free for load in self.holdings if load.pool is not None)
        self.telemetry.kv_blocks_free(blocks)
        self.membership.changed()

    def _loads_changed(self) -> None:
        self._available = float("-inf"), 0  # what a load took or gave back counts at once
        self.membership.changed()

    def _free_bytes(self) -> int:
        """What may still be reserved: the memory at the start less every promise, and no more than others have left of it since."""
        at_start = self._measured.capability.memory_free_bytes
        return max(0, min(at_start - self.holdings.reserved_bytes, self._available_bytes() - self.holdings.untouched_bytes))

    def _available_bytes(self) -> int:
        now = self._clock.monotonic()
        measured_at, available = self._available
        if now - measured_at > _MEMORY_LOOK_S:
            available = measure_memory().free_bytes
            self._available = now, available
        return available

    def _capability(self) -> Capability:
        return msgspec.structs.replace(self._measured.capability, memory_free_bytes=self._free_bytes())

    def _about(self) -> dict[str, Any]:
        discovery = self._mdns
        return {
            "id": self._identity.peer,
            "name": self._config.name,
            "version": __version__,
            "protocol": ".".join(map(str, PROTOCOL_VERSION)),
            "cluster": self._identity.fingerprint,
            "api": self._api_address,
            "link": self.membership.link_address,
            "uptime_s": self._clock.monotonic() - self._started,
            "notices": [{"message": message, "hint": hint} for message, hint in self.membership.notices.items()],
            "interfaces": [msgspec.to_builtins(choice) for choice in discovery.interfaces] if discovery else [],
            "other_clusters": discovery.other_clusters() if discovery else {},
        }
