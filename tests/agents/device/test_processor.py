import sys
from pathlib import Path

import pytest

from meshd.agents.device.processor import processor_name


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


def test_the_name_is_never_empty(tmp_path: Path) -> None:
    assert processor_name(tmp_path)
