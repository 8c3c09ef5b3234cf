"""What this device is and does apart from computing: its processor's name, its disk's speed, its power."""

import contextlib
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_MIB = 2**20
_DISK_LIMIT_BYTES = 256 * _MIB
_DISK_LIMIT_S = 1.0
_BLOCK_BYTES = 8 * _MIB
_PROCESSOR_KEYS = ("model name", "Model", "Hardware", "cpu model", "uarch")
"""x86; Raspberry Pi; other ARM; MIPS; RISC-V."""


def processor_name(root: Path = Path("/")) -> str:
    """For people and for the cache's key: never empty."""
    if sys.platform == "darwin":
        brand = _sysctl("machdep.cpu.brand_string")
        if brand:
            return brand
    facts = _cpuinfo(root)
    named = next((facts[key] for key in _PROCESSOR_KEYS if facts.get(key)), "")
    return " ".join(named.split()) or platform.processor() or platform.machine() or "unknown"


def _cpuinfo(root: Path) -> dict[str, str]:
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=2.0, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def disk_read_rate(folder: Path, limit_bytes: int = _DISK_LIMIT_BYTES, limit_s: float = _DISK_LIMIT_S) -> float:
    """Bytes per second read from `folder`'s disk, past the page cache where the system lets us.

    Writes a file for it, at most `limit_bytes` or for `limit_s` and no more, and removes it. Raises: OSError.
    """
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".disk-probe-") as file:
        _fill(file.fileno(), limit_bytes, limit_s)
        descriptor = _open_uncached(file.name)
        try:
            return _read_rate(descriptor, limit_s)
        finally:
            os.close(descriptor)


def _fill(descriptor: int, limit_bytes: int, limit_s: float) -> None:
    """Random bytes, so that no file system compresses them; synced block by block, so that a slow disk ends it in time."""
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


class EnergyMeter:
    """Energy that the processor packages have used, from RAPL (Linux powercap); most systems show it to root only."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._packages = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        self._packages = [package for package in self._packages if package.name.count(":") == 1]
        self._start = self._read()
        self._since = time.monotonic()

    def mean_w(self) -> float | None:
        """Watts since construction; None where the counters can't be read."""
        now, elapsed_s = self._read(), time.monotonic() - self._since
        if not self._packages or now is None or self._start is None or elapsed_s <= 0:
            return None
        used = 0
        for (after, wrap), (before, _) in zip(now, self._start, strict=True):
            used += after - before if after >= before else after - before + wrap
        return used / 1e6 / elapsed_s

    def _read(self) -> list[tuple[int, int]] | None:
        """(microjoules, where the counter wraps) of each package."""
        try:
            return [
                (int((package / "energy_uj").read_text()), int((package / "max_energy_range_uj").read_text()))
                for package in self._packages
            ]
        except (OSError, ValueError):
            return None
