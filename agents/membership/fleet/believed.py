"""Decides which presences to believe, with bounded memory and a bounded number of signature checks.

Whoever can publish at the broker, and the broker itself, can send anything. So cheap checks come first (size, form, topic, date),
then the newest date that was believed of this peer, then a budget, and only then the signatures.

House rules of this file: no I/O and no clock.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from meshd.agents.budget import TokenBucket
from meshd.agents.membership.fleet.presence import Presence, check_presence, read_presence
from meshd.errors import PeerRefused
from meshd.protocol.statement import StatementChecker
from meshd.types import PeerId

MAX_AGE_S = 300.0
"""How far the date of a presence may be from this device's clock, in both directions. Clocks without NTP are off by minutes."""
MAX_PEERS = 256
"""Most peers that are remembered."""
SILENT_S = 2 * MAX_AGE_S
"""A presence that was not repeated for so long is forgotten: the peer is gone, and its last will was lost with its broker. An old
copy of it can't be believed again: it was dated `MAX_AGE_S` ahead at the most."""
_CHECKS_S, _CHECKS_AT_ONCE = 20.0, 2 * MAX_PEERS
"""Signature checks of peers that are not known yet: those of a whole fleet at once, then 20 a second, at 0.05 to 0.4 ms each."""
_PEER_CHECKS_S, _PEER_CHECKS_AT_ONCE = 1.0, 4
"""Signature checks for each known peer, so that a flood of forgeries of one peer does not delay another one."""


@dataclass(slots=True)
class _Known:
    presence: Presence
    heard: float
    """When the presence was believed, in monotonic time."""
    budget: TokenBucket = field(default_factory=lambda: TokenBucket(_PEER_CHECKS_S, _PEER_CHECKS_AT_ONCE))


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a presence is not believed."""

    reason: str
    clock: bool = False
    """A member signed it, but its date is too far from this device's clock: one of both clocks is wrong, or it is an old copy."""


@dataclass(slots=True)
class BelievedPresences:
    """The newest believed presence of each peer."""

    cluster: str
    checker: StatementChecker
    refused: Counter[str] = field(default_factory=Counter)
    """Number of presences that were not believed, by reason. The reasons are a fixed set."""
    _known: OrderedDict[PeerId, _Known] = field(default_factory=OrderedDict)
    """The peer that was heard least recently comes first."""
    _newcomers: TokenBucket = field(default_factory=lambda: TokenBucket(_CHECKS_S, _CHECKS_AT_ONCE))

    def __len__(self) -> int:
        return len(self._known)

    def get(self, peer: PeerId) -> Presence | None:
        """Returns: the newest believed presence of a peer; None if there is none."""
        known = self._known.get(peer)
        return known.presence if known is not None else None

    def present(self) -> list[Presence]:
        """Returns: the newest believed presence of each peer that has not left."""
        return [known.presence for known in self._known.values() if not known.presence.leaves]

    def hear(self, topic_peer: PeerId, data: bytes, wall_s: float, now: float) -> Presence | Refused:
        """Check a presence that the broker delivered. `wall_s` is the Unix time, `now` monotonic.

        Returns: the presence, if it is believed and newer than what was known; else why not.
        """
        try:
            presence, statement = read_presence(data)
        except PeerRefused:
            return self._refuse("malformed")
        if presence.peer != topic_peer or presence.cluster != self.cluster:
            return self._refuse("elsewhere")
        known = self._known.get(topic_peer)
        if known is not None and not _newer(presence, known.presence):
            return self._refuse("repeated")
        fresh = abs(wall_s - presence.at / 1000) <= MAX_AGE_S or _is_will(presence, known)
        if not fresh and presence.at / 1000 < wall_s:
            return self._refuse("old")
        if not (known.budget if known is not None else self._newcomers).take(now):
            return self._refuse("too many")
        try:
            check_presence(self.checker, statement)
        except PeerRefused:
            return self._refuse("forged")
        if not fresh:
            return self._refuse("future", clock=True)
        self._remember(presence, known, now)
        return presence

    def forget(self, gone: Callable[[PeerId], bool]) -> list[PeerId]:
        """Forget the presences of peers that do not belong to the cluster any more. Returns: those of them that had not left."""
        return self._forget([peer for peer in self._known if gone(peer)])

    def forget_silent(self, since: float) -> list[PeerId]:
        """Forget the presences that were not repeated since this monotonic time. Returns: as `forget`."""
        return self._forget([peer for peer, known in self._known.items() if known.heard < since])

    def _forget(self, peers: list[PeerId]) -> list[PeerId]:
        return [peer for peer in peers if not self._known.pop(peer).presence.leaves]

    def _refuse(self, reason: str, *, clock: bool = False) -> Refused:
        self.refused[reason] += 1
        return Refused(reason, clock)

    def _remember(self, presence: Presence, known: _Known | None, now: float) -> None:
        if known is None:
            self._known[presence.peer] = _Known(presence, now)
        else:
            known.presence, known.heard = presence, now
        self._known.move_to_end(presence.peer)
        while len(self._known) > MAX_PEERS:
            self._known.popitem(last=False)


def _newer(presence: Presence, known: Presence) -> bool:
    """Whether a presence says more than the known one. A last will was signed before what its connection has published since."""
    if presence.leaves and presence.since == known.since:
        return not known.leaves
    return presence.at > known.at


def _is_will(presence: Presence, known: _Known | None) -> bool:
    """Whether it is the last will of the connection from which the newest presence came. It is as old as that connection."""
    return presence.leaves and known is not None and presence.since == known.presence.since
