"""What the API and `meshd status` show of a link."""

from typing import TypedDict

from meshd.agents.links.link import Link
from meshd.protocol.messages import Lane
from meshd.types import PeerId
from meshd.values import Address


class LinkRow(TypedDict):
    """One link that is up, or broken and not given up, as `meshd status --json` and the API show it."""

    peer: PeerId
    name: str
    address: str
    addresses: list[str]
    dialled: bool
    up_s: float
    rtt_ms: float | None
    rtt_min_ms: float | None
    queued_bytes: int
    bytes_in: int
    bytes_out: int
    software: str
    features: list[str]


def link_row(link: Link, now: float) -> LinkRow:
    """Describe a link that is up, or broken but not given up."""
    assert link.agreement is not None
    hello = link.agreement.hello
    host, port = link.lanes[Lane.CONTROL].remote
    hop_s = link.estimate.hop_s(now)
    return LinkRow(
        peer=link.peer,
        name=hello.name,
        address=str(Address(host, port)),
        addresses=[str(Address(*address)) for address in link.addresses],
        dialled=link.dialled,
        up_s=now - link.up_since,
        rtt_ms=_ms(None if hop_s is None else 2 * hop_s),
        rtt_min_ms=_ms(link.estimate.rtt_s(now)),
        queued_bytes=link.queued_bytes,
        bytes_in=link.bytes_in,
        bytes_out=link.bytes_out,
        software=hello.software,
        features=sorted(link.agreement.features),
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
