"""How this device's peer finds others: mDNS, the static list of peers and a broker, as the settings choose."""

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from meshd import __version__
from meshd.agents.membership.fleet.broker import Broker
from meshd.agents.membership.fleet.fleet import Fleet, FleetSettings, FleetView
from meshd.agents.membership.fleet.jobs import JobServer
from meshd.agents.membership.fleet.topics import Topics
from meshd.agents.membership.interfaces import link_addresses, used_addresses
from meshd.agents.membership.mdns import MdnsDiscovery
from meshd.agents.membership.mdns_records import Announcement
from meshd.agents.membership.membership import PROTOCOL
from meshd.agents.membership.sources import Source
from meshd.agents.membership.static import StaticPeers
from meshd.clock import Clock
from meshd.config import Config
from meshd.peer.peer import Peer
from meshd.values import BrokerUrl


class Discovery:
    """The sources of peers that the settings choose."""

    def __init__(self, config: Config, peer: Peer, clock: Clock, *, tokens: Callable[[], int]) -> None:
        """`tokens` returns the number of tokens of the answers that this peer has coordinated, for its telemetry."""
        self._config = config
        self._peer = peer
        self._clock = clock
        self._tokens = tokens
        self._mdns: MdnsDiscovery | None = None
        self._fleet: Fleet | None = None

    def sources(self, port: int) -> list[Source]:
        """Make the sources. `port`: where this peer accepts links."""
        config, on_sighting = self._config, self._peer.membership.on_sighting
        sources: list[Source] = []
        if "mdns" in config.discovery:
            self._mdns = self._make_mdns(port)
            sources.append(self._mdns)
        if "static" in config.discovery and config.peers:
            sources.append(StaticPeers(config.peers, on_sighting, clock=self._clock))
        if "mqtt" in config.discovery and config.mqtt is not None:
            self._fleet = self._make_fleet(config.mqtt, port)
            sources.append(self._fleet)
        return sources

    def multicast_addresses(self) -> tuple[str, ...] | None:
        """Return the addresses of the interfaces that mDNS uses. None: mDNS is off."""
        return tuple(used_addresses(self._mdns.interfaces)) if self._mdns is not None else None

    def about(self) -> dict[str, Any]:
        """Return what `identity` shows of the sources: interfaces, other clusters and the connection to the broker."""
        mdns = self._mdns
        return {
            "interfaces": [msgspec.to_builtins(choice) for choice in mdns.interfaces] if mdns else [],
            "other_clusters": mdns.other_clusters() if mdns else {},
            "mqtt": self._fleet.about() if self._fleet else None,
        }

    def _make_mdns(self, port: int) -> MdnsDiscovery:
        config, peer = self._config, self._peer
        announcement = Announcement(
            peer=peer.links.id,
            cluster=peer.links.identity.fingerprint,
            name=config.name,
            port=port,
            protocol=PROTOCOL,
            version=__version__,
        )
        return MdnsDiscovery(
            announcement,
            peer.membership.on_sighting,
            clock=self._clock,
            interfaces=config.interfaces,
            host=config.link.host,
            load=lambda: peer.stages.sessions,
        )

    def _make_fleet(self, url: BrokerUrl, port: int) -> Fleet:
        config, peer = self._config, self._peer
        settings = FleetSettings(
            url=url,
            ca_file=str(config.mqtt_ca or ""),
            telemetry_s=config.mqtt_telemetry,
            home_assistant=config.mqtt_home_assistant,
        )
        view = FleetView(
            name=config.name,
            port=port,
            protocol=PROTOCOL,
            version=__version__,
            addresses=partial(link_addresses, config.link.host, config.interfaces),
            load=lambda: peer.stages.sessions,
            linked=peer.links.peers,
            unreached=peer.membership.table.unreached,
            tokens=self._tokens,
            belongs=peer.exchange.trust.belongs,
        )

        def make_jobs(broker: Broker, topics: Topics) -> JobServer:
            return JobServer(lambda: peer.links.identity, topics, broker, peer.devices, peer.coordinator, self._clock)

        return Fleet(
            settings,
            lambda: peer.links.identity,
            view,
            peer.events,
            peer.membership.on_sighting,
            self._clock,
            make_jobs,
        )
