"""A mesh of real daemons on a site. Tests start them, send requests to them, kill them, and restart them with the same identity."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from meshd.config import Settings
from meshd.protocol.identity import ClusterKey
from real_daemons.forked import Process
from real_daemons.sites import Site, send_signal

MODEL = "smollm2:135m"
API_KEY = "tests-of-meshd"
START_S = 90.0
_ASK_S = 3.0
_CONNECT_S = 2.0
_POLL_S = 0.05


class MeshBroken(Exception):
    """A daemon did not start, did not answer, or ended unexpectedly."""


def http_to(
    site: Site, name: str, method: str, path: str, body: Any = None, *, timeout_s: float, inside: bool = False
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Send one request. The caller reads the response and closes the connection. Raises: OSError, HTTPException."""
    connection = http.client.HTTPConnection("meshd")
    connection.sock = site.connect(name, min(_CONNECT_S, timeout_s), inside=inside)
    connection.sock.settimeout(timeout_s)
    headers = {"authorization": f"Bearer {API_KEY}", "content-type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        return connection, connection.getresponse()
    except BaseException:
        connection.close()
        raise


@dataclass
class Host:
    """One peer of a mesh. Its process can be ended and started again, with the same name and state folder."""

    name: str
    site: Site
    root: Path
    command: list[str]
    process: Process | None = None
    starts: int = 0

    @property
    def log(self) -> Path:
        return self.root / f"{self.name}.log"

    @property
    def state(self) -> Path:
        return self.root / self.name

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        assert not self.running
        self.starts += 1
        self.process = self.site.popen(self.name, self.command, self.log)

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None:
            send_signal(self.process, number)

    def kill(self) -> float:
        """Send SIGKILL and wait for the process to end. Returns: the time of the signal (`time.monotonic`)."""
        at = time.monotonic()
        self.signal(signal.SIGKILL)
        self.wait_for_exit(10)
        return at

    def wait_for_exit(self, within_s: float) -> int | None:
        """Wait for the process to end. Returns: its exit status, or None if it still runs."""
        assert self.process is not None
        try:
            status = self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        return status

    def get(self, path: str, timeout_s: float = _ASK_S) -> Any:
        """Send a GET from the daemon's own host, over loopback, so that cut links do not matter.

        Raises: OSError, HTTPException, MeshBroken for any status but 200.
        """
        return self.ask("GET", path, timeout_s=timeout_s)

    def post(self, path: str, body: Any, timeout_s: float = 60.0) -> Any:
        """Send a POST from the daemon's own host, over loopback. Raises: as `get`."""
        return self.ask("POST", path, body, timeout_s=timeout_s)

    def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float = _ASK_S) -> Any:
        connection, response = http_to(self.site, self.name, method, path, body, timeout_s=timeout_s, inside=True)
        with contextlib.closing(connection):
            data = response.read()
        if response.status != 200:
            raise MeshBroken(f"{self.name}: {method} {path}: {response.status} {data[:500].decode(errors='replace')}")
        kind = response.headers.get("content-type", "")
        return json.loads(data) if kind.startswith("application/json") else data.decode()

    def rows(self, what: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.get(f"/mesh/v1/{what}")["data"]
        return rows

    def rows_or_none(self, what: str, timeout_s: float = 1.0) -> list[dict[str, Any]]:
        """Return the rows of `/mesh/v1/WHAT`. Returns: an empty list if the daemon gives none within `timeout_s`."""
        try:
            rows: list[dict[str, Any]] = self.get(f"/mesh/v1/{what}", timeout_s)["data"]
        except (OSError, http.client.HTTPException, MeshBroken):
            return []
        return rows

    def sees(self) -> set[str]:
        """Return the names of the peers whose link is live and whose advert has arrived at this daemon, and its own name."""
        return {row["name"] for row in self.rows_or_none("peers") if row["state"] == "alive" and row["capability"]} | {self.name}

    def up(self) -> bool:
        try:
            self.get("/health", 1.0)
        except (OSError, http.client.HTTPException, MeshBroken):
            return False
        return True

    def resident_bytes(self) -> int:
        """Return the daemon's resident memory without mapped files: their pages grow with each word that is new, and the system
        takes them back when it needs them."""
        assert self.process is not None
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))

    def sockets(self) -> int:
        assert self.process is not None
        count = 0
        for entry in os.scandir(f"/proc/{self.process.pid}/fd"):
            with contextlib.suppress(OSError):
                count += os.readlink(entry.path).startswith("socket:")
        return count


