"""The present round trip and bandwidth of one link, from heartbeats, probes and real traffic. Pure: callers pass the time.

A time that is measured while other bytes queue on the link is too long, and one that a busy program notices late is too long as
well. So the round trip is a median over heartbeats that no large message accompanied. The bandwidth is a median over probes and
large messages, and of an even number of them the higher of the two in the middle: other traffic only makes a sample lower. A lone
sample changes neither; a change of the link shows in the next samples too, and counts from the second one (bandwidth) or the third
one (round trip) on.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from meshd.planner.network import transfer_s
from meshd.protocol.framing import KIB
from meshd.types import LinkStats

ROUND_TRIPS = 5
"""Number of undisturbed heartbeats in the median: it follows a change after three, 1.5 s."""
RECENT_S = 6.0
"""Older samples count only if there is no newer one."""
SURPRISE = 1.5
"""A bandwidth that differs from the present one by this factor is measured again at once."""
PROBE_SHARE_S = 0.02
"""A probe occupies a link for about this long."""
LEAST_PROBE, MOST_PROBE = 32 * KIB, 256 * KIB
_SLOWEST_BYTES_S, _FASTEST_BYTES_S = 1e3, 1e10
_RESOLUTION_S = 2e-4
"""Time differences below this, or below 5 % of the whole time, say nothing about a link."""
_EXPECTED = 0.1
"""A probe took as long as predicted if its time differs by less than this share."""
_QUIET_S = 0.15
"""A large message disturbs heartbeats for this long: its bytes may wait in the queues of the link."""
_BANDWIDTHS = 5


def shortest_s(elapsed_s: float) -> float:
    """Return the shortest difference from `elapsed_s` that says something about a link."""
    return max(_RESOLUTION_S, 0.05 * elapsed_s)


def bandwidth_of(size_bytes: int, elapsed_s: float, rtt_s: float, *, slow_start: bool = True) -> float:
    """Compute the bandwidth at which a message of this size, sent after a pause, is acknowledged after `elapsed_s`.

    Inverts `transfer_s`. Returns: bytes/s; if slow start takes nearly all of the time, the least bandwidth that fits the time.
    """
    waits_s = rtt_s if slow_start else 0.0
    least = transfer_s(size_bytes, waits_s, _FASTEST_BYTES_S) + shortest_s(elapsed_s)
    wanted = max(elapsed_s - rtt_s, least)
    low, high = math.log(_SLOWEST_BYTES_S), math.log(_FASTEST_BYTES_S)
    for _ in range(40):
        middle = (low + high) / 2
        if transfer_s(size_bytes, waits_s, math.exp(middle)) > wanted:
            low = middle
        else:
            high = middle
    return math.exp(low)


@dataclass(slots=True)
class LinkEstimate:
    """What one peer knows of its link with another."""

    slow_start: bool = True
    """See `LinkStats.slow_start`."""
    disturbed_until: float = -math.inf
    """Monotonic time up to which heartbeats may have waited behind a large message."""
    latest_rtt_s: float = 0.0
    round_trips: int = 0
    """Number of round trips measured so far."""
    measured_at: float = 0.0
    """Monotonic time of the latest sample of any kind."""
    _undisturbed: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=ROUND_TRIPS))
    """Time and length of round trips, in seconds."""
    _disturbed: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=ROUND_TRIPS))
    _bandwidths: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_BANDWIDTHS))
    """Time and bytes/s of samples."""

    def disturb(self, now: float) -> None:
        """Record that a large message is sent or received."""
        self.disturbed_until = now + _QUIET_S

    def round_trip(self, rtt_s: float, now: float) -> None:
        """Add a round trip that ended now."""
        self.latest_rtt_s, self.measured_at = rtt_s, now
        self.round_trips += 1
        samples = self._disturbed if now - rtt_s < self.disturbed_until else self._undisturbed
        samples.append((now, rtt_s))

    def probed(self, size_bytes: int, elapsed_s: float, now: float) -> bool:
        """Add a probe that was sent after a pause and acknowledged after `elapsed_s`. Returns: as `bandwidth`.

        A probe that took as long as predicted confirms the present bandwidth. On a distant link slow start hides the bandwidth, and
        computing it from the time would give only a lower bound.
        """
        rtt_s, present = self.rtt_s(now) or 0.0, self.bandwidth_bytes_s(now)
        if present is not None:
            predicted_s = rtt_s + transfer_s(size_bytes, rtt_s if self.slow_start else 0.0, present)
            if abs(predicted_s - elapsed_s) <= max(_RESOLUTION_S, _EXPECTED * elapsed_s):
                return self.bandwidth(present, now)
        return self.bandwidth(bandwidth_of(size_bytes, elapsed_s, rtt_s, slow_start=self.slow_start), now)

    def bandwidth(self, bytes_s: float, now: float) -> bool:
        """Add a sample. Returns: whether it is surprising, so that it should be confirmed by another one."""
        self.measured_at = now
        bytes_s = min(max(bytes_s, _SLOWEST_BYTES_S), _FASTEST_BYTES_S)
        present = self.bandwidth_bytes_s(now)
        before = self._bandwidths[-1][1] if self._bandwidths else bytes_s
        self._bandwidths.append((now, bytes_s))
        if present is None or _alike(bytes_s, present):
            return False
        if not _alike(before, present) and (bytes_s > present) == (before > present):
            while len(self._bandwidths) > 2:
                self._bandwidths.popleft()
            return False
        return len(self._bandwidths) > 1

    def hop_s(self, now: float) -> float | None:
        """Half of the usual round trip. None: not measured."""
        trips = self._recent_trips(now)
        return statistics.median(trips) / 2 if trips else None

    def rtt_s(self, now: float) -> float | None:
        """The shortest recent round trip. None: not measured."""
        return min(self._recent_trips(now), default=None)

    def bandwidth_bytes_s(self, now: float) -> float | None:
        """The bandwidth to the other peer, in bytes/s. None: not measured."""
        recent = [value for at, value in self._bandwidths if now - at <= RECENT_S]
        if not recent:
            recent = [value for _, value in self._bandwidths][-1:]
        return statistics.median_high(recent) if recent else None

    def probe_bytes(self, now: float) -> int:
        """Return the size of a probe that occupies the link for `PROBE_SHARE_S`, within limits."""
        wanted = (self.bandwidth_bytes_s(now) or 0.0) * PROBE_SHARE_S
        return int(min(MOST_PROBE, max(LEAST_PROBE, wanted)))

    def stats(self, now: float, wall: float) -> LinkStats | None:
        """Return the present values for the advert; None if something is not measured. `wall`: the present wall-clock time."""
        rtt_s, hop_s, bandwidth = self.rtt_s(now), self.hop_s(now), self.bandwidth_bytes_s(now)
        if rtt_s is None or hop_s is None or bandwidth is None:
            return None
        return LinkStats(
            rtt_s=rtt_s,
            bandwidth_bytes_s=bandwidth,
            hop_s=hop_s,
            measured_at=wall - (now - self.measured_at),
            slow_start=self.slow_start,
        )

    def _recent_trips(self, now: float) -> list[float]:
        """Return the undisturbed round trips of late; without any, the shortest of the disturbed ones; else the last known."""
        undisturbed = [trip for at, trip in self._undisturbed if now - at <= RECENT_S]
        if undisturbed:
            return undisturbed
        disturbed = [trip for at, trip in self._disturbed if now - at <= RECENT_S]
        if disturbed:
            return [min(disturbed)]
        return [trip for _, trip in self._undisturbed or self._disturbed][-1:]


def _alike(one: float, other: float) -> bool:
    return max(one, other) <= SURPRISE * min(one, other)


def changed(old: LinkStats | None, new: LinkStats) -> bool:
    """Whether the change is worth an advert of its own, before the next periodic one."""
    if old is None:
        return True
    nearer = abs(new.hop_s - old.hop_s) > max(1e-4, 0.1 * old.hop_s)
    return nearer or not old.bandwidth_bytes_s / 1.2 < new.bandwidth_bytes_s < old.bandwidth_bytes_s * 1.2
