"""A clock whose time a test sets, while sleeps are real."""

from dataclasses import dataclass

from meshd.clock import SystemClock


@dataclass
class SetClock(SystemClock):
    """A clock that shows `now`, which the test changes."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now
