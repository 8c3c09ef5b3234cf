"""Reports problems between peers without flooding the log: at most one line per cause and minute, and rows for `meshd status`."""

import logging
from collections import OrderedDict, deque
from typing import TypedDict

from meshd.clock import Clock
from meshd.types import PeerId

log = logging.getLogger("meshd.links")
_ROWS = 64
_CAUSES = 256
_QUIET_S = 60.0
_ROW_S = 120.0
"""How long a refusal is shown. A device that is still there is refused again within half a minute."""


class RefusalRow(TypedDict):
    """A peer, or another device, that was refused a link."""

    address: str
    """Port 0: it dialled this peer, and did not say where it listens."""
    peer: PeerId | None
    reason: str
    at: float
    """Time of the latest refusal, in seconds since the Unix epoch."""
    count: int


class LinkLog:
    """Remembers the latest refusals, and logs each cause at most once a minute."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.total = 0
        """Number of refusals since the start, repeated ones included."""
        self._rows: deque[tuple[RefusalRow, list[float]]] = deque(maxlen=_ROWS)
        """Each refusal, and the monotonic time of its latest repetition."""
        self._logged: OrderedDict[str, float] = OrderedDict()

    def refused(self, address: str, peer: PeerId | None, reason: str) -> bool:
        """Record a refusal. Returns: True if no recorded one has the same address, peer and reason."""
        now, wall = self._clock.monotonic(), self._clock.wall()
        self.total += 1
        for row, seen in self._recent():
            if (row["address"], row["peer"], row["reason"]) == (address, peer, reason):
                row["at"], seen[0] = wall, now
                row["count"] += 1
                return False
        self._rows.append((RefusalRow(address=address, peer=peer, reason=reason, at=wall, count=1), [now]))
        self.warn(f"refused {address}", "no link with %s: %s", address.removesuffix(":0"), reason)
        return True

    def warn(self, cause: str, text: str, *values: object) -> bool:
        """Log a warning, unless one with this cause was logged within the last minute. Returns: whether it was logged now."""
        now = self._clock.monotonic()
        if now - self._logged.get(cause, -_QUIET_S) < _QUIET_S:
            return False
        self._logged[cause] = now
        self._logged.move_to_end(cause)
        if len(self._logged) > _CAUSES:
            self._logged.popitem(last=False)
        log.warning(text, *values)
        return True

    def rows(self) -> list[RefusalRow]:
        """Returns: the refusals of the last two minutes, oldest first."""
        return [row.copy() for row, _ in self._recent()]

    def _recent(self) -> list[tuple[RefusalRow, list[float]]]:
        now = self._clock.monotonic()
        return [(row, seen) for row, seen in self._rows if now - seen[0] <= _ROW_S]
