"""The links between peers, as measured in each direction.

The time of a message is latency + transfer. A large message also waits for TCP's slow start: after a pause, TCP sends
`INITIAL_WINDOW_BYTES` and then waits a round trip for the acknowledgement, and with each round trip the window doubles, up to what
the link carries in a round trip (RFC 6928, RFC 5681). Prefill chunks come after pauses, so on a distant link this counts more than
its bandwidth. Systems without slow start after a pause say so (`LinkStats.slow_start`).
"""

from collections.abc import Iterable, Mapping
from typing import Literal, Self

import msgspec

from meshd.types import Advert, LinkStats, PeerId

UNMEASURED_HOP_S = 0.010
"""Assumed latency of an unmeasured link: that of poor Wi-Fi, so that measured links are preferred."""
UNMEASURED_BANDWIDTH_BYTES_S = 1_000_000.0
"""Assumed bandwidth of an unmeasured link: 8 Mbit/s."""
INITIAL_WINDOW_BYTES = 14_600
"""Bytes that TCP sends after a pause before it waits for an acknowledgement: 10 segments (RFC 6928)."""


def transfer_s(size_bytes: float, rtt_s: float, bandwidth_bytes_s: float) -> float:
    """Predict the time from the arrival of a message's first byte to that of its last, after a pause of the connection.

    Never less than size / bandwidth; a round trip of 0 gives exactly that.
    """
    waited_s, sent, window = 0.0, 0.0, float(INITIAL_WINDOW_BYTES)
    while sent + window < size_bytes and window < bandwidth_bytes_s * rtt_s:
        waited_s += rtt_s
        sent += window
        window *= 2
    return waited_s + (size_bytes - sent) / bandwidth_bytes_s


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link between two peers, in one direction."""

    latency_s: float
    """One-way time of a small message, from the sender's program to the receiver's."""
    rtt_s: float = 0.0
    """Round trip of the network alone, for which TCP waits after a pause. 0: it goes on at the rate that it knows."""
    bandwidth_bytes_s: float
    source: Literal["local", "measured", "measured backwards", "not measured"]
    """Where latency and bandwidth come from.

    `local`: both ends are the same peer. `measured backwards`: only the opposite direction was measured. `not measured`: defaults.
    """

    def hop_s(self, size_bytes: float) -> float:
        """Return the one-way time of a message of this size."""
        if self.source == "local":
            return 0.0
        return self.latency_s + transfer_s(size_bytes, self.rtt_s, self.bandwidth_bytes_s)


_LOCAL = Link(latency_s=0.0, bandwidth_bytes_s=float("inf"), source="local")
_UNMEASURED = Link(latency_s=UNMEASURED_HOP_S, bandwidth_bytes_s=UNMEASURED_BANDWIDTH_BYTES_S, source="not measured")


class Network(msgspec.Struct, frozen=True):
    """The measured links by `(sender, receiver)`. An unmeasured link has pessimistic defaults."""

    stats: dict[tuple[PeerId, PeerId], LinkStats] = {}

    @classmethod
    def from_adverts(cls, adverts: Iterable[Advert]) -> Self:
        """Collect the links from `adverts`. Each peer advertises the links on which it is the sender."""
        return cls({(advert.peer, target): stats for advert in adverts for target, stats in advert.links.items()})

    def with_links(self, extra: Mapping[tuple[PeerId, PeerId], LinkStats]) -> "Network":
        """Return this network with the links of `extra` added. They replace measured links between the same peers."""
        return Network({**self.stats, **extra})

    def link(self, source: PeerId, target: PeerId) -> Link:
        """Return the link from `source` to `target`: as measured, else as measured backwards, else with default values."""
        if source == target:
            return _LOCAL
        forward = self.stats.get((source, target))
        if forward is not None and forward.bandwidth_bytes_s > 0:
            return _from_stats(forward, "measured")
        backward = self.stats.get((target, source))
        if backward is not None and backward.bandwidth_bytes_s > 0:
            return _from_stats(backward, "measured backwards")
        return _UNMEASURED

    def hop_s(self, source: PeerId, target: PeerId, size_bytes: float) -> float:
        """Return the one-way time of a message; 0 from a peer to itself."""
        return self.link(source, target).hop_s(size_bytes)


def _from_stats(stats: LinkStats, source: Literal["measured", "measured backwards"]) -> Link:
    return Link(
        latency_s=stats.hop_s or stats.rtt_s / 2,
        rtt_s=stats.rtt_s if stats.slow_start else 0.0,
        bandwidth_bytes_s=stats.bandwidth_bytes_s,
        source=source,
    )
