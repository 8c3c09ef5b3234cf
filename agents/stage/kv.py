"""KV and kept outputs of each session on this peer, for the stage that runs and for the stages of later epochs.

KV outlives the stage that computed it: a later epoch's stage of the same session takes it over, for all or some of its layers. Two
stages over different layers may share one table, since its blocks cover all layers that are resident together.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.stage.outputs import OutputLog, Outputs
from meshd.errors import NoPeer
from meshd.kernels.kv import BlockTable, KVPool
from meshd.types import LayerRange, ModelId, PeerId, SessionId


@dataclass(slots=True, eq=False)
class KvLease:
    """KV blocks of one session in one pool, used by caches and by stages until their last step ends. The last user frees them."""

    resident: ResidentLayers
    pool: KVPool
    table: BlockTable
    users: int = 0

    def acquire(self) -> None:
        """Add a user. The layers stay in memory as long as there is one."""
        if not self.users:
            self.resident.sessions += 1
        self.users += 1

    def release(self) -> None:
        """Remove a user; the last one frees the blocks."""
        self.users -= 1
        if not self.users:
            self.pool.free(self.table)
            self.resident.sessions -= 1


@dataclass(slots=True, eq=False)
class StageKv:
    """KV of a session for some layers, and those outputs of the last of them that are kept."""

    lease: KvLease
    layers: LayerRange
    epoch: int
    filled: int = 0
    """KV of positions `[0, filled)` is valid."""
    settled: int = 0
    """KV of `[0, settled)` was valid before the epoch began."""
    source: PeerId | None = None
    """The peer that copies KV to this one. None: a stage here computes it."""
    mirrored: bool = False
    """The KV that was valid when the epoch opened came as a copy."""
    spared: int = 0
    """Epoch in which this copy was kept although the source did not offer it again. 0: never."""
    log: OutputLog | None = None


@dataclass(slots=True, eq=False)
class SessionKv:
    """Everything that this peer keeps of one session."""

    session: SessionId
    coordinator: PeerId
    epoch: int
    """The newest epoch that was opened here."""
    expires: float
    """When the lease on everything of the session ends."""
    caches: list[StageKv] = field(default_factory=list)


@dataclass(slots=True)
class KvCache:
    """KV and kept outputs of all sessions on this peer."""

    outputs: Outputs
    _sessions: dict[SessionId, SessionKv] = field(default_factory=dict)

    def get(self, session: SessionId) -> SessionKv | None:
        return self._sessions.get(session)

    def __iter__(self) -> Iterator[SessionKv]:
        return iter(list(self._sessions.values()))

    def enter(self, session: SessionId, coordinator: PeerId, epoch: int, expires: float) -> SessionKv:
        """Find or make the session's entry and assign it to this coordinator and epoch."""
        session_kv = self._sessions.get(session)
        if session_kv is None:
            session_kv = self._sessions[session] = SessionKv(session, coordinator, epoch, expires)
        session_kv.coordinator, session_kv.epoch, session_kv.expires = coordinator, epoch, max(session_kv.expires, expires)
        return session_kv

    def reserve(self, session_kv: SessionKv, resident: ResidentLayers | None, layers: LayerRange, tokens: int) -> StageKv:
        """Reserve empty KV for `tokens`.

        Raises: NoPeer if the layers are not ready in memory, OutOfMemory.
        """
        if resident is None or resident.weights is None or resident.pool is None:
            raise NoPeer(f"this peer does not have layers {layers} of this model in memory", hint="place them first")
        lease = KvLease(resident, resident.pool, resident.pool.allocate(tokens))
        return self._add(session_kv, StageKv(lease, layers, session_kv.epoch))

    def adopt(self, session_kv: SessionKv, model: ModelId, layers: LayerRange, tokens: int) -> StageKv | None:
        """Take over the KV that an older epoch left for these layers. The older cache stays until it is dropped.

        Returns: a cache of the present epoch on the same blocks; None if no KV fits.
        """
        fitting = [cache for cache in session_kv.caches if cache.epoch < session_kv.epoch and _fits(cache, model, layers, tokens)]
        best = max(fitting, key=lambda cache: (cache.filled, cache.source is None), default=None)
        if best is None:
            return None
        mirrored = best.mirrored or best.source is not None
        return self._add(session_kv, StageKv(best.lease, layers, session_kv.epoch, best.filled, mirrored=mirrored))

    def take_log(self, session_kv: SessionKv, cache: StageKv) -> None:
        """Give a cache the outputs that an older one of the session kept after the same layer, or an empty log."""
        logs = [other.log for other in session_kv.caches if other.log is not None and other.layers.end == cache.layers.end]
        cache.log = max(logs, key=lambda log: log.kept_to, default=None) or self.outputs.open()

    def mirror(
        self, session_kv: SessionKv, resident: ResidentLayers | None, model: ModelId, layers: LayerRange, tokens: int, valid: int
    ) -> StageKv:
        """Reserve KV for a copy, or continue with KV of the session that is here already, up to position `valid`.

        Raises: NoPeer, OutOfMemory.
        """
        idle = [cache for cache in session_kv.caches if not self._stage_uses(session_kv, cache.lease)]
        fitting = [cache for cache in idle if _fits(cache, model, layers, tokens)]
        best = max(fitting, key=lambda cache: cache.filled, default=None)
        if best is None:
            return self.reserve(session_kv, resident, layers, tokens)
        cache = self._add(session_kv, StageKv(best.lease, layers, session_kv.epoch, min(best.filled, valid)))
        for other in idle:
            if other.lease is not best.lease or not other.layers.overlaps(layers):
                continue
            if other.layers in layers:
                self.drop(session_kv, other)
            else:
                other.filled = min(other.filled, cache.filled)  # the copy overwrites the blocks from there on
        return cache

    def settle(self, session_kv: SessionKv, epoch: int) -> None:
        """Drop the caches of epochs before `epoch`, which now runs. A copy stays one epoch more: its source may offer it again."""

        def unwanted(cache: StageKv) -> bool:
            if cache.epoch >= epoch:
                return False
            if cache.source is None or self._stage_uses(session_kv, cache.lease) or cache.spared not in (0, epoch):
                return True
            cache.spared = epoch
            return False

        self.drop_where(session_kv, unwanted)

    def _stage_uses(self, session_kv: SessionKv, lease: KvLease) -> bool:
        """Whether a stage uses the blocks beside the caches: one that runs, or one that has ended during a step."""
        return lease.users > sum(cache.lease is lease for cache in session_kv.caches)

    def drop(self, session_kv: SessionKv, cache: StageKv) -> None:
        """Drop a cache, and the session if it was the last one."""
        session_kv.caches.remove(cache)
        log, cache.log = cache.log, None
        if log is not None and not any(other.log is log for other in session_kv.caches):
            self.outputs.drop(log)
        cache.lease.release()
        self.forget_if_empty(session_kv)

    def drop_where(self, session_kv: SessionKv, unwanted: Callable[[StageKv], bool]) -> int:
        """Drop some caches.

        Returns: the number of blocks that are free now, or will be when the running step ends.
        """
        going = [cache for cache in session_kv.caches if unwanted(cache)]
        leases = {id(cache.lease): cache.lease for cache in going}
        for cache in going:
            self.drop(session_kv, cache)
        staying = {id(cache.lease) for cache in session_kv.caches}
        return sum(len(lease.table.blocks) for key, lease in leases.items() if key not in staying)

    def forget_if_empty(self, session_kv: SessionKv) -> None:
        """Forget the session if nothing of it is kept."""
        if not session_kv.caches and self._sessions.get(session_kv.session) is session_kv:
            del self._sessions[session_kv.session]

    def _add(self, session_kv: SessionKv, cache: StageKv) -> StageKv:
        cache.lease.acquire()
        session_kv.caches.append(cache)
        return cache


def _fits(cache: StageKv, model: ModelId, layers: LayerRange, tokens: int) -> bool:
    resident = cache.lease.resident
    ready = resident.weights is not None and resident.pool is cache.lease.pool
    return ready and resident.card.id == model and layers in cache.layers and cache.lease.table.capacity >= tokens
