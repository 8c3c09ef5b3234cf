"""Format sizes, times and rates for people."""

from meshd.types import Objective


def show_bytes(size: float) -> str:
    """Format a number of bytes, such as `1.5 GiB`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def show_seconds(seconds: float) -> str:
    """Format a time, such as `12.3 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def show_rate(seconds_per_token: float) -> str:
    """Format a time per token as a rate, such as `81.3 tok/s`."""
    return f"{1 / seconds_per_token:.3g} tok/s"


def show_value(objective: Objective, value: float) -> str:
    """Format an objective's value with its name and unit."""
    if objective is Objective.THROUGHPUT:
        return f"{show_rate(value)} over many requests"
    if objective is Objective.ENERGY:
        return f"{value:.3g} J per token"
    if objective is Objective.MEMORY:
        return f"{value:.0%} of the fullest peer's memory"
    if objective is Objective.TTFT:
        return f"TTFT {show_seconds(value)}"
    return f"TPOT {show_seconds(value)} ({show_rate(value)})"
