"""Builds the rows about peers in `meshd status` and the API. They can be encoded as JSON and all have the same keys."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from meshd.agents.membership.peer import Peer
from meshd.agents.membership.peer_events import LINKED, PeerState
from meshd.display import duration, plural
from meshd.types import PeerId
from meshd.values import Address

CLOCK_WARNING_S = 30.0
"""Difference of two clocks that is shown to the user. A status that waits in a queue makes its sender's clock look late."""
OTHER_CLUSTER = "other cluster"
"""State of the row of another cluster, of which only the fingerprint and an address are known."""
_LOOK = "`meshd doctor` looks for the cause"


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with a peer, as this peer sees it."""

    kind: str = ""
    """`unreachable`, `refused`, `lost`, `silent`, `copied`, `clock`, `version`, `other cluster`; empty if nothing is wrong."""
    reason: str = ""
    hint: str = ""
    """What the user can do."""


_KINDS = {
    PeerState.UNREACHED: "unreachable",
    PeerState.REFUSED: "refused",
    PeerState.DEAD: "lost",
    PeerState.SUSPECT: "silent",
}


def trouble_of(peer: Peer, version: str, protocol: str) -> Trouble:
    """Say what is wrong with a peer. `version` and `protocol` are this peer's own."""
    if (kind := _KINDS.get(peer.state)) is not None:
        return Trouble(kind, peer.why, peer.hint or _LOOK)
    if peer.state not in LINKED:
        return Trouble()
    if peer.why:
        return Trouble("copied", peer.why, "remove identity.key from the copy and start it again")
    if peer.ahead_s is not None and abs(peer.ahead_s) >= CLOCK_WARNING_S:
        side = "ahead of" if peer.ahead_s > 0 else "behind"
        wrong = f"its clock is {duration(abs(peer.ahead_s))} {side} this device's"
        return Trouble("clock", wrong, "on the device whose clock is wrong: `sudo timedatectl set-ntp true`")
    if (peer.version, peer.protocol) != (version, protocol) and peer.version and peer.protocol:
        differs = f"it runs meshd {peer.version} (protocol {peer.protocol}), this peer {version} ({protocol})"
        return Trouble("version", differs, "install the same version of meshd on both")
    return Trouble()


def peer_row(peer: Peer, now: float, version: str = "", protocol: str = "") -> dict[str, Any]:
    """Build a peer's row. `version` and `protocol` are this peer's own; without them, versions are not compared."""
    advert = peer.advert
    trouble = trouble_of(peer, version or peer.version, protocol or peer.protocol)
    return {
        "peer": peer.id,
        "name": peer.name,
        "state": peer.state.value,
        "why": trouble.reason or peer.why,
        "trouble": trouble.kind,
        "hint": trouble.hint,
        "clock_ahead_s": peer.ahead_s,
        "addresses": [{"host": known.address.host, "port": known.address.port, "source": known.source} for known in peer.addresses],
        "version": peer.version,
        "protocol": peer.protocol,
        "incarnation": peer.incarnation,
        "first_seen_s": now - peer.first_seen,
        "last_seen_s": now - peer.last_seen,
        "since_s": now - peer.since,
        "capability": msgspec.to_builtins(advert.capability) if advert else None,
        "holdings": msgspec.to_builtins(advert.holdings) if advert else [],
        "models": [card.name for card in advert.models] if advert else [],
        "sessions": advert.sessions if advert else peer.load,
        "api": advert.api if advert else "",
        "draining": advert.draining if advert else False,
        "device": msgspec.to_builtins(advert.device) if advert else None,
    }


def unlinked_row(address: Address, source: str, state: PeerState, why: str, peer: str = "", hint: str = "") -> dict[str, Any]:
    """Build the row of a peer of which only an address, and perhaps the id, is known."""
    kind = _KINDS.get(state, "") if why else ""
    known = Peer(id=PeerId(peer), now=0.0)
    return peer_row(known, 0.0) | {
        "name": str(address) if address.port else address.host,
        "state": state.value,
        "why": why,
        "trouble": kind,
        "hint": hint or (_LOOK if kind else ""),
        "addresses": [{"host": address.host, "port": address.port, "source": source}],
        "first_seen_s": None,
        "last_seen_s": None,
        "since_s": None,
        "capability": None,
        "holdings": [],
        "models": [],
        "sessions": 0,
        "api": "",
        "draining": False,
        "device": None,
    }


def cluster_rows(peers: Mapping[str, int], addresses: Mapping[str, Address]) -> list[dict[str, Any]]:
    """Build a row for each other cluster on this network: fingerprint -> number of its peers, and where one of them listens."""
    return [
        unlinked_row(
            addresses[cluster],
            "mdns",
            PeerState.FOUND,
            f"another cluster is on this network: {cluster}, with {plural(count, 'peer')}",
            hint="to join it, type `meshd key join CODE --replace` here and start `meshd up` again; "
            "`meshd key show` on one of its devices prints the CODE",
        )
        | {"name": cluster, "state": OTHER_CLUSTER, "trouble": OTHER_CLUSTER}
        for cluster, count in peers.items()
        if cluster in addresses
    ]
