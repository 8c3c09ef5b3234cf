"""Builds membership events of invented peers."""

from meshd.agents.membership.peer_events import (
    Event,
    GoodbyeReceived,
    HandshakeRefused,
    HeartbeatMissed,
    LinkDown,
    LinkUp,
    PeerState,
)
from meshd.agents.membership.sources import PeerFound
from meshd.types import Advert, Capability, PeerId, Rates
from meshd.values import Address

ANN, BOB = PeerId("ann"), PeerId("bob")
HOME, AWAY = Address("192.168.1.7", 6375), Address("10.0.0.7", 6375)
RATES = Rates(
    decode_bytes_s=1e9, prefill_flops_s=1e10, memory_bytes_s=1e10, attention_bytes_s=1e9, disk_bytes_s=1e9, layer_overhead_s=1e-4
)
CAPABILITY = Capability(backend="torch", processor="cpu", threads=2, memory_total_bytes=8, memory_free_bytes=4, rates=RATES)


def found(peer: PeerId | None = ANN, *hosts: str, source: str = "mdns", port: int = 6375) -> PeerFound:
    return PeerFound(
        source=source, peer=peer, addresses=hosts or (HOME.host,), port=port, name="desk", version="0.1.0", protocol="1.0"
    )


def advert(peer: PeerId = ANN, incarnation: int = 1, revision: int = 1) -> Advert:
    return Advert(peer=peer, name="desk", incarnation=incarnation, revision=revision, version="0.1.0", capability=CAPABILITY)


def link_up(peer: PeerId = ANN, incarnation: int = 1, dialled: Address | None = None) -> LinkUp:
    return LinkUp(peer, incarnation, "desk", "0.1.0", dialled)


EVENTS_TO: dict[PeerState, list[Event]] = {
    PeerState.UNKNOWN: [],
    PeerState.FOUND: [found()],
    PeerState.ALIVE: [found(), link_up()],
    PeerState.SUSPECT: [found(), link_up(), HeartbeatMissed(ANN)],
    PeerState.DEAD: [found(), link_up(), LinkDown(ANN, "connection reset")],
    PeerState.REFUSED: [found(), HandshakeRefused(ANN, HOME, "another key")],
    PeerState.LEFT: [found(), link_up(), GoodbyeReceived(ANN, "stopped")],
}
"""State -> the events that bring peer ANN from UNKNOWN to it."""
