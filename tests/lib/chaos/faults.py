"""The faults: whom each strikes, what it does, and how it is mended. Several may be on at once, while enough peers are well."""

import http.client
import json
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chaos.clients import Crowd, Order, stages_over
from chaos.schedule import DOUBLE, Fault, Kind
from real_daemons.mesh import Host, Mesh, MeshBroken
from real_daemons.streams import Spec

WELL_AT_LEAST = 3
DRAIN_S = 10.0
"""What daemons get as `--drain-timeout`."""
_STOP_S = DRAIN_S + 8
_SPACING_S = 2.0
_SETTLE_S = 15.0
"""How long the next fault waits for answers that the last one holds up."""
_STALLED_S = 2.0
_SPARE_S = 20.0
_BACK_S = 45.0
_SLOW = ("10mbit", "10ms")
FAST = ("1gbit", "0ms")
_PREFILL_CUT = (10,)


@dataclass(slots=True)
class Struck:
    """A fault that came, for the table."""

    fault: Fault
    at: float
    hit: dict[str, bool]
    """Sessions that used the peers that it struck; whether the peer was their coordinator."""
    over_at: float = 0.0
    note: str = ""


@dataclass
class Storm:
    """Strikes a mesh."""

    mesh: Mesh
    crowd: Crowd
    long: Spec
    say: Callable[[str], None]
    struck: list[Struck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _ill: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _mending: list[threading.Thread] = field(default_factory=list)
    _last_at: float = 0.0

    def well(self) -> set[str]:
        with self._lock:
            return set(self.mesh.hosts) - self._ill

    def strike(self, fault: Fault) -> None:
        """Wait until it may come, let it come, and have it mended beside what follows."""
        self._wait_for_calm(2 if fault.kind in DOUBLE else 1)
        ways: dict[Kind, Callable[[Fault], None]] = {
            Kind.TWO: self._double,
            Kind.DURING: self._double,
            Kind.REPLACEMENT: self._replacement,
            Kind.PREFILL: self._prefill,
            Kind.MIGRATE: self._migrate,
        }
        try:
            ways.get(fault.kind, self._single)(fault)
        finally:
            self.crowd.front = frozenset()
            self._last_at = time.monotonic()

    def finish(self) -> None:
        """Wait until everything is mended."""
        for thread in self._mending:
            thread.join(_STOP_S + _BACK_S + 30)

    # When

    def _wait_for_calm(self, victims: int) -> None:
        """Enough peers are well, and the answers have got over the last fault."""
        settled_by = time.monotonic() + _SETTLE_S
        while time.monotonic() < self._last_at + _SPACING_S or (self.crowd.stalled(_STALLED_S) and time.monotonic() < settled_by):
            time.sleep(0.05)
        until = time.monotonic() + _STOP_S + _BACK_S + 30
        while len(self.well()) - victims < WELL_AT_LEAST:
            self.check_running()
            if time.monotonic() > until:
                raise MeshBroken(f"only {sorted(self.well())} are well, and no other comes back")
            time.sleep(0.05)

    def check_running(self) -> None:
        """Raises: MeshBroken if a daemon ended without a fault."""
        for name in self.well():
            if not self.mesh[name].running and name in self.well():
                raise MeshBroken(f"{name} ended by itself:\n{self.mesh[name].log.read_text(errors='replace')[-3000:]}")

    # Whom

    def _sessions(self) -> dict[str, list[dict[str, Any]]]:
        """What each well peer says that it runs."""
        return {name: self.mesh[name].rows_or_none("sessions") for name in sorted(self.well())}

    def _choose(self, fault: Fault) -> tuple[str, dict[str, bool]]:
        """A peer with the part that the fault wants, if there is one, and the sessions that it hits."""
        running = self._sessions()
        wanted = [name for name, rows in running.items() if any(_has_part(row, coordinator=fault.coordinator) for row in rows)]
        if not fault.coordinator:
            # Rather one that coordinates nothing: what is measured is the loss of a stage.
            wanted = [name for name in wanted if not any(_has_part(row, coordinator=True) for row in running[name])] or wanted
        candidates = wanted or sorted(running)
        name = candidates[int(fault.pick * len(candidates))]
        return name, _hit(running[name])

    def _spare_coordinators(self, front: set[str]) -> None:
        """New answers are asked of `front` alone; wait until nobody else coordinates one."""
        self.crowd.front = frozenset(front)
        until = time.monotonic() + _SPARE_S
        while time.monotonic() < until:
            running = self._sessions()
            if not any(_has_part(row, coordinator=True) for name, rows in running.items() if name not in front for row in rows):
                return
            time.sleep(0.2)

    # How

    def _single(self, fault: Fault) -> None:
        name, hit = self._choose(fault)
        struck = self._begin(fault, name, hit=hit)
        self._blow(fault, name)
        self._mend(struck, name)

    def _double(self, fault: Fault) -> None:
        well = sorted(self.well())
        first = well[int(fault.pick * len(well))]
        second = well[(well.index(first) + 1 + fault.number % (len(well) - 1)) % len(well)]
        self._spare_coordinators(set(well) - {first, second})
        running = self._sessions()
        struck = self._begin(fault, first, second, hit=_hit(running.get(first, [])) | _hit(running.get(second, [])))
        self.mesh[first].kill()
        time.sleep(max(0.0, struck.at + fault.delay_s - time.monotonic()))
        self.mesh[second].kill()
        self._mend(struck, first, second)

    def _replacement(self, fault: Fault) -> None:
        """Kill a stage's peer, see who takes its layers over, and kill that one too."""
        well = sorted(self.well())
        front = {well[int(fault.pick * len(well))], well[(int(fault.pick * len(well)) + 1) % len(well)]}
        self._spare_coordinators(front)
        running = self._sessions()
        others = [name for name in well if name not in front]
        with_stage = [name for name in others if _hit(running.get(name, []))] or others
        first = with_stage[fault.number % len(with_stage)]
        hit = _hit(running.get(first, []))
        before = {(name, row["id"]) for name, rows in running.items() for row in rows if _has_part(row, coordinator=False)}
        struck = self._begin(fault, first, hit=hit)
        self.mesh[first].kill()
        second = self._who_took_over(hit, before, {name for name in others if name != first})
        if second is None:
            struck.note = "nobody but a coordinator took over"
            self._mend(struck, first)
            return
        with self._lock:
            self._ill.add(second)
        self.mesh[second].kill()
        self._mend(struck, first, second)

    def _who_took_over(self, hit: dict[str, bool], before: set[tuple[str, str]], among: set[str]) -> str | None:
        until = time.monotonic() + 3.0
        while hit and time.monotonic() < until:
            for name in sorted(among):
                for row in self.mesh[name].rows_or_none("sessions"):
                    if row["id"] in hit and _has_part(row, coordinator=False) and (name, row["id"]) not in before:
                        return name
            time.sleep(0.01)
        return None

    def _prefill(self, fault: Fault) -> None:
        """A long prompt over two peers that the client does not talk to; one dies while it is computed."""
        well = sorted(self.well())
        start = int(fault.pick * len(well))
        door, one, victim = (well[(start + step) % len(well)] for step in range(3))
        order = Order(self.long, door, {"stages": stages_over([one, victim], _PREFILL_CUT)})
        self.crowd.orders.put(order)
        until = time.monotonic() + 60
        while order.asked is None or not (order.asked.answer.begun_at or order.asked.ended_at):
            if time.monotonic() > until:
                raise MeshBroken("no client has taken the long prompt")
            time.sleep(0.01)
        time.sleep(max(0.0, order.asked.answer.begun_at + fault.delay_s - time.monotonic()))
        struck = self._begin(fault, victim, hit=_hit(self.mesh[victim].rows_or_none("sessions")))
        if order.asked.answer.times:
            struck.note = "the prefill was over already"
        self.mesh[victim].kill()
        self._mend(struck, victim)

    def _migrate(self, fault: Fault) -> None:
        """No fault: an answer is moved in mid-air."""
        until = time.monotonic() + _SETTLE_S
        while not (moves := self._possible_moves()) and time.monotonic() < until:
            time.sleep(0.2)
        if not moves:
            self.say(f"{fault.number} {fault.label}: no peer holds what another one computes")
            return
        at, session, source, target = moves[int(fault.pick * len(moves))]
        struck = Struck(fault, time.monotonic(), {session: False})
        self.struck.append(struck)
        try:
            told = self.mesh[at].post("/mesh/v1/migrate", {"session": session, "source": source, "target": target}, 30)
            struck.note = f"pause {told['pause_ms']:.0f} ms"
        except (OSError, http.client.HTTPException, MeshBroken) as error:
            struck.note = f"not moved: {error}"
        struck.over_at = time.monotonic()
        self.say(f"{fault.number} {fault.label}: {session:.8} from {source} to {target}: {struck.note}")

    def _possible_moves(self) -> list[tuple[str, str, str, str]]:
        """(coordinator, session, from, to): a peer that has no part in it holds the layers that another one computes."""
        running = self._sessions()
        holds = {
            row["name"]: [_range(held["layers"]) for held in row["holdings"] if held["state"] == "active"]
            for row in self.mesh[min(running)].rows_or_none("peers")
            if row["name"] in running
        }
        return [
            (name, row["id"], source, target)
            for name, rows in running.items()
            for row in rows
            if _has_part(row, coordinator=True) and row["state"] == "decoding"
            for source, _, layers in (part.partition(":") for part in row["plan"].split(","))
            for target, loads in sorted(holds.items())
            if f"{target}:" not in row["plan"] and any(set(_range(layers)) <= set(load) for load in loads)
        ]

    def _begin(self, fault: Fault, *names: str, hit: dict[str, bool]) -> Struck:
        with self._lock:
            self._ill.update(names)
        struck = Struck(fault, time.monotonic(), hit)
        self.struck.append(struck)
        detail = f" {fault.mode}" if fault.mode else ""
        self.say(f"{fault.number} {fault.label}{detail}: {', '.join(names)}, {len(hit)} answers hit")
        return struck

    def _blow(self, fault: Fault, name: str) -> None:
        host = self.mesh[name]
        match fault.kind:
            case Kind.KILL | Kind.COORDINATOR:
                host.kill()
            case Kind.POWER:
                self.mesh.site.cut(name, "silent")
                host.kill()
            case Kind.FREEZE:
                host.signal(signal.SIGSTOP)
            case Kind.PARTITION | Kind.ONE_WAY:
                self.mesh.site.cut(name, fault.mode)
            case Kind.SLOW:
                self.mesh.site.shape(name, *_SLOW)
            case Kind.GARBAGE:
                (host.state / "garbage").write_text(json.dumps({"kind": fault.mode, "seconds": fault.seconds}))
                host.signal(signal.SIGUSR1)
            case Kind.DRAIN:
                host.signal(signal.SIGTERM)

    # Mending

    def _mend(self, struck: Struck, *names: str) -> None:
        thread = threading.Thread(target=self._mend_all, args=(struck, names), name=f"fault {struck.fault.number}", daemon=True)
        self._mending.append(thread)
        thread.start()

    def _mend_all(self, struck: Struck, names: tuple[str, ...]) -> None:
        try:
            time.sleep(max(0.0, struck.at + struck.fault.seconds - time.monotonic()))
            for name in names:
                self._mend_one(struck.fault, self.mesh[name])
            struck.over_at = time.monotonic()
            for name in names:
                self._wait_until_back(self.mesh[name])
        except (MeshBroken, OSError) as error:
            self.problems.append(f"fault {struck.fault.number} ({struck.fault.label}) of {', '.join(names)}: {error}")
            self.say(self.problems[-1])
        else:
            with self._lock:
                self._ill.difference_update(names)
        finally:
            struck.over_at = struck.over_at or time.monotonic()

    def _mend_one(self, fault: Fault, host: Host) -> None:
        match fault.kind:
            case Kind.FREEZE:
                host.signal(signal.SIGCONT)
            case Kind.POWER | Kind.PARTITION | Kind.ONE_WAY:
                self.mesh.site.heal(host.name)
            case Kind.SLOW:
                self.mesh.site.shape(host.name, *FAST)
            case Kind.DRAIN:
                status = host.gone(_STOP_S)
                if status != 0:
                    raise MeshBroken(f"it did not end in good order: exit status {status}")
        if not host.running:
            host.start()
        elif fault.kind not in (Kind.FREEZE, Kind.PARTITION, Kind.ONE_WAY, Kind.SLOW, Kind.GARBAGE):
            raise MeshBroken("it still runs")

    def _wait_until_back(self, host: Host) -> None:
        """It and the others that are well see one another again."""
        self.mesh.wait(host.up, f"{host.name} to answer again", host, _BACK_S)
        self.mesh.wait(
            lambda: host.sees() >= self.well() and all(host.name in self.mesh[other].sees() for other in self.well()),
            f"{host.name} and the others to see one another again",
            host,
            _BACK_S,
        )


def _range(layers: str) -> range:
    start, _, end = layers.partition("-")
    return range(int(start), int(end))


def _has_part(row: dict[str, Any], *, coordinator: bool) -> bool:
    return bool(row["role"] == "coordinator" if coordinator else row["role"].startswith("stage"))


def _hit(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Sessions that a peer computes or coordinates; whether it does the latter."""
    computed = {row["id"]: False for row in rows if _has_part(row, coordinator=False)}
    return computed | {row["id"]: True for row in rows if _has_part(row, coordinator=True)}