@dataclass
class Mesh:
    """All daemons of one cluster."""

    site: Site
    root: Path
    flags: Sequence[str] = ()
    entry: Sequence[str] = ("-m", "meshd")
    """Arguments of Python that run `meshd`: a module or a script."""
    threads: int = 1
    cache: Path = field(default_factory=lambda: Path(Settings()["cache"].value))
    hosts: dict[str, Host] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        key = ClusterKey.generate(os.urandom).code
        for name in self.site.names:
            command = [sys.executable, "-P", *self.entry, "up", "--stop-with-stdin", "--name", name]
            command += ["--state", str(self.root / name), "--config", os.devnull, "--key", key, "--api-key", API_KEY]
            command += ["--cache", str(self.cache), "--threads", str(self.threads), "--backend", "onnxruntime"]
            command += [*self.site.flags(name), *self.flags]
            self.hosts[name] = Host(name, self.site, self.root, command)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def start(self) -> None:
        """Start all daemons. The first one starts alone and measures this machine for all. Raises: MeshBroken."""
        first, *others = self
        first.start()
        self.wait(first.up, f"{first.name} to be up", first)
        for host in others:
            host.start()
        self.wait_until_all_see()

    def wait_until_all_see(self) -> None:
        """Wait until each daemon has a live link with each of the others, and its advert. Raises: MeshBroken."""
        for host in self:
            self.wait(partial(self._sees_all, host), f"{host.name} to see all others", host)

    def _sees_all(self, host: Host) -> bool:
        return host.sees() >= set(self.hosts)

    def wait(self, condition: Callable[[], object], what: str, host: Host, within_s: float = START_S) -> None:
        """Poll a condition. Raises: MeshBroken with the end of the log if it does not hold in time or the daemon has ended."""
        until = time.monotonic() + within_s
        while not condition():
            if not host.running or time.monotonic() > until:
                tail = host.log.read_text(errors="replace")[-3000:]
                raise MeshBroken(f"gave up waiting for {what} (running: {host.running}):\n{tail}")
            time.sleep(_POLL_S)

    def place(self, at: str, stages: str, context: int) -> None:
        """Place layers as in `stages`, through the daemon `at`. Raises: OSError, HTTPException, MeshBroken."""
        events = self[at].post("/mesh/v1/place", {"model": MODEL, "stages": stages, "context": context}, 120)
        if "data: [DONE]" not in events:
            raise MeshBroken(f"{stages} were not placed: {events[-500:]}")

    def place_only(self, at: str, context: int, *placements: str) -> None:
        """Place these layers of the model and no others, through the daemon `at`. Raises: as `place`."""
        self[at].post("/mesh/v1/unplace", {"model": MODEL}, 120)
        for stages in placements:
            self.place(at, stages, context)

    def story(self, session: str) -> list[dict[str, Any]]:
        """Return a session's story, which the first daemon that answers collects from all peers. Empty: none answers."""
        for host in self:
            with contextlib.suppress(OSError, http.client.HTTPException, MeshBroken):
                rows: list[dict[str, Any]] = host.get(f"/mesh/v1/sessions/{session}/story")["data"]
                return rows
        return []

    def story_text(self, session: str) -> str:
        """Return the output of `meshd debug story` for a session."""
        for host in self:
            if host.running and host.up():
                command = [sys.executable, "-P", "-m", "meshd", "debug", "story", session]
                return self.site.run(host.name, [*command, "--api", self.site.api(host.name), "--api-key", API_KEY])
        return "no peer answers"

    def close(self) -> None:
        """Send SIGTERM to all daemons, also to frozen ones, and SIGKILL to those that still run after 5 s."""
        for host in self:
            host.signal(signal.SIGCONT)
            host.signal(signal.SIGTERM)
        until = time.monotonic() + 5
        for host in self:
            if host.process is not None and host.wait_for_exit(max(0.0, until - time.monotonic())) is None:
                host.kill()


@contextlib.contextmanager
def running(
    site: Site, root: Path, flags: Sequence[str] = (), entry: Sequence[str] = ("-m", "meshd"), threads: int = 1
) -> Iterator[Mesh]:
    """Run a mesh on a site inside the block. On exit, stop the mesh and close the site."""
    try:
        mesh = Mesh(site, root, flags, entry, threads)
        try:
            mesh.start()
            yield mesh
        finally:
            mesh.close()
    finally:
        site.close()


def pull_model() -> Path:
    """Pull the model into the cache that all daemons share. Returns: its file. Raises: MeshBroken."""
    command = [sys.executable, "-P", "-m", "meshd", "pull", MODEL, "--cache", str(Settings()["cache"].value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise MeshBroken(f"the model can't be fetched: {done.stderr}")
    return Path(done.stdout.splitlines()[0].rpartition(" in ")[2])
