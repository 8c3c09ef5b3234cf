"""Limits how many asynchronous handlers run for each peer, so that a busy or hostile peer does not take the share of others."""

from collections import Counter
from typing import Any

from meshd.errors import Overloaded
from meshd.protocol.framing import MIB
from meshd.protocol.messages import Message, Request
from meshd.types import PeerId

PER_PEER = 64
"""Maximum number of a peer's requests that are handled at once."""
PER_KIND = 32
"""Maximum number of them that are of one type."""
LASTING_PER_PEER = 16
"""Maximum number of a peer's requests that may last minutes, such as PLACE. They are counted apart from the others."""
PAYLOAD_BYTES = 32 * MIB
"""Maximum size of the payloads that a peer's running handlers hold."""


class TaskBudget:
    """Counts the running handlers of each peer. A peer's budget does not depend on what other peers do."""

    def __init__(self) -> None:
        self._peers: Counter[tuple[PeerId, bool]] = Counter()
        self._kinds: Counter[tuple[PeerId, type[Message]]] = Counter()
        self._bytes: Counter[PeerId] = Counter()

    def enter(self, peer: PeerId, message: Message, payload_bytes: int) -> None:
        """Count a handler that starts. Raises: Overloaded, with nothing counted."""
        kind, lasting = type(message), _lasts(message)
        running, most = self._peers[peer, lasting], LASTING_PER_PEER if lasting else PER_PEER
        if running >= most:
            raise Overloaded(f"{running} requests of this peer are under way already", retry_after_s=0.5)
        if not lasting and self._kinds[peer, kind] >= PER_KIND:
            raise Overloaded(f"{PER_KIND} {kind.__name__} of this peer are under way already", retry_after_s=0.5)
        if payload_bytes and self._bytes[peer] + payload_bytes > PAYLOAD_BYTES:
            raise Overloaded(f"{self._bytes[peer]} bytes of this peer's requests are being handled already", retry_after_s=0.5)
        self._add(peer, message, payload_bytes, 1)

    def leave(self, peer: PeerId, message: Message, payload_bytes: int) -> None:
        """Count a handler that has ended."""
        self._add(peer, message, payload_bytes, -1)

    def __len__(self) -> int:
        """The number of handlers that run."""
        return self._peers.total()

    def _add(self, peer: PeerId, message: Message, payload_bytes: int, sign: int) -> None:
        counts: tuple[tuple[Counter[Any], Any, int], ...] = (
            (self._peers, (peer, _lasts(message)), sign),
            (self._kinds, (peer, type(message)), sign),
            (self._bytes, peer, sign * payload_bytes),
        )
        for counter, key, change in counts:
            counter[key] += change
            if not counter[key]:
                del counter[key]


def _lasts(message: Message) -> bool:
    return isinstance(message, Request) and message.lasting
