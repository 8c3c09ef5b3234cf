"""KV and kept outputs of each session on this peer, for running stages and for the stages of later epochs.

    KvManager    all sessions on this peer
    SessionKv    one session: its coordinator, epoch and lease, and its caches
    StageCache   KV of one session for the layers of one stage, and the kept outputs of that stage
    KvLease      the memory that one or more caches and stages share

KV outlives the stage that computed it: in a later epoch, a stage of the same session takes it over, for all or some of the layers.
Caches of different layers may share a lease: those that take over parts of what an older one had.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.stage.mirror.unplaced import UnplacedKv
from meshd.agents.stage.outputs import OutputLog, Outputs
from meshd.errors import NoPeer
from meshd.kernels.kv.lease import ArenaLease
from meshd.kernels.kv.share import STEP_TOKENS
from meshd.types import LayerRange, ModelId, PeerId, SessionId


@dataclass(slots=True, eq=False)
class KvLease:
    """Reference-counted KV of one session, and the resident layers on whose share it is.

    Each cache on the lease is a user, and so is each running stage, until its last step ends. The last user frees the memory.
    """

    resident: ResidentLayers | None
    """While the lease has a user, these layers stay in memory. None: KV without weights, for which this peer only keeps a copy."""
    kv: ArenaLease

    def acquire(self) -> None:
        """Add a user."""
        if not self.kv.users and self.resident is not None:
            self.resident.sessions += 1
        self.kv.acquire()

    def attach(self, resident: ResidentLayers) -> None:
        """Keep these layers in memory, because a stage computes on KV that was kept without weights."""
        self.resident = resident
        resident.sessions += 1

    def release(self) -> None:
        """Remove a user; the last one frees the memory."""
        self.kv.release()
        if not self.kv.users and self.resident is not None:
            self.resident.sessions -= 1


@dataclass(slots=True, eq=False)
class StageCache:
    """KV of a session for some layers, and the kept outputs of the last of these layers."""

    lease: KvLease
    layers: LayerRange
    epoch: int
    filled: int = 0
    """KV of positions `[0, filled)` is valid."""
    epoch_start: int = 0
    """Position at which the epoch resumed. KV of `[0, epoch_start)` is from older epochs."""
    source: PeerId | None = None
    """The peer that sends the KV, if this cache is a copy. None: a stage on this peer fills the cache."""
    offered: bool = False
    """Whether `source` has offered the copy. Until then the cache is only reserved."""
    reusable: int = 0
    """Positions that the lease of an expected copy has from an older cache; the offer says how many of them are valid."""
    mirrored: bool = False
    """Whether the KV that was valid when the epoch opened was copied from another peer."""
    spared_epoch: int = 0
    """Epoch for which `drop_before` kept this copy, although the copy belongs to an older epoch. 0: none."""
    log: OutputLog | None = None

    @property
    def startable(self) -> tuple[int, int]:
        """The first and last position above 0 at which a stage can start; `(0, 0)` if there is none."""
        return self.lease.kv.resumable(self.layers, self.filled)

    def restart(self, position: int) -> None:
        """Drop KV from `position` on, because an epoch starts there."""
        self.lease.kv.truncate(self.layers, position, 0)
        self.filled = self.epoch_start = position
        self.mirrored = False

    def extend(self, filled: int, committed: int) -> None:
        """Note that KV is valid up to `filled`, and give back what no step from `committed` on reads."""
        self.filled = filled
        self.lease.kv.commit(self.layers, committed)


@dataclass(slots=True, eq=False)
class SessionKv:
    """KV and kept outputs of one session on this peer."""

    session: SessionId
    coordinator: PeerId
    epoch: int
    """The newest epoch that OPEN or EXPECT_COPY began on this peer."""
    expires: float
    """When the coordinator's lease ends, in the clock's monotonic time. All caches are freed then."""
    orphaned: bool = False
    """The link with the coordinator went down, and it has said nothing of the session since: it may have restarted."""
    caches: list[StageCache] = field(default_factory=list)


@dataclass(slots=True)
class KvManager:
    """Allocates, reuses and frees the caches of all sessions on this peer."""

    outputs: Outputs
    unplaced: UnplacedKv
    _sessions: dict[SessionId, SessionKv] = field(default_factory=dict)

    def get(self, session: SessionId) -> SessionKv | None:
        return self._sessions.get(session)

    def __iter__(self) -> Iterator[SessionKv]:
        return iter(list(self._sessions.values()))

    def enter(self, session: SessionId, coordinator: PeerId, epoch: int, expires: float) -> SessionKv:
        """Find or create the session's `SessionKv`, set its coordinator and epoch, and extend its lease to `expires`."""
        session_kv = self._sessions.get(session)
        if session_kv is None:
            session_kv = self._sessions[session] = SessionKv(session, coordinator, epoch, expires)
        session_kv.orphaned = False
        session_kv.coordinator, session_kv.epoch, session_kv.expires = coordinator, epoch, max(session_kv.expires, expires)
        return session_kv

    def reserve(
        self,
        session_kv: SessionKv,
        resident: ResidentLayers | None,
        layers: LayerRange,
        tokens: int,
        step_tokens: int = STEP_TOKENS,
    ) -> StageCache:
        """Add an empty cache for `tokens` tokens, with steps of at most `step_tokens`, or of `STEP_TOKENS` if that is more.

        Raises: NoPeer if the layers are not ready in memory; OutOfMemory if their share of KV has too little left.
        """
        if resident is None or resident.weights is None or resident.kv is None:
            raise NoPeer(f"this peer does not have layers {layers} of this model in memory", hint="place them first")
        lease = KvLease(resident, resident.kv.open(layers, tokens, step_tokens=max(step_tokens, STEP_TOKENS)))
        return self._add(session_kv, StageCache(lease, layers, session_kv.epoch))

    def adopt(
        self,
        session_kv: SessionKv,
        resident: ResidentLayers | None,
        model: ModelId,
        layers: LayerRange,
        tokens: int,
        step_tokens: int = STEP_TOKENS,
    ) -> StageCache | None:
        """Add a cache that takes over the KV of an older epoch for these layers. The older cache stays until it is dropped.

        `resident`: layers in memory that can compute on KV which was kept without weights; None if there are none.

        Returns: a cache of the current epoch on the older cache's lease; None if no older cache fits.
        """
        older = [cache for cache in session_kv.caches if cache.epoch < session_kv.epoch]
        older = [cache for cache in older if cache.lease.resident is not None or _computes(resident, cache.lease)]
        fitting = [cache for cache in older if _fits(cache, model, layers, tokens, step_tokens)]
        best = max(fitting, key=lambda cache: (cache.startable[1], cache.source is None), default=None)
        if best is None:
            return None
        if best.lease.resident is None and resident is not None:
            best.lease.attach(resident)
        mirrored = best.mirrored or best.source is not None
        return self._add(session_kv, StageCache(best.lease, layers, session_kv.epoch, best.filled, mirrored=mirrored))

    def assign_log(self, session_kv: SessionKv, cache: StageCache, dtype: str) -> None:
        """Give the cache the log of an older cache that ends at the same layer, or an empty log. `dtype`: how outputs are sent."""
        logs = [other.log for other in session_kv.caches if other.log is not None and other.layers.end == cache.layers.end]
        fitting = [log for log in logs if log.dtype == dtype]
        cache.log = max(fitting, key=lambda log: log.kept_to, default=None) or self.outputs.open(dtype)

    def reserve_copy(
        self,
        session_kv: SessionKv,
        resident: ResidentLayers | None,
        model: ModelId,
        layers: LayerRange,
        tokens: int,
        source: PeerId,
    ) -> StageCache:
        """Add a cache for a copy that `source` will send, on the lease of an older cache that no stage uses, or on a new one.

        Raises: NoPeer if the layers are not ready in memory and the model is not known; OutOfMemory.
        """
        fitting = [cache for cache in self._idle(session_kv) if _fits(cache, model, layers, tokens, STEP_TOKENS)]
        best = max(fitting, key=lambda cache: max(cache.filled, cache.reusable), default=None)
        if best is None and resident is None:
            lease = KvLease(None, self.unplaced.open(model, layers, tokens))
            cache = self._add(session_kv, StageCache(lease, layers, session_kv.epoch))
        elif best is None:
            cache = self.reserve(session_kv, resident, layers, tokens)
        else:
            reusable = max(best.filled, best.reusable)
            cache = self._add(session_kv, StageCache(best.lease, layers, session_kv.epoch, reusable=reusable))
        cache.source = source
        return cache

    def begin_copy(self, session_kv: SessionKv, cache: StageCache, valid: int) -> None:
        """Begin to fill a reserved copy. KV that its lease has already is used up to position `valid`."""
        if cache.offered:
            return
        cache.offered = True
        _, cache.filled = cache.lease.kv.resumable(cache.layers, min(cache.reusable, max(0, valid)))
        cache.lease.kv.truncate(cache.layers, cache.filled, 0)
        for other in self._idle(session_kv):
            if other is cache or other.lease is not cache.lease or not other.layers.overlaps(cache.layers):
                continue
            if other.layers in cache.layers:
                self.drop(session_kv, other)
            else:
                other.filled = min(other.filled, cache.filled)  # beyond this position the copy overwrites the shared lease

    def drop_before(self, session_kv: SessionKv, epoch: int) -> None:
        """Drop the caches of epochs before `epoch`. A copy stays for one more epoch, because its source may offer it again."""

        def unwanted(cache: StageCache) -> bool:
            if cache.epoch >= epoch:
                return False
            if cache.source is None or self._stage_uses(session_kv, cache.lease) or cache.spared_epoch not in (0, epoch):
                return True
            cache.spared_epoch = epoch
            return False

        self.drop_where(session_kv, unwanted)

    def _idle(self, session_kv: SessionKv) -> list[StageCache]:
        return [cache for cache in session_kv.caches if not self._stage_uses(session_kv, cache.lease)]

    def _stage_uses(self, session_kv: SessionKv, lease: KvLease) -> bool:
        """Return whether a running stage uses the lease, or an ended stage whose last step still computes."""
        return lease.kv.users > sum(cache.lease is lease for cache in session_kv.caches)

    def drop(self, session_kv: SessionKv, cache: StageCache) -> None:
        """Drop a cache, and the session if that was its last cache."""
        session_kv.caches.remove(cache)
        log, cache.log = cache.log, None
        if log is not None and not any(other.log is log for other in session_kv.caches):
            self.outputs.drop(log)
        cache.lease.release()
        self.forget_if_empty(session_kv)

    def drop_where(self, session_kv: SessionKv, unwanted: Callable[[StageCache], bool]) -> int:
        """Drop the caches for which `unwanted` is true.

        Returns: the number of pages that are free now, or will be when the running step ends.
        """
        dropped = [cache for cache in session_kv.caches if unwanted(cache)]
        leases = {id(cache.lease): cache.lease for cache in dropped}
        for cache in dropped:
            self.drop(session_kv, cache)
        still_leased = {id(cache.lease) for cache in session_kv.caches}
        return sum(lease.kv.pages for key, lease in leases.items() if key not in still_leased)

    def forget_if_empty(self, session_kv: SessionKv) -> None:
        """Forget the session if it has no cache."""
        if not session_kv.caches and self._sessions.get(session_kv.session) is session_kv:
            del self._sessions[session_kv.session]

    def _add(self, session_kv: SessionKv, cache: StageCache) -> StageCache:
        cache.lease.acquire()
        session_kv.caches.append(cache)
        return cache


def _computes(resident: ResidentLayers | None, lease: KvLease) -> bool:
    return resident is not None and lease.kv.key.layers in resident.layers


def _fits(cache: StageCache, model: ModelId, layers: LayerRange, tokens: int, step_tokens: int) -> bool:
    kv = cache.lease.kv
    return kv.key.model == model and layers in cache.layers and kv.capacity >= tokens and kv.step_tokens >= min(step_tokens, tokens)
