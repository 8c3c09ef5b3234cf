"""The cache of this device's measurements, and a lock so that only one daemon measures at a time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from filelock import lock_descriptor

from meshd.clock import Clock
from meshd.errors import StorageError
from meshd.numerics import UNKNOWN, NumericsId
from meshd.state import StateFolder
from meshd.types import Rates

FORMAT = 2
"""Version of the cache file. Increase it when the measured rates or numerics, or the way in which they are measured, change."""
CACHE_FILE = "probe.json"
_LOCK_FILE = "probe.lock"
_MAX_RECORDS = 8
"""Maximum number of records in the file. Each combination of threads and backends has its own record."""
_RETRY_S = 0.2
_TYPICAL_LAYER_BYTES = 16 * 2**20
"""Size of one layer of a 4-bit model with 1B parameters. Backends are compared by their time for such a layer."""


class BackendTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One backend's rates and numerics, or the error if it failed.

    The rates' `disk_bytes_s` is 0, because the disk is measured separately.
    """

    backend: str
    rates: Rates | None = None
    numerics: NumericsId = UNKNOWN
    power_w: float | None = None
    error: str = ""

    @property
    def layer_s(self) -> float:
        """Seconds in which this backend decodes one token through a typical layer; infinite without rates."""
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
    features: str = ""
    """A digest of the processor's instruction sets: a virtual machine may hide some of them, and libraries choose by them. Records
    of format 1 lack it."""
    environment: dict[str, str] = {}
    """Variables of the environment that are set and by which libraries choose instructions, and so bits."""


class ProbeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A cached measurement of this device, with every backend."""

    key: ProbeKey
    trials: tuple[BackendTrial, ...]
    disk_bytes_s: float
    measured_at: float


def load_record(folder: Path, key: ProbeKey) -> ProbeRecord | None:
    """Read the record of `key`. Returns: None if there is none, or if the file can't be read."""
    return next((record for record in _read(folder) if record.key == key), None)


def save_record(folder: Path, record: ProbeRecord) -> None:
    """Store a record in place of an older one with the same key. Keeps the newest `_MAX_RECORDS`. Raises: StorageError."""
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
    """Lock out other daemons on this machine: daemons that measure at the same time slow each other down.

    Makes the folder if needed. Waits at most `wait_s` for the lock, then continues without it: the daemon that has it may be stuck,
    and a measurement that is too low is better than none.

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
