"""The daemon of one device: a peer that is composed from a `Config`, and its API server."""

import asyncio
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from logging import getLogger
from typing import Any

import msgspec

from meshd import __version__
from meshd.agents.admin.model_files import ModelFiles
from meshd.agents.admin.view import ClusterView
from meshd.agents.device.compute import ComputeThread
from meshd.agents.device.descriptors import DescriptorShares, raise_limit, share_descriptors
from meshd.agents.device.memory import measure_memory
from meshd.agents.device.probe import ProbeResult, Progress, probe
from meshd.agents.device.sensors import DeviceSensors
from meshd.agents.links import links
from meshd.agents.links.pairing.inviter import Inviter, InviterSettings
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.fleet.devices import DeviceList
from meshd.agents.membership.fleet.fleet import Fleet, FleetSettings, FleetView
from meshd.agents.membership.fleet.jobs import JobServer
from meshd.agents.membership.interfaces import link_addresses, used_addresses
from meshd.agents.membership.invites import mdns as mdns_invites
from meshd.agents.membership.mdns import MdnsDiscovery
from meshd.agents.membership.mdns_records import Announcement
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.membership.sources import Source
from meshd.agents.membership.static import StaticPeers
from meshd.agents.observe import log_lines
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.restart.placements import Placements
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.placement.weights.provider import WeightProvider
from meshd.agents.placement.weights.sources import WeightSources
from meshd.agents.service import CheckStep, DoctorRequest
from meshd.agents.supervisor import Supervisor
from meshd.agents.text.model_texts import ModelTexts
from meshd.agents.text.workers import TextWorkers, memory_limit
from meshd.agents.trust.files import StateFiles, load_exclusion
from meshd.agents.trust.known_peers import KnownPeers
from meshd.agents.trust.trust import Trust
from meshd.api.access.key_file import KeyFile
from meshd.api.access.ring import KeyRing
from meshd.api.http import server
from meshd.api.http.app import create_app
from meshd.api.http.services import ClientLimits
from meshd.clock import Clock, SystemClock
from meshd.compose import Parts, PeerSettings, PeerSignals, compose
from meshd.config import Config, require_guarded_api
from meshd.doctor import CHECKS
from meshd.doctor.check import Context, LivePeer, Runner
from meshd.errors import LocalFault, Overloaded
from meshd.kernels.registry import make_backend
from meshd.models.store.store import Store
from meshd.protocol import transport
from meshd.protocol.identity import Identity, choose_cluster_key, load_identity, load_trust, stored_code
from meshd.protocol.messages import PROTOCOL_VERSION
from meshd.reloading import Reloaded, Reloader
from meshd.state import StateFolder, StateLock, lock_state
from meshd.telemetry import Telemetry
from meshd.types import PeerId
from meshd.values import BrokerUrl

log = getLogger(__name__)

_SWITCH_S = 0.0005
"""Longest time that Python code of one thread keeps the others waiting. A step hands Python over some 60 times for each token, so
that with the default of 5 ms it takes many times as long beside a search for a plan."""
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
    reload: Callable[[], Reloaded] | None = None
    """Reads the settings again. None: they can't be."""


async def run_daemon(
    config: Config,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[DaemonInfo], None] = lambda info: None,
    on_progress: Progress = lambda what, fraction: None,
    on_waiting: Callable[[str], None] = lambda text: None,
    read_config: Callable[[], Config] | None = None,
) -> None:
    """Run a peer until `stop` is set, then leave the cluster.

    Leaving waits up to `--drain-timeout` for running sessions; `on_waiting` is called with a description of what is waited for.
    After that, within a second, the clients of answers that still run get an error, and the other peers a goodbye message.

    `read_config` reads the settings again, for a reload.

    Raises: ConfigError, StorageError (the folder is in use), LocalFault (the device can't be measured, or an agent failed too
    often, in which case the peer has left the cluster in the same orderly way).
    Cancel: the peer leaves without waiting for its sessions.
    """
    require_guarded_api(config)
    sys.setswitchinterval(_SWITCH_S)
    folder = StateFolder.open(config.state)
    clock = SystemClock()
    shares = share_descriptors(raise_limit())
    with lock_state(config.state) as lock, _bound(config) as sockets:
        cluster, new = choose_cluster_key(folder, config.key, clock.random_bytes)
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
        daemon = Daemon(config, identity, measured, clock, sockets, shares, read_config)
        async with daemon.serving(lock) as api:
            on_ready(
                DaemonInfo(
                    name=config.name,
                    peer=identity.peer,
                    cluster=identity.fingerprint,
                    join_code=cluster.code,
                    new_cluster=new,
                    api=api.url,
                    link=daemon.peer.membership.link_address,
                    probe=measured,
                    reload=daemon.reloader.reload,
                )
            )
            failed = await _stopped(stop, daemon.peer.supervisor)
            if failed:
                on_waiting(f"stopping: {failed}")
            await daemon.peer.drain(daemon.reloader.config.drain_timeout, on_waiting)
        if failed:
            raise LocalFault(f"the daemon stopped itself: {failed}", hint="start it again; the log has the errors")


