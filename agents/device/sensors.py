"""Reads how busy and how warm this device is, and its battery. What a device does not show is unknown."""

import asyncio
from logging import getLogger

import psutil

from meshd.clock import Clock
from meshd.types import DeviceStatus

log = getLogger(__name__)

PERIOD_S = 5.0
"""As often as a status is sent without a change."""
_PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "cpu-thermal", "acpitz")
"""Names that Linux gives to sensors of processors, the most exact first."""
_HOTTEST_C = 150.0
"""Broken sensors report more than this, or less than 0."""


class DeviceSensors:
    """Keeps a recent reading. Reading takes tens of milliseconds on some devices, so it happens on a thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._latest = DeviceStatus()

    def latest(self) -> DeviceStatus:
        """Return the newest reading; at first, nothing is known."""
        return self._latest

    async def run(self) -> None:
        """Read every `PERIOD_S` until cancelled."""
        psutil.cpu_percent()  # the load is counted from this call on
        while True:
            await self._clock.sleep(PERIOD_S)
            self._latest = await asyncio.to_thread(read)


def read() -> DeviceStatus:
    """Read all sensors. Blocks."""
    battery, on_mains = _battery()
    return DeviceStatus(
        load=round(min(1.0, max(0.0, psutil.cpu_percent() / 100)), 2),
        temperature_c=_temperature_c(),
        battery=battery,
        on_mains=on_mains,
    )


def _battery() -> tuple[float | None, bool | None]:
    try:
        state = psutil.sensors_battery()
    except (OSError, AttributeError, ValueError) as error:  # psutil lacks it on some systems, and trips over odd drivers on others
        log.debug("no battery can be read: %s", error)
        return None, None
    if state is None:
        return None, None
    return round(min(1.0, max(0.0, state.percent / 100)), 2), state.power_plugged


def _temperature_c() -> float | None:
    """Return the temperature of the processor's hottest sensor."""
    try:
        sensors = psutil.sensors_temperatures()
    except (OSError, AttributeError, ValueError) as error:
        log.debug("no temperature can be read: %s", error)
        return None
    for name in _PROCESSOR_SENSORS:
        readings = [reading.current for reading in sensors.get(name, ()) if 0 < reading.current < _HOTTEST_C]
        if readings:
            return float(round(max(readings)))
    return None
