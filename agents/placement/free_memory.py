"""Computes how much memory may still be reserved on this peer."""

from collections.abc import Callable
from logging import getLogger

from meshd.agents.placement.resident import ResidentModels
from meshd.clock import Clock

log = getLogger(__name__)

_MEASURED_AGAIN_S = 1.0
"""Maximum age of the measured free memory. A measurement is reused because it reads several files."""


class FreeMemory:
    """Computes the free memory as the smaller of two figures.

    The first is the memory that was free when the daemon started, minus all reservations. The second is the memory that is free
    now, minus the reservations that are not allocated yet; it counts what other processes have taken since the start.
    """

    def __init__(self, at_start_bytes: int, residents: ResidentModels, measure: Callable[[], int], clock: Clock) -> None:
        """`measure` returns the bytes that the system has free now."""
        self._at_start_bytes = at_start_bytes
        self._residents = residents
        self._measure = measure
        self._clock = clock
        self._measured_at = float("-inf")
        self._measured_bytes = at_start_bytes
        self._failing = False

    def free_bytes(self) -> int:
        """Returns: bytes that may still be reserved, with those of stages that are freed when memory is short.

        The measurement behind them is at most `_MEASURED_AGAIN_S` old.
        """
        return max(0, self.spare_bytes() + self._residents.idle_stage_bytes)

    def spare_bytes(self) -> int:
        """Returns: bytes that may be reserved without freeing anything.

        Less than 0 while layers are promised memory that others are yet to give up.
        """
        now = self._clock.monotonic()
        if now - self._measured_at > _MEASURED_AGAIN_S:
            self._measured_at = now
            self._measured_bytes = self._measurement()
        unreserved = self._at_start_bytes - self._residents.reserved_bytes
        return min(unreserved, self._measured_bytes - self._residents.untouched_bytes)

    def _measurement(self) -> int:
        """Measure the free memory. A failure, for example when all file descriptors are in use, is logged once until a measurement
        succeeds again; the last figure stays valid."""
        try:
            measured = self._measure()
        except OSError as error:
            if not self._failing:
                log.warning("the free memory can't be measured, so the last figure is used: %s", error)
            self._failing = True
            return self._measured_bytes
        self._failing = False
        return measured

    def forget(self) -> None:
        """Drop the cached measurement, because layers were loaded or freed."""
        self._measured_at = float("-inf")
