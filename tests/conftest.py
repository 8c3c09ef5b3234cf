"""Set-up of all tests: signals, hypothesis, and the order of tests with real daemons."""

import signal
from pathlib import Path

import hypothesis
import pytest

from meshd.agents.device.memory import usable_cores
from meshd.agents.device.probe import probe_key
from meshd.agents.device.probe_record import BackendTrial, ProbeRecord, save_record
from meshd.config import Config, load_config
from meshd.types import Rates

pytest.register_assert_rewrite("real_daemons", "fake_api")

# Under nohup or in a shell's background job, these signals are ignored, and processes that tests start would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("untimed", deadline=None)  # on a busy machine any example may be slow
hypothesis.settings.load_profile("untimed")

LONGEST_FIRST = ("netlab", "cluster", "chaos", "sim", "kernels")
"""Folders whose tests take longest. Their files begin first, so that no process is left with a long one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first. `pytest --dist loadfile --no-loadscope-reorder` runs files in this order."""
    folder = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        first = item.path.relative_to(folder).parts[0]
        return LONGEST_FIRST.index(first) if first in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@pytest.fixture
def local_config(tmp_path: Path) -> Config:
    """Settings of a daemon that only this machine can reach, with a cached measurement so that it starts at once."""
    (tmp_path / "config.toml").touch()
    paths = {"state": "state", "cache": "cache", "hf-cache": "hf", "config": "config.toml"}
    folders = {name: str(tmp_path / path) for name, path in paths.items()}
    addresses = {"api": "127.0.0.1:0", "link": "127.0.0.1:0"}
    config = load_config(folders | addresses | {"discovery": "static", "backend": "torch", "threads": "1"}, {})
    rates = Rates(
        decode_bytes_s=1e9,
        prefill_flops_s=1e10,
        memory_bytes_s=1e10,
        attention_bytes_s=1e9,
        disk_bytes_s=0.0,
        layer_overhead_s=1e-4,
    )
    trial = BackendTrial(backend="torch", rates=rates)
    config.cache.mkdir()
    record = ProbeRecord(key=probe_key(usable_cores(), 1, ("torch",)), trials=(trial,), disk_bytes_s=1e8, measured_at=1.0)
    save_record(config.cache, record)
    return config
