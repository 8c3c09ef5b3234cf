"""Builds the rows about peers in `meshd status` and the API. They can be encoded as JSON and all have the same keys."""

from typing import Any

import msgspec

from meshd.agents.membership.peer import Peer
from meshd.agents.membership.peer_events import PeerState
from meshd.values import Address


def peer_row(peer: Peer, now: float) -> dict[str, Any]:
    advert = peer.advert
    return {
        "peer": peer.id,
        "name": peer.name,
        "state": peer.state.value,
        "why": peer.why,
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
    }


def unlinked_row(address: Address, source: str, state: PeerState, why: str, peer: str = "") -> dict[str, Any]:
    """Build the row of a peer of which only an address, and perhaps the id, is known."""
    return {
        "peer": peer,
        "name": str(address),
        "state": state.value,
        "why": why,
        "addresses": [{"host": address.host, "port": address.port, "source": source}],
        "version": "",
        "protocol": "",
        "incarnation": 0,
        "first_seen_s": None,
        "last_seen_s": None,
        "since_s": None,
        "capability": None,
        "holdings": [],
        "models": [],
        "sessions": 0,
        "api": "",
        "draining": False,
    }
