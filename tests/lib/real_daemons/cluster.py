"""A cluster of real daemons on this machine for tests: each is a process of `meshd up` with its own state folder."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from meshd.state import read_holder
from real_daemons.forked import Process, fork

MODEL = "smollm2:135m"
_START_S = 60.0


@dataclass
class Daemon:
    """One process of `meshd up`."""

    name: str
    state: Path
    process: Process
    log: Path
    api: str = ""
    link: str = ""

    def get(self, path: str, timeout_s: float = 30.0) -> Any:
        with urllib.request.urlopen(self.api + path, timeout=timeout_s) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> Any:
        """Send a POST that must succeed. Returns: the body of the response."""
        status, document, _ = self.post_raw(path, body, timeout_s)
        assert status < 400, f"{path} failed with {status}: {document}"
        return document

    def post_raw(self, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> tuple[int, Any, dict[str, str]]:
        """Send a POST. Returns: status, body and headers (names in lower case), also of an error response."""
        headers = {"content-type": "application/json"}
        return _raw(urllib.request.Request(self.api + path, json.dumps(body).encode(), headers), timeout_s)

    def get_raw(self, path: str) -> tuple[int, Any, dict[str, str]]:
        """Send a GET. Returns: status, body and headers (names in lower case), also of an error response."""
        return _raw(urllib.request.Request(self.api + path), 30.0)

    def rows(self, what: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.get(f"/mesh/v1/{what}")["data"]
        return rows

    def stop(self) -> int:
        """Send SIGTERM and wait for the process to end. Returns: the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(15)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(15)


@dataclass
class Cluster:
    """Daemons with the same cluster key. All others get the address of the first one as `--peer`."""

    root: Path
    shared: Path
    """Cache folder of all clusters of this test run: models and measurements of the device."""
    forked: bool = True
    """Whether daemons are forked (`real_daemons.forked`). False: each is a new Python process, for tests that measure memory."""
    daemons: dict[str, Daemon] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    """Command that starts the next daemons, which are not forked then: it must run its arguments as a process of the same group."""
    build: Path | None = None
    """Source tree that the next daemons run from, which are not forked then (`real_daemons.builds`). None: this one."""
    _key: str = ""

    def __getitem__(self, name: str) -> Daemon:
        return self.daemons[name]

    def start(self, *names: str, flags: tuple[str, ...] = (), discovery: str = "static") -> None:
        """Start daemons and wait until their APIs answer."""
        for name in names:
            self.daemons[name] = self._spawn(name, flags, discovery)
        for name in names:
            wait_for(lambda name=name: self._address_of(self.daemons[name]), f"{name} to be up", self.daemons[name])

    def _spawn(self, name: str, flags: tuple[str, ...], discovery: str) -> Daemon:
        state = self.root / name
        log = self.root / f"{name}.log"
        command = [sys.executable, "-P", "-m", "meshd", "up", "--name", name, "--state", str(state), "--api", "127.0.0.1:0"]
        command += ["--link", "127.0.0.1:0", "--threads", "1", "--cache", str(self.shared), "--discovery", discovery]
        command += ["--copies", "1", "--drain-timeout", "0"]  # hold only the layers that a test places; stop at once
        if self.daemons:
            first = next(iter(self.daemons.values()))
            wait_for(lambda: self._address_of(first), f"{first.name} to be up", first)
            self._key = self._key or self.key(first)
            command += ["--key", self._key, "--peer", first.link]
        command += flags
        if self.forked and not self.prefix and self.build is None:
            return Daemon(name, state, fork(command, log), log)
        with log.open("a") as output:
            env = os.environ | {"PYTHONPATH": str(self.build)} if self.build is not None else None
            process = subprocess.Popen([*self.prefix, *command], env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        return Daemon(name, state, process, log)

    def key(self, daemon: Daemon) -> str:
        command = [sys.executable, "-P", "-m", "meshd", "key", "show", "--json", "--state", str(daemon.state)]
        code: str = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout)["code"]
        return code

    def _address_of(self, daemon: Daemon) -> bool:
        """Find out the daemon's API and link addresses. Returns: False if the daemon does not listen yet."""
        if daemon.api:
            return True
        holder = read_holder(daemon.state)
        if holder is None or holder.pid != daemon.process.pid or not holder.api:
            return False
        daemon.api = f"http://{holder.api}"
        daemon.link = daemon.get("/mesh/v1/self")["link"]
        return True

    def see_each_other(self, *names: str) -> None:
        """Wait until each of these daemons has a live link with each of the others, and its advert. No names: all daemons."""
        expected = set(names or self.daemons)
        for name in expected:
            daemon = self.daemons[name]
            wait_for(lambda daemon=daemon: expected <= self.alive(daemon), f"{name} to see {sorted(expected)}", daemon)

    def place(self, at: str, **options: object) -> None:
        """Place the model and wait until it can answer."""
        body = json.dumps({"model": MODEL, **options}).encode()
        request = urllib.request.Request(self.daemons[at].api + "/mesh/v1/place", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as stream:
            events = stream.read().decode()
        assert "data: [DONE]" in events, events

    def alive(self, daemon: Daemon) -> set[str]:
        """Return the names of the peers whose link is live and whose advert has arrived at `daemon`, and the name of `daemon`."""
        return {row["name"] for row in daemon.rows("peers") if row["state"] == "alive" and row["capability"]} | {daemon.name}

    def close(self) -> None:
        for daemon in self.daemons.values():
            if daemon.process.poll() is None:
                daemon.process.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.process.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _raw(request: urllib.request.Request, timeout_s: float) -> tuple[int, Any, dict[str, str]]:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return answer.status, json.load(answer), {name.lower(): value for name, value in answer.headers.items()}
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), {name.lower(): value for name, value in error.headers.items()}


def wait_for(condition: Callable[[], object], what: str, daemon: Daemon, within_s: float = _START_S) -> None:
    """Poll a condition. If it does not hold in time or the daemon ends, fail the test with the end of the daemon's log."""
    until = time.monotonic() + within_s
    while not condition():
        if daemon.process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"gave up waiting for {what} (exit {daemon.process.poll()}):\n{daemon.log.read_text()[-4000:]}")
        time.sleep(0.05)


def make_cluster(root: Path, shared: Path) -> Iterator[Cluster]:
    cluster = Cluster(root, shared)
    try:
        yield cluster
    finally:
        cluster.close()
