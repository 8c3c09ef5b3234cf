"""Who is in the cluster: one pure table, events in and commands out.

House rules of this file: no I/O and no clock; time comes with each event. `TRANSITIONS` is the whole truth about which event may
come in which state; an event that is not in the table raises and changes nothing. Sources (mDNS, the static list) only hint at
peers; the authenticated link alone makes one ALIVE. Addresses from `--peer` whose peer is not known yet stand beside the table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from meshd.agents.machine import IllegalTransition
from meshd.agents.membership.peer_events import (
    LINKED,
    AdvertReceived,
    Command,
    Dial,
    DialFailed,
    Event,
    GoodbyeReceived,
    HandshakeRefused,
    HeartbeatMissed,
    HeartbeatReceived,
    LinkDown,
    LinkUp,
    PeerState,
    PublishChange,
    RetentionExpired,
    StopDialling,
)
from meshd.agents.membership.sources import PeerFound, PeerWithdrawn
from meshd.errors import Overloaded
from meshd.types import Advert, PeerId
from meshd.values import Address

MAX_PEERS = 256
MAX_ADDRESSES = 16
"""Of one peer."""
RETENTION_S: Mapping[PeerState, float] = {
    PeerState.FOUND: 60.0,
    PeerState.DEAD: 600.0,
    PeerState.REFUSED: 600.0,
    PeerState.LEFT: 60.0,
}
"""How long a peer without a link, and without a source that vouches for it, is still shown."""
REFUSED_RETRY_S = 30.0
"""A static address that refused is dialled again after this: its key may have been mended."""
_INCARNATIONS = 4
"""Past ones remembered, to notice one that comes back."""
_TWIN = "two devices use its identity: a state folder was copied"

TRANSITIONS: Mapping[PeerState | None, Mapping[type, PeerState | None]] = {
    None: {
        PeerFound: PeerState.FOUND,
        PeerWithdrawn: None,
        LinkUp: PeerState.ALIVE,
        DialFailed: None,
        HandshakeRefused: PeerState.REFUSED,
    },
    PeerState.FOUND: {
        PeerFound: PeerState.FOUND,
        PeerWithdrawn: PeerState.LEFT,
        LinkUp: PeerState.ALIVE,
        DialFailed: PeerState.FOUND,
        HandshakeRefused: PeerState.REFUSED,
        RetentionExpired: None,
    },
    PeerState.ALIVE: {
        PeerFound: PeerState.ALIVE,
        PeerWithdrawn: PeerState.ALIVE,
        LinkUp: PeerState.ALIVE,
        LinkDown: PeerState.DEAD,
        DialFailed: PeerState.ALIVE,
        HandshakeRefused: PeerState.ALIVE,
        AdvertReceived: PeerState.ALIVE,
        HeartbeatReceived: PeerState.ALIVE,
        HeartbeatMissed: PeerState.SUSPECT,
        GoodbyeReceived: PeerState.LEFT,
    },
    PeerState.SUSPECT: {
        PeerFound: PeerState.SUSPECT,
        PeerWithdrawn: PeerState.SUSPECT,
        LinkUp: PeerState.ALIVE,
        LinkDown: PeerState.DEAD,
        DialFailed: PeerState.SUSPECT,
        HandshakeRefused: PeerState.SUSPECT,
        AdvertReceived: PeerState.ALIVE,
        HeartbeatReceived: PeerState.ALIVE,
        HeartbeatMissed: PeerState.SUSPECT,
        GoodbyeReceived: PeerState.LEFT,
    },
    PeerState.DEAD: {
        PeerFound: PeerState.DEAD,
        PeerWithdrawn: PeerState.DEAD,
        LinkUp: PeerState.ALIVE,
        DialFailed: PeerState.DEAD,
        HandshakeRefused: PeerState.REFUSED,
        RetentionExpired: None,
    },
    PeerState.REFUSED: {
        PeerFound: PeerState.REFUSED,
        PeerWithdrawn: PeerState.LEFT,
        LinkUp: PeerState.ALIVE,
        DialFailed: PeerState.REFUSED,
        HandshakeRefused: PeerState.REFUSED,
        RetentionExpired: None,
    },
    PeerState.LEFT: {
        PeerFound: PeerState.FOUND,
        PeerWithdrawn: PeerState.LEFT,
        LinkUp: PeerState.ALIVE,
        LinkDown: PeerState.LEFT,
        DialFailed: PeerState.LEFT,
        HandshakeRefused: PeerState.REFUSED,
        AdvertReceived: PeerState.LEFT,
        HeartbeatReceived: PeerState.LEFT,
        HeartbeatMissed: PeerState.LEFT,
        GoodbyeReceived: PeerState.LEFT,
        RetentionExpired: None,
    },
}
"""state -> event -> state; None is a peer that the table does not hold. After a goodbye its link may still say a word or two."""


@dataclass(frozen=True, slots=True)
class KnownAddress:
    """An address, and who named it: a source, or `link`."""

    address: Address
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """All that is known of one peer."""

    id: PeerId
    state: PeerState
    first_seen: float
    last_seen: float
    since: float
    """When it came into this state."""
    why: str = ""
    """Why it is left out; of a linked peer, what is odd about it."""
    name: str = ""
    version: str = ""
    protocol: str = ""
    incarnation: int = 0
    past: tuple[int, ...] = ()
    addresses: tuple[KnownAddress, ...] = ()
    advert: Advert | None = None

    @property
    def linked(self) -> bool:
        return self.state in LINKED


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticAddress:
    """An address from `--peer`, and the peer that answered there last."""

    address: Address
    peer: PeerId | None = None
    why: str = ""
    refused_at: float | None = None


class PeerTable:
    """The peers of the cluster as this peer sees them, itself not among them."""

    def __init__(self, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._peers: dict[PeerId, Peer] = {}
        self._static: dict[Address, StaticAddress] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, peer: PeerId) -> Peer | None:
        """What is known of the peer, if anything."""
        return self._peers.get(peer)

    def name_of(self, peer: PeerId) -> str:
        """The name of a peer; the beginning of its id if its name is unknown."""
        known = self._peers.get(peer)
        return known.name if known is not None and known.name else peer[:8]

    def linked(self) -> list[Peer]:
        """Those with a standing link, suspects too."""
        return [peer for peer in self._peers.values() if peer.linked]

    def adverts(self) -> list[Advert]:
        """The newest advert of each peer that is ALIVE: what a plan may count on."""
        return [peer.advert for peer in self._peers.values() if peer.state is PeerState.ALIVE and peer.advert is not None]

    def apply(self, event: Event, now: float) -> list[Command]:
        """Take one event. Raises: IllegalTransition (nothing changed); Overloaded (the table is full of linked peers)."""
        if event.peer is None:
            return self._apply_to_address(event, now)
        before = self._peers.get(event.peer)
        state = before.state if before is not None else None
        following = TRANSITIONS[state]
        if type(event) not in following:
            raise IllegalTransition(f"{event.peer} is {state.value if state else 'unknown'}: {type(event).__name__} can't come now")
        after_state = following[type(event)]
        if before is None and after_state is None:
            return []
        if after_state is None:
            del self._peers[event.peer]
            return [StopDialling(event.peer), PublishChange(event.peer, None, state, "")]
        dropped = self._make_room(event) if before is None else []
        after = _after(before or _newcomer(event.peer, now), event, after_state, now)
        self._peers[event.peer] = after
        if isinstance(event, LinkUp) and event.dialled in self._static:
            self._static[event.dialled] = StaticAddress(address=event.dialled, peer=event.peer)
        return dropped + _commands(before, after, event)

    def expire(self, now: float) -> list[Command]:
        """Drop whoever was long not heard of; to be called now and then."""
        return [
            command
            for peer in list(self._peers.values())
            if _is_over(peer, now)
            for command in self.apply(RetentionExpired(peer.id), now)
        ]

    def rows(self, now: float) -> list[dict[str, Any]]:
        """For `meshd status` and the API: JSON-ready, linked peers first, then by name; then static addresses nobody answers at."""
        peers = sorted(self._peers.values(), key=lambda peer: (not peer.linked, peer.name, peer.id))
        unanswered = [known for known in self._static.values() if known.peer is None]
        return [_row(peer, now) for peer in peers] + [_row_of_address(known) for known in unanswered]

    def _make_room(self, event: Event) -> list[Command]:
        if len(self._peers) < self._max_peers:
            return []
        idle = [peer for peer in self._peers.values() if not peer.linked]
        if not idle:
            raise Overloaded(f"peer {event.peer} can't be taken in: {len(self._peers)} are linked", hint="split the cluster in two")
        oldest = min(idle, key=lambda peer: (peer.state is PeerState.FOUND, peer.last_seen))
        del self._peers[oldest.id]
        return [StopDialling(oldest.id), PublishChange(oldest.id, None, oldest.state, "the table is full")]

    def _apply_to_address(self, event: Event, now: float) -> list[Command]:
        """Events of which no peer is known, only an address."""
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


def _newcomer(peer: PeerId, now: float) -> Peer:
    return Peer(id=peer, state=PeerState.FOUND, first_seen=now, last_seen=now, since=now)


def _after(peer: Peer, event: Event, state: PeerState, now: float) -> Peer:
    """The peer after an event that the table allows."""
    if state is not peer.state:
        peer = replace(peer, state=state, since=now, why="")
    match event:
        case PeerFound():
            return _found(peer, event, now)
        case PeerWithdrawn():
            return replace(peer, addresses=tuple(known for known in peer.addresses if known.source != event.source))
        case LinkUp():
            return _linked(peer, event, now)
        case AdvertReceived():
            newer = peer.advert is None or event.advert.revision > peer.advert.revision
            keep = newer and event.advert.incarnation == peer.incarnation
            return replace(peer, last_seen=now, advert=event.advert if keep else peer.advert)
        case HeartbeatReceived():
            return replace(peer, last_seen=now)
        case HeartbeatMissed() if peer.state is PeerState.SUSPECT:
            return replace(peer, why="silent")
        case LinkDown() | GoodbyeReceived() | DialFailed() | HandshakeRefused() if not peer.linked:
            return replace(peer, why=event.reason)
    return peer


def _found(peer: Peer, event: PeerFound, now: float) -> Peer:
    """A source's new list replaces its old one. What the link says of itself counts for more than a hint."""
    addresses = [KnownAddress(Address(host, event.port), event.source) for host in event.addresses]
    others = [known for known in peer.addresses if known.source != event.source]
    peer = replace(peer, addresses=tuple([*addresses, *others][:MAX_ADDRESSES]), protocol=event.protocol, last_seen=now)
    return peer if peer.linked else replace(peer, name=event.name or peer.name, version=event.version or peer.version)


