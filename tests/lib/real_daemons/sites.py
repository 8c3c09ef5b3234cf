"""The places where daemons of a test run: hosts in network namespaces, or this machine.

Both implement the interface `Site`.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, Self

from real_daemons.forked import Process, enter_network, fork

_DEFAULT_NETLAB = Path(__file__).resolve().parents[3].parent / "shared/netlab/netlab.py"
"""The file of the module `netlab`, beside the repository. The variable MESHD_NETLAB can name another file."""
_API_PORT, _LINK_PORT = 6374, 6375
_RUN_S = 60.0


def find_netlab() -> Any:
    """Import the module `netlab`, which makes hosts. Returns: the module, or as text the reason why it cannot be used."""
    path = Path(os.environ.get("MESHD_NETLAB", _DEFAULT_NETLAB))
    if not path.is_file():
        return f"no netlab at {path} (MESHD_NETLAB can name another place)"
    if os.geteuid() != 0:
        return "netlab needs root"
    if (module := sys.modules.get("netlab")) is not None:
        return module
    spec = importlib.util.spec_from_file_location("netlab", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Site(Protocol):
    """A place where daemons run: starts them, connects to them, and cuts or slows their links."""

    names: tuple[str, ...]
    has_network: bool
    """Whether `cut` and `shape` work."""

    def flags(self, name: str) -> list[str]:
        """Return the daemon's flags for its addresses and for discovery."""
        ...

    def popen(self, name: str, command: Sequence[str], log: Path) -> Process: ...

    def run(self, name: str, command: Sequence[str]) -> str:
        """Run a command on a peer's host. Returns: the text of standard output and standard error."""
        ...

    def api(self, name: str) -> str:
        """Return the URL of a daemon's API as seen on its own host."""
        ...

    def connect(self, name: str, timeout_s: float, *, inside: bool = False) -> socket.socket:
        """Connect to a daemon's API from another host, or with `inside` from the same host, despite cuts. Raises: OSError."""
        ...

    def cut(self, name: str, mode: str) -> None:
        """Drop a host's frames without notice to either side. `mode`: `in`, `out`, or `silent` for both directions."""
        ...

    def heal(self, name: str) -> None:
        """End a `cut`."""
        ...

    def shape(self, name: str, rate: str, delay: str) -> None:
        """Limit the rate of a host's link, such as `1gbit`, and delay its frames, such as by `10ms`."""
        ...

    def close(self) -> None: ...


class LabSite:
    """A host in a network namespace for each peer, and one more for the clients."""

    has_network = True

    def __init__(self, netlab: Any, peers: int, subnets: int = 1) -> None:
        """`subnets`: networks over which the peers are spread, the first with one more if they can't be spread evenly."""
        each = [peers // subnets + (number < peers % subnets) for number in range(subnets)]
        self._lab = netlab.Lab(hosts=(*each[:-1], each[-1] + 1))
        self._lab.up()
        *names, self._client = self._lab.hosts
        self.names = tuple(names)
        self._lock = threading.Lock()

    @property
    def lab(self) -> Any:
        """The lab itself, for programs besides the daemons."""
        return self._lab

    def flags(self, name: str) -> list[str]:
        return ["--api", f"0.0.0.0:{_API_PORT}", "--link", f"0.0.0.0:{_LINK_PORT}"]

    def popen(self, name: str, command: Sequence[str], log: Path) -> Process:
        return fork(command, log, _environment(), (f"/run/netns/{self._lab.ns(name)}", name))

    def run(self, name: str, command: Sequence[str]) -> str:
        done = self._lab.run(name, list(command), timeout=_RUN_S, env=_environment())
        return str(done.stdout) + str(done.stderr)

    def api(self, name: str) -> str:
        return f"http://127.0.0.1:{_API_PORT}"

    def connect(self, name: str, timeout_s: float, *, inside: bool = False) -> socket.socket:
        address = "127.0.0.1" if inside else self._lab.ip(name)
        with _within(f"/run/netns/{self._lab.ns(name if inside else self._client)}"):
            return socket.create_connection((address, _API_PORT), timeout_s)

    def cut(self, name: str, mode: str) -> None:
        with self._lock:
            self._lab.cut(name, mode)

    def heal(self, name: str) -> None:
        with self._lock:
            self._lab.heal(name)

    def shape(self, name: str, rate: str, delay: str) -> None:
        with self._lock:
            self._lab.shape(name, rate=rate, delay=delay)

    def close(self) -> None:
        self._lab.down()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalSite:
    """Processes on the loopback address. They can be killed, frozen and stopped, but their links cannot be cut or slowed."""

    has_network = False

    def __init__(self, peers: int) -> None:
        self.names = tuple(f"h{number + 1}" for number in range(peers))
        ports = _free_ports(2 * peers)
        self._api = dict(zip(self.names, ports[:peers], strict=True))
        self._link = dict(zip(self.names, ports[peers:], strict=True))

    def flags(self, name: str) -> list[str]:
        others = [part for other, port in self._link.items() if other != name for part in ("--peer", f"127.0.0.1:{port}")]
        where = ["--api", f"127.0.0.1:{self._api[name]}", "--link", f"127.0.0.1:{self._link[name]}"]
        return [*where, "--discovery", "static", *others]

    def popen(self, name: str, command: Sequence[str], log: Path) -> Process:
        return fork(command, log, _environment())

    def run(self, name: str, command: Sequence[str]) -> str:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=_RUN_S, env=_environment(), check=False)
        return done.stdout + done.stderr

    def api(self, name: str) -> str:
        return f"http://127.0.0.1:{self._api[name]}"

    def connect(self, name: str, timeout_s: float, *, inside: bool = False) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._api[name]), timeout_s)

    def cut(self, name: str, mode: str) -> None:
        raise NotImplementedError("a LocalSite cannot cut or slow links: its processes share the loopback device")

    def heal(self, name: str) -> None:
        """Do nothing: the links of a `LocalSite` cannot be cut."""

    def shape(self, name: str, rate: str, delay: str) -> None:
        raise NotImplementedError("a LocalSite cannot cut or slow links: its processes share the loopback device")

    def close(self) -> None:
        """Do nothing: the mesh stops the processes, and nothing else exists."""


def make_site(peers: int) -> tuple[Site, str]:
    """Make a `LabSite` if possible, else a `LocalSite`. Returns: the site, and why it is not a `LabSite` (empty if it is)."""
    netlab = find_netlab()
    if isinstance(netlab, str):
        return LocalSite(peers), netlab
    return LabSite(netlab, peers), ""


def send_signal(process: Process, number: signal.Signals) -> None:
    """Send a signal to a process if it still runs."""
    with suppress(ProcessLookupError):
        process.send_signal(number)


@contextmanager
def _within(namespace: str) -> Iterator[None]:
    """Move this thread into a network namespace for the block: sockets made inside belong to the namespace."""
    with open("/proc/thread-self/ns/net") as home, open(namespace) as other:
        enter_network(other.fileno())
        try:
            yield
        finally:
            enter_network(home.fileno())


def _free_ports(count: int) -> list[int]:
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return ports


def _environment() -> dict[str, str]:
    """Copy this process's environment without `MESHD_*`, except the variables for the folders of caches and models."""
    kept = {"MESHD_CACHE", "MESHD_MODELS_DIR", "MESHD_HF_CACHE"}
    return {name: value for name, value in os.environ.items() if not name.startswith("MESHD_") or name in kept}
