"""Stores the copies of other peers' stages on this peer."""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.story import Story
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage.kv import KvManager, SessionKv, StageCache
from meshd.errors import InvalidRequest, MeshdError, ProtocolViolation
from meshd.protocol.messages import KvAccepted, KvBlocks, KvOffer, KvStored
from meshd.types import LayerRange, PeerId

log = getLogger(__name__)


@dataclass(slots=True)
class IncomingMirrors:
    """Reserves caches and fills them with the KV that other peers send."""

    links: Links
    residents: ResidentModels
    kv_manager: KvManager
    story: Story
    admit: Callable[[KvOffer], SessionKv]
    """Enters the offer's epoch, as `SessionLeases.admit_copy` does. Raises: Superseded."""
    on_change: Callable[[], None]

    def on_offer(self, sender: PeerId, message: KvOffer, payload: memoryview) -> KvAccepted:
        """Reserve KV for a copy. A repeated offer gets the same cache.

        Raises: InvalidRequest if the offer is empty; Superseded if its epoch is past or another coordinator controls the session;
        NoPeer if the layers are not in memory; OutOfMemory.
        """
        if message.tokens < 1:
            raise InvalidRequest("a copy needs at least one token")
        session_kv = self.admit(message)
        cache = _find(session_kv, sender, message.layers, message.epoch)
        if cache is None:
            resident = self.residents.find(message.model, message.layers)
            try:
                cache = self.kv_manager.reserve_copy(
                    session_kv, resident, message.model, message.layers, message.tokens, message.valid
                )
            finally:
                self.kv_manager.forget_if_empty(session_kv)
            cache.source = sender
            self.story.note(message.session, "mirror kept", layers=str(message.layers), source=sender, held=cache.filled)
            self.on_change()
        return KvAccepted(request=message.request, held=cache.filled)

    def on_blocks(self, sender: PeerId, message: KvBlocks, payload: memoryview) -> None:
        """Store a chunk, unless an earlier one is missing. Answer with the number of positions that this peer now holds."""
        session_kv = self.kv_manager.get(message.session)
        cache = _find(session_kv, sender, message.layers, message.epoch) if session_kv is not None else None
        held, error = 0, "this peer has no such copy"
        if session_kv is not None and cache is not None:
            error = self._store(session_kv, cache, message, payload)
            held = cache.filled
        stored = KvStored(session=message.session, epoch=message.epoch, layers=message.layers, held=held, error=error)
        try_send(self.links.send, sender, stored)

    def _store(self, session_kv: SessionKv, cache: StageCache, message: KvBlocks, payload: memoryview) -> str:
        """Store a chunk; drop the cache if the chunk is invalid. Returns: why the cache was dropped; empty if it was not."""
        lease = cache.lease
        if message.position > cache.filled:
            return ""  # a chunk before this one was lost: the answer contains the position to restart at
        try:
            if message.tokens < 1 or len(payload) != message.tokens * len(cache.layers) * lease.pool.layer_bytes:
                raise ProtocolViolation(f"KV_BLOCKS has the wrong size: {len(payload)} bytes for {message.tokens} tokens")
            lease.pool.copy_in(cache.layers, lease.table, message.position, payload)
        except MeshdError as error:
            log.warning("session %s: the copy from %.8s is dropped: %s", session_kv.session, cache.source, error)
            self.kv_manager.drop(session_kv, cache)
            self.on_change()
            return str(error)
        cache.filled = message.position + message.tokens
        return ""


def _find(session_kv: SessionKv, source: PeerId, layers: LayerRange, epoch: int) -> StageCache | None:
    for cache in session_kv.caches:
        if cache.source == source and cache.layers == layers and cache.epoch == epoch:
            return cache
    return None
