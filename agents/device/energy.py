"""Measures the power that this device's processor draws."""

import time
from pathlib import Path


class EnergyMeter:
    """Measures the energy that the processor packages use, from RAPL (Linux powercap), which on most systems only root can read."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._packages = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        self._packages = [package for package in self._packages if package.name.count(":") == 1]
        self._start = self._read()
        self._since = time.monotonic()

    def mean_w(self) -> float | None:
        """Compute the mean power since construction, in watts. Returns: None if there are no counters or they can't be read."""
        now, elapsed_s = self._read(), time.monotonic() - self._since
        if not self._packages or now is None or self._start is None or elapsed_s <= 0:
            return None
        used = 0
        for (after, wrap), (before, _) in zip(now, self._start, strict=True):
            used += after - before if after >= before else after - before + wrap
        return used / 1e6 / elapsed_s

    def _read(self) -> list[tuple[int, int]] | None:
        """Read each package's counter and the value at which it wraps, in microjoules."""
        try:
            return [
                (int((package / "energy_uj").read_text()), int((package / "max_energy_range_uj").read_text()))
                for package in self._packages
            ]
        except (OSError, ValueError):
            return None
