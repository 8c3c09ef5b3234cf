"""The state of one other peer, as this peer sees it: a pure state machine, events in and commands out.

It decides when the peer is ALIVE, SUSPECT or DEAD, and when to dial the peer. A report from a source (mDNS, the static list, other
peers) is only a hint: a peer becomes ALIVE only by an authenticated link.

House rules of this file: no I/O and no clock. `TRANSITIONS` lists the events that may occur in each state; the diagram in
`docs/state-machines.md` is generated from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from meshd.agents.machine import Machine, Transition
from meshd.agents.membership.adverts.encoding import merge
from meshd.agents.membership.peer_events import (
    LINKED,
    Command,
    Dial,
    DialFailed,
    Event,
    FetchPeerProfile,
    GoodbyeReceived,
    HandshakeRefused,
    HeartbeatMissed,
    HeartbeatReceived,
    LinkDown,
    LinkUp,
    PeerState,
    ProfileReceived,
    PublishChange,
    RetentionExpired,
    StatusReceived,
    StopDialling,
)
from meshd.agents.membership.sources import PeerFound, PeerWithdrawn
from meshd.types import Advert, PeerId, Profile, Status
from meshd.values import Address

MAX_ADDRESSES = 16
"""Maximum number of addresses that are kept of one peer."""
RETENTION_S: Mapping[PeerState, float] = {
    PeerState.FOUND: 60.0,
    PeerState.UNREACHED: 120.0,
    PeerState.DEAD: 600.0,
    PeerState.REFUSED: 120.0,
    PeerState.LEFT: 60.0,
}
"""Seconds for which a peer without a link stays in the table after the last event that shows that it exists.

A report of a source shows that only when it is new: anyone on the LAN can repeat one. A REFUSED peer that is still there is refused
again at each dial, twice a minute.
"""
_MAX_PAST_INCARNATIONS = 4
"""How many earlier incarnations are remembered. If one of them comes back, two devices use the same identity."""
_TWIN = "two devices use its identity: a state folder was copied"
_SILENT = "silent"


@dataclass(frozen=True, slots=True)
class KnownAddress:
    """An address of a peer, and the source that reported it; the source is `link` for the address of a link."""

    address: Address
    source: str


@dataclass(slots=True, kw_only=True)
class Peer(Machine[Event, Command]):
    """One peer's state and facts. Only `handle` changes them."""

    id: PeerId
    now: float = field(compare=False)
    """Time of the event that is being handled. `PeerTable` sets it before each `handle`."""
    state: PeerState = PeerState.UNKNOWN
    first_seen: float = field(init=False)
    last_seen: float = field(init=False)
    since: float = field(init=False)
    """When the peer entered its state."""
    why: str = ""
    """Reason of the state; for a linked peer, a problem with the peer, or empty."""
    hint: str = ""
    """What the user can do about `why`; empty if that is not known."""
    ahead_s: float | None = None
    """By how much the peer's clock is ahead of this peer's. None: unknown."""
    name: str = ""
    version: str = ""
    protocol: str = ""
    load: int = 0
    """Number of its sessions by the source that found it. A linked peer's status is more exact."""
    incarnation: int = 0
    past: tuple[int, ...] = ()
    """Its earlier incarnations, oldest first."""
    addresses: tuple[KnownAddress, ...] = ()
    profile: Profile | None = None
    profile_hash: str = ""
    status: Status | None = None
    """The newest status of the present incarnation."""
    advert: Advert | None = None
    """`profile` and `status` together. None while one of them is missing."""

    def __post_init__(self) -> None:
        self.first_seen = self.last_seen = self.since = self.now

    @property
    def linked(self) -> bool:
        return self.state in LINKED

    @property
    def is_over(self) -> bool:
        """Whether the peer's retention time has passed at `now`, so that the table drops the peer."""
        return not self.linked and self.now - max(self.last_seen, self.since) > RETENTION_S[self.state]

    def title(self) -> str:
        return f"peer {self.id}"

    def validate(self) -> None:
        if len(self.addresses) > MAX_ADDRESSES or len(self.past) > _MAX_PAST_INCARNATIONS:
            raise AssertionError("more is remembered than allowed")
        if not self.first_seen <= min(self.last_seen, self.since) <= max(self.last_seen, self.since) <= self.now:
            raise AssertionError("times are out of order")
        if self.advert is not None and self.advert.incarnation != self.incarnation:
            raise AssertionError("the advert is of another incarnation")
        if self.why not in {PeerState.ALIVE: ("", _TWIN), PeerState.SUSPECT: (_SILENT,)}.get(self.state, (self.why,)):
            raise AssertionError(f"unexpected reason in state {self.state.value}: {self.why}")

    def _enter(self, state: PeerState, why: str = "", *, hint: str = "", news: bool = False) -> list[Command]:
        """Set the state and its reason. Returns: a PublishChange if one of them has changed, or if the advert has (`news`)."""
        was, was_why = self.state, self.why
        if state is not was:
            self.since = self.now
        self.state, self.why, self.hint = state, why, hint
        return [PublishChange(self.id, state, was, why)] if news or (state, why) != (was, was_why) else []

    def _merge(self) -> None:
        """Build the advert anew. Until a changed profile has been fetched, the earlier one stays in use."""
        self.advert = None
        if self.profile is not None and self.status is not None:
            self.advert = merge(self.id, self.name, self.version, self.incarnation, self.profile, self.status)

    def _dial(self) -> list[Command]:
        return [Dial(self.id, tuple(known.address for known in self.addresses))] if self.addresses else []

    def _note_addresses(self, event: PeerFound) -> None:
        """Record the addresses from a source, in place of its earlier ones. Hints of other peers come last."""
        self.protocol = event.protocol
        named = [KnownAddress(Address(host, event.port), event.source) for host in event.addresses]
        others = [known for known in self.addresses if known.source != event.source]
        self.addresses = tuple(sorted([*named, *others], key=lambda known: known.source == "gossip")[:MAX_ADDRESSES])

    def _note_link_address(self, address: Address | None) -> None:
        """Record the address of the latest link, after the addresses from sources. Removes the address of an earlier link."""
        known = [each for each in self.addresses if each.source != "link"]
        if address is not None and all(each.address != address for each in known):
            known = [*known[: MAX_ADDRESSES - 1], KnownAddress(address, "link")]
        self.addresses = tuple(known)


