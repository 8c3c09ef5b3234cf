"""Injects the faults of a schedule, each when enough peers are healthy, and chooses their victims. Faults may overlap."""

import http.client
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.clients import ANSWER_S, ClientPool, Order, stages_over
from chaos.repairs import REPAIRED_WITHIN_S, InjectedFault, Repairs
from chaos.schedule import DOUBLE, Fault, Kind
from chaos.sessions import Rows, choose_victim, coordinators_outside, has_part, possible_moves, sessions_hit
from real_daemons.mesh import Mesh, MeshBroken
from real_daemons.streams import Spec

HEALTHY_AT_LEAST = 3
_SPACING_S = 2.0
_SETTLE_S = 15.0
"""Longest time that a fault waits for answers that the fault before it has stalled."""
_STALLED_S = 2.0
_COORDINATORS_END_S = 20.0
"""Longest time that a fault of two peers waits until its possible victims coordinate no answer."""
_SLOW = ("10mbit", "10ms")
_PREFILL_CUT = (10,)


@dataclass
class FaultInjector:
    """Injects faults into a mesh while its clients send requests."""

    mesh: Mesh
    clients: ClientPool
    repairs: Repairs
    long: Spec
    """A request whose prefill takes seconds, for the losses during prefill."""
    say: Callable[[str], None]
    injected: list[InjectedFault] = field(default_factory=list)
    _last_at: float = 0.0

    def inject(self, fault: Fault) -> None:
        """Wait until enough peers are healthy, inject the fault, and start its repair in the background."""
        self._wait_until_bearable(2 if fault.kind in DOUBLE else 1)
        injectors: dict[Kind, Callable[[Fault], None]] = {
            Kind.TWO: self._double,
            Kind.DURING: self._double,
            Kind.REPLACEMENT: self._replacement,
            Kind.PREFILL: self._prefill,
            Kind.MIGRATE: self._migrate,
        }
        try:
            injectors.get(fault.kind, self._single)(fault)
        finally:
            self.clients.entry_peers = frozenset()
            self._last_at = time.monotonic()

    def _wait_until_bearable(self, victims: int) -> None:
        """Wait until the answers have recovered from the fault before, and enough peers are healthy. Raises: MeshBroken."""
        settled_by = time.monotonic() + _SETTLE_S
        while time.monotonic() < self._last_at + _SPACING_S or (self.clients.stalled(_STALLED_S) and time.monotonic() < settled_by):
            time.sleep(0.05)
        until = time.monotonic() + REPAIRED_WITHIN_S
        while len(self.repairs.healthy()) - victims < HEALTHY_AT_LEAST:
            self.check_running()
            if time.monotonic() > until:
                raise MeshBroken(f"only {sorted(self.repairs.healthy())} are healthy, and no other peer comes back")
            time.sleep(0.05)

    def check_running(self) -> None:
        """Raises: MeshBroken if a daemon has ended without a fault."""
        for name in self.repairs.healthy():
            # Call `healthy` again, because a fault may have begun since the first call.
            if not self.mesh[name].running and name in self.repairs.healthy():
                raise MeshBroken(f"{name} ended without a fault:\n{self.mesh[name].log.read_text(errors='replace')[-3000:]}")

    def _sessions(self) -> Rows:
        """Return the session rows of each healthy peer."""
        return {name: self.mesh[name].rows_or_none("sessions") for name in sorted(self.repairs.healthy())}

    def _move_coordinators_to(self, entry_peers: set[str]) -> None:
        """Send new requests to these peers only, and wait until no other peer coordinates an answer, but at most 20 s."""
        self.clients.entry_peers = frozenset(entry_peers)
        until = time.monotonic() + _COORDINATORS_END_S
        while time.monotonic() < until:
            if not coordinators_outside(self._sessions(), entry_peers):
                return
            time.sleep(0.2)

    def _single(self, fault: Fault) -> None:
        sessions = self._sessions()
        name = choose_victim(sessions, fault.pick, coordinator=fault.coordinator)
        injected = self._begin(fault, name, hit=sessions_hit(sessions[name]))
        self._strike(fault, name)
        self.repairs.start(injected, name)

    def _double(self, fault: Fault) -> None:
        healthy = sorted(self.repairs.healthy())
        first = healthy[int(fault.pick * len(healthy))]
        second = healthy[(healthy.index(first) + 1 + fault.number % (len(healthy) - 1)) % len(healthy)]
        self._move_coordinators_to(set(healthy) - {first, second})
        sessions = self._sessions()
        hit = sessions_hit(sessions.get(first, [])) | sessions_hit(sessions.get(second, []))
        injected = self._begin(fault, first, second, hit=hit)
        self.mesh[first].kill()
        time.sleep(max(0.0, injected.at + fault.delay_s - time.monotonic()))
        self.mesh[second].kill()
        self.repairs.start(injected, first, second)

    def _replacement(self, fault: Fault) -> None:
        """Kill a peer with a stage, wait until another peer takes the stage over, and kill this peer too."""
        healthy = sorted(self.repairs.healthy())
        start = int(fault.pick * len(healthy))
        entry_peers = {healthy[start], healthy[(start + 1) % len(healthy)]}
        self._move_coordinators_to(entry_peers)
        sessions = self._sessions()
        others = [name for name in healthy if name not in entry_peers]
        with_stage = [name for name in others if sessions_hit(sessions.get(name, []))] or others
        first = with_stage[fault.number % len(with_stage)]
        hit = sessions_hit(sessions.get(first, []))
        before = {(name, row["id"]) for name, rows in sessions.items() for row in rows if has_part(row, coordinator=False)}
        injected = self._begin(fault, first, hit=hit)
        self.mesh[first].kill()
        second = self._replacement_of(hit, before, {name for name in others if name != first})
        if second is None:
            injected.note = "only coordinators took the stages over"
            self.repairs.start(injected, first)
            return
        self.repairs.mark_faulty(second)
        self.mesh[second].kill()
        self.repairs.start(injected, first, second)

    def _replacement_of(self, hit: dict[str, bool], before: set[tuple[str, str]], among: set[str]) -> str | None:
        """Return the first peer of `among` that runs a new stage of a session in `hit`. None: no peer does so within 3 s."""
        until = time.monotonic() + 3.0
        while hit and time.monotonic() < until:
            for name in sorted(among):
                for row in self.mesh[name].rows_or_none("sessions"):
                    if row["id"] in hit and has_part(row, coordinator=False) and (name, row["id"]) not in before:
                        return name
            time.sleep(0.01)
        return None

    def _prefill(self, fault: Fault) -> None:
        """Run a long prompt over two peers that do not coordinate it, and kill one of them during the prefill."""
        healthy = sorted(self.repairs.healthy())
        start = int(fault.pick * len(healthy))
        coordinator, first, victim = (healthy[(start + step) % len(healthy)] for step in range(3))
        order = Order(self.long, coordinator, {"stages": stages_over([first, victim], _PREFILL_CUT)})
        self.clients.orders.put(order)
        until = time.monotonic() + ANSWER_S  # until a client has got the answer that it waits for
        while order.request is None or not (order.request.answer.begun_at or order.request.ended_at):
            if time.monotonic() > until:
                raise MeshBroken("no client has taken the long prompt")
            time.sleep(0.01)
        time.sleep(max(0.0, order.request.answer.begun_at + fault.delay_s - time.monotonic()))
        injected = self._begin(fault, victim, hit=sessions_hit(self.mesh[victim].rows_or_none("sessions")))
        if order.request.answer.times:
            injected.note = "the prefill had ended already"
        self.mesh[victim].kill()
        self.repairs.start(injected, victim)

    def _migrate(self, fault: Fault) -> None:
        """Move a stage of a decoding answer to another peer. No peer fails."""
        until = time.monotonic() + _SETTLE_S
        while not (moves := self._possible_moves()) and time.monotonic() < until:
            time.sleep(0.2)
        if not moves:
            self.say(f"{fault.number} {fault.label}: no peer has the layers of another peer's stage")
            return
        at, session, source, target = moves[int(fault.pick * len(moves))]
        injected = InjectedFault(fault, time.monotonic(), {session: False})
        self.injected.append(injected)
        try:
            moved = self.mesh[at].post("/mesh/v1/migrate", {"session": session, "source": source, "target": target}, 30)
            injected.note = f"pause {moved['pause_ms']:.0f} ms"
        except (OSError, http.client.HTTPException, MeshBroken) as error:
            injected.note = f"not moved: {error}"
        injected.over_at = time.monotonic()
        self.say(f"{fault.number} {fault.label}: {session:.8} from {source} to {target}: {injected.note}")

    def _possible_moves(self) -> list[tuple[str, str, str, str]]:
        sessions = self._sessions()
        return possible_moves(sessions, self.mesh[min(sessions)].rows_or_none("peers"))

    def _begin(self, fault: Fault, *names: str, hit: dict[str, bool]) -> InjectedFault:
        self.repairs.mark_faulty(*names)
        injected = InjectedFault(fault, time.monotonic(), hit)
        self.injected.append(injected)
        detail = f" {fault.mode}" if fault.mode else ""
        self.say(f"{fault.number} {fault.label}{detail}: {', '.join(names)}, {len(hit)} answers hit")
        return injected

    def _strike(self, fault: Fault, name: str) -> None:
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
