import sys
from pathlib import Path

import pytest

from meshd.agents.device.processor import processor_features, processor_name


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_instruction_sets_have_a_digest_in_any_order(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("one", "other", "hidden", "bare")]
    for root in roots:
        root.mkdir()
    texts = ("flags\t: fpu avx2 avx512f\n", "flags\t: avx512f fpu avx2\n", "flags\t: fpu avx2\n", "processor\t: 0\n")
    one, other, hidden, bare = (processor_features(cpuinfo(root, text)) for root, text in zip(roots, texts, strict=True))
    assert one == other != hidden
    assert bare == ""


def test_the_name_is_never_empty(tmp_path: Path) -> None:
    assert processor_name(tmp_path)
