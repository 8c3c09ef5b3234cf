"""How far another peer's monotonic clock is from this peer's, from the round trips of heartbeats.

As in NTP (RFC 5905, section 8): the other peer reads its clock somewhere between the sending of the question and the arrival of the
answer. So its clock minus the middle of both is the offset, wrong by at most half of the round trip, whatever the two directions
take. The shortest round trip of each period is kept, because it says most.
"""

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

PERIOD_S = 2.0
"""Four heartbeats. The best of them is kept."""
SAMPLES = 300
"""Ten minutes: an answer's spans are kept no longer."""
DRIFT = 1e-4
"""Largest assumed difference of two clocks' rates: crystals are within 50 millionths of their nominal rate."""


class Offset(NamedTuple):
    """Another clock minus this one, at one time of this clock; all in seconds."""

    at: float
    offset: float
    error: float
    """The true offset differs by at most this much."""


@dataclass(slots=True)
class ClockOffset:
    """Samples of one other clock, oldest first. Pure: callers pass the times."""

    _samples: deque[Offset] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    _period: float = float("-inf")
    """When the period of the newest sample began."""

    def copy(self) -> "ClockOffset":
        """Return the present samples, for another thread."""
        return ClockOffset(self._samples.copy(), self._period)

    def add(self, sent: float, answered: float, theirs: float) -> None:
        """Add a round trip: sent and answered in this clock, and the reading of the other one between."""
        sample = Offset((sent + answered) / 2, theirs - (sent + answered) / 2, (answered - sent) / 2)
        if answered - self._period >= PERIOD_S:
            self._period = answered
            self._samples.append(sample)
        elif sample.error < self._samples[-1].error:
            self._samples[-1] = sample

    def when(self, at: float) -> Offset | None:
        """Return the offset at a time of this clock; None without samples.

        Between two samples it is interpolated, so that the order of the other peer's readings stays.
        """
        if not self._samples:
            return None
        place = bisect_left(self._samples, at, key=lambda sample: sample.at)
        if place in (0, len(self._samples)):
            near = self._samples[0 if place == 0 else -1]
            return Offset(at, near.offset, near.error + DRIFT * abs(at - near.at))
        before, after = self._samples[place - 1], self._samples[place]
        share = (at - before.at) / (after.at - before.at)
        offset = before.offset + share * (after.offset - before.offset)
        error = max(before.error, after.error) + DRIFT * min(at - before.at, after.at - at)
        return Offset(at, offset, error)

    def to_ours(self, theirs: float) -> Offset | None:
        """Return the time of this clock at which the other one showed `theirs` (in `at`), with the offset; None without samples."""
        if not self._samples:
            return None
        # The offset is needed at a time that follows from it. It changes by less than `DRIFT`, so one step is enough.
        first = self.when(theirs - self._samples[-1].offset)
        assert first is not None
        found = self.when(theirs - first.offset)
        assert found is not None
        return Offset(theirs - found.offset, found.offset, found.error)
