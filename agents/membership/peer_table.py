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
MAX_UNLINKED = 192
"""Maximum number of peers that were never linked: sources report them, and anyone can forge a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticAddress:
    """An address from `--peer`, and the last peer that answered there (None: none yet)."""

    address: Address
    peer: PeerId | None = None
    state: PeerState = PeerState.FOUND
    """FOUND, UNREACHED or REFUSED, while no peer has answered."""
    why: str = "being dialled"
    hint: str = ""


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

    def answered(self, address: Address, peer: PeerId) -> None:
        """Record which peer answers at an address from `--peer`."""
        if address in self._static:
            self._static[address] = StaticAddress(address=address, peer=peer)

    def unanswered(self, address: Address) -> StaticAddress | None:
        """Returns: an address from `--peer` at which no peer answers; None if it is not from there, or a peer has answered."""
        known = self._static.get(address)
        return known if known is not None and known.peer is None else None

    def all(self) -> list[Peer]:
        """Returns: the state machines of all peers, linked or not."""
        return list(self._peers.values())

    def linked(self) -> list[Peer]:
        """Returns: the peers whose link is up, suspects included."""
        return [peer for peer in self._peers.values() if peer.linked]

    def unreached(self) -> dict[PeerId, str]:
        """Returns: the peers that were dialled in vain, each with the reason."""
        return {peer.id: peer.why for peer in self._peers.values() if peer.state is PeerState.UNREACHED}

    def adverts(self) -> list[Advert]:
        """Returns: the newest advert of each ALIVE peer. Plans use only these peers and this one."""
        return [peer.advert for peer in self._peers.values() if peer.state is PeerState.ALIVE and peer.advert is not None]

    def apply(self, event: Event, now: float) -> list[Command]:
        """Apply one event.

        Returns: the commands to carry out.
        Raises: IllegalTransition, with nothing changed; Overloaded if the table is full of linked peers.
        """
        if event.peer is None:
            return self._apply_to_address(event)
        peer = self._peers.get(event.peer) or Peer(id=event.peer, now=now)
        peer.now = now
        commands = peer.handle(event)
        if peer.state is PeerState.UNKNOWN:
            self._peers.pop(peer.id, None)
            return commands
        if peer.id not in self._peers:
            commands = self._make_room(peer) + commands
            self._peers[peer.id] = peer
        if isinstance(event, LinkUp) and event.dialled is not None:
            self.answered(event.dialled, peer.id)
        return commands

    def expire(self, now: float) -> list[Command]:
        """Drop the peers whose retention time has passed. Returns: the commands to carry out."""
        commands: list[Command] = []
        for peer in list(self._peers.values()):
            peer.now = now
            if peer.is_over:
                commands += self.apply(RetentionExpired(peer.id), now)
        return commands

    def rows(self, now: float, version: str = "", protocol: str = "") -> list[dict[str, Any]]:
        """Build the rows for `meshd status` and the API: linked peers, other peers, then static addresses where no peer answers.

        Peers are sorted by name. `version` and `protocol` are this peer's own.
        """
        peers = sorted(self._peers.values(), key=lambda peer: (not peer.linked, peer.name, peer.id))
        unanswered = [known for known in self._static.values() if known.peer is None]
        return [peer_row(peer, now, version, protocol) for peer in peers] + [_row_of_address(known) for known in unanswered]

    def validate(self) -> None:
        """Check the invariants that hold between events; tests call this after each event. Raises: AssertionError."""
        if len(self._peers) > self._max_peers or len(self._static) > self._max_peers:
            raise AssertionError("the table is larger than allowed")
        for peer_id, peer in self._peers.items():
            if peer.id != peer_id or peer.state is PeerState.UNKNOWN:
                raise AssertionError(f"{peer_id} should not be in the table")
            peer.validate()

    def _make_room(self, newcomer: Peer) -> list[Command]:
        """Drop a peer if the table is full, or full of peers that were never linked. Raises: Overloaded."""
        strangers = [peer for peer in self._peers.values() if not peer.incarnation]
        if not newcomer.incarnation and len(strangers) >= min(MAX_UNLINKED, self._max_peers):
            return self._drop(min(strangers, key=lambda peer: peer.first_seen))
        if len(self._peers) < self._max_peers:
            return []
        idle = [peer for peer in self._peers.values() if not peer.linked]
        if not idle:
            raise Overloaded(f"peer {newcomer.id} can't be added: {len(self._peers)} are linked", hint="split the cluster in two")
        return self._drop(min(idle, key=lambda peer: (peer.incarnation != 0, peer.last_seen)))

    def _drop(self, peer: Peer) -> list[Command]:
        del self._peers[peer.id]
        return [StopDialling(peer.id), PublishChange(peer.id, PeerState.UNKNOWN, peer.state, "the table is full")]

    def _apply_to_address(self, event: Event) -> list[Command]:
        """Apply an event about an address whose peer is unknown."""
        match event:
            case PeerFound():
                return self._dial_static(Address(event.addresses[0], event.port))
            case DialFailed():
                self._note(event, PeerState.UNREACHED)
            case HandshakeRefused():
                self._note(event, PeerState.REFUSED)
        return []

    def _dial_static(self, address: Address) -> list[Command]:
        if address not in self._static and len(self._static) >= self._max_peers:
            return []
        known = self._static.setdefault(address, StaticAddress(address=address))
        peer = self._peers.get(known.peer) if known.peer is not None else None
        return [] if peer is not None and peer.linked else [Dial(known.peer, (address,))]

    def _note(self, event: DialFailed | HandshakeRefused, state: PeerState) -> None:
        if (known := self._static.get(event.address)) is not None:
            self._static[event.address] = replace(known, state=state, why=event.reason, hint=event.hint)


def _row_of_address(known: StaticAddress) -> dict[str, Any]:
    return unlinked_row(known.address, "static", known.state, known.why, hint=known.hint)
