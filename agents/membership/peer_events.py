"""A peer's states, what happens to it (events) and what to do about it (commands)."""

from dataclasses import dataclass
from enum import Enum

from meshd.agents.membership.sources import PeerFound, PeerWithdrawn
from meshd.types import Advert, PeerId
from meshd.values import Address


class PeerState(Enum):
    """Where a peer stands."""

    UNKNOWN = "unknown"
    """Not in the table: never seen, or forgotten."""
    FOUND = "found"
    """A source named it; there was no link yet."""
    ALIVE = "alive"
    SUSPECT = "suspect"
    """Linked, but silent for longer than heartbeats may take."""
    DEAD = "dead"
    """Its link broke, or it stayed silent."""
    REFUSED = "refused"
    """A handshake failed for good."""
    LEFT = "left"
    """It said goodbye."""


LINKED = frozenset({PeerState.ALIVE, PeerState.SUSPECT})


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The authenticated link stands. `dialled` is the address that we reached it at; None if it dialled us."""

    peer: PeerId
    incarnation: int
    name: str
    version: str
    dialled: Address | None = None


@dataclass(frozen=True, slots=True)
class LinkDown:
    """Every connection to the peer is closed, for this reason."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    """Nobody answered there (the links keep trying). `peer` is None where only the address was known."""

    peer: PeerId | None
    address: Address
    reason: str


@dataclass(frozen=True, slots=True)
class HandshakeRefused:
    """The handshake failed for good: another cluster's key, another protocol, revoked, or it is this very peer."""

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
    """Silent past the limit; the link still stands."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class GoodbyeReceived:
    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class RetentionExpired:
    """Nothing was heard of a peer without a link for so long that it need not be shown any more."""

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
"""What the sources report of peers are events too."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Try these addresses in order, now, and with back-off until a link stands or `StopDialling` comes. Idempotent."""

    peer: PeerId | None
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class StopDialling:
    """Dial this peer no more."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class PublishChange:
    """Publish to the planner and the event stream that the peer's state or advert changed."""

    peer: PeerId
    state: PeerState
    was: PeerState
    why: str


Command = Dial | StopDialling | PublishChange