def _found(peer: Peer, event: PeerFound) -> list[Command]:
    peer._note_addresses(event)
    peer.name = event.name or peer.name
    peer.version = event.version or peer.version
    peer.load = event.load
    changes = peer._enter(PeerState.FOUND) if peer.state in (PeerState.UNKNOWN, PeerState.LEFT) else []
    return [*peer._dial(), *changes]


def _found_though_linked(peer: Peer, event: PeerFound) -> list[Command]:
    """Record the addresses only: the name and versions from the link are more reliable than those in a hint."""
    protocol = peer.protocol
    peer._note_addresses(event)
    peer.protocol = protocol or peer.protocol
    return []


def _withdrawn(peer: Peer, event: PeerWithdrawn) -> list[Command]:
    peer.addresses = tuple(known for known in peer.addresses if known.source != event.source)
    return []


def _withdrawn_before_a_link(peer: Peer, event: PeerWithdrawn) -> list[Command]:
    _withdrawn(peer, event)
    return [StopDialling(peer.id), *peer._enter(PeerState.LEFT)]


def _link_up(peer: Peer, event: LinkUp) -> list[Command]:
    """Enter ALIVE. A new incarnation starts without a status, but its profile is likely to be the same.

    If an earlier incarnation comes back, that is not a restart: two devices use the same identity.
    """
    why = _TWIN if event.incarnation in peer.past else ""
    outdated = None
    if event.incarnation != peer.incarnation:
        if peer.incarnation:
            peer.past = (*peer.past, peer.incarnation)[-_MAX_PAST_INCARNATIONS:]
        outdated, peer.advert, peer.status = peer.advert, None, None
    peer.name, peer.version, peer.incarnation = event.name, event.version, event.incarnation
    peer.protocol = event.protocol or peer.protocol
    peer._note_link_address(event.dialled)
    peer.last_seen = peer.now
    return peer._enter(PeerState.ALIVE, why, news=outdated is not None)


