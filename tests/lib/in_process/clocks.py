"""A clock whose time a test sets, while sleeps are real."""

from dataclasses import dataclass

from meshd.clock import SystemClock


@dataclass
class SetClock(SystemClock):
    """Returns `now` until the test changes it."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now
