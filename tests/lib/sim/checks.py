"""Checks of invariants: quick ones after every callback of a peer, slow ones after every 300th, others at the end of the run."""

from typing import TYPE_CHECKING, Any

from meshd.agents.session.stages.client import LEASE_S
from meshd.types import PeerId, SessionId
from sim.peer.inspection import leftovers, queues, used_leases
from sim.toy.backend import ToyArena

if TYPE_CHECKING:
    from sim.peer.process import SimProcess
    from sim.world import World

_SWEEP_EVERY = 300


class InvariantBroken(AssertionError):
    """An invariant does not hold."""


class Checks:
    """The checks of one run. Each raises `InvariantBroken` if it fails."""

    def __init__(self, world: "World") -> None:
        self.count = 0
        self._world = world
        self._epochs: dict[int, tuple[Any, int]] = {}
        """The last epoch of each answer and `SessionKv`, by `id()`. The object is kept, so that no other one gets its `id()`."""
        self._blamed: dict[tuple[PeerId, SessionId, PeerId], float] = {}
        """Until when a coordinator distrusts a peer in a session, as it was at the last check."""
        self._arenas: dict[int, int] = {}
        """Changes of each arena up to its last check, by `id()`. An arena that has not changed since is not checked again."""

    def after(self, process: "SimProcess") -> None:
        """Check a process after one of its callbacks."""
        self.count += 1
        if self._world.loop.faults:
            raise InvariantBroken(self._world.loop.faults[0])
        for answer in process.coordinator.answers.values():
            answer.machine.validate()
            self._check_epoch(process, answer, answer.session, answer.machine.epoch)
            self._check_blame(process, answer)
        for session_kv in process.stages._kv_manager._sessions.values():
            self._check_epoch(process, session_kv, session_kv.session, session_kv.epoch)
        self._check_arena(process)
        if self.count % _SWEEP_EVERY == 0:
            self.sweep()

    def sweep(self) -> None:
        """Run the checks that take too long to run after each callback."""
        self._arenas.clear()
        present: set[int] = set()
        for peer in self._world.peers.values():
            if peer.process is not None:
                self._check_queues(peer.process)
                self._check_links(peer.process)
                self._check_takeovers(peer.process)
                for active in peer.process.stages._active.values():
                    active.machine.validate()
                present.update(map(id, peer.process.coordinator.answers.values()))
                present.update(map(id, peer.process.stages._kv_manager))
        self._epochs = {key: known for key, known in self._epochs.items() if key in present}

    def _check_epoch(self, process: "SimProcess", owner: Any, session: SessionId, epoch: int) -> None:
        """Check that the epoch of `owner`, an answer or a `SessionKv`, has not fallen."""
        known = self._epochs.get(id(owner))
        if known is not None and known[1] == epoch:
            return
        if known is not None and epoch < known[1]:
            raise InvariantBroken(f"{process.spec.name}: session {session} went from epoch {known[1]} back to {epoch}")
        self._epochs[id(owner)] = owner, epoch

    def _check_blame(self, process: "SimProcess", answer: Any) -> None:
        """Check that no peer is blamed in an answer unless a peer of it has a fault, or had one since it began; load is none."""
        for peer, until in answer.recovery._distrusted.items():
            blame = process.spec.id, answer.session, peer
            if self._blamed.get(blame) == until:
                continue
            self._blamed[blame] = until
            plans = [plan for plan in (answer.machine.plan, answer.machine.kv_plan) if plan is not None]
            involved = {process.spec.id, peer}.union(*(plan.peers for plan in plans))
            if not any(self._world.health.was_affected(each, answer.output.started) for each in involved):
                names = self._world.names
                raise InvariantBroken(
                    f"{process.spec.name}: {names[peer]} is blamed in session {answer.session}, though no peer of it has a fault: "
                    f"{answer.recovery.reason or answer.machine.error}"
                )

    def _check_arena(self, process: "SimProcess") -> None:
        """Check that bytes are counted once, and that every lease is in use by a session or a step."""
        arena = process.holdings.arena
        assert isinstance(arena, ToyArena)
        if self._arenas.get(id(arena)) == arena.changes:
            return
        self._arenas[id(arena)] = arena.changes
        open_leases = frozenset(map(id, arena.leases))
        counted = sum(lease.reserved_bytes for lease in arena.leases)
        if counted != arena.reserved_bytes or counted > arena.budget_bytes:
            raise InvariantBroken(f"{process.spec.name}: {arena.reserved_bytes} bytes are reserved, the leases have {counted}")
        used = frozenset(map(id, used_leases(process)))
        if used != open_leases:
            raise InvariantBroken(f"{process.spec.name}: {len(open_leases)} leases are open, {len(used)} are in use")

    def _check_takeovers(self, process: "SimProcess") -> None:
        """Check that no session of a lost coordinator waits behind other requests: its stages do not keep its KV for so long."""
        if self._world.health.is_affected(process.spec.id):
            return
        now = process.clock.monotonic()
        for orphan in process.coordinator._takeovers._orphans.values():
            if orphan.tried and now - orphan.due > LEASE_S:
                raise InvariantBroken(
                    f"{process.spec.name}: session {orphan.session} waits for {now - orphan.due:.1f} s to be taken over, "
                    f"but its stages keep its KV for {LEASE_S:g} s only"
                )

    def _check_links(self, process: "SimProcess") -> None:
        """Check that every link is with a peer that belongs to the cluster, by the newest rotation that this peer knows."""
        for peer in process.links.peers():
            if not process.trust.belongs(peer):
                raise InvariantBroken(f"{process.spec.name} is linked with {self._world.names[peer]}, which was excluded")

    def one_key(self) -> None:
        """Check that all peers have the same cluster key, once all faults have ended."""
        keys = {peer.process.trust.chain.hash for peer in self._world.peers.values() if peer.process is not None}
        if len(keys) > 1 or self._world.excluded:
            raise InvariantBroken(f"{len(keys)} rotations count, and {len(self._world.excluded)} peers are excluded")

    def _check_queues(self, process: "SimProcess") -> None:
        for name, size, limit in queues(process):
            if size > limit:
                raise InvariantBroken(f"{process.spec.name}: {size} {name}, the limit is {limit}")

    def no_orphaned_leases(self) -> None:
        """Check that the session of every lease has a running peer as coordinator."""
        processes = [peer.process for peer in self._world.peers.values() if peer.process is not None]
        coordinated = {session for process in processes for session in process.coordinator.answers}
        for process in processes:
            for session_kv in process.stages._kv_manager:
                if session_kv.session not in coordinated:
                    raise InvariantBroken(
                        f"{process.spec.name} holds a lease of session {session_kv.session}, which nobody coordinates"
                    )

    def nothing_left(self) -> None:
        """Check that no session, lease, block or task is left once all sessions have ended."""
        self.sweep()
        for peer in self._world.peers.values():
            process = peer.process
            if process is None:
                continue
            left = leftovers(process)
            if left:
                raise InvariantBroken(f"{process.spec.name}: left over after all sessions have ended: {'; '.join(left)}")
            if process.holdings.arena.leases:
                raise InvariantBroken(f"{process.spec.name}: {len(process.holdings.arena.leases)} leases leaked")
