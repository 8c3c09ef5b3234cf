"""Measures how fast this device reads from its disk."""

import contextlib
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path

_MIB = 2**20
_DISK_LIMIT_BYTES = 256 * _MIB
_DISK_LIMIT_S = 1.0
_BLOCK_BYTES = 8 * _MIB


def disk_read_rate(folder: Path, limit_bytes: int = _DISK_LIMIT_BYTES, limit_s: float = _DISK_LIMIT_S) -> float:
    """Measure the read rate of `folder`'s disk, bypassing the page cache where the system allows it.

    Writes a temporary file in `folder` until it has `limit_bytes` or `limit_s` has passed, then reads it for at most `limit_s`.

    Returns: bytes per second.
    Raises: OSError.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-probe-") as file:
        _fill(file.fileno(), limit_bytes, limit_s)
        descriptor = _open_uncached(file.name)
        try:
            return _read_rate(descriptor, limit_s)
        finally:
            os.close(descriptor)


def _fill(descriptor: int, limit_bytes: int, limit_s: float) -> None:
    """Fill a file with random bytes, which no file system can compress. Syncs each block, so that a slow disk keeps `limit_s`."""
    block = os.urandom(min(_BLOCK_BYTES, limit_bytes))
    start, written = time.monotonic(), 0
    while written < limit_bytes and (not written or time.monotonic() - start < limit_s):
        written += os.write(descriptor, block)
        os.fsync(descriptor)


def _open_uncached(path: str) -> int:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # tmpfs and some network file systems have no O_DIRECT
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    elif sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    return descriptor


def _read_rate(descriptor: int, limit_s: float) -> float:
    with mmap.mmap(-1, _BLOCK_BYTES) as block, os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
        start, read = time.perf_counter(), 0
        while time.perf_counter() - start < limit_s and (count := file.readinto(block)):
            read += count
        return read / (time.perf_counter() - start)
