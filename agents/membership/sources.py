"""What a source of peers (mDNS, the static list) reports to its callback."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meshd.types import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFound:
    """A peer of this cluster may be reached here. It is reported again when it is heard again: a listener must accept repeats.

    It is a hint, never a proof: only the authenticated link shows who answers.
    """

    source: str
    """`mdns` or `static`."""
    peer: PeerId | None
    """None where only an address is known."""
    addresses: tuple[str, ...]
    """Hosts, the likeliest to be reached first; names are resolved at each dial."""
    port: int
    name: str = ""
    cluster: str = ""
    """The cluster's public fingerprint."""
    protocol: str = ""
    """`major.minor`; skew can be shown before a link is tried."""
    version: str = ""
    """Of its software."""
    load: str = ""
    """A summary for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerWithdrawn:
    """The source no longer vouches for the peer: it said goodbye, or its record ran out."""

    source: str
    peer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateIdentity:
    """Another daemon advertises this very peer's id: a copied state folder."""

    source: str
    peer: PeerId
    addresses: tuple[str, ...]
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceNotice:
    """Something a person should know: `WHAT went wrong: WHY`, and how to fix it. The source keeps running."""

    source: str
    message: str
    hint: str = ""


Sighting = PeerFound | PeerWithdrawn | DuplicateIdentity | SourceNotice
OnSighting = Callable[[Sighting], None]


class Source(Protocol):
    """Finds peers until it is cancelled."""

    async def run(self) -> None:
        """Report every sighting to the callback given at construction. Cancel: sends a goodbye where it can."""
        ...
