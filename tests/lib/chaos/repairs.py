"""Ends each fault after its duration and waits until its peers work again. Each fault has a thread of its own."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.blame import FaultTimes
from chaos.schedule import Fault, Kind
from real_daemons.mesh import Host, Mesh, MeshBroken

DRAIN_S = 10.0
"""The daemons' `--drain-timeout`."""
_STOP_S = DRAIN_S + 8
_BACK_S = 45.0
REPAIRED_WITHIN_S = _STOP_S + _BACK_S + 30
"""Longest time from the end of a fault until its peers work again."""
FAST = ("1gbit", "0ms")
"""Rate and delay of a link without a fault."""


@dataclass(slots=True)
class InjectedFault:
    """A fault that was injected: when, in which sessions, and a note for the results."""

    fault: Fault
    at: float
    hit: dict[str, bool]
    """Sessions in which a victim had a part: id -> whether a victim coordinated the session."""
    over_at: float = 0.0
    note: str = ""


@dataclass
class Repairs:
    """Records which peers have a fault, and repairs them."""

    mesh: Mesh
    say: Callable[[str], None]
    problems: list[str] = field(default_factory=list)
    times: FaultTimes = field(default_factory=FaultTimes)
    _faulty: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def healthy(self) -> set[str]:
        """Return the peers without a fault."""
        with self._lock:
            return set(self.mesh.hosts) - self._faulty

    def mark_faulty(self, *names: str) -> None:
        with self._lock:
            self._faulty.update(names)
        for name in names:
            self.times.begins(name, time.time())

    def start(self, injected: InjectedFault, *names: str) -> None:
        """Start a thread that repairs these peers when the fault's duration is over."""
        thread = threading.Thread(
            target=self._repair_all, args=(injected, names), name=f"fault {injected.fault.number}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def finish(self) -> None:
        """Wait until everything is repaired."""
        for thread in self._threads:
            thread.join(REPAIRED_WITHIN_S)

    def _repair_all(self, injected: InjectedFault, names: tuple[str, ...]) -> None:
        try:
            time.sleep(max(0.0, injected.at + injected.fault.seconds - time.monotonic()))
            for name in names:
                self._repair(injected.fault, self.mesh[name])
            injected.over_at = time.monotonic()
            for name in names:
                self._wait_until_back(self.mesh[name])
        except (MeshBroken, OSError) as error:
            self.problems.append(f"fault {injected.fault.number} ({injected.fault.label}) of {', '.join(names)}: {error}")
            self.say(self.problems[-1])
        else:
            with self._lock:
                self._faulty.difference_update(names)
            for name in names:
                self.times.ends(name, time.time())
        finally:
            injected.over_at = injected.over_at or time.monotonic()

    def _repair(self, fault: Fault, host: Host) -> None:
        match fault.kind:
            case Kind.FREEZE:
                host.signal(signal.SIGCONT)
            case Kind.POWER | Kind.PARTITION | Kind.ONE_WAY:
                self.mesh.site.heal(host.name)
            case Kind.SLOW:
                self.mesh.site.shape(host.name, *FAST)
            case Kind.DRAIN:
                status = host.wait_for_exit(_STOP_S)
                if status != 0:
                    raise MeshBroken(f"the drained daemon did not exit cleanly: exit status {status}")
        if not host.running:
            host.start()
        elif fault.kind not in (Kind.FREEZE, Kind.PARTITION, Kind.ONE_WAY, Kind.SLOW, Kind.GARBAGE):
            raise MeshBroken("the daemon still runs though the fault should have ended it")

    def _wait_until_back(self, host: Host) -> None:
        """Wait until this peer and all healthy peers see one another."""
        self.mesh.wait(host.up, f"{host.name} to answer again", host, _BACK_S)
        self.mesh.wait(
            lambda: host.sees() >= self.healthy() and all(host.name in self.mesh[other].sees() for other in self.healthy()),
            f"{host.name} and the others to see one another again",
            host,
            _BACK_S,
        )
