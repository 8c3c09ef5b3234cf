"""Checks of the limits that the system sets to this process: memory, swap, descriptors, locked memory."""

import sys

import psutil

from meshd.agents.device.memory import cgroup_memory_limits, measure_memory
from meshd.display import size
from meshd.doctor.check import Context, Found, ok, unchecked, warning, wrong

LEAST_MEMORY = 512 << 20
"""A daemon takes 310 MiB with its libraries before it holds a layer (measured with torch 2 and onnxruntime on x86-64)."""
SCARCE_MEMORY = 1 << 30
FEWEST_FILES = 128
"""What `agents/device/descriptors.py` needs for the smallest shares."""
FEW_FILES = 512
_MUCH_SWAPPED = 0.5


def memory(context: Context) -> Found:
    """Check how much memory layers can get, and what bounds it."""
    budget = measure_memory(context.config.memory_bytes, root=context.root)
    found = f"{size(budget.free_bytes)} of {size(budget.total_bytes)} are free, bound by {budget.bound_by}"
    mends = {
        "system": "end other programs, or start meshd on a device with more memory",
        "--memory": "raise --memory",
        "ulimit -v": "type `ulimit -v unlimited` in the shell that starts `meshd up`",
    }
    mend = mends.get(budget.bound_by) or _raise_cgroup(budget.bound_by.removeprefix("cgroup "))
    if budget.bound_by in ("system", "--memory", "ulimit -v") and budget.free_bytes < LEAST_MEMORY:
        return [wrong("memory", f"too little memory for any model: {found}", mend)]
    if budget.free_bytes < SCARCE_MEMORY:
        return [warning("memory", f"memory is scarce: {found}", mend)]
    return [ok("memory", found)]


def cgroup(context: Context) -> Found:
    """Check the limits of the control groups that this process is in, of both versions."""
    limits = cgroup_memory_limits(context.root)
    if not limits:
        return [ok("cgroup", "no control group limits memory")]
    tightest = min(limits, key=lambda limit: limit.total_bytes)
    name = tightest.source.removeprefix("cgroup ")
    found = f"control group {name} allows {size(tightest.total_bytes)}, {size(max(0, tightest.free_bytes))} of it free"
    if tightest.total_bytes < LEAST_MEMORY:
        return [wrong("cgroup", f"{found}: too little for the daemon itself", _raise_cgroup(name))]
    if tightest.free_bytes < LEAST_MEMORY:
        return [warning("cgroup", found, _raise_cgroup(name))]
    return [ok("cgroup", found)]


def _raise_cgroup(name: str) -> str:
    if name.endswith((".service", ".scope", ".slice")):
        return f"sudo systemctl set-property {name} MemoryMax=4G"
    return (
        "raise the limit of its control group: `docker update --memory 4g --memory-swap 4g CONTAINER`, or resources.limits.memory"
    )


def swap(context: Context) -> Found:
    """Check whether the device has moved much of its memory to disk."""
    state = psutil.swap_memory()
    if state.total and state.used > _MUCH_SWAPPED * state.total:
        found = f"{size(state.used)} of {size(state.total)} of swap are in use: layers that are swapped out answer very slowly"
        return [warning("swap", found, "end other programs, or give less memory to meshd with --memory")]
    return [ok("swap", f"{size(state.used)} of {size(state.total)} in use" if state.total else "no swap")]


def open_files(context: Context) -> Found:
    """Check how many files and sockets this process may open. The daemon raises its soft limit to the hard one when it starts."""
    if sys.platform == "win32":
        return [unchecked("open-files", "Windows has no such limit")]
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    bound = soft if context.peer is not None else hard
    mend = "type `ulimit -n 65536` in the shell that starts `meshd up`, or set LimitNOFILE=65536 in its systemd unit"
    if bound == resource.RLIM_INFINITY:
        return [ok("open-files", "no limit")]
    if bound < FEWEST_FILES:
        return [wrong("open-files", f"only {bound} files may be open at once; links and clients need {FEWEST_FILES}", mend)]
    if bound < FEW_FILES:
        return [warning("open-files", f"only {bound} files may be open at once, which limits links and clients", mend)]
    return [ok("open-files", f"{bound} files may be open at once")]


def locked_memory(context: Context) -> Found:
    """Check the limit of locked memory, which matters to accelerators only: their drivers lock the memory that they copy from."""
    if sys.platform == "win32" or not context.config.backend.startswith("torch-"):
        return [ok("locked-memory", f"does not matter to backend {context.config.backend}")]
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and soft < 64 << 20:
        mend = "type `ulimit -l unlimited` in the shell that starts `meshd up`, or set LimitMEMLOCK=infinity in its systemd unit"
        return [warning("locked-memory", f"only {size(soft)} may be locked, so copies to the accelerator are slow", mend)]
    return [ok("locked-memory", "enough may be locked")]
