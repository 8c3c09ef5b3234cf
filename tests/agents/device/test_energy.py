from pathlib import Path

import pytest

from meshd.agents.device.energy import EnergyMeter


class Packages:
    """RAPL counters in a fake sysfs: two packages, and a subzone of the first, whose energy must not count twice."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "sys/class/powercap"
        for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
            (self.folder / name).mkdir(parents=True)
            (self.folder / name / "max_energy_range_uj").write_text("1000000000\n")
            self.set(name, 0)

    def set(self, name: str, microjoules: int) -> None:
        (self.folder / name / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    times = [100.0]
    monkeypatch.setattr("meshd.agents.device.energy.time.monotonic", lambda: times[-1])
    return times


def test_power_is_the_energy_of_all_packages_over_time(tmp_path: Path, now: list[float]) -> None:
    packages = Packages(tmp_path)
    meter = EnergyMeter(tmp_path)
    packages.set("intel-rapl:0", 30_000_000)
    packages.set("intel-rapl:0:0", 29_000_000)
    packages.set("intel-rapl:1", 10_000_000)
    now.append(102.0)
    assert meter.mean_w() == 20.0


def test_the_wrap_of_a_counter_is_taken_into_account(tmp_path: Path, now: list[float]) -> None:
    packages = Packages(tmp_path)
    packages.set("intel-rapl:0", 990_000_000)
    meter = EnergyMeter(tmp_path)
    packages.set("intel-rapl:0", 10_000_000)
    now.append(101.0)
    assert meter.mean_w() == 20.0


def test_without_counters_there_is_no_power(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).mean_w() is None