def _link_down(peer: Peer, event: LinkDown) -> list[Command]:
    return [*peer._dial(), *peer._enter(PeerState.DEAD, event.reason)]


def _status(peer: Peer, event: StatusReceived) -> list[Command]:
    """Record a status that is newer. It counts as a sign of life even if it is not."""
    peer.last_seen = peer.now
    newer = peer.status is None or event.status.revision > peer.status.revision
    if newer:
        peer.status = event.status
        peer.ahead_s = event.ahead_s
        peer._merge()
    missing = peer.status is not None and peer.status.profile != peer.profile_hash
    fetch: list[Command] = [FetchPeerProfile(peer.id, peer.status.profile)] if missing and peer.status is not None else []
    news = newer and peer.advert is not None
    if peer.state is PeerState.SUSPECT:
        return [*fetch, *peer._enter(PeerState.ALIVE, news=news)]
    return [*fetch, *peer._enter(peer.state, peer.why, news=news)]


def _profile(peer: Peer, event: ProfileReceived) -> list[Command]:
    peer.last_seen = peer.now
    peer.profile, peer.profile_hash = event.profile, event.hash
    peer._merge()
    return peer._enter(peer.state, peer.why, news=peer.advert is not None)


def _heartbeat(peer: Peer, event: HeartbeatReceived) -> list[Command]:
    peer.last_seen = peer.now
    return peer._enter(PeerState.ALIVE) if peer.state is PeerState.SUSPECT else []


def _silent(peer: Peer, event: HeartbeatMissed) -> list[Command]:
    return peer._enter(PeerState.SUSPECT, _SILENT)


def _goodbye(peer: Peer, event: GoodbyeReceived) -> list[Command]:
    stop: list[Command] = [StopDialling(peer.id)] if peer.linked else []
    return [*stop, *peer._enter(PeerState.LEFT, event.reason)]


def _not_reached(peer: Peer, event: DialFailed | LinkDown) -> list[Command]:
    """Stay in the state, and record why the peer can't be reached."""
    return peer._enter(peer.state, event.reason, hint=event.hint if isinstance(event, DialFailed) else "")


def _unreached(peer: Peer, event: DialFailed) -> list[Command]:
    return peer._enter(PeerState.UNREACHED, event.reason, hint=event.hint)


def _refused(peer: Peer, event: HandshakeRefused) -> list[Command]:
    peer.last_seen = peer.now
    peer.name = event.name or peer.name
    if event.address.port:
        peer._note_link_address(event.address)
    dial = peer._dial() if peer.state is not PeerState.REFUSED else []
    return [*dial, *peer._enter(PeerState.REFUSED, event.reason, hint=event.hint)]


def _expired(peer: Peer, event: RetentionExpired) -> list[Command]:
    return [StopDialling(peer.id), *peer._enter(PeerState.UNKNOWN)]


def _ignore(peer: Peer, event: Event) -> list[Command]:
    return []


_ignored = Transition(_ignore)
_is_found = Transition(_found, (PeerState.FOUND,))
_is_withdrawn = Transition(_withdrawn_before_a_link, (PeerState.LEFT,))
_comes_up = Transition(_link_up, (PeerState.ALIVE,))
_breaks = Transition(_link_down, (PeerState.DEAD,))
_leaves = Transition(_goodbye, (PeerState.LEFT,))
_is_refused = Transition(_refused, (PeerState.REFUSED,))
_is_unreached = Transition(_unreached, (PeerState.UNREACHED,))
_is_forgotten = Transition(_expired, (PeerState.UNKNOWN,))

