"""Checks of the device: software, clock, processor, power, container."""

import re
import sys
from importlib import metadata
from pathlib import Path

import psutil

import meshd
from meshd.agents.device.memory import cgroup_cpu_limit
from meshd.agents.membership.interfaces import InterfaceKind, choose_interfaces
from meshd.display import size
from meshd.doctor.check import Context, Found, ok, read_text, unchecked, warning, wrong

LEAST_PYTHON = (3, 11)
_DISTRIBUTION = "meshd-edge"
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*(?:>=\s*([0-9.]+))?[^;]*(;.*)?")
_BUILT = 1_760_000_000.0
"""October 2025, when this check was written: an earlier clock is wrong."""
_HOT_SHARE = 0.95
"""Part of the temperature at which the processor slows down."""
_SPARE_HUGE_BYTES = 256 << 20


def python(context: Context) -> Found:
    """Compare the interpreter and the installed packages with what meshd needs."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        yield wrong("python", f"Python {version} is too old: meshd needs {least}", f"install Python {least} or newer")
    else:
        yield ok("python", f"meshd {meshd.__version__} on Python {version}")


def packages(context: Context) -> Found:
    """Compare the versions of the installed packages with those that meshd needs."""
    try:
        needed = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return [unchecked("packages", "meshd was not installed as a package, so its requirements are not known")]
    bad = [trouble for line in needed if (trouble := package_trouble(line))]
    if bad:
        mend = f"{sys.executable} -m pip install --upgrade {_DISTRIBUTION}"
        return [wrong("packages", f"packages do not fit: {'; '.join(bad)}", mend)]
    return [ok("packages", f"{len(needed)} packages are as meshd needs them")]


def package_trouble(requirement: str) -> str:
    """Compare one requirement (`name>=1.2; marker`) with what is installed. Returns: what is wrong, or empty text."""
    match = _REQUIREMENT.match(requirement)
    if match is None or (match[3] and "extra" in match[3]):
        return ""
    name, least = match[1], match[2]
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    if least and _numbers(installed) < _numbers(least):
        return f"{name} is {installed}, {least} is needed"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:4]]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def clock(context: Context) -> Found:
    """Check that this device's clock can be right, and that something keeps it right."""
    if context.clock.wall() < _BUILT:
        return [wrong("clock", "this device's clock is years behind", "sudo timedatectl set-ntp true")]
    shown = context.command(("timedatectl", "show", "--property=NTP", "--property=NTPSynchronized"))
    if shown is None or shown.status:
        return [ok("clock", "the clock is plausible; what sets it is not known")]
    facts = dict(line.partition("=")[::2] for line in shown.text.splitlines())
    if facts.get("NTPSynchronized") == "yes":
        return [ok("clock", "the clock is set from the network")]
    return [warning("clock", "nothing sets this device's clock", "sudo timedatectl set-ntp true")]


def governor(context: Context) -> Found:
    """Check the clock rate that the processor is allowed."""
    folder = context.root / "sys/devices/system/cpu"
    names = {read_text(file) for file in sorted(folder.glob("cpu[0-9]*/cpufreq/scaling_governor"))} - {""}
    drivers = {read_text(file) for file in folder.glob("cpu[0-9]*/cpufreq/scaling_driver")}
    own_choice = any(driver.startswith(("intel_pstate", "amd-pstate-epp", "amd_pstate")) for driver in drivers)
    if "powersave" in names and not own_choice:
        mend = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        return [warning("cpu-governor", "the processor stays at its lowest clock rate (governor powersave)", mend)]
    return [ok("cpu-governor", f"governor {', '.join(sorted(names))}" if names else "no governor limits the processor")]


def temperature(context: Context) -> Found:
    """Check whether the processor is so hot that it slows down."""
    read = getattr(psutil, "sensors_temperatures", None)  # Linux only
    hot = [
        f"{entry.label or chip} {entry.current:.0f} °C"
        for chip, entries in (read() if read else {}).items()
        for entry in entries
        if entry.current and entry.high and entry.current >= _HOT_SHARE * entry.high
    ]
    throttled = context.command(("vcgencmd", "get_throttled"))
    if throttled is not None and not throttled.status and int(throttled.text.partition("=")[2] or "0", 16) & 0xF:
        hot.append("the Raspberry Pi reports too little voltage or too much heat")
    if hot:
        return [warning("temperature", f"the device slows itself down: {', '.join(hot)}", "cool it, or use a stronger supply")]
    return [ok("temperature", "no part is near its limit")]


def battery(context: Context) -> Found:
    """Check whether the device runs on its battery."""
    state = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if state is None:
        return [ok("battery", "the device has no battery")]
    if not state.power_plugged:
        found = f"it runs on its battery ({state.percent:.0f} %), and computes more slowly on most devices"
        return [warning("battery", found, "plug it in")]
    return [ok("battery", f"plugged in, {state.percent:.0f} %")]


def cores(context: Context) -> Found:
    """Check whether a quota leaves less than one core."""
    quota = cgroup_cpu_limit(context.root)
    if quota is not None and quota < 1:
        mend = "raise it: `docker update --cpus 2 CONTAINER`, or CPUQuota= of its systemd unit"
        return [warning("cpu-quota", f"a quota allows {quota:.2g} of a core", mend)]
    return [ok("cpu-quota", "no quota limits the processor" if quota is None else f"a quota allows {quota:.3g} cores")]


def huge_pages(context: Context) -> Found:
    """Check whether memory is set aside for huge pages, which meshd does not use."""
    facts = dict(line.partition(":")[::2] for line in read_text(context.root / "proc/meminfo").splitlines())
    free = int((facts.get("HugePages_Free", "0").split() or ["0"])[0])
    page = int((facts.get("Hugepagesize", "0 kB").split() or ["0"])[0]) << 10
    if free * page >= _SPARE_HUGE_BYTES:
        found = f"{size(free * page)} of memory are set aside as huge pages that nobody uses; meshd can't use them"
        return [warning("huge-pages", found, "sudo sysctl vm.nr_hugepages=0")]
    return [ok("huge-pages", "no memory is set aside for huge pages in vain")]


def container(context: Context) -> Found:
    """Check whether this is a container whose network no other device reaches."""
    kind = container_kind(context.root)
    if not kind:
        return [ok("container", "not in a container")]
    choices = choose_interfaces(context.interfaces(), context.config.interfaces)
    used = [choice.interface for choice in choices if choice.used]
    if used and all(interface.kind is InterfaceKind.VIRTUAL for interface in used):
        found = f"this is a {kind} container with a network of its own: other devices neither find it nor reach its ports"
        return [warning("container", found, "start it with `--network host`; in Kubernetes with `hostNetwork: true`")]
    return [ok("container", f"a {kind} container, on the network of its host")]


def container_kind(root: Path) -> str:
    """Returns: the kind of container that this process runs in; empty outside of containers."""
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    groups = read_text(root / "proc/1/cgroup")
    return next((kind for kind in ("kubepods", "docker", "lxc", "podman") if f"/{kind}" in groups), "")
