"""Checks that a mesh blames only peers that have a fault."""

import threading
from dataclasses import dataclass, field
from typing import Any

_BEFORE_S, _AFTER_S = 0.5, 5.0
"""How long before the begin and after the end of a fault its peer may be blamed: the times of events are known this well, and a
session keeps the peers that failed it until its next token."""


@dataclass
class FaultTimes:
    """When which peer had a fault. All times are Unix times, as those of stories."""

    _times: dict[str, list[list[float]]] = field(default_factory=dict)
    """Name of a peer -> begin and end of each of its faults."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begins(self, name: str, at: float) -> None:
        with self._lock:
            self._times.setdefault(name, []).append([at, float("inf")])

    def ends(self, name: str, at: float) -> None:
        """End the fault that has begun last."""
        with self._lock:
            self._times[name][-1][1] = at

    def covers(self, name: str, at: float) -> bool:
        """Whether a peer may be blamed at a time."""
        with self._lock:
            return any(begin - _BEFORE_S <= at <= end + _AFTER_S for begin, end in self._times.get(name, ()))


def wrong_blame(story: list[dict[str, Any]], names: dict[str, str], faults: FaultTimes) -> list[str]:
    """Find the peers without a fault that the story of a session blames.

    What a peer with a fault says does not count: one that was frozen or cut off finds all others silent.

    Returns: a line for each.
    """
    found = []
    for row in story:
        blamed, at = row.get("blame") or [], row["unix_s"]
        for peer in [blamed] if isinstance(blamed, str) else blamed:
            name = names.get(peer, peer)
            if not faults.covers(name, at) and not faults.covers(row["name"], at):
                found.append(f"{row['name']} blames {name}, which had no fault: {row['what']}, {row['reason']}")
    return found
