"""Stores the copies of other peers' stages on this peer.

The session's coordinator announces a copy: EXPECT_COPY names the peer that will send the KV, the layers and the epoch. KV from any
other peer is refused, whatever that peer knows of the session: after a loss it would be used without a check.
"""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.story import Story
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage.kv import KvManager, SessionKv, StageCache
from meshd.agents.stage.leases import SessionLeases
from meshd.errors import InvalidRequest, MeshdError
from meshd.protocol.messages import CopyExpected, ExpectCopy, KvAccepted, KvBlocks, KvOffer, KvStored
from meshd.types import LayerRange, PeerId, SessionId

log = getLogger(__name__)


@dataclass(slots=True)
class IncomingMirrors:
    """Reserves caches and fills them with the KV that other peers send."""

    me: PeerId
    links: Links
    residents: ResidentModels
    kv_manager: KvManager
    leases: SessionLeases
    story: Story
    on_change: Callable[[], None]

    def on_expect(self, sender: PeerId, message: ExpectCopy, payload: memoryview) -> CopyExpected:
        """Reserve KV for a copy that the coordinator announces. A repeat gets the same cache.

        Raises: InvalidRequest if the copy is empty or its source is this peer; Superseded if the epoch is past or another peer
        coordinates the session; NoPeer if the layers are not in memory and the model is not known; OutOfMemory.
        """
        if message.tokens < 1:
            raise InvalidRequest("a copy needs at least one token")
        if message.source == self.me:
            raise InvalidRequest("the target of a copy is the stage's own peer")
        self.leases.begin_epoch(message.session, sender, message.epoch, message.predecessors)
        expires = self.leases.expiry(message.lease_ms)
        session_kv = self.kv_manager.enter(message.session, sender, message.epoch, expires)
        if _find(session_kv, message.source, message.layers) is None:
            resident = self.residents.find(message.model, message.layers)
            try:
                self.kv_manager.reserve_copy(session_kv, resident, message.model, message.layers, message.tokens, message.source)
            finally:
                self.kv_manager.forget_if_empty(session_kv)
            self.on_change()
        return CopyExpected(request=message.request, session=message.session, epoch=message.epoch)

    def on_offer(self, sender: PeerId, message: KvOffer, payload: memoryview) -> KvAccepted:
        """Begin a copy that the coordinator announced. A repeated offer gets the same cache.

        Raises: InvalidRequest for a copy that was not announced.
        """
        session_kv, cache = self._expected(sender, message.session, message.epoch, message.layers)
        if session_kv is None or cache is None:
            raise InvalidRequest(
                f"the coordinator of session {message.session} did not ask {sender:.8} to copy layers {message.layers} to this peer"
            )
        if not cache.offered:
            self.kv_manager.begin_copy(session_kv, cache, message.valid)
            self.story.note(message.session, "mirror kept", layers=str(message.layers), source=sender, held=cache.filled)
            self.on_change()
        return KvAccepted(request=message.request, held=cache.filled)

    def on_blocks(self, sender: PeerId, message: KvBlocks, payload: memoryview) -> None:
        """Store a chunk, unless an earlier one is missing. Answer with the number of positions that this peer now holds."""
        session_kv, cache = self._expected(sender, message.session, message.epoch, message.layers)
        held, error = 0, "this peer has no such copy"
        if session_kv is not None and cache is not None and cache.offered:
            error = self._store(session_kv, cache, message, payload)
            held = cache.filled
        stored = KvStored(session=message.session, epoch=message.epoch, layers=message.layers, held=held, error=error)
        try_send(self.links.send, sender, stored)

    def _expected(
        self, source: PeerId, session: SessionId, epoch: int, layers: LayerRange
    ) -> tuple[SessionKv | None, StageCache | None]:
        """Returns: the session and the cache that its coordinator reserved for this copy; None for what there is not."""
        session_kv = self.kv_manager.get(session)
        if session_kv is None or session_kv.epoch != epoch:
            return session_kv, None
        return session_kv, _find(session_kv, source, layers)

    def _store(self, session_kv: SessionKv, cache: StageCache, message: KvBlocks, payload: memoryview) -> str:
        """Store a chunk; drop the cache if the chunk is invalid. Returns: why the cache was dropped; empty if it was not."""
        lease = cache.lease
        if message.position > cache.filled:
            return ""  # a chunk before this one was lost: the answer contains the position to restart at
        try:
            lease.kv.copy_in(cache.layers, message.position, message.position + message.tokens, payload)
        except MeshdError as error:
            log.warning("session %s: the copy from %.8s is dropped: %s", session_kv.session, cache.source, error)
            self.kv_manager.drop(session_kv, cache)
            self.on_change()
            return str(error)
        end = message.position + message.tokens
        cache.extend(end, end)
        return ""


def _find(session_kv: SessionKv, source: PeerId, layers: LayerRange) -> StageCache | None:
    """Returns: the cache for a copy of these layers from `source` in the session's present epoch; None if there is none."""
    for cache in session_kv.caches:
        if cache.source == source and cache.layers == layers and cache.epoch == session_kv.epoch:
            return cache
    return None
