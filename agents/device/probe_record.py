"""What was measured of this device, and the file that remembers it."""

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
"""Of the file; to be raised when what is measured, or how, changes."""
CACHE_FILE = "probe.json"
_LOCK_FILE = "probe.lock"
_KEPT = 8
"""Records in the file: one for each setting of threads and backend that is in use."""
_TRY_S = 0.2
_TYPICAL_LAYER_BYTES = 16 * 2**20
"""A layer of a 1B model in 4 bits: backends are compared by it."""


class BackendTrial(msgspec.Struct, frozen=True, kw_only=True):
    """One backend's measurement, or why there is none. The disk is measured apart: `disk_bytes_s` is 0 here."""

    backend: str
    rates: Rates | None = None
    power_w: float | None = None
    error: str = ""

    @property
    def layer_s(self) -> float:
        """One token through a typical layer."""
        if self.rates is None or self.rates.decode_bytes_s <= 0:
            return float("inf")
        return _TYPICAL_LAYER_BYTES / self.rates.decode_bytes_s + self.rates.layer_overhead_s


class ProbeKey(msgspec.Struct, frozen=True, kw_only=True):
    """What a measurement is valid for: if any of it changes, the device is measured again."""

    format: int
    machine: str
    processor: str
    memory_bytes: int
    cores: int
    threads: int
    backends: tuple[str, ...]
    software: dict[str, str]


class ProbeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device's measurement."""

    key: ProbeKey
    trials: tuple[BackendTrial, ...]
    disk_bytes_s: float
    measured_at: float


def load_record(folder: Path, key: ProbeKey) -> ProbeRecord | None:
    """Read the record of `key`. Returns: None if there is none; a torn file, or one of another format, has none."""
    return next((record for record in _read(folder) if record.key == key), None)


def save_record(folder: Path, record: ProbeRecord) -> None:
    """Store a record, in the place of one with the same key. Raises: StorageError."""
    others = [other for other in _read(folder) if other.key != record.key]
    content = msgspec.json.encode([record, *others][:_KEPT])
    StateFolder(folder).write(CACHE_FILE, msgspec.json.format(content))


def _read(folder: Path) -> list[ProbeRecord]:
    try:
        return msgspec.json.decode(StateFolder(folder).read(CACHE_FILE) or b"[]", type=list[ProbeRecord])
    except (StorageError, msgspec.DecodeError):
        return []


@asynccontextmanager
async def measuring_alone(folder: Path, clock: Clock, wait_s: float) -> AsyncIterator[None]:
    """Keep other daemons of this machine from measuring at the same time: each would get only a share of the device.

    Makes the folder if needed. Waits at most `wait_s` for one that measures; past that it may be stuck, and a shared measurement is
    better than none. Raises: OSError.
    """
    with _open_lock(folder) as file:
        until = clock.monotonic() + wait_s
        while not lock_descriptor(file.fileno(), blocking=False) and clock.monotonic() < until:
            await clock.sleep(_TRY_S)
        yield


def _open_lock(folder: Path) -> BinaryIO:
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / _LOCK_FILE).open("wb")