def _linked(peer: Peer, event: LinkUp, now: float) -> Peer:
    """A new incarnation starts with no advert. One that was there before another is no restart but a twin."""
    restarted = event.incarnation != peer.incarnation
    past = (*peer.past, peer.incarnation)[-_INCARNATIONS:] if restarted and peer.incarnation else peer.past
    return replace(
        peer,
        name=event.name,
        version=event.version,
        incarnation=event.incarnation,
        past=past,
        why=_TWIN if event.incarnation in peer.past else "",
        advert=None if restarted else peer.advert,
        addresses=_with_link(peer.addresses, event),
        last_seen=now,
    )


def _with_link(addresses: Iterable[KnownAddress], event: LinkUp) -> tuple[KnownAddress, ...]:
    """Where the link was reached, or may be, comes after what the sources say, and only the latest counts."""
    known = [each for each in addresses if each.source != "link"]
    link = event.dialled or event.listens
    if link is not None and all(each.address != link for each in known):
        known = [*known[: MAX_ADDRESSES - 1], KnownAddress(link, "link")]
    return tuple(known)


def _commands(before: Peer | None, after: Peer, event: Event) -> list[Command]:
    commands: list[Command] = []
    was = before.state if before is not None else None
    if not after.linked and after.addresses and isinstance(event, PeerFound | LinkDown) and after.state is not PeerState.LEFT:
        commands.append(Dial(after.id, tuple(known.address for known in after.addresses)))
    refused = isinstance(event, HandshakeRefused) and after.state is PeerState.REFUSED
    if refused or (after.state is PeerState.LEFT and was is not PeerState.LEFT):
        commands.append(StopDialling(after.id))
    changed = before is None or (was, before.advert, before.why) != (after.state, after.advert, after.why)
    if changed:
        commands.append(PublishChange(after.id, after.state, was, after.why))
    return commands


