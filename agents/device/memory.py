"""Measures how much memory and how many cores this process may use, within the limits of cgroups (v1 and v2) and ulimit."""

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_UNLIMITED = 2**60
"""A limit of this many bytes or more means no limit: without a limit, cgroup v1 shows a number near 2^63."""


@dataclass(frozen=True, slots=True)
class _MemoryFiles:
    """Where a cgroup shows its memory limits and usage: names of files and of a line."""

    bounds: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]
    """Keys in `memory.stat` of what the kernel reclaims before a process of the group runs out of memory: page cache, whether it
    was used recently (active) or not, and caches of the kernel itself."""


_V1 = _MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _MemoryFiles(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_NOT_AVAILABLE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors of a reading that say nothing of the file: this process, or the system, is out of descriptors or memory."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit on memory, in bytes: its source, its size, and how much of it is free."""

    source: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory that this process may use."""

    total_bytes: int
    free_bytes: int
    bound_by: str
    """The source of the limit with the least free memory."""


def measure_memory(cap_bytes: int | None = None, taken_bytes: int = 0, root: Path = Path("/")) -> MemoryBudget:
    """Combine the system's available memory, the limits of cgroups, RLIMIT_AS and `cap_bytes` (`--memory`; None: no cap).

    `taken_bytes`: bytes of the cap that meshd already uses. `root`: the folder that contains `proc` and `sys`.

    Raises: OSError if it can't be read at present, for example because all file descriptors are in use.
    """
    system = psutil.virtual_memory()
    limits = [MemoryLimit("system", system.total, system.available), *cgroup_memory_limits(root)]
    if (address_space := _address_space_limit()) is not None:
        limits.append(address_space)
    if cap_bytes is not None:
        limits.append(MemoryLimit("--memory", cap_bytes, cap_bytes - taken_bytes))
    return tightest(limits)


def tightest(limits: list[MemoryLimit]) -> MemoryBudget:
    """Take the smallest total and the smallest free memory of all limits. Free memory is never below 0."""
    binding = min(limits, key=lambda limit: limit.free_bytes)
    return MemoryBudget(min(limit.total_bytes for limit in limits), max(0, binding.free_bytes), binding.source)


def cgroup_memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """List the limits of this process's cgroup and of every cgroup above it. Page cache that can be reclaimed counts as free."""
    limits = [_memory_limit(folder, _V2) for folder in _folders(root, "memory", version=2)]
    limits += [_memory_limit(folder, _V1) for folder in _folders(root, "memory", version=1)]
    return [limit for limit in limits if limit is not None]


def cgroup_cpu_limit(root: Path = Path("/")) -> float | None:
    """Find the tightest CPU quota of this process's cgroups, in cores. Returns: None if there is no quota."""
    quotas = [_quota(_words(folder / "cpu.max")) for folder in _folders(root, "cpu", version=2)]
    quotas += [
        _quota(_words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"))
        for folder in _folders(root, "cpu", version=1)
    ]
    return min((quota for quota in quotas if quota is not None), default=None)


def usable_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may use: those of its CPU affinity, limited by its CPU quota rounded down; at least one."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = cgroup_cpu_limit(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def _folders(root: Path, controller: str, version: int) -> Iterator[Path]:
    """Yield, for each mount of a cgroup hierarchy, this process's folder and every folder above it, up to the mount point."""
    path = _own_path(root, controller, version)
    if path is None:
        return
    for mounted, mount_point in _mounts(root, controller, version):
        top = root / mount_point.lstrip("/")
        folder = top / _below(path, mounted).strip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
        yield top


def _below(path: str, mounted: str) -> str:
    """Return a cgroup's path below its mount.

    In a container, `/proc/self/cgroup` may show the path on the host, which is not below the mount. Then the mount itself is this
    process's cgroup.

    Returns: an empty path for the mount itself.
    """
    if mounted == "/":
        return path
    return path.removeprefix(mounted) if path.startswith(mounted) else ""


def _own_path(root: Path, controller: str, version: int) -> str | None:
    """Read this process's cgroup from `/proc/self/cgroup`, see cgroups(7): `id:controllers:path`, without controllers in v2."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (controllers == "") if version == 2 else (controller in controllers.split(",")):
            return path
    return None


def _mounts(root: Path, controller: str, version: int) -> Iterator[tuple[str, str]]:
    """Yield (path of the mounted cgroup, mount point) for each mount of the hierarchy, from `/proc/self/mountinfo` (proc(5))."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        match before.split(), after.split():
            case [_, _, _, mounted, mount_point, *_], ["cgroup2", *_] if version == 2:
                yield mounted, mount_point
            case [_, _, _, mounted, mount_point, *_], ["cgroup", _, options] if version == 1 and controller in options.split(","):
                yield mounted, mount_point


def _memory_limit(folder: Path, files: _MemoryFiles) -> MemoryLimit | None:
    bounds = [bound for name in files.bounds if (bound := _number(folder / name)) is not None and bound < _UNLIMITED]
    usage = _number(folder / files.usage)
    if not bounds or usage is None:
        return None
    words = _words(folder / "memory.stat")
    statistics = dict(zip(words[::2], words[1::2], strict=False))
    used = max(0, usage - sum(int(statistics.get(key, "0")) for key in files.reclaimable))
    return MemoryLimit(f"cgroup {folder.name}", min(bounds), min(bounds) - used)


def _address_space_limit() -> MemoryLimit | None:
    """Read RLIMIT_AS. It limits address space rather than memory, but allocations beyond it fail."""
    if sys.platform == "win32":
        return None
    import resource

    bound, _ = resource.getrlimit(resource.RLIMIT_AS)
    if bound == resource.RLIM_INFINITY:
        return None
    return MemoryLimit("ulimit -v", bound, bound - psutil.Process().memory_info().vms)


def _quota(words: list[str]) -> float | None:
    """Divide a CPU quota by its period, both in microseconds, which gives cores. Returns: None for no quota (`max` or -1)."""
    match words:
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            return int(quota) / int(period)
    return None


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdecimal() else None


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    """Read a file's lines; none for a file that does not exist. Raises: OSError if nothing can be read at present, since a limit
    that is not read must not count as no limit."""
    try:
        return path.read_text().splitlines()
    except OSError as error:
        if error.errno in _NOT_AVAILABLE:
            raise
        return []
