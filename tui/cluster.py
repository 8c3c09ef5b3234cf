"""All that the monitor knows of the cluster, as the events of one daemon add up to it. Pure: callers pass the time."""

from collections import deque
from collections.abc import Mapping
from typing import Any

from meshd.tui.rates import Histories, StageTimes, TokenRates
from meshd.tui.rows import ClusterRows, Row

Event = Mapping[str, Any]
KEPT = 2000
"""Events that are kept for the screen of logs."""
_RECOVERIES = 20
_PULLS = 64
_ENDS = frozenset({"done", "ended"})


class ClusterState:
    """Rows, measured times, and the latest events."""

    def __init__(self) -> None:
        self.rows = ClusterRows()
        self.rates = TokenRates()
        self.steps = StageTimes()
        self.histories = Histories()
        self.happenings: deque[Event] = deque(maxlen=KEPT)
        self.recoveries: deque[Event] = deque(maxlen=_RECOVERIES)
        self.pulls: dict[tuple[str, str], Event] = {}
        """The latest progress of each running pull, and of those that ended last, by peer and model."""
        self.now = 0.0

    def restart(self) -> None:
        """Forget the rows, because a stream begins that has them all."""
        self.rows.clear()

    def apply(self, event: Event, now: float) -> frozenset[str]:
        """Apply an event. Returns: what has changed: names of listings, `pulls`, `recoveries`, `work`, `history`."""
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
        self.happenings.append(event)
        if kind == "recovery":
            self.recoveries.append(event)
            return changed | {"recoveries"}
        return changed

    def _pulled(self, event: Event) -> frozenset[str]:
        key = event["peer"], event["model"]
        before = self.pulls.pop(key, None)
        self.pulls[key] = event
        while len(self.pulls) > _PULLS:
            del self.pulls[next(iter(self.pulls))]
        if before is None or before["phase"] != event["phase"]:  # not each percent
            self.happenings.append(event)
        return frozenset({"pulls"})

    def tick(self, now: float) -> frozenset[str]:
        """Take the samples that are due, and forget ended sessions. Returns: what has changed: `history`."""
        self.now = now
        if not self.histories.tick(now, self.rows["peers"], self.rows["links"]):
            return frozenset()
        self.rates.forget(frozenset(row["id"] for row in self.sessions()))
        return frozenset({"history"})

    def sessions(self) -> list[Row]:
        """The rows of all answers, each as its coordinator tells of it."""
        return [row for row in self.rows["sessions"] if row.get("role") == "coordinator"]

    def peer(self, identifier: str | None) -> Row | None:
        """The row of a peer."""
        return next((row for row in self.rows["peers"] if row["id"] == identifier), None)

    def link(self, source: str, target: str) -> Row | None:
        """The row of a link in one direction."""
        return next((row for row in self.rows["links"] if (row["source"], row["target"]) == (source, target)), None)

    def model_name(self, identifier: str) -> str:
        """The name of a model; the beginning of its id if the name is not known."""
        return next((str(row["name"]) for row in self.rows["models"] if row["id"] == identifier), identifier[:8])

    def running_pulls(self) -> list[Event]:
        """The pulls that have not ended."""
        return [event for event in self.pulls.values() if event["phase"] not in _ENDS]
