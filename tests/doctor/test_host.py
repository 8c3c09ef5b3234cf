"""What psutil and the system's tools say of the device, and how it is judged."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from meshd.doctor import host, limits
from meshd.doctor.check import CommandOutput, Context, Found

Check = Callable[[Context], Found]


def _only(check: Check, context: Context) -> tuple[str, str]:
    [result] = check(context)
    return result.status.value, result.mend


@pytest.mark.parametrize(("plugged", "status"), [(True, "ok"), (False, "warning"), (None, "warning")])
def test_a_device_on_its_battery(plugged: bool | None, status: str, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(percent=40.0, power_plugged=plugged), raising=False)
    assert _only(host.battery, context)[0] == status


@pytest.mark.parametrize(("current", "status"), [(60.0, "ok"), (99.0, "warning")])
def test_a_hot_processor(current: float, status: str, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = SimpleNamespace(label="core 0", current=current, high=100.0, critical=105.0)
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: {"coretemp": [entry]}, raising=False)
    assert _only(host.temperature, context)[0] == status


@pytest.mark.parametrize(("bits", "status"), [("0x0", "ok"), ("0x50000", "ok"), ("0x50005", "warning")])
def test_a_raspberry_pi_that_throttles_now(bits: str, status: str, context: Context) -> None:
    """The upper bits say that it has throttled since it was started."""
    told = replace(context, command=lambda words: CommandOutput(0, f"throttled={bits}\n") if words[0] == "vcgencmd" else None)
    assert _only(host.temperature, told)[0] == status


@pytest.mark.parametrize(
    ("text", "status", "mend"),
    [("NTP=yes\nNTPSynchronized=yes\n", "ok", ""), ("NTP=no\nNTPSynchronized=no\n", "warning", "sudo timedatectl set-ntp true")],
)
def test_a_clock_that_nothing_sets(text: str, status: str, mend: str, context: Context) -> None:
    assert _only(host.clock, replace(context, command=lambda words: CommandOutput(0, text))) == (status, mend)


@pytest.mark.parametrize(
    ("requirement", "trouble"),
    [
        ("psutil>=6", ""),
        ("psutil>=6.0.0; sys_platform != 'win32'", ""),
        ("psutil>=999", "psutil is"),
        ("no-such-package>=1", "no-such-package is missing"),
        ("no-such-package>=1; extra == 'test'", ""),
        ("psutil", ""),
    ],
)
def test_requirements_are_compared_with_what_is_installed(requirement: str, trouble: str) -> None:
    said = host.package_trouble(requirement)
    assert said.startswith(trouble) if trouble else said == ""


@pytest.mark.parametrize(("used", "status"), [(1, "ok"), (7, "warning")])
def test_a_device_that_swaps(used: int, status: str, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    state: Any = SimpleNamespace(total=8 << 30, used=used << 30)
    monkeypatch.setattr(psutil, "swap_memory", lambda: state)
    assert _only(limits.swap, context)[0] == status


def test_locked_memory_matters_to_accelerators_only(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    assert _only(limits.locked_memory, context)[0] == "ok"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    accelerated = replace(context, config=replace(context.config, backend="torch-cuda"))
    assert "ulimit -l unlimited" in _only(limits.locked_memory, accelerated)[1]
