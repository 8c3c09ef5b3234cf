"""The states, events and commands of a peer's state machine (`peer.py`)."""

from dataclasses import dataclass
from enum import Enum

from meshd.agents.membership.sources import PeerFound, PeerWithdrawn
from meshd.types import Advert, PeerId
from meshd.values import Address


class PeerState(Enum):
    """State of another peer, as this peer sees it."""

    UNKNOWN = "unknown"
    """Not in the table: never seen, or forgotten."""
    FOUND = "found"
    """Reported by a source, but never linked."""
    ALIVE = "alive"
    """Linked and heard within the heartbeat limit."""
    SUSPECT = "suspect"
    """Linked, but silent beyond the heartbeat limit."""
    DEAD = "dead"
    """Its link broke, or was ended because of silence."""
    REFUSED = "refused"
    """The handshake failed for a reason that a retry does not cure."""
    LEFT = "left"
    """It said goodbye."""


LINKED = frozenset({PeerState.ALIVE, PeerState.SUSPECT})


@dataclass(frozen=True, slots=True)
class LinkUp:
    """An authenticated link came up. `dialled` is the address at which the peer listens; None if it is unknown."""

    peer: PeerId
    incarnation: int
    name: str
    version: str
    dialled: Address | None = None


@dataclass(frozen=True, slots=True)
class LinkDown:
    """All connections with the peer are closed."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    """No peer answered at the address; the links keep trying. `peer` is None if only the address is known."""

    peer: PeerId | None
    address: Address
    reason: str


@dataclass(frozen=True, slots=True)
class HandshakeRefused:
    """The handshake failed for good: another cluster's key, another protocol, a revoked peer, or this peer itself."""

    peer: PeerId | None
    address: Address | None
    reason: str


@dataclass(frozen=True, slots=True)
class AdvertReceived:
    advert: Advert

    @property
    def peer(self) -> PeerId:
        return self.advert.peer


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class HeartbeatMissed:
    """Nothing came from the peer within the heartbeat limit; its link is still up."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class GoodbyeReceived:
    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class RetentionExpired:
    """The retention time of a peer without a link has passed."""

    peer: PeerId


Event = (
    PeerFound
    | PeerWithdrawn
    | LinkUp
    | LinkDown
    | DialFailed
    | HandshakeRefused
    | AdvertReceived
    | HeartbeatReceived
    | HeartbeatMissed
    | GoodbyeReceived
    | RetentionExpired
)
"""What can happen to another peer. The discovery sources (`sources.py`) report PeerFound and PeerWithdrawn."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial these addresses now, and with back-off until a link is up or `StopDialling` comes. Idempotent."""

    peer: PeerId | None
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class StopDialling:
    """Stop dialling this peer."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PublishChange:
    """Publish on the event stream that the peer's state or advert changed."""

    peer: PeerId
    state: PeerState
    was: PeerState
    why: str


Command = Dial | StopDialling | PublishChange