async def _stopped(stop: asyncio.Event, supervisor: Supervisor) -> str:
    """Wait until `stop` is set or an agent has failed too often. Returns: the reason; empty if `stop` was set."""
    waits = [asyncio.create_task(event.wait()) for event in (stop, supervisor.gave_up)]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return "" if stop.is_set() else supervisor.reason


@dataclass(frozen=True, slots=True)
class Sockets:
    """The sockets of the two addresses, bound before the device is measured, so that a taken port is reported at once."""

    api: list[socket.socket]
    link: list[socket.socket]


@contextmanager
def _bound(config: Config) -> Iterator[Sockets]:
    """Bind the addresses of the API and the links. Raises: ConfigError if one can't be used."""
    with ExitStack() as stack:
        api = [stack.enter_context(closing(bound)) for bound in server.bind(config.api.host, config.api.port)]
        link = [stack.enter_context(closing(bound)) for bound in links.bind(config.link.host, config.link.port)]
        yield Sockets(api, link)


class Daemon:
    """This device's peer and its API server."""

    def __init__(
        self,
        config: Config,
        identity: Identity,
        measured: ProbeResult,
        clock: Clock,
        sockets: Sockets,
        shares: DescriptorShares,
        read_config: Callable[[], Config] | None = None,
    ) -> None:
        """Construct the peer and its API view. Must be called inside the event loop."""
        self._config = config
        self._identity = identity
        self._clock = clock
        self._sockets = sockets
        self._limits = ClientLimits(connections=shares.clients)
        self._started = clock.monotonic()
        self._mdns: MdnsDiscovery | None = None
        self._fleet: Fleet | None = None
        self._telemetry = Telemetry()
        self.peer = compose(_parts(config, identity, measured, clock, self._telemetry, sockets, shares))
        peer = self.peer
        self.reloader = Reloader(config, peer, read_config or (lambda: config))
        peer.reach.multicast = self._multicast_addresses
        self._doctor = Runner(CHECKS)
        self.view = ClusterView(
            drainer=self.peer.drainer,
            story_collector=self.peer.story_collector,
            trace_collector=self.peer.trace_collector,
            membership=self.peer.membership,
            library=self.peer.library,
            router=self.peer.router,
            placer=self.peer.placer,
            coordinator=self.peer.coordinator,
            stages=self.peer.stages,
            stream=self.peer.events,
            listings=peer.listings,
            files=ModelFiles(peer.library),
            rows=peer.rows,
            reload_settings=lambda: asdict(self.reloader.reload()),
            exchange=peer.exchange,
            about=self._about,
            inviter=Inviter(self._inviter_settings(), clock),
            checks=self._checks,
        )

    def _inviter_settings(self) -> InviterSettings:
        config, folder = self._config, StateFolder(self._config.state)

        async def advertise(number: int, port: int) -> None:
            if "mdns" in config.discovery:
                name = self._clock.random_bytes(16).hex()
                await mdns_invites.advertise(number, port, name=name, interfaces=config.interfaces, host=config.link.host)

        return InviterSettings(
            name=config.name,
            join_code=partial(stored_code, folder),
            host=config.link.host,
            link_port=self.peer.links.bind,
            hosts=lambda: mdns_invites.own_addresses(config.interfaces, config.link.host),
            folder=config.state,
            advertise=advertise,
        )

    @asynccontextmanager
    async def serving(self, lock: StateLock) -> AsyncIterator[server.Server]:
        """Run the peer and the API server inside the block.

        On exit, the clients of running answers get an error, the other peers get a goodbye message, and memory is freed.
        """
        peer, membership = self.peer, self.peer.membership
        peer.register()
        port = peer.links.bind()
        membership.link_address = f"{self._config.link.host}:{port}"
        if self._identity.notice:
            membership.notice(self._identity.notice, "nothing needs to be done: the two devices are two peers now")
        await peer.library.refresh()
        local_key = self._clock.random_bytes(24).hex()
        keys = KeyRing(
            self._clock,
            self._telemetry,
            default=self._config.api_key,
            local=local_key,
            file=KeyFile(StateFolder(self._config.state)),
            always_closed=not self._config.api.loopback,
        )
        app = create_app(peer.coordinator, self.view, self._telemetry, keys=keys, clock=self._clock, limits=self._limits)
        api = await server.serve_at(app, self._sockets.api)
        membership.publisher.api_address = f"{self._config.api.host}:{api.port}"
        with log_lines.published(peer.events, self._clock, self._telemetry.log_line):
            async with peer.running(self._sources(port)):
                lock.announce(membership.publisher.api_address, str(self._config.models_dir.absolute()), local_key)
                log.info("up: links on %s, API on %s", membership.link_address, membership.publisher.api_address)
                try:
                    yield api
                finally:
                    await peer.leave(api.aclose)

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
                load=lambda: self.peer.stages.sessions,
            )
            sources.append(self._mdns)
        if "static" in self._config.discovery and self._config.peers:
            sources.append(StaticPeers(self._config.peers, self.peer.membership.on_sighting, clock=self._clock))
        if "mqtt" in self._config.discovery and self._config.mqtt is not None:
            self._fleet = self._make_fleet(self._config.mqtt, port)
            sources.append(self._fleet)
        return sources

    def _multicast_addresses(self) -> tuple[str, ...] | None:
        return tuple(used_addresses(self._mdns.interfaces)) if self._mdns is not None else None

    async def _checks(self, request: DoctorRequest) -> AsyncGenerator[CheckStep, None]:
        """Run the checks of `meshd doctor` on this daemon. Raises: Overloaded if they run already."""
        if self._doctor.running:
            raise Overloaded("another `meshd doctor` runs on this daemon", hint="try again when it has ended", retry_after_s=10.0)
        membership, links_ = self.peer.membership, self.peer.links
        live = LivePeer(
            id=self._identity.peer,
            cluster=self._identity.fingerprint,
            link=membership.link_address,
            api=membership.publisher.api_address,
            linked=links_.peers,
            rows=self.view.peers,
            notices=membership.notices.items,
            reach=self.peer.reach.check,
            dial=links_.reach,
            plan=self.view.plan,
        )
        context = Context(config=self._config, clock=self._clock, model=request.model, peer=live)
        async with aclosing(self._doctor.run(context)) as steps:
            async for step in steps:
                yield step

    def _tokens(self) -> int:
        """Returns: the number of tokens of the answers that this peer has coordinated, running ones included."""
        running = sum(answer.output.timed_tokens for answer in self.peer.coordinator.answers.values())
        return self._telemetry.completion_tokens + running

    def _make_fleet(self, url: BrokerUrl, port: int) -> Fleet:
        config, peer = self._config, self.peer

        def identity() -> Identity:
            return peer.links.identity

        return Fleet(
            FleetSettings(
                url=url,
                ca_file=str(config.mqtt_ca or ""),
                telemetry_s=config.mqtt_telemetry,
                home_assistant=config.mqtt_home_assistant,
            ),
            identity,
            FleetView(
                name=config.name,
                port=port,
                protocol=".".join(map(str, PROTOCOL_VERSION)),
                version=__version__,
                addresses=partial(link_addresses, config.link.host, config.interfaces),
                load=lambda: peer.stages.sessions,
                linked=peer.links.peers,
                unreached=peer.membership.table.unreached,
                belongs=peer.exchange.trust.belongs,
                tokens=self._tokens,
            ),
            peer.events,
            peer.membership.on_sighting,
            self._clock,
            lambda broker, topics: JobServer(
                lambda: peer.links.identity, topics, broker, peer.devices, peer.coordinator, self._clock
            ),
        )

    def _about(self) -> dict[str, Any]:
        discovery = self._mdns
        return {
            "id": self._identity.peer,
            "name": self._config.name,
            "version": __version__,
            "protocol": ".".join(map(str, PROTOCOL_VERSION)),
            "cluster": self._identity.fingerprint,
            "api": self.peer.membership.publisher.api_address,
            "link": self.peer.membership.link_address,
            "uptime_s": self._clock.monotonic() - self._started,
            "notices": [{"message": message, "hint": hint} for message, hint in self.peer.membership.notices.items()],
            "interfaces": [msgspec.to_builtins(choice) for choice in discovery.interfaces] if discovery else [],
            "other_clusters": discovery.other_clusters() if discovery else {},
            "mqtt": self._fleet.about() if self._fleet else None,
        }