def _is_over(peer: Peer, now: float) -> bool:
    if peer.linked or (peer.state is PeerState.FOUND and peer.addresses):
        return False
    return now - max(peer.last_seen, peer.since) > RETENTION_S[peer.state]


def _row(peer: Peer, now: float) -> dict[str, Any]:
    advert = peer.advert
    return {
        "peer": peer.id,
        "name": peer.name,
        "state": peer.state.value,
        "why": peer.why,
        "addresses": [{"host": known.address.host, "port": known.address.port, "source": known.source} for known in peer.addresses],
        "version": peer.version,
        "protocol": peer.protocol,
        "incarnation": peer.incarnation,
        "first_seen_s": now - peer.first_seen,
        "last_seen_s": now - peer.last_seen,
        "since_s": now - peer.since,
        "capability": msgspec.to_builtins(advert.capability) if advert else None,
        "holdings": msgspec.to_builtins(advert.holdings) if advert else [],
        "models": [card.name for card in advert.models] if advert else [],
        "sessions": advert.sessions if advert else 0,
        "api": advert.api if advert else "",
        "draining": advert.draining if advert else False,
    }


def _row_of_address(known: StaticAddress) -> dict[str, Any]:
    state = PeerState.FOUND if known.refused_at is None else PeerState.REFUSED
    return unlinked_row(known.address, "static", state, known.why or "being dialled")


def unlinked_row(address: Address, source: str, state: PeerState, why: str, peer: str = "") -> dict[str, Any]:
    """A row for who was never linked with: only an address, and perhaps an id, is known."""
    return {
        "peer": peer,
        "name": str(address),
        "state": state.value,
        "why": why,
        "addresses": [{"host": address.host, "port": address.port, "source": source}],
        "version": "",
        "protocol": "",
        "incarnation": 0,
        "first_seen_s": None,
        "last_seen_s": None,
        "since_s": None,
        "capability": None,
        "holdings": [],
        "models": [],
        "sessions": 0,
        "api": "",
        "draining": False,
    }
