"""The links between peers, as directed measurements."""

from collections.abc import Iterable, Mapping
from typing import Literal, Self

import msgspec

from meshd.types import Advert, LinkStats, PeerId

UNMEASURED_HOP_S = 0.010
"""Assumed for an unmeasured pair: one hop over poor Wi-Fi, so that a measured link is preferred."""
UNMEASURED_BANDWIDTH_BYTES_S = 1_000_000.0
"""Assumed for an unmeasured pair: 8 Mbit/s."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between two peers."""

    latency_s: float
    """A small message, one way."""
    bandwidth_bytes_s: float
    source: Literal["local", "measured", "measured backwards", "not measured"]
    """`measured backwards`: only the other direction is known. `not measured`: the pessimistic default."""

    def hop_s(self, size_bytes: float) -> float:
        """Time for one message of this size, one way."""
        if self.source == "local":
            return 0.0
        return self.latency_s + size_bytes / self.bandwidth_bytes_s


_LOCAL = Link(latency_s=0.0, bandwidth_bytes_s=float("inf"), source="local")
_UNMEASURED = Link(latency_s=UNMEASURED_HOP_S, bandwidth_bytes_s=UNMEASURED_BANDWIDTH_BYTES_S, source="not measured")


class Network(msgspec.Struct, frozen=True):
    """Every measured direction, `(sender, receiver)`. A missing one has a pessimistic default."""

    stats: dict[tuple[PeerId, PeerId], LinkStats] = {}

    @classmethod
    def from_adverts(cls, adverts: Iterable[Advert]) -> Self:
        """The links in these adverts: each peer advertises the directions in which it sends."""
        return cls({(advert.peer, target): stats for advert in adverts for target, stats in advert.links.items()})

    def with_links(self, extra: Mapping[tuple[PeerId, PeerId], LinkStats]) -> "Network":
        """This network with `extra`, which overrides it."""
        return Network({**self.stats, **extra})

    def link(self, source: PeerId, target: PeerId) -> Link:
        """The best knowledge of one direction: measured, measured backwards, or the default."""
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
        """Time for one message, one way; 0 from a peer to itself."""
        return self.link(source, target).hop_s(size_bytes)


def _from_stats(stats: LinkStats, source: Literal["measured", "measured backwards"]) -> Link:
    return Link(latency_s=stats.hop_s or stats.rtt_s / 2, bandwidth_bytes_s=stats.bandwidth_bytes_s, source=source)
