"""All that the monitor knows of the cluster, as the events of one daemon add up to it. Pure: callers pass the time."""

from collections import deque
from collections.abc import Mapping
from itertools import islice
from typing import Any

from meshd.tui.rates import Histories, StageTimes, TokenRates
from meshd.tui.rows import ClusterRows, Row, peer_key

Event = Mapping[str, Any]
KEPT = 2000
"""Events that are kept for the screen of logs."""
_RECOVERIES = 20
_PULLS = 64


class ClusterState:
    """Rows, measured times, and the latest events."""

    def __init__(self) -> None:
        self.rows = ClusterRows()
        self.rates = TokenRates()
        self.steps = StageTimes()
        self.histories = Histories()
        self.happenings: deque[Event] = deque(maxlen=KEPT)
        """Events other than changes of rows and of work, oldest first."""
        self.happened = 0
        """How many there were, those that are not kept any more included."""
        self.recoveries: deque[Event] = deque(maxlen=_RECOVERIES)
        self.pulls: dict[tuple[str, str], Event] = {}
        """The latest progress of each running pull, and of those that ended last, by peer and model."""
        self.now = 0.0

    def restart(self) -> None:
        """Forget the rows, because a stream begins that has them all."""
        self.rows.clear()

    def apply(self, event: Event, now: float) -> frozenset[str]:
        """Apply an event. Returns: what has changed: names of listings, `happenings`, `pulls`, `recoveries`, `work`, `history`."""
        return self.tick(now) | self._apply(event, now)

    def _apply(self, event: Event, now: float) -> frozenset[str]:
        changed = self.rows.apply(event)
        kind = event.get("type")
        if kind in ("row", "gone"):
            if kind == "row" and event["list"] == "sessions" and event["row"].get("role") == "coordinator":
                self.rates.observe(event["row"]["id"], event["row"]["tokens"], now)
            return changed
        if kind == "work":
            self.steps.observe(event)
            self.histories.observe(event)
            return frozenset({"work"})
        if kind == "pull":
            return self._pulled(event)
        changed |= self._happens(event)
        if kind == "recovery":
            self.recoveries.append(event)
            return changed | {"recoveries"}
        return changed

    def _happens(self, event: Event) -> frozenset[str]:
        self.happenings.append(event)
        self.happened += 1
        return frozenset({"happenings"})

    def since(self, happened: int) -> list[Event]:
        """The events that came after so many had happened, as far as they are kept."""
        new = min(self.happened - happened, len(self.happenings))
        return list(islice(self.happenings, len(self.happenings) - new, None))

    def _pulled(self, event: Event) -> frozenset[str]:
        key = event["peer"], event["model"]
        before = self.pulls.pop(key, None)
        self.pulls[key] = event
        while len(self.pulls) > _PULLS:
            del self.pulls[next(iter(self.pulls))]
        changed = frozenset({"pulls"})
        if before is None or before["phase"] != event["phase"]:  # not each percent
            changed |= self._happens(event)
        return changed

    def tick(self, now: float) -> frozenset[str]:
        """Take the samples that are due, and forget ended sessions. Returns: what has changed: `history`."""
        self.now = now
        if not self.histories.tick(now, self.rows):
            return frozenset()
        self.rates.forget(frozenset(row["id"] for row in self.sessions()))
        return frozenset({"history"})

    def sessions(self) -> list[Row]:
        """The rows of all answers, each as its coordinator tells of it."""
        return [row for row in self.rows["sessions"] if row.get("role") == "coordinator"]

    def peer(self, identifier: str | None) -> Row | None:
        """The row of a peer, by its `peer_key`."""
        return next((row for row in self.rows["peers"] if peer_key(row) == identifier), None)

    def link(self, source: str, target: str) -> Row | None:
        """The row of a link in one direction."""
        return next((row for row in self.rows["links"] if (row["source"], row["target"]) == (source, target)), None)

    def model_name(self, identifier: str) -> str:
        """The name of a model; the beginning of its id if the name is not known."""
        return next((str(row["name"]) for row in self.rows["models"] if row["id"] == identifier), identifier[:8])
