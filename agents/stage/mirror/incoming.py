"""Copies of other peers' stages that this peer keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.story import Story
from meshd.agents.placement.resident import ResidentModels
from meshd.agents.stage.kv import KvCache, SessionKv, StageKv
from meshd.errors import InvalidRequest, MeshdError, ProtocolViolation
from meshd.protocol.messages import KvAccepted, KvBlocks, KvOffer, KvStored
from meshd.types import LayerRange, PeerId

log = getLogger(__name__)


@dataclass(slots=True)
class IncomingMirrors:
    """Stores KV that other peers copy to this one."""

    links: Links
    residents: ResidentModels
    caches: KvCache
    story: Story
    admit: Callable[[KvOffer], SessionKv]
    """Makes the session's entry for the offer's epoch; raises Superseded if the session is past it."""
    on_change: Callable[[], None]

    def on_offer(self, sender: PeerId, message: KvOffer, payload: memoryview) -> KvAccepted:
        """Reserve KV for a copy. A repeated offer gets the same copy.

        Raises: InvalidRequest, Superseded, NoPeer, OutOfMemory.
        """
        if message.tokens < 1 or len(message.layers) < 1:
            raise InvalidRequest("a copy needs layers and tokens")
        session_kv = self.admit(message)
        cache = _find(session_kv, sender, message.layers, message.epoch)
        if cache is None:
            resident = self.residents.find(message.model, message.layers)
            try:
                cache = self.caches.mirror(session_kv, resident, message.model, message.layers, message.tokens, message.valid)
            finally:
                self.caches.forget_if_empty(session_kv)
            cache.source = sender
            self.story.note(message.session, "mirror kept", layers=str(message.layers), source=sender, held=cache.filled)
            self.on_change()
        return KvAccepted(request=message.request, held=cache.filled)

    def on_blocks(self, sender: PeerId, message: KvBlocks, payload: memoryview) -> None:
        """Store a chunk, unless one before it is missing, and answer with the positions held."""
        session_kv = self.caches.get(message.session)
        cache = _find(session_kv, sender, message.layers, message.epoch) if session_kv is not None else None
        held, error = 0, "this peer keeps no such copy"
        if session_kv is not None and cache is not None:
            error = self._store(session_kv, cache, message, payload)
            held = cache.filled
        stored = KvStored(session=message.session, epoch=message.epoch, layers=message.layers, held=held, error=error)
        try_send(self.links.send, sender, stored)

    def _store(self, session_kv: SessionKv, cache: StageKv, message: KvBlocks, payload: memoryview) -> str:
        """Store a chunk. Returns: why the copy ended; empty if it continues."""
        lease = cache.lease
        if message.position > cache.filled:
            return ""  # a chunk before this one was lost: the answer names the position to send from
        try:
            if message.tokens < 1 or len(payload) != message.tokens * len(cache.layers) * lease.pool.layer_bytes:
                raise ProtocolViolation(f"KV_BLOCKS is torn: {len(payload)} bytes for {message.tokens} tokens")
            lease.pool.copy_in(cache.layers, lease.table, message.position, payload)
        except MeshdError as error:
            log.warning("session %s: the copy from %.8s ends: %s", session_kv.session, cache.source, error)
            self.caches.drop(session_kv, cache)
            self.on_change()
            return str(error)
        cache.filled = message.position + message.tokens
        return ""


def _find(session_kv: SessionKv, source: PeerId, layers: LayerRange, epoch: int) -> StageKv | None:
    for cache in session_kv.caches:
        if cache.source == source and cache.layers == layers and cache.epoch == epoch:
            return cache
    return None
