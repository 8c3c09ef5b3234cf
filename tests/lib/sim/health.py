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
"""A peer counts as unable to hold layers until this long after its fault. Its errors are excused for twice as long."""
_CLOSE_S = 6.0
"""If several peers are lost within this time, they may be the only ones that had a session's record."""
_LOSSES = ("freeze", "isolate", "partition", "one-way cut", "harsh network", "stall")
"""Faults by which other peers lose a peer although its process still exists."""


class PeerHealth:
    """Which peers have a fault, or had one recently."""

    def __init__(self, loop: SimLoop, trace: Trace, peers: Mapping[PeerId, SimPeer], cards: tuple[ModelCard, ...]) -> None:
        self.faulty: dict[PeerId, str] = {}
        """Peers with a fault now, and its kind."""
        self.injected = 0
        """Number of faults so far."""
        self._loop = loop
        self._trace = trace
        self._peers = peers
        self._cards = cards
        self._affected_until: dict[PeerId, float] = {}
        self._short_at = -math.inf
        """The last time at which the unaffected peers could not hold the models."""
        self._losses: list[float] = []
        """Times at which a peer was lost or came back."""

    def begin(self, peer: SimPeer, kind: str) -> None:
        """Note that a fault begins."""
        self.injected += 1
        self.faulty[peer.id] = kind
        self._affected_until[peer.id] = math.inf
        self._trace.note("fault", kind, peer.name)
        if kind in _LOSSES:
            self.note_loss()
        self._note_capacity()

    def end(self, peer: SimPeer, kind: str) -> None:
        """Note that a fault ends."""
        self._note_capacity()
        self.faulty.pop(peer.id, None)
        self._affected_until[peer.id] = self._loop.time() + _AFTERMATH_S
        self._trace.note("over", kind, peer.name)
        if kind in _LOSSES:
            self.note_loss()

    def begin_all(self, kind: str) -> None:
        """Note that a fault begins on every peer that has none."""
        for peer in self._peers.values():
            if peer.id not in self.faulty:
                self.begin(peer, kind)

    def end_all(self, kind: str) -> None:
        """Note that this kind of fault ends on every peer that has it."""
        for peer in self._peers.values():
            if self.faulty.get(peer.id) == kind:
                self.end(peer, kind)

    def note_loss(self) -> None:
        """Note that the others lose a peer now, or that it comes back."""
        self._losses.append(self._loop.time())

    def is_affected(self, peer: PeerId) -> bool:
        """Return whether the peer has a fault, or had one recently."""
        return self._affected_until.get(peer, -math.inf) > self._loop.time() - _AFTERMATH_S

    def excuses_error(self, process: SimProcess, since: float) -> bool:
        """Return whether an error of this peer is excused, in an answer that was requested at `since`.

        An error is excused if the peer is affected by a fault or is leaving, or if at some time since then the unaffected peers
        could not hold the models.
        """
        self._note_capacity()
        return self.is_affected(process.spec.id) or self._short_at >= since - _AFTERMATH_S or process.leaving

    def may_have_lost_records(self) -> bool:
        """Return whether several peers were lost at about the same time: only then may a session's record be lost."""
        times = sorted(self._losses)
        close = any(later - earlier < _CLOSE_S for earlier, later in pairwise(times))
        return close or any(self._loop.time() - at < _CLOSE_S for at in times)

    def _note_capacity(self) -> None:
        """Note the time if the unaffected peers cannot hold the models now."""
        now = self._loop.time()
        layer_bytes = max(self._cards[0].layer_bytes)
        layers = 0
        for peer in self._peers.values():
            if peer.process is None or self._affected_until.get(peer.id, -math.inf) > now:
                continue
            layers += max(0, int((0.9 * peer.spec.memory_bytes - 80 * MIB) // layer_bytes))
        if layers < sum(card.spec.layers for card in self._cards):
            self._short_at = now
