"""The states, events and commands of a peer's state machine (`peer.py`)."""

from dataclasses import dataclass
from enum import Enum

from meshd.agents.membership.sources import PeerFound, PeerWithdrawn
from meshd.types import PeerId, Profile, Status
from meshd.values import Address


class PeerState(Enum):
    """The state of another peer, as this peer sees it."""

    UNKNOWN = "unknown"
    """Not in the table: never seen, or forgotten."""
    FOUND = "found"
    """Reported by a source; no link has come up yet, or none since the peer left."""
    ALIVE = "alive"
    """Linked, and heard recently (see `membership._SUSPECT_S`)."""
    SUSPECT = "suspect"
    """Linked, but silent for longer than `membership._SUSPECT_S`."""
    DEAD = "dead"
    """The peer's link broke, or was ended because of silence."""
    UNREACHED = "not reached"
    """No peer answers at the addresses that a source reported. They are dialled again."""
    REFUSED = "refused"
    """The handshake failed for a reason that a retry can't fix. It is dialled again now and then."""
    LEFT = "left"
    """The peer said goodbye, or its source withdrew it before a link came up."""


LINKED = frozenset({PeerState.ALIVE, PeerState.SUSPECT})


@dataclass(frozen=True, slots=True)
class LinkUp:
    """An authenticated link came up. `dialled` is the address at which the peer listens; None if it is unknown."""

    peer: PeerId
    incarnation: int
    name: str
    version: str
    dialled: Address | None = None
    protocol: str = ""
    """`major.minor`."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link with the peer has ended without a goodbye."""

    peer: PeerId
    reason: str


@dataclass(frozen=True, slots=True)
class DialFailed:
    """No peer answered at the address, which is dialled again. `peer` is None if only the address is known."""

    peer: PeerId | None
    address: Address
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class HandshakeRefused:
    """The handshake failed for a lasting reason: another cluster's key, or another protocol. `peer` is the id that was proved."""

    peer: PeerId | None
    address: Address
    reason: str
    name: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class StatusReceived:
    peer: PeerId
    status: Status
    ahead_s: float | None = None
    """By how much the peer's clock is ahead of this peer's. None: the status does not say."""


@dataclass(frozen=True, slots=True)
class ProfileReceived:
    """The peer's profile was fetched. `hash` is of the bytes that were received."""

    peer: PeerId
    hash: str
    profile: Profile


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class HeartbeatMissed:
    """Nothing has come from the peer for `membership._SUSPECT_S`; its link is still up."""

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
    | StatusReceived
    | ProfileReceived
    | HeartbeatReceived
    | HeartbeatMissed
    | GoodbyeReceived
    | RetentionExpired
)
"""An event about another peer. The discovery sources (`sources.py`) report PeerFound and PeerWithdrawn."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial these addresses now, and with back-off whenever there is no link, until `StopDialling`. Idempotent."""

    peer: PeerId | None
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class StopDialling:
    """Stop dialling this peer."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class FetchPeerProfile:
    """Fetch the peer's profile, because its status names another hash than that of the known one. Idempotent."""

    peer: PeerId
    hash: str


@dataclass(frozen=True, slots=True)
class PublishChange:
    """Publish on the event stream that the peer's state or advert changed."""

    peer: PeerId
    state: PeerState
    was: PeerState
    why: str


Command = Dial | StopDialling | FetchPeerProfile | PublishChange
