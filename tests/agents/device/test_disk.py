import os
from pathlib import Path

import pytest

from meshd.agents.device.disk import disk_read_rate


def test_the_rate_is_positive_and_no_file_remains(tmp_path: Path) -> None:
    assert disk_read_rate(tmp_path, limit_bytes=2**20, limit_s=0.2) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        disk_read_rate(tmp_path / "missing")
    assert not os.path.exists(tmp_path / "missing")
