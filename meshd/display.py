"""Format sizes, rates, times and rows for people. The command line and the monitor show them alike."""

from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "-"
_RECOVERIES = 3
"""Number of recoveries shown per session. `--json` lists all of them, with their reasons."""


def size(count: float | None) -> str:
    """Format bytes in binary units: `1.5 GiB`."""
    return ABSENT if count is None else _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def rate(bytes_s: float | None) -> str:
    """Format bytes per second in decimal units, as makers of networks and memory do: `12.3 GB/s`."""
    return ABSENT if not bytes_s else _scaled(bytes_s, 1000, ("B/s", "kB/s", "MB/s", "GB/s", "TB/s"))


def flops(flops_s: float | None) -> str:
    """Format floating-point operations per second: `85 GFLOP/s`."""
    return ABSENT if not flops_s else _scaled(flops_s, 1000, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    rank = 0
    while abs(number) >= base and rank < len(units) - 1:
        number /= base
        rank += 1
    digits = 0 if rank == 0 or number >= 100 else 1
    return f"{number:.{digits}f} {units[rank]}"


def duration(seconds: float | None) -> str:
    """Format a duration: `85 us`, `12.3 ms`, `4.2 s`, `3 min`, `2 h`, `5 d`."""
    if seconds is None:
        return ABSENT
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if seconds < limit:
            scaled = seconds * factor
            return f"{scaled:.{0 if scaled >= 100 or unit == 'us' else 1}f} {unit}"
    minutes = seconds / 60
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} d"


def short_id(identifier: str) -> str:
    """Shorten an id to 8 characters; `--json` prints the whole id."""
    return identifier[:8]


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: `1 peer`, `3 peers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def layers(value: Any) -> str:
    """Format a half-open layer range, `[0, 12]` in JSON, as `0-12`."""
    return value if isinstance(value, str) else f"{value[0]}-{value[1]}"


LINK_HEADERS = ("FROM", "TO", "ROUND TRIP", "HOP", "BANDWIDTH")


def link_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Format a link in one direction, under `LINK_HEADERS`."""
    return (
        row["source_name"],
        row["target_name"],
        duration(row["rtt_s"]),
        duration(row["hop_s"] or None),
        rate(row["bandwidth_bytes_s"]),
    )


def recovered(changes: Sequence[Mapping[str, Any]]) -> str:
    """Format the latest recoveries of a session, and the number of earlier ones."""
    shown = [f"{change['method']} {duration(change['pause_ms'] / 1e3)}" for change in changes[-_RECOVERIES:]]
    more = len(changes) - len(shown)
    return ", ".join([f"{more} more", *shown] if more else shown) or ABSENT
