"""The invariants of architecture.md: after every callback of a peer, all of it now and then, and what must be true in the end."""

from typing import TYPE_CHECKING, Any

from meshd.types import SessionId

if TYPE_CHECKING:
    from sim.peer import Life
    from sim.world import World

_SWEEP_EVERY = 500
_MAX_QUEUE = 1024


class Broken(AssertionError):
    """An invariant does not hold."""


class Checks:
    """Of one world."""

    def __init__(self, world: "World") -> None:
        self.count = 0
        self._world = world
        self._epochs: dict[int, tuple[Any, int]] = {}
        """By the identity of its owner: the coordinator's answer, or a stage peer's state of a session."""
        self._pools: dict[int, tuple[int, int, int]] = {}
        self._faults_seen = 0

    def after(self, life: "Life") -> None:
        """One callback of this peer has run."""
        self.count += 1
        if self._world.loop.faults:
            raise Broken(self._world.loop.faults[0])
        for answer in life.coordinator.answers.values():
            answer.machine.validate()
            self._rises(life, answer, answer.session, answer.machine.epoch)
        for active in life.stages._active.values():
            active.machine.validate()
        for session_kv in life.stages._kv_manager:
            self._rises(life, session_kv, session_kv.session, session_kv.epoch)
        for load in life.holdings:
            if load.pool is not None:
                self._pool(life, load)
        if self.count % _SWEEP_EVERY == 0:
            self.sweep()

    def sweep(self) -> None:
        """What is too long to look at each time."""
        self._pools.clear()
        present: set[int] = set()
        for peer in self._world.peers.values():
            if peer.life is not None:
                self._queues(peer.life)
                present.update(map(id, peer.life.coordinator.answers.values()))
                present.update(map(id, peer.life.stages._kv_manager))
        self._epochs = {key: known for key, known in self._epochs.items() if key in present}

    def _rises(self, life: "Life", owner: Any, session: SessionId, epoch: int) -> None:
        known = self._epochs.get(id(owner))
        if known is not None and known[1] == epoch:
            return
        if known is not None and epoch < known[1]:
            raise Broken(f"{life.spec.name}: session {session} went from epoch {known[1]} back to {epoch}")
        self._epochs[id(owner)] = owner, epoch

    def _pool(self, life: "Life", load: Any) -> None:
        """Blocks that are taken are those of tables that somebody owns."""
        pool = load.pool
        state = (len(pool._live), pool._next_id, pool.blocks_free)
        if self._pools.get(id(pool)) == state:
            return
        self._pools[id(pool)] = state
        taken = [block for table in pool._live.values() for block in table.blocks]
        if len(taken) != len(set(taken)) or not pool._free.isdisjoint(taken) or len(taken) + len(pool._free) != pool.blocks:
            raise Broken(f"{life.spec.name}: {len(taken)} blocks are taken and {len(pool._free)} free of {pool.blocks}")
        owned = {table.id for table in life.tables(load)}
        if owned != set(pool._live):
            raise Broken(f"{life.spec.name} {load.layers}: tables {sorted(pool._live)} are taken, {sorted(owned)} are in use")

    def _queues(self, life: "Life") -> None:
        for what, size, limit in life.queues():
            if size > limit:
                raise Broken(f"{life.spec.name}: {size} {what} wait where {limit} may")

    def nothing_unwanted(self) -> None:
        """What stages hold is wanted by a coordinator that lives."""
        lives = [peer.life for peer in self._world.peers.values() if peer.life is not None]
        wanted = {session for life in lives for session in life.coordinator.answers}
        for life in lives:
            for session_kv in life.stages._kv_manager:
                if session_kv.session not in wanted:
                    raise Broken(f"{life.spec.name} holds a lease of session {session_kv.session}, which nobody coordinates")

    def nothing_left(self) -> None:
        """No session, no lease, no block, no task is left of what was."""
        self.sweep()
        for peer in self._world.peers.values():
            life = peer.life
            if life is None:
                continue
            left = life.left_over()
            if left:
                raise Broken(f"{life.spec.name}: when all is over there is still {'; '.join(left)}")
            for load in life.holdings:
                if load.pool is not None and load.pool.blocks_free != load.pool.blocks:
                    raise Broken(f"{life.spec.name} {load.layers}: {load.pool.blocks - load.pool.blocks_free} blocks leaked")
