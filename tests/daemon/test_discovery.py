"""The sources of peers that the settings choose."""

import dataclasses

import pytest

from meshd.agents.membership.fleet.fleet import Fleet
from meshd.agents.membership.mdns import MdnsDiscovery
from meshd.agents.membership.static import StaticPeers
from meshd.clock import SystemClock
from meshd.config import Config
from meshd.daemon.discovery import Discovery
from meshd.peer.peer import Peer
from meshd.values import Address, BrokerUrl

PEERS = (Address("192.0.2.1", 7946),)
BROKER = BrokerUrl("127.0.0.1", 1883, tls=False)


@pytest.mark.parametrize(
    ("ways", "peers", "broker", "expected"),
    [
        (("mdns",), PEERS, BROKER, [MdnsDiscovery]),
        (("static",), PEERS, None, [StaticPeers]),
        (("static",), (), None, []),
        (("mqtt",), (), BROKER, [Fleet]),
        (("mqtt",), (), None, []),
        (("mdns", "static", "mqtt"), PEERS, BROKER, [MdnsDiscovery, StaticPeers, Fleet]),
    ],
)
async def test_the_settings_choose_the_sources(
    local_config: Config,
    peer: Peer,
    ways: tuple[str, ...],
    peers: tuple[Address, ...],
    broker: BrokerUrl | None,
    expected: list[type],
) -> None:
    config = dataclasses.replace(local_config, discovery=ways, peers=peers, mqtt=broker)
    discovery = Discovery(config, peer, SystemClock(), tokens=lambda: 0)
    assert [type(source) for source in discovery.sources(40_000)] == expected
    assert (discovery.about()["mqtt"] is not None) == (Fleet in expected)


async def test_without_mdns_no_address_is_used_for_multicast(local_config: Config, peer: Peer) -> None:
    discovery = Discovery(local_config, peer, SystemClock(), tokens=lambda: 0)
    discovery.sources(40_000)
    assert discovery.multicast_addresses() is None
    assert discovery.about() == {"interfaces": [], "other_clusters": {}, "mqtt": None}