TRANSITIONS: dict[tuple[Enum, type[Any]], Transition] = {
    (PeerState.UNKNOWN, PeerFound): _is_found,
    (PeerState.UNKNOWN, PeerWithdrawn): _ignored,
    (PeerState.UNKNOWN, LinkUp): _comes_up,
    (PeerState.UNKNOWN, DialFailed): _ignored,
    (PeerState.UNKNOWN, HandshakeRefused): _is_refused,
    (PeerState.FOUND, PeerFound): Transition(_found),
    (PeerState.FOUND, PeerWithdrawn): _is_withdrawn,
    (PeerState.FOUND, LinkUp): _comes_up,
    (PeerState.FOUND, DialFailed): _is_unreached,
    (PeerState.FOUND, HandshakeRefused): _is_refused,
    (PeerState.FOUND, RetentionExpired): _is_forgotten,
    (PeerState.UNREACHED, PeerFound): Transition(_found),
    (PeerState.UNREACHED, PeerWithdrawn): _is_withdrawn,
    (PeerState.UNREACHED, LinkUp): _comes_up,
    (PeerState.UNREACHED, DialFailed): Transition(_not_reached),
    (PeerState.UNREACHED, HandshakeRefused): _is_refused,
    (PeerState.UNREACHED, RetentionExpired): _is_forgotten,
    (PeerState.ALIVE, PeerFound): Transition(_found_though_linked),
    (PeerState.ALIVE, PeerWithdrawn): Transition(_withdrawn),
    (PeerState.ALIVE, LinkUp): Transition(_link_up),
    (PeerState.ALIVE, LinkDown): _breaks,
    (PeerState.ALIVE, DialFailed): _ignored,
    (PeerState.ALIVE, HandshakeRefused): _ignored,
    (PeerState.ALIVE, StatusReceived): Transition(_status),
    (PeerState.ALIVE, ProfileReceived): Transition(_profile),
    (PeerState.ALIVE, HeartbeatReceived): Transition(_heartbeat),
    (PeerState.ALIVE, HeartbeatMissed): Transition(_silent, (PeerState.SUSPECT,)),
    (PeerState.ALIVE, GoodbyeReceived): _leaves,
    (PeerState.SUSPECT, PeerFound): Transition(_found_though_linked),
    (PeerState.SUSPECT, PeerWithdrawn): Transition(_withdrawn),
    (PeerState.SUSPECT, LinkUp): _comes_up,
    (PeerState.SUSPECT, LinkDown): _breaks,
    (PeerState.SUSPECT, DialFailed): _ignored,
    (PeerState.SUSPECT, HandshakeRefused): _ignored,
    (PeerState.SUSPECT, StatusReceived): Transition(_status, (PeerState.ALIVE,)),
    (PeerState.SUSPECT, ProfileReceived): Transition(_profile),
    (PeerState.SUSPECT, HeartbeatReceived): Transition(_heartbeat, (PeerState.ALIVE,)),
    (PeerState.SUSPECT, HeartbeatMissed): Transition(_silent),
    (PeerState.SUSPECT, GoodbyeReceived): _leaves,
    (PeerState.DEAD, PeerFound): Transition(_found),
    (PeerState.DEAD, PeerWithdrawn): Transition(_withdrawn),
    (PeerState.DEAD, LinkUp): _comes_up,
    (PeerState.DEAD, DialFailed): Transition(_not_reached),
    (PeerState.DEAD, HandshakeRefused): _is_refused,
    (PeerState.DEAD, RetentionExpired): _is_forgotten,
    (PeerState.REFUSED, PeerFound): Transition(_found),
    (PeerState.REFUSED, PeerWithdrawn): _is_withdrawn,
    (PeerState.REFUSED, LinkUp): _comes_up,
    (PeerState.REFUSED, DialFailed): _is_unreached,
    (PeerState.REFUSED, HandshakeRefused): Transition(_refused),
    (PeerState.REFUSED, RetentionExpired): _is_forgotten,
    (PeerState.LEFT, PeerFound): _is_found,
    (PeerState.LEFT, PeerWithdrawn): Transition(_withdrawn),
    (PeerState.LEFT, LinkUp): _comes_up,
    (PeerState.LEFT, DialFailed): Transition(_not_reached),
    (PeerState.LEFT, HandshakeRefused): _is_refused,
    (PeerState.LEFT, RetentionExpired): _is_forgotten,
    # After a goodbye, a few more messages and events of its link may arrive.
    (PeerState.LEFT, LinkDown): Transition(_not_reached),
    (PeerState.LEFT, StatusReceived): _ignored,
    (PeerState.LEFT, ProfileReceived): _ignored,
    (PeerState.LEFT, HeartbeatReceived): Transition(_heartbeat),
    (PeerState.LEFT, HeartbeatMissed): _ignored,
    (PeerState.LEFT, GoodbyeReceived): Transition(_goodbye),
}
Peer.table = TRANSITIONS
