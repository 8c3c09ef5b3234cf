"""The links between peers, as measured in each direction."""

from collections.abc import Iterable, Mapping
from typing import Literal, Self

import msgspec

from meshd.types import Advert, LinkStats, PeerId

UNMEASURED_HOP_S = 0.010
"""Assumed latency of an unmeasured link: that of poor Wi-Fi, so that measured links are preferred."""
UNMEASURED_BANDWIDTH_BYTES_S = 1_000_000.0
"""Assumed bandwidth of an unmeasured link: 8 Mbit/s."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A link between two peers, in one direction."""

    latency_s: float
    """One-way time of a small message."""
    bandwidth_bytes_s: float
    source: Literal["local", "measured", "measured backwards", "not measured"]
    """Where latency and bandwidth come from.

    `local`: both ends are the same peer. `measured backwards`: only the opposite direction was measured. `not measured`: defaults.
    """

    def hop_s(self, size_bytes: float) -> float:
        """Return the one-way time of a message of this size."""
        if self.source == "local":
            return 0.0
        return self.latency_s + size_bytes / self.bandwidth_bytes_s


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
    return Link(latency_s=stats.hop_s or stats.rtt_s / 2, bandwidth_bytes_s=stats.bandwidth_bytes_s, source=source)
