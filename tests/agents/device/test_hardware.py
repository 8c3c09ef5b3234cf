import os
import sys
from pathlib import Path

import pytest

from meshd.agents.device.hardware import EnergyMeter, disk_read_rate, processor_name


def cpuinfo(root: Path, text: str) -> Path:
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(text)
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD  Ryzen 7\nprocessor\t: 1\nmodel name\t: other\n", "AMD Ryzen 7"),
        ("processor\t: 0\nCPU part\t: 0xd0b\nHardware\t: BCM2835\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("hart\t: 0\nuarch\t: sifive,u74\n", "sifive,u74"),
    ],
)
def test_the_processors_name_is_found(tmp_path: Path, text: str, name: str) -> None:
    assert processor_name(cpuinfo(tmp_path, text)) == name


def test_a_processor_without_a_name_has_one_all_the_same(tmp_path: Path) -> None:
    assert processor_name(tmp_path)


def test_the_disk_is_read_and_left_as_it_was(tmp_path: Path) -> None:
    assert disk_read_rate(tmp_path, limit_bytes=2**20, limit_s=0.2) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        disk_read_rate(tmp_path / "missing")
    assert not os.path.exists(tmp_path / "missing")


class Packages:
    """RAPL counters in a made-up sysfs: two packages, and a part of one that must not count twice."""

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
    monkeypatch.setattr("meshd.agents.device.hardware.time.monotonic", lambda: times[-1])
    return times


def test_power_is_the_energy_of_all_packages_over_time(tmp_path: Path, now: list[float]) -> None:
    packages = Packages(tmp_path)
    meter = EnergyMeter(tmp_path)
    packages.set("intel-rapl:0", 30_000_000)
    packages.set("intel-rapl:0:0", 29_000_000)
    packages.set("intel-rapl:1", 10_000_000)
    now.append(102.0)
    assert meter.mean_w() == 20.0


def test_a_counter_that_wrapped_is_followed(tmp_path: Path, now: list[float]) -> None:
    packages = Packages(tmp_path)
    packages.set("intel-rapl:0", 990_000_000)
    meter = EnergyMeter(tmp_path)
    packages.set("intel-rapl:0", 10_000_000)
    now.append(101.0)
    assert meter.mean_w() == 20.0


def test_without_counters_there_is_no_figure(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).mean_w() is None
