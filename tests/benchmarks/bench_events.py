"""Measure what it costs to see the cluster: `meshd status`, `meshd top`, and the daemons' events.

    python tests/benchmarks/bench_events.py [--rounds 5] [--seconds 20] [--sessions 8]

- `meshd status` on a cluster of three daemons: wall time of the command.
- `meshd top`: wall time from the start of the command to its first picture on a terminal of 120 x 40.
- The CPU time of `meshd top` while a server sends it recorded events at 500 a second, on the screens of the cluster and of the
  logs, as a share of one core.
- The share of a daemon's CPU time that it spends on events while answers run and somebody reads its events: on the peer that is
  read, which coordinates all answers, and on the peers whose events it relays.

All daemons run on this machine, with one thread each, and share its cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from monitor import timed_daemon
from monitor.terminal import TopProcess, recorded_daemon
from real_daemons.mesh import API_KEY, MODEL, Mesh, http_to, pull_model, running
from real_daemons.sites import LocalSite
from real_daemons.streams import Streaming, of_length

EVENTS_S = 500.0
PROMPT = 32
SPLIT = "h2:0-15,h3:15-30"
_LONG = 1500
"""Tokens of an answer that runs longer than the measurement."""
_SETTLE_S = 3.0
CPU_TO_PAINT: list[float] = []
"""CPU time of each `meshd top` up to its first picture: what the wall time would be on a machine that does nothing else."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--sessions", type=int, default=8)
    options = parser.parse_args()
    pull_model()
    print(f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        top_cpu(root, options.seconds)
        entry = (str(Path(timed_daemon.__file__)),)
        with running(LocalSite(3), root / "mesh", flags=("--copies", "1"), entry=entry) as mesh:
            api = mesh.site.api("h1")
            show("meshd status", options.rounds, lambda: status_s(api, root))
            show("meshd top, first picture", options.rounds, lambda: paint_s(api, root))
            print(f"  of which CPU time: {1000 * statistics.median(CPU_TO_PAINT):.0f} ms", flush=True)
            mesh.place("h1", SPLIT, 8192)
            events_share(mesh, options.sessions, options.seconds)


def show(name: str, rounds: int, measure: Callable[[], float]) -> None:
    """Print the median of some measurements, after one that warms the files up."""
    measure()
    times = sorted(measure() for _ in range(rounds))
    print(
        f"{name}: {1000 * statistics.median(times):.0f} ms (of {rounds}: {1000 * times[0]:.0f} to {1000 * times[-1]:.0f})",
        flush=True,
    )


def status_s(api: str, root: Path) -> float:
    command = [sys.executable, "-P", "-m", "meshd", "status", "--api", api, "--api-key", API_KEY, "--state", str(root / "none")]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return time.monotonic() - began


def paint_s(api: str, root: Path) -> float:
    top = TopProcess(api, root / "none")
    try:
        shown_s = top.first_paint_s()
        times = psutil.Process(top.pid).cpu_times()
        CPU_TO_PAINT.append(times.user + times.system)
        return shown_s
    finally:
        top.close()


def top_cpu(root: Path, seconds: float) -> None:
    """Print the CPU time of the monitor while events come at a fixed rate."""
    with recorded_daemon(EVENTS_S) as api:
        top = TopProcess(api, root / "none")
        try:
            top.first_paint_s()
            for key, screen in (("1", "cluster"), ("3", "sessions"), ("6", "logs")):
                top.press(key)
                time.sleep(_SETTLE_S)
                share, drawn = _busy_share(top, seconds)
                name = f"meshd top, {screen}, at {EVENTS_S:.0f} events/s"
                print(f"{name}: {100 * share:.0f} % of a core, {drawn / 1e3:.0f} kB/s drawn", flush=True)
        finally:
            top.close()


def _busy_share(top: TopProcess, seconds: float) -> tuple[float, float]:
    process = psutil.Process(top.pid)

    def used_s() -> float:
        times = process.cpu_times()
        return times.user + times.system

    before_s, before_bytes, began = used_s(), top.drawn_bytes, time.monotonic()
    time.sleep(seconds)
    wall_s = time.monotonic() - began
    return (used_s() - before_s) / wall_s, (top.drawn_bytes - before_bytes) / wall_s


def events_share(mesh: Mesh, sessions: int, seconds: float) -> None:
    """Print the share of each daemon's CPU time that goes into events, while answers run and one reader reads at h1."""
    answers = [Streaming(mesh.site, "h1", of_length(PROMPT, _LONG, seed), {"stages": SPLIT}) for seed in range(sessions)]
    for answer in answers:
        answer.wait_for(1)
    stopped = threading.Event()
    counted = [0]
    reader = threading.Thread(target=_read_events, args=(mesh, stopped, counted), daemon=True)
    reader.start()
    time.sleep(_SETTLE_S)
    began, before = time.monotonic(), counted[0]
    time.sleep(seconds)
    ended = time.monotonic()
    running_now = sum(answer.error is None and not answer.answer.ended for answer in answers)
    rate = (counted[0] - before) / seconds
    print(f"{running_now} sessions of {MODEL} over {SPLIT}, coordinated by h1: {rate:.0f} events/s read", flush=True)
    for host in mesh:
        lines = [json.loads(line) for line in (host.state / timed_daemon.NAME).read_text().splitlines()]
        window = [line for line in lines if began <= line[0] <= ended]
        cpu_s, events_s = window[-1][1] - window[0][1], window[-1][2] - window[0][2]
        wall_s = window[-1][0] - window[0][0]
        shares = f"{100 * events_s / wall_s:.2f} % of a core, {100 * events_s / cpu_s:.1f} % of the daemon's own CPU time"
        print(f"  {host.name}: events take {shares} ({cpu_s:.1f} s in {wall_s:.1f} s)", flush=True)
    stopped.set()
    reader.join(30)


def _read_events(mesh: Mesh, stopped: threading.Event, counted: list[int]) -> None:
    connection, response = http_to(mesh.site, "h1", "GET", "/mesh/v1/events", timeout_s=30)
    while not stopped.is_set() and (line := response.readline()):
        counted[0] += line.startswith(b"data: ")
    connection.close()


if __name__ == "__main__":
    main()
