"""Builds membership events of invented peers."""

import msgspec

from meshd.agents.membership.peer_events import (
    DialFailed,
    Event,
    GoodbyeReceived,
    HandshakeRefused,
    HeartbeatMissed,
    LinkDown,
    LinkUp,
    PeerState,
    ProfileReceived,
    StatusReceived,
)
from meshd.agents.membership.sources import PeerFound
from meshd.types import Advert, Capability, PeerId, Profile, Rates, Status
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


PROFILE, PROFILE_HASH = Profile(capability=CAPABILITY), "0f" * 16
PROFILE_CAME = ProfileReceived(ANN, PROFILE_HASH, PROFILE)


def status(peer: PeerId = ANN, revision: int = 1, profile: str = PROFILE_HASH) -> StatusReceived:
    return StatusReceived(peer, Status(revision=revision, profile=profile, memory_free_bytes=3))


def advert(peer: PeerId = ANN, incarnation: int = 1, revision: int = 1) -> Advert:
    """What PROFILE and `status` give together."""
    capability = msgspec.structs.replace(CAPABILITY, memory_free_bytes=3)
    return Advert(peer=peer, name="desk", incarnation=incarnation, revision=revision, version="0.1.0", capability=capability)


def link_up(peer: PeerId = ANN, incarnation: int = 1, dialled: Address | None = None) -> LinkUp:
    return LinkUp(peer, incarnation, "desk", "0.1.0", dialled)


EVENTS_TO: dict[PeerState, list[Event]] = {
    PeerState.UNKNOWN: [],
    PeerState.FOUND: [found()],
    PeerState.UNREACHED: [found(), DialFailed(ANN, HOME, "no route to host")],
    PeerState.ALIVE: [found(), link_up()],
    PeerState.SUSPECT: [found(), link_up(), HeartbeatMissed(ANN)],
    PeerState.DEAD: [found(), link_up(), LinkDown(ANN, "connection reset")],
    PeerState.REFUSED: [found(), HandshakeRefused(ANN, HOME, "another key")],
    PeerState.LEFT: [found(), link_up(), GoodbyeReceived(ANN, "stopped")],
}
"""State -> the events that bring peer ANN from UNKNOWN to it."""
