"""The interface of a source of peers, such as mDNS or the static list, and the sightings that it reports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from meshd.types import PeerId
from meshd.values import Address


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFound:
    """A peer of this cluster may be reached at these addresses. The report is repeated when the peer is heard again.

    The report is only a hint: the authenticated link shows which peer answers.
    """

    source: str
    """`mdns`, `static` or `gossip`."""
    peer: PeerId | None
    """None if only an address is known."""
    addresses: tuple[str, ...]
    """IP addresses or host names, the likeliest to answer first. Names are resolved at each dial."""
    port: int
    name: str = ""
    cluster: str = ""
    """The cluster's public fingerprint."""
    protocol: str = ""
    """`major.minor`, so that a mismatch can be shown before a link is tried."""
    version: str = ""
    """Version of the peer's software."""
    load: int = 0
    """Number of sessions that have a stage on the peer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerWithdrawn:
    """A source withdraws its report: the peer said goodbye, or its record expired."""

    source: str
    peer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateIdentity:
    """Another daemon advertises this peer's own id, because the state folder was copied."""

    source: str
    peer: PeerId
    addresses: tuple[str, ...]
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceNotice:
    """A problem to show to the user: `WHAT went wrong: WHY`, and how to fix it. The source keeps running."""

    source: str
    message: str
    """Empty: the problem is over."""
    hint: str = ""
    about: str = ""
    """Subject: a notice takes the place of the earlier one about the same subject."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherClusters:
    """The other clusters that are on this network now. Reported when they change."""

    source: str
    peers: Mapping[str, int]
    """Fingerprint -> number of its peers that were seen."""
    addresses: Mapping[str, Address] = field(default_factory=dict)
    """Fingerprint -> where one of these peers listens."""


Sighting = PeerFound | PeerWithdrawn | DuplicateIdentity | SourceNotice | OtherClusters
OnSighting = Callable[[Sighting], None]


class Source(Protocol):
    """Looks for peers until it is cancelled."""

    async def run(self) -> None:
        """Report every sighting to the callback given at construction. Cancel: announces that this peer leaves, if it can."""
        ...
