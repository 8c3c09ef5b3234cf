"""Limits on the chains that a search may return."""

from collections.abc import Collection
from dataclasses import dataclass

TIE = 1e-9
"""Costs whose relative difference is smaller are equal: the tie-break decides."""


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """Bounds on the set of a chain's peers, as indices."""

    least: int = 1
    """At least so many peers."""
    exactly: int | None = None
    """Exactly so many."""
    require: frozenset[int] = frozenset()
    """All of these must take part."""
    forbid: frozenset[int] | None = None
    """These may not all take part together (used to find a runner-up)."""

    def allow(self, peers: Collection[int]) -> bool:
        """Whether a chain over these peers may be returned."""
        chosen = frozenset(peers)
        if len(chosen) < self.least or (self.exactly is not None and len(chosen) != self.exactly):
            return False
        return self.require <= chosen and (self.forbid is None or not self.forbid <= chosen)
