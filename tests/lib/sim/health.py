"""Tracks the faults of all peers, and decides which errors of clients they excuse."""

import math
from collections.abc import Mapping
from itertools import pairwise

from meshd.types import ModelCard, PeerId
from sim.loop import SimLoop
from sim.peer.peer import SimPeer
from sim.peer.process import SimProcess
from sim.toy.mathematics import MIB
from sim.trace import Trace

_AFTERMATH_S = 5.0
"""Seconds after its fault in which a peer counts as unable to hold layers. Its errors are excused for twice as long."""
_CLOSE_S = 6.0
"""Seconds. Peers that are lost within this time may be the only ones that had a session's record."""
_LOSSES = ("freeze", "isolate", "partition", "one-way cut", "harsh network", "stall", "exclude")
"""Kinds of faults by which other peers lose a peer although its process still exists."""


class PeerHealth:
    """Records which peers have a fault or had one recently, and when peers were lost."""

    def __init__(self, loop: SimLoop, trace: Trace, peers: Mapping[PeerId, SimPeer], cards: tuple[ModelCard, ...]) -> None:
        self.faulty: dict[PeerId, str] = {}
        """Peers that have a fault now, each with the fault's kind."""
        self.injected = 0
        """Number of faults and moves so far."""
        self._loop = loop
        self._trace = trace
        self._peers = peers
        self._cards = cards
        self._affected_until: dict[PeerId, float] = {}
        self._short_at = -math.inf
        """The last known time at which the unaffected peers could not hold all models."""
        self._losses: list[float] = []
        """Times at which other peers lost a peer or got it back."""

    def begin(self, peer: SimPeer, kind: str) -> None:
        """Record that a fault of a peer begins."""
        self.injected += 1
        self.faulty[peer.id] = kind
        self._affected_until[peer.id] = math.inf
        self._trace.note("fault", kind, peer.name)
        if kind in _LOSSES:
            self.note_loss()
        self._note_capacity()

    def end(self, peer: SimPeer, kind: str) -> None:
        """Record that a fault of a peer ends."""
        self._note_capacity()
        self.faulty.pop(peer.id, None)
        self._affected_until[peer.id] = self._loop.time() + _AFTERMATH_S
        self._trace.note("over", kind, peer.name)
        if kind in _LOSSES:
            self.note_loss()

    def begin_all(self, kind: str) -> None:
        """Record that a fault begins on every peer that has none."""
        for peer in self._peers.values():
            if peer.id not in self.faulty:
                self.begin(peer, kind)

    def end_all(self, kind: str) -> None:
        """Record that a fault ends on every peer that has a fault of this kind."""
        for peer in self._peers.values():
            if self.faulty.get(peer.id) == kind:
                self.end(peer, kind)

    def note_loss(self) -> None:
        """Record that now other peers lose a peer or get it back."""
        self._losses.append(self._loop.time())

    def is_affected(self, peer: PeerId) -> bool:
        """Return whether the peer has a fault, or had one within the last 2 * `_AFTERMATH_S`."""
        return self._affected_until.get(peer, -math.inf) > self._loop.time() - _AFTERMATH_S

    def was_affected(self, peer: PeerId, since: float) -> bool:
        """Return whether the peer has a fault, or had one shortly before `since` or later."""
        return self.is_affected(peer) or self._affected_until.get(peer, -math.inf) > since

    def excuses_error(self, process: SimProcess, since: float) -> bool:
        """Return whether an error of this peer is excused, in an answer that was requested at `since`.

        An error is excused if the peer is affected by a fault or is leaving, or if the unaffected peers could not hold all models
        at some time since `_AFTERMATH_S` before the request.
        """
        self._note_capacity()
        return self.is_affected(process.spec.id) or self._short_at >= since - _AFTERMATH_S or process.leaving

    def may_have_lost_records(self) -> bool:
        """Return whether a session's record may be lost.

        It may be if two peers were lost or came back within `_CLOSE_S` of each other, or one was or did in the last `_CLOSE_S`.
        """
        times = sorted(self._losses)
        close = any(later - earlier < _CLOSE_S for earlier, later in pairwise(times))
        return close or any(self._loop.time() - at < _CLOSE_S for at in times)

    def _note_capacity(self) -> None:
        """Record the time if the unaffected peers cannot hold all models now."""
        now = self._loop.time()
        layer_bytes = max(self._cards[0].layer_bytes)
        layers = 0
        for peer in self._peers.values():
            if peer.process is None or self._affected_until.get(peer.id, -math.inf) > now:
                continue
            layers += max(0, int((0.9 * peer.spec.memory_bytes - 80 * MIB) // layer_bytes))
        if layers < sum(card.spec.layers for card in self._cards):
            self._short_at = now
