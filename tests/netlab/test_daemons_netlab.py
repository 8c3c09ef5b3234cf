"""Daemons on three hosts find one another, ignore other clusters, and notice peers that leave. `pytest -s` prints the times."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from meshd.config import Settings

pytestmark = pytest.mark.netlab

FIND_S = 3.0
LEFT_S = 1.0
CUT_S = 3.0


class Host:
    """A process of `meshd up` on one host, and its log."""

    def __init__(self, lab: Any, host: str, root: Path, *flags: str) -> None:
        self.name, self.state = host, root / host
        self.log = root / f"{host}.log"
        command = [sys.executable, "-P", "-m", "meshd", "up", "--name", host, "--state", str(self.state), "--log-format", "json"]
        command += ["--threads", "1", "--backend", "onnxruntime", "--cache", str(Settings()["cache"].value), *flags]
        with self.log.open("w") as output:
            self.process = lab.popen(host, command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def events(self) -> Iterator[tuple[float, str]]:
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                yield datetime.fromisoformat(entry["time"]).timestamp(), entry["event"]

    def when(self, text: str, since: float = 0.0) -> float | None:
        """Return when the daemon first logged an event that contains `text`, not before `since`. None: not yet."""
        return next((at for at, event in self.events() if at >= since and text in event), None)

    def key(self) -> str:
        command = [sys.executable, "-P", "-m", "meshd", "key", "show", "--json", "--state", str(self.state)]
        code: str = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout)["code"]
        return code


def wait_for(condition: Callable[[], float | None], what: str, host: Host, within_s: float = 40.0) -> float:
    until = time.monotonic() + within_s
    while (at := condition()) is None:
        if time.monotonic() > until:
            pytest.fail(f"gave up waiting for {what} on {host.name}:\n{host.log.read_text()[-3000:]}")
        time.sleep(0.01)
    return at


def now() -> float:
    """Return the time, rounded down to milliseconds like the times in the log, so that later events have no earlier time."""
    return math.floor(time.time() * 1000) / 1000


def when_all(hosts: list[Host], of: list[Host], text: str, since: float = 0.0) -> float:
    """Wait until each of `hosts` has logged `peer NAME (id) is TEXT` for each peer in `of`. Returns: the time of the last log."""

    def seen(host: Host, other: Host) -> float | None:
        logged = ((at, event) for at, event in host.events() if at >= since)
        return next((at for at, event in logged if event.startswith(f"peer {other.name} (") and f") is {text}" in event), None)

    pairs = [(host, other) for host in hosts for other in of if host is not other]
    return max(wait_for(lambda host=host, other=other: seen(host, other), f"{other.name} {text}", host) for host, other in pairs)


@pytest.fixture(scope="module")
def three(netlab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[Host], float]]:
    """A lab of four hosts, daemons of one cluster on three of the hosts, and the time when the last daemon was up.

    The last test stops two of them.
    """
    folder = tmp_path_factory.mktemp("three")
    with netlab.Lab(hosts=4) as lab:
        first = Host(lab, "h1", folder)
        wait_for(lambda: first.when("up: links on"), "start", first)
        hosts = [first, *(Host(lab, host, folder, "--key", first.key()) for host in ("h2", "h3"))]
        yield lab, hosts, max(wait_for(lambda host=host: host.when("up: links on"), "start", host) for host in hosts)


def test_three_daemons_find_one_another_and_ignore_another_cluster(three: tuple[Any, list[Host], float], tmp_path: Path) -> None:
    lab, hosts, up = three
    found_s = when_all(hosts, hosts, "alive") - up
    stranger = Host(lab, "h4", tmp_path)
    wait_for(lambda: stranger.when("up: links on"), "start", stranger)
    time.sleep(FIND_S)
    assert not [event for _, event in stranger.events() if "is alive" in event]
    assert not [event for host in hosts for _, event in host.events() if "peer h4" in event]
    print(f"\nfound: all linked with all {1000 * max(found_s, 0):.0f} ms after the last was up; a stranger is not joined")
    assert found_s < FIND_S


def test_a_daemon_that_stops_or_is_cut_off_is_noticed_soon(three: tuple[Any, list[Host], float]) -> None:
    lab, hosts, _ = three
    when_all(hosts, hosts, "alive")
    stopped = now()
    os.kill(hosts[2].process.pid, signal.SIGTERM)
    left_s = when_all(hosts[:2], hosts[2:], "left", stopped) - stopped
    assert hosts[2].process.wait(10) == 0
    cut = now()
    lab.cut("h2")
    dead_s = when_all(hosts[:1], hosts[1:2], "dead", cut) - cut
    lab.heal("h2")
    healed = now()
    back_s = when_all(hosts[:2], hosts[:2], "alive", healed) - healed
    print(f"\ngone: {1000 * left_s:.0f} ms after SIGTERM, {1000 * dead_s:.0f} ms after a silent cut; back in {back_s:.1f} s")
    assert left_s < LEFT_S
    assert dead_s < CUT_S
