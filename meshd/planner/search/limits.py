"""Limits on the chains that a search may return, and the tolerance within which two costs count as equal."""

from collections.abc import Collection
from dataclasses import dataclass

TIE = 1e-9
"""Costs with a smaller relative difference count as equal, so that rounding does not decide between chains."""


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """Limits on the set of peers in a chain. Peers are indices."""

    least: int = 1
    """Least number of peers."""
    exactly: int | None = None
    """Exact number of peers. None: any."""
    require: frozenset[int] = frozenset()
    """Peers that must all take part."""
    forbid: frozenset[int] | None = None
    """Peers that may not all take part together. The search for a runner-up excludes the best plan's set of peers in this way."""

    def allow(self, peers: Collection[int]) -> bool:
        """Whether a chain over these peers may be returned."""
        chosen = frozenset(peers)
        if len(chosen) < self.least or (self.exactly is not None and len(chosen) != self.exactly):
            return False
        return self.require <= chosen and (self.forbid is None or not self.forbid <= chosen)
