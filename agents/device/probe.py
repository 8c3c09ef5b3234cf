"""Measures this device's rates with each backend (`kernels/measure.py`) and its numerics id, and caches them.

A peer advertises only rates and numerics that it has measured. The measurement takes less than 20 s, unless the first backend
loads slowly.

Each backend is measured in its own process (`python -m meshd.agents.device.probe BACKEND THREADS BUDGET_S`), so that the daemon's
thread pools and memory are not affected, and a backend that hangs or crashes loses only its own measurement. Free memory is
measured at every start and not cached.
"""

import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import psutil

import meshd
from meshd.agents.device.disk import disk_read_rate
from meshd.agents.device.energy import EnergyMeter
from meshd.agents.device.memory import MemoryBudget, measure_memory, usable_cores
from meshd.agents.device.probe_record import FORMAT, BackendTrial, ProbeKey, ProbeRecord, load_record, measurement_lock, save_record
from meshd.agents.device.processor import processor_features, processor_name
from meshd.clock import Clock
from meshd.errors import LocalFault, StorageError
from meshd.types import Capability, Rates

AUTO = "auto"
LIMIT_S = 13.0
"""Planned time of the whole probe, libraries included. The backends share the time that is left after the disk measurement."""
DEADLINE_S = 60.0
"""Deadline of each backend until one is measured, so that a device gets rates even if its libraries load slowly."""
_MIN_DEADLINE_S = 8.0
"""Shortest deadline of a backend once another backend is measured, even if `LIMIT_S` is used up."""
_PACKING_S = 1.5
"""Estimated time that a backend takes to load the synthetic weights."""
_MIN_MEASURING_S = 1.0
_SOFTWARE = ("numpy", "onnxruntime", "torch")
_ENVIRONMENT = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "NPY_DISABLE_CPU_FEATURES", "ONEDNN_MAX_CPU_ISA")
"""Variables by which torch, MKL, numpy and oneDNN choose instructions."""

