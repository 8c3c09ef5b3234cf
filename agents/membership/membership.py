"""Passes events to the table of peers, and carries out its commands.

`adverts/` publishes what this peer is and does, and fetches the profiles of other peers.

This module reports a peer's silence to the table (`_report_silence`), and `peer.py` makes the peer SUSPECT. `links/link_table.py`
ends the link of a peer that stays silent, and `peer.py` then makes the peer DEAD.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import DEBUG, INFO, getLogger
from typing import Any

from meshd.agents.budget import TokenBucket
from meshd.agents.links.link_table import LEFT, STOPS
from meshd.agents.links.links import Links
from meshd.agents.links.open import DialOutcome
from meshd.agents.links.probe import LinkProber
from meshd.agents.machine import IllegalTransition
from meshd.agents.membership.adverts.fetcher import ProfileFetcher
from meshd.agents.membership.adverts.gossip import GossipBudget
from meshd.agents.membership.adverts.publisher import Publisher, SelfDescription
from meshd.agents.membership.notices import Notices
from meshd.agents.membership.peer_events import (
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
    StatusReceived,
    StopDialling,
)
from meshd.agents.membership.peer_rows import OTHER_CLUSTER, Trouble, cluster_rows, trouble_of, unlinked_row
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.membership.sources import (
    DuplicateIdentity,
    OtherClusters,
    PeerFound,
    PeerWithdrawn,
    Sighting,
    Source,
    SourceNotice,
)
from meshd.agents.observe.events import LinkRefused, PeerChanged
from meshd.agents.observe.stream import EventStream
from meshd.agents.supervisor import Supervise, unsupervised
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import PROTOCOL_VERSION, Hello, PeerStatus
from meshd.types import Advert, PeerId, Profile
from meshd.values import Address

log = getLogger(__name__)

_SWEEP_S = 0.5
_SUSPECT_S = 1.2
"""Silence after which a peer is SUSPECT: two missed heartbeats. After `Timing.silence_s` (2 s) its link ends."""
_REFUSALS_PER_S, _REFUSALS_AT_ONCE = 1.0, 20
"""Events about refused links. Strangers cause them as often as they like."""
PROTOCOL = ".".join(map(str, PROTOCOL_VERSION))
GOSSIP = "gossip"
"""Source of the addresses that other peers list in their statuses."""


@dataclass(slots=True)
class Membership:
    """Owns the table of peers. `on_advert` is called with every advert of another peer, `on_gone` when a peer's link has ended."""

    description: SelfDescription
    links: Links
    prober: LinkProber
    clock: Clock
    events: EventStream
    on_advert: Callable[[Advert], None]
    on_gone: Callable[[PeerId, str], None]
    link_address: str = ""
    """Set once the sockets are bound, like `publisher.api_address`."""
    table: PeerTable = field(default_factory=PeerTable)
    notices: Notices = field(init=False)
    publisher: Publisher = field(init=False)
    _fetcher: ProfileFetcher = field(init=False)
    _gossip: GossipBudget = field(default_factory=GossipBudget)
    _refusals: TokenBucket = field(default_factory=lambda: TokenBucket(_REFUSALS_PER_S, _REFUSALS_AT_ONCE))
    _dialled: dict[PeerId, set[tuple[Address, str]]] = field(default_factory=dict)
    _troubles: dict[PeerId, Trouble] = field(default_factory=dict)
    """What is wrong with linked peers, as published last."""
    _elsewhere: OtherClusters = field(default_factory=lambda: OtherClusters(source="", peers={}))

    def __post_init__(self) -> None:
        self.notices = Notices(self.clock.monotonic, self.events.publish)
        self.publisher = Publisher(self.description, self.links, self.prober, self.clock, self.notices.add, self.notices.withdraw)
        self._fetcher = ProfileFetcher(self.links, self.clock, self._on_profile, self._on_unusable_profile)

    def register(self) -> None:
        """Register the handlers of messages."""
        self.links.register(PeerStatus, self._on_status)
        self.publisher.register()

    async def run(self, sources: Iterable[Source], supervise: Supervise = unsupervised) -> None:
        """Run the sources, send statuses and check for silent peers. Cancel: the sources announce that this peer leaves."""
        async with asyncio.TaskGroup() as tasks:
            for source in sources:
                tasks.create_task(supervise(f"discovery ({type(source).__name__})", source.run))
            tasks.create_task(supervise("statuses", self.publisher.run))
            tasks.create_task(supervise("profiles of peers", self._fetcher.run))
            tasks.create_task(supervise("membership", self._sweep))

    def changed(self) -> None:
        """Send a new status soon, because its content has changed."""
        self.publisher.changed()

    def own_advert(self) -> Advert:
        """Build this peer's advert from present values."""
        return self.publisher.own_advert()

    def adverts(self) -> list[Advert]:
        """Returns: the adverts of all ALIVE peers, after this peer's own. Plans are made from these adverts."""
        return [self.own_advert(), *self.table.adverts()]

    def suspects(self) -> list[Advert]:
        """Returns: the adverts of SUSPECT peers. These peers get no new work, but their layers do not count as lost yet."""
        return [peer.advert for peer in self.table.linked() if peer.state is PeerState.SUSPECT and peer.advert is not None]

    def name_of(self, peer: PeerId) -> str:
        """Returns: a peer's name, or the beginning of its id if the name is unknown."""
        if peer == self.description.peer:
            return self.description.name
        return self.table.name_of(peer)

    def rows(self) -> list[dict[str, Any]]:
        """Returns: the table's rows, one for each device that was refused a link and is in no row of the table, and one for each
        other cluster on this network."""
        rows = self.table.rows(self.clock.monotonic(), self.description.version, PROTOCOL)
        shown = {row["peer"] for row in rows} | {f"{known['host']}:{known['port']}" for row in rows for known in row["addresses"]}
        # The address of a device that was refused before it said its port has none. A peer with trouble has a row already.
        shown |= {known["host"] for row in rows if row["trouble"] for known in row["addresses"]}
        refused = [
            row
            for row in self.links.refusals()
            if row["address"].removesuffix(":0") not in shown and (row["peer"] or "") not in shown
        ]
        rows += [_refused_row(row["address"], row["peer"] or "", row["reason"]) for row in refused]
        return rows + cluster_rows(self._elsewhere.peers, self._elsewhere.addresses)

    async def probe_links(self) -> None:
        """Measure the links to all peers again, one after another."""
        for peer in self.links.peers():
            await self.prober.probe(peer)
        self.changed()

    def notice(self, message: str, hint: str = "") -> None:
        """Log a message for the user. `meshd status` shows the newest ones."""
        self.notices.add(message, hint)

    def on_sighting(self, sighting: Sighting) -> None:
        """Handle a report from one of the sources of peers, such as mDNS."""
        match sighting:
            case PeerFound() | PeerWithdrawn():
                self._apply(sighting)
            case DuplicateIdentity():
                self.notices.add(
                    f"another daemon at {', '.join(sighting.addresses)} has this peer's identity: its state folder was copied",
                    "remove identity.key from the copy and start it again",
                    about="copy",
                )
            case OtherClusters():
                self._show_other_clusters(sighting)
            case SourceNotice(message="", about=about):
                self.notices.withdraw(about)
            case SourceNotice():
                self.notices.add(sighting.message, sighting.hint, sighting.about)

    def _show_other_clusters(self, others: OtherClusters) -> None:
        before, self._elsewhere = self._elsewhere, others
        for row in cluster_rows(others.peers, others.addresses):
            if row["name"] not in before.peers:
                self.events.publish(PeerChanged(of="", of_name=row["name"], state=row["state"], was="", reason=row["why"]))
        for cluster in before.peers.keys() - others.peers.keys():
            self.events.publish(
                PeerChanged(of="", of_name=cluster, state="forgotten", was=OTHER_CLUSTER, reason="it is not seen any more")
            )
        if not others.peers:
            self.notices.withdraw("clusters")
            return
        several = len(others.peers) > 1
        self.notices.add(
            f"{'other clusters are' if several else 'another cluster is'} on this network: {', '.join(others.peers)}",
            f"to join {'one' if several else 'it'}, type `meshd key join CODE --replace` here and start `meshd up` again; "
            "`meshd key show` on one of its devices prints the CODE",
            about="clusters",
        )

    def on_dialled(self, outcome: DialOutcome) -> None:
        """Record which peer answers at an address, or why there is no link with it."""
        address = Address(*outcome.address)
        if outcome.peer is not None:
            self.table.answered(address, outcome.peer)
        if not outcome.reason:
            return
        if outcome.refused and self._refusals.take(self.clock.monotonic()):
            self.events.publish(LinkRefused(address=str(address), of=outcome.peer or "", reason=outcome.reason, hint=outcome.hint))
        if outcome.peer == self.description.peer:
            self.notices.add(outcome.reason, outcome.hint, about="identity")
        elif outcome.refused and outcome.peer is not None:
            self._apply(HandshakeRefused(outcome.peer, address, outcome.reason, outcome.name, outcome.hint))
            self.notices.add(f"{address.host}: {outcome.reason}", outcome.hint, about=f"refused {outcome.peer}")
        else:
            self._note_static(address, outcome)
            # Without a proof of identity, a refusal says nothing about the peer that a source reported at the address.
            for peer in [peer for peer, dialled in self._dialled.items() if any(known == address for known, _ in dialled)]:
                self._apply(DialFailed(peer, address, outcome.reason, outcome.hint))

    def _note_static(self, address: Address, outcome: DialOutcome) -> None:
        before = self.table.unanswered(address)
        if outcome.refused:
            self._apply(HandshakeRefused(None, address, outcome.reason, hint=outcome.hint))
        else:
            self._apply(DialFailed(None, address, outcome.reason, outcome.hint))
        after = self.table.unanswered(address)
        if before is not None and after is not None and before != after:
            log.warning("no link with %s (--peer): %s", address, outcome.reason)
            state, was = after.state.value, before.state.value
            self.events.publish(PeerChanged(of="", of_name=str(address), state=state, was=was, reason=after.why))

    def on_up(self, peer: PeerId, hello: Hello, address: tuple[str, int]) -> None:
        """Record that a link is up, and send this peer's status over it."""
        dialled = Address(*address)
        version = hello.software.removeprefix("meshd/")
        self._apply(LinkUp(peer, hello.incarnation, hello.name, version, dialled, ".".join(map(str, hello.version))))
        self.publisher.greet(peer)
        self.prober.link_up(peer)

    def on_down(self, peer: PeerId, reason: str) -> None:
        """Record that a link has ended, by a goodbye or by a fault."""
        if reason != STOPS:  # otherwise the end says nothing about the other peer
            left = reason.startswith(LEFT)
            self._apply(GoodbyeReceived(peer, reason) if left else LinkDown(peer, reason))
        self.prober.link_down(peer)
        self._troubles.pop(peer, None)
        self._fetcher.forget(peer)
        self._gossip.forget(peer)
        self.on_gone(peer, reason)

    def _on_status(self, sender: PeerId, message: PeerStatus, payload: memoryview) -> None:
        wall = message.status.wall
        self._apply(StatusReceived(sender, message.status, wall - self.clock.wall() if wall else None))
        self._report_trouble(sender)
        self._report_advert(sender)
        unlinked = {peer: text for peer, text in message.status.neighbours.items() if self._may_be_dialled(peer)}
        for peer, address in self._gossip.choose(sender, unlinked, self.clock.monotonic()):
            self._apply(PeerFound(source=GOSSIP, peer=peer, addresses=(address.host,), port=address.port))

    def _report_trouble(self, peer: PeerId) -> None:
        """Publish what is wrong with a linked peer, if another thing is wrong than before."""
        known = self.table.get(peer)
        if known is None or not known.linked:
            return
        trouble, before = trouble_of(known, self.description.version, PROTOCOL), self._troubles.get(peer, Trouble())
        if trouble.kind != before.kind:
            self._troubles[peer] = trouble
            if trouble.kind:
                log.warning("peer %s (%.8s): %s; %s", known.name, peer, trouble.reason, trouble.hint)
            state = known.state.value
            self.events.publish(PeerChanged(of=peer, of_name=known.name, state=state, was=state, reason=trouble.reason))

    def _may_be_dialled(self, peer: PeerId) -> bool:
        """Whether another peer's hint about `peer` can be of use."""
        known = self.table.get(peer)
        return peer != self.description.peer and (known is None or not (known.linked or known.state is PeerState.REFUSED))

    def _on_profile(self, sender: PeerId, profile_hash: str, profile: Profile) -> None:
        self._apply(ProfileReceived(sender, profile_hash, profile))
        self._report_advert(sender)

    def _report_advert(self, peer: PeerId) -> None:
        known = self.table.get(peer)
        if known is not None and known.linked and known.advert is not None:
            self.on_advert(known.advert)

    def _on_unusable_profile(self, peer: PeerId, why: str) -> None:
        self.notices.add(
            f"{self.name_of(peer)} ({peer:.8}) gets no work from this peer: {why}",
            "install the same version of meshd on both",
            about=f"profile of {peer}",
        )

    def _apply(self, event: Event) -> None:
        try:
            commands = self.table.apply(event, self.clock.monotonic())
        except MeshdError as error:
            self.notice(error.message, error.hint)
            return
        except IllegalTransition:
            log.exception("the table of peers does not allow this event (a bug in meshd); it is dropped")
            return
        self._carry_out(commands, event.source if isinstance(event, PeerFound) else GOSSIP)

    def _carry_out(self, commands: Iterable[Command], source: str) -> None:
        for command in commands:
            match command:
                case Dial(peer, addresses):
                    self._dial(peer, addresses, source)
                case StopDialling(peer):
                    self._forget(peer)
                case FetchPeerProfile(peer, wanted):
                    self._fetcher.fetch(peer, wanted)
                case PublishChange(peer, state, was, why):
                    unknown = PeerState.UNKNOWN
                    self._publish_change(
                        peer, "forgotten" if state is unknown else state.value, "" if was is unknown else was.value, why
                    )

    def _dial(self, peer: PeerId | None, addresses: Iterable[Address], source: str) -> None:
        for address in addresses:
            self.links.connect(address.host, address.port, source)
            if peer is not None:
                self._dialled.setdefault(peer, set()).add((address, source))

    def _forget(self, peer: PeerId) -> None:
        for address, source in self._dialled.pop(peer, set()):
            self.links.forget(address.host, address.port, source)

    def _publish_change(self, peer: PeerId, state: str, was: str, why: str) -> None:
        if was == PeerState.REFUSED.value != state:
            self.notices.withdraw(f"refused {peer}")
        if state != was:
            # Hints about peers that were never linked cost their sender nothing, so they must not fill the log.
            known = self.table.get(peer)
            level = INFO if known is not None and known.incarnation else DEBUG
            log.log(level, "peer %s (%.8s) is %s%s", self.name_of(peer), peer, state, f": {why}" if why else "")
        if state != was or why:  # otherwise it is a new status, every 5 s
            reason = why or self._troubles.get(peer, Trouble()).reason
            self.events.publish(PeerChanged(of=peer, of_name=self.name_of(peer), state=state, was=was, reason=reason))

    def _report_silence(self) -> None:
        """Report to the table which linked peers are silent, and which SUSPECT peers were heard again."""
        for known in self.table.linked():
            if self.links.silence_s(known.id) > _SUSPECT_S:
                self._apply(HeartbeatMissed(known.id))
            elif known.state is PeerState.SUSPECT:
                self._apply(HeartbeatReceived(known.id))

    async def _sweep(self) -> None:
        while True:
            await self.clock.sleep(_SWEEP_S)
            self._report_silence()
            self._carry_out(self.table.expire(self.clock.monotonic()), GOSSIP)


def _refused_row(address: str, peer: str, why: str) -> dict[str, Any]:
    host, colon, port = address.rpartition(":")
    known = Address(host, int(port)) if colon and port.isdecimal() else Address(address, 0)
    return unlinked_row(known, "link", PeerState.REFUSED, why, peer)
