"""How much memory may still be reserved on this peer."""

from collections.abc import Callable

from meshd.agents.placement.loads import ResidentModels
from meshd.clock import Clock

_MEASURED_AGAIN_S = 1.0
"""How old the figure of free memory may be: a measurement costs some file reads."""


class FreeMemory:
    """The memory free at the start less every reservation, and no more than other processes have left of it since."""

    def __init__(self, at_start_bytes: int, holdings: ResidentModels, measure: Callable[[], int], clock: Clock) -> None:
        """`measure` returns the bytes that are free now."""
        self._at_start_bytes = at_start_bytes
        self._holdings = holdings
        self._measure = measure
        self._clock = clock
        self._measured_at = float("-inf")
        self._measured_bytes = 0

    def free_bytes(self) -> int:
        """Bytes that may still be reserved; the measurement behind it is at most a second old."""
        now = self._clock.monotonic()
        if now - self._measured_at > _MEASURED_AGAIN_S:
            self._measured_at, self._measured_bytes = now, self._measure()
        unreserved = self._at_start_bytes - self._holdings.reserved_bytes
        return max(0, min(unreserved, self._measured_bytes - self._holdings.untouched_bytes))

    def forget(self) -> None:
        """Measure anew at the next question: layers were loaded or freed."""
        self._measured_at = float("-inf")
