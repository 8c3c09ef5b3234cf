"""The daemon of one device: a peer that is composed from a `Config`, and its API server."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import msgspec

from meshd import __version__
from meshd.agents.admin.view import ClusterView
from meshd.agents.device.compute import ComputeThread
from meshd.agents.device.memory import measure_memory
from meshd.agents.device.probe import ProbeResult, Progress, probe
from meshd.agents.links.links import Links, LinkSettings
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.mdns import MdnsDiscovery
from meshd.agents.membership.mdns_records import Announcement
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.membership.sources import Source
from meshd.agents.membership.static import StaticPeers
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.restart.placements import Placements
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.sources import WeightSources
from meshd.api.http.app import Server, create_app, serve
from meshd.clock import Clock, SystemClock
from meshd.compose import Parts, PeerSettings, PeerSignals, compose
from meshd.config import Config, require_guarded_api
from meshd.errors import ConfigError
from meshd.kernels.registry import make_backend
from meshd.models.store.store import Store
from meshd.protocol.identity import ClusterKey, Identity, load_cluster_key, load_identity, store_cluster_key
from meshd.protocol.messages import PROTOCOL_VERSION
from meshd.state import StateFolder, StateLock, lock_state
from meshd.telemetry import Telemetry
from meshd.types import PeerId

log = getLogger(__name__)

_QUEUE_WAIT_S = 60.0
_OUTPUTS_BYTES = 128 << 20
"""Memory for stage outputs that are kept in case they must be sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonInfo:
    """What `meshd up` prints once the daemon runs."""

    name: str
    peer: PeerId
    cluster: str
    """The cluster's public fingerprint."""
    join_code: str
    new_cluster: bool
    """Whether this start created the cluster's key."""
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
    """Run a peer until `stop` is set, then leave the cluster.

    Leaving waits up to `--drain-timeout` for running sessions; `on_waiting` is called with a description of what is waited for.
    After that, within a second, the clients of answers that still run get an error, and the other peers a goodbye message.

    Raises: ConfigError, StorageError (the folder is in use), LocalFault (the device can't be measured).
    Cancel: the peer leaves without waiting for its sessions.
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
        daemon = Daemon(config, identity, measured, clock)
        async with daemon.serving(lock) as server:
            on_ready(
                DaemonInfo(
                    name=config.name,
                    peer=identity.peer,
                    cluster=identity.fingerprint,
                    join_code=cluster.code,
                    new_cluster=new,
                    api=server.url,
                    link=daemon.peer.membership.link_address,
                    probe=measured,
                )
            )
            await stop.wait()
            await daemon.peer.drain(config.drain_timeout, on_waiting)


def _cluster_key(config: Config, folder: StateFolder, clock: Clock) -> tuple[ClusterKey, bool]:
    """Choose the cluster's key: the stored one, else the one from the settings, else a new one. Store it in the folder.

    Returns: the key, and whether it is new.
    Raises: ConfigError, StorageError.
    """
    stored = load_cluster_key(folder)
    given = ClusterKey.from_code(config.key) if config.key else None
    if stored is not None and given is not None and given != stored:
        raise ConfigError(
            f"{folder.path} belongs to cluster {stored.fingerprint}, but the join code is of cluster {given.fingerprint}",
            hint="move this device with `meshd key join CODE`, or use another folder with --state DIR",
        )
    key = stored or given or ClusterKey.generate(clock.random_bytes)
    if stored is None:
        store_cluster_key(folder, key)
    return key, stored is None and given is None


class Daemon:
    """This device's peer and its API server."""

    def __init__(self, config: Config, identity: Identity, measured: ProbeResult, clock: Clock) -> None:
        """Construct the peer and its API view. Must be called inside the event loop."""
        self._config = config
        self._identity = identity
        self._clock = clock
        self._started = clock.monotonic()
        self._mdns: MdnsDiscovery | None = None
        self._telemetry = Telemetry()
        self.peer = compose(_parts(config, identity, measured, clock, self._telemetry))
        self.view = ClusterView(
            drainer=self.peer.drainer,
            story_collector=self.peer.story_collector,
            membership=self.peer.membership,
            library=self.peer.library,
            router=self.peer.router,
            placer=self.peer.placer,
            coordinator=self.peer.coordinator,
            stages=self.peer.stages,
            bus=self.peer.bus,
            about=self._about,
        )

    @asynccontextmanager
    async def serving(self, lock: StateLock) -> AsyncIterator[Server]:
        """Run the peer and the API server inside the block.

        On exit, the clients of running answers get an error, the other peers get a goodbye message, and memory is freed.
        """
        peer, membership = self.peer, self.peer.membership
        peer.register()
        port = peer.links.bind()
        membership.link_address = f"{self._config.link.host}:{port}"
        if self._identity.notice:
            membership.notice(self._identity.notice)
        await peer.library.refresh()
        app = create_app(peer.coordinator, self.view, self._telemetry, api_key=self._config.api_key, clock=self._clock)
        server = await serve(app, self._config.api.host, self._config.api.port)
        membership.api_address = f"{self._config.api.host}:{server.port}"
        async with peer.running(self._sources(port)):
            lock.announce(membership.api_address, str(self._config.models_dir.absolute()))
            log.info("up: links on %s, API on %s", membership.link_address, membership.api_address)
            try:
                yield server
            finally:
                await peer.leave(server.aclose)

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
                self.peer.membership.on_sighting,
                clock=self._clock,
                interfaces=self._config.interfaces,
                host=self._config.link.host,
            )
            sources.append(self._mdns)
        if "static" in self._config.discovery and self._config.peers:
            sources.append(StaticPeers(self._config.peers, self.peer.membership.on_sighting, clock=self._clock))
        return sources

    def _about(self) -> dict[str, Any]:
        discovery = self._mdns
        return {
            "id": self._identity.peer,
            "name": self._config.name,
            "version": __version__,
            "protocol": ".".join(map(str, PROTOCOL_VERSION)),
            "cluster": self._identity.fingerprint,
            "api": self.peer.membership.api_address,
            "link": self.peer.membership.link_address,
            "uptime_s": self._clock.monotonic() - self._started,
            "notices": [{"message": message, "hint": hint} for message, hint in self.peer.membership.notices.items()],
            "interfaces": [msgspec.to_builtins(choice) for choice in discovery.interfaces] if discovery else [],
            "other_clusters": discovery.other_clusters() if discovery else {},
        }


