"""What a device shows of itself, and what it does not."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest

from meshd.agents.device import sensors
from meshd.agents.device.sensors import DeviceSensors, read
from meshd.clock import SystemClock
from meshd.types import DeviceStatus


def shows(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    def sensor() -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(psutil, name, sensor, raising=False)


def test_this_device_can_be_read() -> None:
    status = read()
    assert status.load is not None
    assert msgspec.json.decode(msgspec.json.encode(status), type=DeviceStatus) == status  # within the bounds of the protocol


@pytest.mark.parametrize(
    ("battery", "charge", "mains"),
    [
        (SimpleNamespace(percent=41.3, power_plugged=False), 0.41, False),
        (SimpleNamespace(percent=100.4, power_plugged=None), 1.0, None),
        (None, None, None),
        (FileNotFoundError("no such driver"), None, None),
    ],
)
def test_battery(monkeypatch: pytest.MonkeyPatch, battery: Any, charge: float | None, mains: bool | None) -> None:
    shows(monkeypatch, "sensors_battery", battery)
    assert (read().battery, read().on_mains) == (charge, mains)


def warm(*degrees: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(current=each) for each in degrees]


@pytest.mark.parametrize(
    ("readings", "degrees"),
    [
        ({"nvme": warm(70.0), "coretemp": warm(41.0, 48.6)}, 49.0),
        ({"acpitz": warm(27.8), "k10temp": warm(55.0)}, 55.0),
        ({"coretemp": warm(0.0, 255.0), "acpitz": warm(30.0)}, 30.0),
        ({"nvme": warm(70.0)}, None),
        ({}, None),
        (OSError("no sensors"), None),
    ],
)
def test_the_temperature_is_that_of_the_processor(monkeypatch: pytest.MonkeyPatch, readings: Any, degrees: float | None) -> None:
    shows(monkeypatch, "sensors_temperatures", readings)
    assert read().temperature_c == degrees


async def test_the_newest_reading_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "PERIOD_S", 0.01)
    shows(monkeypatch, "sensors_battery", SimpleNamespace(percent=50.0, power_plugged=True))
    kept = DeviceSensors(SystemClock())
    assert kept.latest() == DeviceStatus()
    running = asyncio.create_task(kept.run())
    await _until(lambda: kept.latest().battery == 0.5)
    running.cancel()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
