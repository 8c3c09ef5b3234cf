"""Counts the bytes of all links, also of those that have ended."""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from meshd.protocol.messages import KvBlocks, Message, PeerEvents, Steps, WeightData
from meshd.types import PeerId

MAX_PEERS = 256
"""Peers whose ended links are remembered: as many as the table of peers has."""
Kind = Literal["activations", "kv", "weights", "events", "other"]
_KINDS: dict[type[Message], Kind] = {Steps: "activations", KvBlocks: "kv", WeightData: "weights", PeerEvents: "events"}
KINDS: tuple[Kind, ...] = ("activations", "kv", "weights", "events", "other")


@dataclass(slots=True)
class Traffic:
    """Bytes that this peer has sent and received since its start."""

    sent: Counter[Kind] = field(default_factory=Counter)
    """Bytes of payloads by what they carry, without headers and encryption."""
    received: Counter[Kind] = field(default_factory=Counter)
    _ended: OrderedDict[PeerId, tuple[int, int]] = field(default_factory=OrderedDict)
    """Bytes sent and received on links that have ended."""

    def count_sent(self, message: Message, size: int) -> None:
        """Count a payload that is sent."""
        self.sent[_KINDS.get(type(message), "other")] += size

    def count_received(self, message: Message, size: int) -> None:
        """Count a payload that was received."""
        self.received[_KINDS.get(type(message), "other")] += size

    def ended(self, peer: PeerId, sent: int, received: int) -> None:
        """Add the bytes of a link that has ended. Of more than `MAX_PEERS` peers, the one whose link ended first is forgotten."""
        before = self._ended.pop(peer, (0, 0))
        self._ended[peer] = before[0] + sent, before[1] + received
        if len(self._ended) > MAX_PEERS:
            self._ended.popitem(last=False)

    def before(self, peer: PeerId) -> tuple[int, int]:
        """Return the bytes sent and received on the links with a peer that have ended."""
        return self._ended.get(peer, (0, 0))
