"""The cache of this device's measurements, and a lock so that only one daemon measures at a time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from filelock import lock_descriptor

from meshd.clock import Clock
from meshd.errors import StorageError
from meshd.state import StateFolder
from meshd.types import Rates

FORMAT = 1
"""Format of the file. Raise it when the measurements, or the way they are made, change."""
CACHE_FILE = "probe.json"
_LOCK_FILE = "probe.lock"
_MAX_RECORDS = 8
"""Records in the file. There is one for each combination of threads and backends that is in use."""
_RETRY_S = 0.2
_TYPICAL_LAYER_BYTES = 16 * 2**20
"""A layer of a model of 1B parameters in 4 bits. Backends are compared by their time for it."""


class BackendTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One backend's measurement, or why it failed. `disk_bytes_s` is 0, since the disk is measured separately."""

    backend: str
    rates: Rates | None = None
    power_w: float | None = None
    error: str = ""

    @property
    def layer_s(self) -> float:
        """Seconds that one token takes through a typical layer; infinite without rates."""
        if self.rates is None or self.rates.decode_bytes_s <= 0:
            return float("inf")
        return _TYPICAL_LAYER_BYTES / self.rates.decode_bytes_s + self.rates.layer_overhead_s


class ProbeKey(msgspec.Struct, frozen=True, kw_only=True):
    """Hardware, software and settings of a measurement. If any of them changes, the device is measured again."""

    format: int
    machine: str
    processor: str
    memory_bytes: int
    cores: int
    threads: int
    backends: tuple[str, ...]
    software: dict[str, str]


class ProbeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement of this device."""

    key: ProbeKey
    trials: tuple[BackendTrial, ...]
    disk_bytes_s: float
    measured_at: float


def load_record(folder: Path, key: ProbeKey) -> ProbeRecord | None:
    """Read the record of `key`. Returns: None if there is none, or if the file is damaged or of another format."""
    return next((record for record in _read(folder) if record.key == key), None)


def save_record(folder: Path, record: ProbeRecord) -> None:
    """Store a record; it replaces one with the same key. The oldest of too many records are dropped. Raises: StorageError."""
    others = [other for other in _read(folder) if other.key != record.key]
    content = msgspec.json.encode([record, *others][:_MAX_RECORDS])
    StateFolder(folder).write(CACHE_FILE, msgspec.json.format(content))


def _read(folder: Path) -> list[ProbeRecord]:
    try:
        return msgspec.json.decode(StateFolder(folder).read(CACHE_FILE) or b"[]", type=list[ProbeRecord])
    except (StorageError, msgspec.DecodeError):
        return []


@asynccontextmanager
async def measurement_lock(folder: Path, clock: Clock, wait_s: float) -> AsyncIterator[None]:
    """Lock out other daemons of this machine, since daemons that measure at the same time get only a share of the device each.

    Makes the folder if needed. Waits at most `wait_s` for the lock, then continues without it: the other daemon may be stuck, and a
    measurement of a shared device is better than none.

    Raises: OSError.
    """
    with _open_lock(folder) as file:
        until = clock.monotonic() + wait_s
        while not lock_descriptor(file.fileno(), blocking=False) and clock.monotonic() < until:
            await clock.sleep(_RETRY_S)
        yield


def _open_lock(folder: Path) -> BinaryIO:
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / _LOCK_FILE).open("wb")