Progress = Callable[[str, float], None]
"""Called with the name of the measurement that runs now and the fraction of the probe that is done (0 to 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """The capability that this peer advertises, and the measurements that it is based on."""

    capability: Capability
    memory: MemoryBudget
    cores: int
    trials: tuple[BackendTrial, ...]
    cached: bool
    elapsed_s: float


async def probe(
    folder: Path,
    *,
    clock: Clock,
    threads: int = 0,
    backend: str = AUTO,
    memory_cap_bytes: int | None = None,
    roles: Sequence[str] = ("compute", "attention", "storage"),
    refresh: bool = False,
    progress: Progress = lambda _what, _fraction: None,
) -> ProbeResult:
    """Measure this device, or reuse the cached measurement of the same hardware, software and settings.

    `folder` contains the cache, and its disk is measured; daemons on one machine may share it. With `threads` 0 there is one thread
    per usable core. With `backend` `auto` all available backends are measured and the fastest is chosen. `refresh` ignores a cached
    measurement.

    Raises: LocalFault if no backend could be measured, StorageError.
    Cancel: the measuring process is killed and nothing is cached.
    """
    start = clock.monotonic()
    cores = usable_cores()
    key = probe_key(cores, threads or cores, _available() if backend == AUTO else (backend,))
    cached = None if refresh else load_record(folder, key)
    record = cached or await _measure_exclusively(key, folder, clock, progress, refresh=refresh)
    progress("done", 1.0)
    memory = measure_memory(memory_cap_bytes)
    return ProbeResult(
        capability=_capability(record, memory, tuple(roles)),
        memory=memory,
        cores=cores,
        trials=record.trials,
        cached=cached is not None,
        elapsed_s=clock.monotonic() - start,
    )


def report(result: ProbeResult) -> dict[str, Any]:
    """Make the JSON object that `meshd bench` prints. Its keys are stable; its `rates` are the ones that the peer advertises."""
    capability = result.capability
    return {
        "processor": capability.processor,
        "cores": result.cores,
        "threads": capability.threads,
        "backend": capability.backend,
        "numerics": capability.numerics,
        "rates": msgspec.to_builtins(capability.rates),
        "memory_total_bytes": capability.memory_total_bytes,
        "memory_free_bytes": capability.memory_free_bytes,
        "memory_bound_by": result.memory.bound_by,
        "power_w": capability.power_w,
        "backends": msgspec.to_builtins(result.trials),
        "measured_at": capability.measured_at,
        "cached": result.cached,
        "elapsed_s": result.elapsed_s,
    }


def _available() -> tuple[str, ...]:
    from meshd.kernels.registry import available_backends

    return available_backends()


def probe_key(cores: int, threads: int, backends: tuple[str, ...]) -> ProbeKey:
    """Make the key under which a measurement of this device is cached. It contains the installed versions of the libraries."""
    software = {"meshd": meshd.__version__, "python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            software[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ProbeKey(
        format=FORMAT,
        machine=platform.machine(),
        processor=processor_name(),
        features=processor_features(),
        memory_bytes=psutil.virtual_memory().total,
        cores=cores,
        threads=threads,
        backends=backends,
        software=software,
        environment={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    )


def _capability(record: ProbeRecord, memory: MemoryBudget, roles: tuple[str, ...]) -> Capability:
    best = _best(record.trials)
    assert best.rates is not None
    return Capability(
        backend=best.backend,
        numerics=best.numerics,
        processor=record.key.processor,
        threads=record.key.threads,
        memory_total_bytes=memory.total_bytes,
        memory_free_bytes=memory.free_bytes,
        rates=msgspec.structs.replace(best.rates, disk_bytes_s=record.disk_bytes_s),
        roles=roles,
        power_w=best.power_w,
        measured_at=record.measured_at,
    )


def _best(trials: Sequence[BackendTrial]) -> BackendTrial:
    """Choose the fastest backend. Raises: LocalFault if none has rates."""
    best = min(trials, key=lambda trial: trial.layer_s, default=None)
    if best is None or best.rates is None:
        reasons = "; ".join(f"{trial.backend}: {trial.error}" for trial in trials) or "no backend is installed"
        raise LocalFault(f"this device's speed can't be measured: {reasons}", hint="fix this, then run `meshd bench`")
    return best


async def _measure_exclusively(key: ProbeKey, folder: Path, clock: Clock, progress: Progress, *, refresh: bool) -> ProbeRecord:
    """Measure while no other daemon does. Without `refresh`, a record that another daemon has cached meanwhile is used."""
    progress("waiting", 0.0)
    try:
        async with measurement_lock(folder, clock, DEADLINE_S):
            if not refresh and (record := load_record(folder, key)) is not None:
                return record
            record = await _measure(key, folder, clock, progress)
            save_record(folder, record)
            return record
    except OSError as error:
        raise StorageError(
            f"{folder} can't be used to measure this device: {error.strerror}", hint="free some disk space"
        ) from error


async def _measure(key: ProbeKey, folder: Path, clock: Clock, progress: Progress) -> ProbeRecord:
    """Measure the disk, then each backend. Raises: LocalFault, OSError."""
    start = clock.monotonic()
    progress("disk", 0.0)
    disk_bytes_s = await asyncio.to_thread(disk_read_rate, folder)
    trials: list[BackendTrial] = []
    for done, backend in enumerate(key.backends):
        progress(backend, (done + 0.5) / (len(key.backends) + 0.5))
        left_s = LIMIT_S - (clock.monotonic() - start)
        measured = any(trial.rates is not None for trial in trials)
        deadline_s = max(left_s, _MIN_DEADLINE_S) if measured else DEADLINE_S
        trials.append(await _try(backend, key.threads, left_s / (len(key.backends) - done), deadline_s))
    _best(trials)
    return ProbeRecord(key=key, trials=tuple(trials), disk_bytes_s=disk_bytes_s, measured_at=clock.wall())


async def _try(backend: str, threads: int, budget_s: float, deadline_s: float) -> BackendTrial:
    """Measure one backend in its own process for about `budget_s`. Returns: rates or an error. Cancel: the process is killed."""
    meter = EnergyMeter()
    try:
        status, output, stderr = await run_module("meshd.agents.device.probe", backend, threads, budget_s, deadline_s=deadline_s)
    except TimeoutError:
        return BackendTrial(backend=backend, error=f"no result after {deadline_s:.0f} s")
    return read_trial(backend, status, output, stderr, meter.mean_w())


async def run_module(module: str, *arguments: object, deadline_s: float) -> tuple[int, bytes, bytes]:
    """Run a module of meshd in a process of its own.

    Returns: its exit status, and what it printed to standard output and standard error.
    Raises: TimeoutError after `deadline_s`. Then, and on a cancel, the process is killed.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", module, *map(str, arguments)),
        cwd=Path(meshd.__file__).parent.parent,  # there it can import meshd, and no file of the user shadows a module
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(deadline_s):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, output, errors


def read_trial(backend: str, status: int, output: bytes, stderr: bytes, power_w: float | None) -> BackendTrial:
    """Read a measuring process's result: the last line of `output`, or else an error in the last line of `stderr`."""
    try:
        trial = msgspec.json.decode((output.splitlines() or [b""])[-1], type=BackendTrial)
    except msgspec.DecodeError:
        lines = stderr.decode(errors="replace").strip().splitlines()
        return BackendTrial(backend=backend, error=lines[-1] if lines else f"its process ended with status {status}")
    return msgspec.structs.replace(trial, power_w=power_w)


def main(backend: str, threads: int, budget_s: float) -> None:
    """Measure a backend in this process and print its trial as one line of JSON.

    `budget_s` includes the loading of libraries and the numerics, which take 1 to 3 s and are not cut short.
    """
    from meshd.kernels.measure import measure
    from meshd.kernels.numerics.measure_id import measure_numerics
    from meshd.kernels.registry import make_backend

    numerics = measure_numerics(make_backend(backend, threads))
    used_s = time.time() - psutil.Process().create_time()
    measured = measure(backend, threads, max(_MIN_MEASURING_S, budget_s - used_s - _PACKING_S))
    rates = Rates(
        decode_bytes_s=measured.decode_bytes_s,
        prefill_flops_s=measured.prefill_flops_s,
        memory_bytes_s=measured.memory_bytes_s,
        attention_bytes_s=measured.attention_bytes_s,
        disk_bytes_s=0.0,
        layer_overhead_s=measured.layer_overhead_s,
    )
    print(msgspec.json.encode(BackendTrial(backend=backend, rates=rates, numerics=numerics)).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