def _peer_settings(config: Config) -> PeerSettings:
    return PeerSettings(
        models=config.models,
        mirror=config.mirror,
        copies=config.copies,
        max_sessions=config.max_sessions,
        queue_limit=config.queue_limit,
        queue_wait_s=_QUEUE_WAIT_S,
        outputs_limit_bytes=_OUTPUTS_BYTES,
    )


def _link_settings(config: Config, sockets: Sockets, shares: DescriptorShares) -> links.LinkSettings:
    return links.LinkSettings(
        host=config.link.host,
        port=config.link.port,
        sockets=tuple(sockets.link),
        max_links=shares.links,
        max_half_open=shares.half_open,
        slow_start=transport.has_slow_start(),
    )


def _parts(
    config: Config,
    identity: Identity,
    measured: ProbeResult,
    clock: Clock,
    telemetry: Telemetry,
    sockets: Sockets,
    shares: DescriptorShares,
) -> Parts:
    """Make the parts of this device's peer."""
    capability = measured.capability
    signals, table = PeerSignals(), PeerTable()
    incarnation = int.from_bytes(clock.random_bytes(8), "big") >> 1
    peer_links = links.Links(
        identity,
        config.name,
        incarnation,
        _link_settings(config, sockets, shares),
        clock,
        on_up=signals.link_up,
        on_down=signals.link_down,
        on_outcome=signals.dialled,
    )
    prober = LinkProber(
        peer_links, clock, on_change=signals.changed, on_round_trip=lambda peer, seconds: telemetry.hop(peer, seconds / 2)
    )
    store = Store(config.models_dir, config.hf_cache, index_url=config.pypi_index, clock=clock)
    texts = ModelTexts(TextWorkers(memory_bytes=memory_limit(capability.memory_total_bytes)))
    weight_sources = WeightSources(
        me=identity.peer, links=peer_links, adverts=table.adverts, names=table.name_of, clock=clock, link_stats=prober.stats
    )
    library = ModelLibrary(
        links=peer_links,
        store=store,
        adverts=table.adverts,
        on_change=signals.changed,
        on_pull=signals.pull_progress,
        clock=clock,
        headers=HeaderFetcher(peer_links, weight_sources),
        texts=texts,
    )
    return Parts(
        me=identity.peer,
        name=config.name,
        version=__version__,
        incarnation=incarnation,
        settings=_peer_settings(config),
        signals=signals,
        clock=clock,
        telemetry=telemetry,
        capability=capability,
        measure_free_bytes=lambda: measure_memory().free_bytes,
        backend=make_backend(capability.backend, capability.threads),
        compute=ComputeThread(),
        links=peer_links,
        prober=prober,
        table=table,
        library=library,
        weights=WeightProvider(peer_links, library, weight_sources, clock),
        devices=DeviceList(peer_links, StateFolder.open(config.state)),
        placements=Placements(StateFolder.open(config.state)),
        trust=_trust(StateFolder.open(config.state), identity, clock),
        supervisor=Supervisor(clock),
        sensors=DeviceSensors(clock),
    )


def _trust(folder: StateFolder, identity: Identity, clock: Clock) -> Trust:
    stored = load_trust(folder)
    assert stored is not None, "the identity was made from the stored key"
    key, chain = stored
    return Trust(
        identity.peer, key, chain, StateFiles(folder, clock), KnownPeers(folder, clock), exclusion=load_exclusion(folder, key)
    )
