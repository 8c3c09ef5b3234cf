"""What a source of peers says: mDNS, the static list, and later others, all speak to one callback in these words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meshd.types import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFound:
    """A peer of this cluster may be reached here. Said again when it is heard again, so a listener must not mind repeats.

    It is a hint, never a proof: only the authenticated link says who answers.
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
    """Something a person should know: WHAT went wrong: WHY, and how to mend it. The source goes on."""

    source: str
    message: str
    hint: str = ""


Sighting = PeerFound | PeerWithdrawn | DuplicateIdentity | SourceNotice
OnSighting = Callable[[Sighting], None]


class Source(Protocol):
    """Finds peers until it is cancelled."""

    async def run(self) -> None:
        """Tell every sighting to the callback given at construction. Cancel: says goodbye to others where it can."""
        ...
