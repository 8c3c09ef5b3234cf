"""The rows of a cluster, as the events of a daemon add up to them."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
LISTINGS = ("peers", "links", "models", "plans", "sessions")
MAX_ROWS = 20_000
"""Rows that are kept of one listing. A daemon sends at most some thousands of each peer."""


def peer_key(row: Row) -> str:
    """What identifies a peer's row: its id, or the addresses of a peer whose id is not known."""
    return row["id"] or ",".join(row["addresses"])


class ClusterRows:
    """The present rows of each listing, by their keys, in the order in which they came."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Row]] = {listing: {} for listing in LISTINGS}

    def __getitem__(self, listing: str) -> list[Row]:
        return list(self._rows[listing].values())

    def clear(self) -> None:
        """Forget all rows, because a stream begins that has them all."""
        for rows in self._rows.values():
            rows.clear()

    def apply(self, event: Mapping[str, Any]) -> frozenset[str]:
        """Apply an event. Returns: the listings that have changed. Listings that this version does not know are left out."""
        match event:
            case {"type": "row", "list": str(listing), "key": str(key), "row": dict(row)} if listing in self._rows:
                rows = self._rows[listing]
                if key in rows or len(rows) < MAX_ROWS:
                    rows[key] = row
                return frozenset({listing})
            case {"type": "gone", "list": str(listing), "key": str(key)} if listing in self._rows:
                self._rows[listing].pop(key, None)
                return frozenset({listing})
            case {"type": "lost"}:
                self.clear()
                return frozenset(LISTINGS)
        return frozenset()
