"""The daemon of one device: starts its peer and its API server, and ends them in order."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from logging import getLogger
from typing import Any

from meshd import __version__
from meshd.agents.admin.model_files import ModelFiles
from meshd.agents.admin.view import ClusterView
from meshd.agents.device.descriptors import DescriptorShares, raise_limit, share_descriptors
from meshd.agents.device.probe import ProbeResult, Progress, probe
from meshd.agents.links.pairing.inviter import Inviter
from meshd.agents.membership.membership import PROTOCOL
from meshd.agents.observe import log_lines
from meshd.agents.supervisor import Supervisor
from meshd.api.access.key_file import KeyFile
from meshd.api.access.ring import KeyRing
from meshd.api.http import server
from meshd.api.http.app import create_app
from meshd.api.http.services import ClientLimits
from meshd.clock import Clock, SystemClock
from meshd.config import Config, require_guarded_api
from meshd.daemon.checks import DaemonChecks
from meshd.daemon.device_parts import device_parts
from meshd.daemon.discovery import Discovery
from meshd.daemon.invites import inviter_settings
from meshd.daemon.reloading import Reloaded, Reloader
from meshd.daemon.sockets import Sockets, bound
from meshd.errors import LocalFault
from meshd.peer.compose import compose
from meshd.protocol.identity import Identity, choose_cluster_key, load_identity
from meshd.state import StateFolder, StateLock, lock_state
from meshd.telemetry import Telemetry
from meshd.types import PeerId

log = getLogger(__name__)

_SWITCH_S = 0.0005
"""Longest time that Python code of one thread keeps the others waiting. A step hands Python over some 60 times for each token, so
that with the default of 5 ms it takes many times as long beside a search for a plan."""


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
    with lock_state(config.state) as lock, bound(config) as sockets:
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
        self._telemetry = Telemetry()
        self.peer = compose(device_parts(config, identity, measured, clock, self._telemetry, sockets, shares))
        peer = self.peer
        self.reloader = Reloader(config, peer, read_config or (lambda: config))
        self._discovery = Discovery(config, peer, clock, tokens=self._tokens)
        peer.reach.multicast = self._discovery.multicast_addresses
        self._checks = DaemonChecks(config, peer, clock)
        self.view = ClusterView(
            drainer=peer.drainer,
            story_collector=peer.story_collector,
            trace_collector=peer.trace_collector,
            membership=peer.membership,
            library=peer.library,
            router=peer.router,
            placer=peer.placer,
            coordinator=peer.coordinator,
            stages=peer.stages,
            stream=peer.events,
            listings=peer.listings,
            files=ModelFiles(peer.library),
            rows=peer.rows,
            relay=peer.relay,
            reload_settings=lambda: asdict(self.reloader.reload()),
            exchange=peer.exchange,
            about=self._about,
            inviter=Inviter(inviter_settings(config, peer, clock), clock),
            checks=lambda request: self._checks.run(request, self.view),
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
            async with peer.running(self._discovery.sources(port)):
                lock.announce(membership.publisher.api_address, str(self._config.models_dir.absolute()), local_key)
                log.info("up: links on %s, API on %s", membership.link_address, membership.publisher.api_address)
                try:
                    yield api
                finally:
                    await peer.leave(api.aclose)

    def _tokens(self) -> int:
        """Returns: the number of tokens of the answers that this peer has coordinated, running ones included."""
        running = sum(answer.output.timed_tokens for answer in self.peer.coordinator.answers.values())
        return self._telemetry.completion_tokens + running

    def _about(self) -> dict[str, Any]:
        return {
            "id": self._identity.peer,
            "name": self._config.name,
            "version": __version__,
            "protocol": PROTOCOL,
            "cluster": self._identity.fingerprint,
            "api": self.peer.membership.publisher.api_address,
            "link": self.peer.membership.link_address,
            "uptime_s": self._clock.monotonic() - self._started,
            "notices": [{"message": message, "hint": hint} for message, hint in self.peer.membership.notices.items()],
            **self._discovery.about(),
        }
