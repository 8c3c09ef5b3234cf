"""The table of peers: their state machines, and the addresses from `--peer`.

House rules of this file: no I/O and no clock; time comes with each event.
"""

from dataclasses import dataclass, replace
from typing import Any

from meshd.agents.membership.peer import Peer
from meshd.agents.membership.peer_events import (
    Command,
    Dial,
    DialFailed,
    Event,
    HandshakeRefused,
    LinkUp,
    PeerState,
    PublishChange,
    RetentionExpired,
    StopDialling,
)
from meshd.agents.membership.peer_rows import peer_row, unlinked_row
from meshd.agents.membership.sources import PeerFound
from meshd.errors import Overloaded
from meshd.types import Advert, PeerId
from meshd.values import Address

MAX_PEERS = 256
REFUSED_RETRY_S = 30.0
"""How long a static address is not dialled after it refused a link. Its peer may have the right key by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticAddress:
    """An address from `--peer`, and the last peer that answered there (None: none yet)."""

    address: Address
    peer: PeerId | None = None
    why: str = ""
    refused_at: float | None = None


class PeerTable:
    """The other peers of the cluster, as this peer sees them."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._peers: dict[PeerId, Peer] = {}
        self._static: dict[Address, StaticAddress] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, peer: PeerId) -> Peer | None:
        """Returns: the peer's state machine, which changes with later events; None if the peer is unknown."""
        return self._peers.get(peer)

    def name_of(self, peer: PeerId) -> str:
        """Returns: a peer's name, or the beginning of its id if the name is unknown."""
        known = self._peers.get(peer)
        return known.name if known is not None and known.name else peer[:8]

    def linked(self) -> list[Peer]:
        """Returns: the peers whose link is up, suspects included."""
        return [peer for peer in self._peers.values() if peer.linked]

    def adverts(self) -> list[Advert]:
        """Returns: the newest advert of each ALIVE peer. Plans use only these peers and this one."""
        return [peer.advert for peer in self._peers.values() if peer.state is PeerState.ALIVE and peer.advert is not None]

    def apply(self, event: Event, now: float) -> list[Command]:
        """Apply one event.

        Returns: the commands to carry out.
        Raises: IllegalTransition, with nothing changed; Overloaded if the table is full of linked peers.
        """
        if event.peer is None:
            return self._apply_to_address(event, now)
        peer = self._peers.get(event.peer) or Peer(id=event.peer, now=now)
        peer.now = now
        commands = peer.handle(event)
        if peer.state is PeerState.UNKNOWN:
            self._peers.pop(peer.id, None)
            return commands
        if peer.id not in self._peers:
            commands = self._make_room(peer.id) + commands
            self._peers[peer.id] = peer
        if isinstance(event, LinkUp) and event.dialled in self._static:
            self._static[event.dialled] = StaticAddress(address=event.dialled, peer=peer.id)
        return commands

    def expire(self, now: float) -> list[Command]:
        """Drop the peers whose retention time has passed. Returns: the commands to carry out."""
        commands: list[Command] = []
        for peer in list(self._peers.values()):
            peer.now = now
            if peer.is_over:
                commands += self.apply(RetentionExpired(peer.id), now)
        return commands

    def rows(self, now: float) -> list[dict[str, Any]]:
        """Build the rows for `meshd status` and the API: linked peers, other peers, then static addresses where no peer answers.

        Peers are sorted by name.
        """
        peers = sorted(self._peers.values(), key=lambda peer: (not peer.linked, peer.name, peer.id))
        unanswered = [known for known in self._static.values() if known.peer is None]
        return [peer_row(peer, now) for peer in peers] + [_row_of_address(known) for known in unanswered]

    def validate(self) -> None:
        """Check the invariants that hold between events; tests call this after each event. Raises: AssertionError."""
        if len(self._peers) > self._max_peers or len(self._static) > self._max_peers:
            raise AssertionError("the table is larger than allowed")
        for peer_id, peer in self._peers.items():
            if peer.id != peer_id or peer.state is PeerState.UNKNOWN:
                raise AssertionError(f"{peer_id} should not be in the table")
            peer.validate()

    def _make_room(self, newcomer: PeerId) -> list[Command]:
        if len(self._peers) < self._max_peers:
            return []
        idle = [peer for peer in self._peers.values() if not peer.linked]
        if not idle:
            raise Overloaded(f"peer {newcomer} can't be added: {len(self._peers)} are linked", hint="split the cluster in two")
        oldest = min(idle, key=lambda peer: (peer.state is PeerState.FOUND, peer.last_seen))
        del self._peers[oldest.id]
        return [StopDialling(oldest.id), PublishChange(oldest.id, PeerState.UNKNOWN, oldest.state, "the table is full")]

    def _apply_to_address(self, event: Event, now: float) -> list[Command]:
        """Apply an event about an address whose peer is unknown."""
        match event:
            case PeerFound():
                return self._dial_static(Address(event.addresses[0], event.port), now)
            case DialFailed():
                self._note(event.address, event.reason, None)
            case HandshakeRefused(address=Address() as address):
                self._note(address, event.reason, now)
        return []

    def _dial_static(self, address: Address, now: float) -> list[Command]:
        if address not in self._static and len(self._static) >= self._max_peers:
            return []
        known = self._static.setdefault(address, StaticAddress(address=address))
        peer = self._peers.get(known.peer) if known.peer is not None else None
        if peer is not None and peer.linked:
            return []
        if known.refused_at is not None and now - known.refused_at < REFUSED_RETRY_S:
            return []
        return [Dial(known.peer, (address,))]

    def _note(self, address: Address, why: str, refused_at: float | None) -> None:
        if (known := self._static.get(address)) is not None:
            self._static[address] = replace(known, why=why, refused_at=refused_at)


def _row_of_address(known: StaticAddress) -> dict[str, Any]:
    state = PeerState.FOUND if known.refused_at is None else PeerState.REFUSED
    return unlinked_row(known.address, "static", state, known.why or "being dialled")
