"""Finds the name of this device's processor, and a digest of its instruction sets."""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

_PROCESSOR_KEYS = ("model name", "Model", "Hardware", "cpu model", "uarch")
"""Keys of the processor's name in `/proc/cpuinfo`: on x86, Raspberry Pi, other ARM, MIPS and RISC-V."""

_FEATURE_KEYS = ("flags", "Features", "isa")
"""Keys of its instruction sets: on x86, ARM and RISC-V."""


def processor_name(root: Path = Path("/")) -> str:
    """Return the processor's name. If the system does not show it, return the machine type, or else `unknown`."""
    if sys.platform == "darwin":
        brand = _sysctl("machdep.cpu.brand_string")
        if brand:
            return brand
    facts = _cpuinfo(root)
    name = next((facts[key] for key in _PROCESSOR_KEYS if facts.get(key)), "")
    return " ".join(name.split()) or platform.processor() or platform.machine() or "unknown"


def processor_features(root: Path = Path("/")) -> str:
    """Return a digest of the instruction sets that the system shows; empty if it shows none."""
    if sys.platform == "darwin":
        text = " ".join(_sysctl(f"machdep.cpu.{name}") for name in ("features", "leaf7_features"))
    else:
        facts = _cpuinfo(root)
        text = next((facts[key] for key in _FEATURE_KEYS if facts.get(key)), "")
    names = sorted(text.split())
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:16] if names else ""


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