def _parts(config: Config, identity: Identity, measured: ProbeResult, clock: Clock, telemetry: Telemetry) -> Parts:
    """Make the parts of this device's peer."""
    capability = measured.capability
    signals, table = PeerSignals(), PeerTable()
    incarnation = int.from_bytes(clock.random_bytes(8), "big") >> 1
    links = Links(
        identity,
        config.name,
        incarnation,
        LinkSettings(host=config.link.host, port=config.link.port),
        clock,
        on_up=signals.link_up,
        on_down=signals.link_down,
        on_notice=signals.notice,
    )
    prober = LinkProber(links, clock, on_change=signals.changed)
    store = Store(config.models_dir, config.hf_cache, index_url=config.pypi_index, clock=clock)
    library = ModelLibrary(links=links, store=store, adverts=table.adverts, on_change=signals.changed, clock=clock)
    weight_sources = WeightSources(
        me=identity.peer, links=links, adverts=table.adverts, names=table.name_of, clock=clock, link_stats=prober.stats
    )
    return Parts(
        me=identity.peer,
        name=config.name,
        version=__version__,
        incarnation=incarnation,
        settings=PeerSettings(
            models=config.models,
            mirror=config.mirror,
            copies=config.copies,
            max_sessions=config.max_sessions,
            queue_limit=config.queue_limit,
            queue_wait_s=_QUEUE_WAIT_S,
            outputs_limit_bytes=_OUTPUTS_BYTES,
        ),
        signals=signals,
        clock=clock,
        telemetry=telemetry,
        capability=capability,
        measure_free_bytes=lambda: measure_memory().free_bytes,
        backend=make_backend(capability.backend, capability.threads),
        compute=ComputeThread(),
        links=links,
        prober=prober,
        table=table,
        library=library,
        weights=WeightProvider(links, library, weight_sources, clock),
        placements=Placements(StateFolder.open(config.state)),
    )
