"""Passes events to the table of peers, carries out its commands, and sends this peer's adverts.

Every peer keeps the newest advert of every other peer. A changed advert is sent to all peers within a tenth of a second. It is also
repeated every few seconds, so that values that drift (free memory, measured times) stay current.

This module reports a peer's silence to the table (`_report_silence`), and `peer.py` makes the peer SUSPECT. `links/link_table.py`
ends the link of a peer that stays silent, and `peer.py` then makes the peer DEAD.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from logging import getLogger
from typing import Any

from meshd.agents.links.link_table import LEFT
from meshd.agents.links.links import Links
from meshd.agents.links.probe import LinkProber
from meshd.agents.links.rpc import try_send
from meshd.agents.machine import IllegalTransition
from meshd.agents.membership.peer_events import (
    AdvertReceived,
    Dial,
    Event,
    GoodbyeReceived,
    HeartbeatMissed,
    HeartbeatReceived,
    LinkDown,
    LinkUp,
    PeerState,
    PublishChange,
    StopDialling,
)
from meshd.agents.membership.peer_rows import unlinked_row
from meshd.agents.membership.peer_table import PeerTable
from meshd.agents.membership.sources import DuplicateIdentity, PeerFound, PeerWithdrawn, Sighting, Source, SourceNotice
from meshd.agents.observe.events import EventBus
from meshd.agents.supervisor import Supervise, unsupervised
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import Advertise, Hello
from meshd.types import Advert, Capability, Holding, ModelCard, PeerId, is_peer_id
from meshd.values import Address, parse_address

log = getLogger(__name__)

_GATHER_S = 0.05
"""Changes that occur within this time are sent in one advert."""
_REPEAT_S = 5.0
_SWEEP_S = 0.5
_SUSPECT_S = 1.2
"""Silence after which a peer is SUSPECT: two missed heartbeats. After `Timing.silence_s` (2 s) its link ends."""
_NOTICES = 20
_MAX_NEIGHBOURS = 64
GOSSIP = "gossip"
"""Source of the addresses that other peers list in their adverts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfDescription:
    """The content of this peer's advert. The functions return present values."""

    peer: PeerId
    name: str
    incarnation: int
    version: str
    capability: Callable[[], Capability]
    holdings: Callable[[], tuple[Holding, ...]]
    models: Callable[[], tuple[ModelCard, ...]]
    sessions: Callable[[], int]
    draining: Callable[[], bool]


@dataclass(slots=True)
class Membership:
    """Owns the table of peers. `on_advert` is called with every advert of another peer, `on_gone` when a peer's link has ended."""

    description: SelfDescription
    links: Links
    prober: LinkProber
    clock: Clock
    bus: EventBus
    on_advert: Callable[[Advert], None]
    on_gone: Callable[[PeerId, str], None]
    link_address: str = ""
    api_address: str = ""
    """Set, like `link_address`, once the sockets are bound."""
    table: PeerTable = field(default_factory=PeerTable)
    notices: dict[str, str] = field(default_factory=dict)
    """Messages for the user, each with a hint on how to fix it."""
    _dialled: dict[PeerId, set[tuple[Address, str]]] = field(default_factory=dict)
    _revision: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def register(self) -> None:
        """Register the handler of ADVERTISE."""
        self.links.register(Advertise, self._on_advertise)

    async def run(self, sources: Iterable[Source], supervise: Supervise = unsupervised) -> None:
        """Run the sources, send adverts and check for silent peers. Cancel: the sources announce that this peer leaves."""
        async with asyncio.TaskGroup() as tasks:
            for source in sources:
                tasks.create_task(supervise(f"discovery ({type(source).__name__})", source.run))
            tasks.create_task(supervise("adverts", self._publish))
            tasks.create_task(supervise("membership", self._sweep))

    def changed(self) -> None:
        """Send a new advert soon, because its content has changed."""
        self._changed.set()

    def own_advert(self) -> Advert:
        """Build this peer's advert from present values."""
        return Advert(
            peer=self.description.peer,
            name=self.description.name,
            incarnation=self.description.incarnation,
            revision=self._revision,
            version=self.description.version,
            capability=self.description.capability(),
            holdings=self.description.holdings(),
            models=self.description.models(),
            links=self.prober.stats(),
            neighbours=self._neighbours(),
            sessions=self.description.sessions(),
            api=self.api_address,
            draining=self.description.draining(),
        )

    def _neighbours(self) -> dict[PeerId, str]:
        met = {peer: self.links.addresses(peer) for peer in self.links.peers()[:_MAX_NEIGHBOURS]}
        return {peer: addresses[0] for peer, addresses in met.items() if addresses}

    async def _publish(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_REPEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            else:
                await self.clock.sleep(_GATHER_S)
            self._changed.clear()
            self._revision += 1
            advert = self.own_advert()
            for peer in self.links.peers():
                try_send(self.links.send, peer, Advertise(advert=advert))

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
        """Returns: the table's rows, and one for each device that was refused a link and is in no row of the table."""
        rows = self.table.rows(self.clock.monotonic())
        shown = {row["peer"] for row in rows} | {f"{known['host']}:{known['port']}" for row in rows for known in row["addresses"]}
        refused = [row for row in self.links.refusals() if row["address"] not in shown and (row["peer"] or "") not in shown]
        return rows + [_refused_row(row["address"], row["peer"] or "", row["reason"]) for row in refused]

    async def probe_links(self) -> None:
        """Measure the links to all peers again, one after another."""
        for peer in self.links.peers():
            await self.prober.probe(peer)
        self.changed()

    def notice(self, message: str, hint: str = "") -> None:
        """Log a message for the user. `meshd status` shows the newest ones."""
        if message not in self.notices:
            log.warning("%s%s", message, f"; {hint}" if hint else "")
        self.notices.pop(message, None)
        self.notices[message] = hint
        while len(self.notices) > _NOTICES:
            del self.notices[next(iter(self.notices))]

    def on_sighting(self, sighting: Sighting) -> None:
        """Handle a report from one of the sources of peers, such as mDNS."""
        match sighting:
            case PeerFound() | PeerWithdrawn():
                self._apply(sighting)
            case DuplicateIdentity():
                self.notice(
                    f"another daemon at {', '.join(sighting.addresses)} has this peer's identity: its state folder was copied",
                    "remove identity.key from the copy and start it again",
                )
            case SourceNotice():
                self.notice(sighting.message, sighting.hint)

    def on_up(self, peer: PeerId, hello: Hello, address: tuple[str, int]) -> None:
        """Record that a link is up, and send this peer's advert over it."""
        dialled = Address(*address)
        version = hello.software.removeprefix("meshd/")
        self._apply(LinkUp(peer, hello.incarnation, hello.name, version, dialled))
        try_send(self.links.send, peer, Advertise(advert=self.own_advert()))
        self.prober.link_up(peer)

    def on_down(self, peer: PeerId, reason: str) -> None:
        """Record that a link has ended, by a goodbye or by a fault."""
        left = reason.startswith(LEFT)
        self._apply(GoodbyeReceived(peer, reason) if left else LinkDown(peer, reason))
        self.prober.link_down(peer)
        self.on_gone(peer, reason)

    def _on_advertise(self, sender: PeerId, message: Advertise, payload: memoryview) -> None:
        if message.advert.peer != sender:
            return
        self._apply(AdvertReceived(message.advert))
        self.on_advert(message.advert)
        for peer, address in islice(message.advert.neighbours.items(), _MAX_NEIGHBOURS):
            self._hear_of(peer, address)

    def _hear_of(self, peer: PeerId, address: str) -> None:
        """Handle an entry of `neighbours` in another peer's advert, as a sighting by the source `GOSSIP`."""
        known = self.table.get(peer)
        if peer == self.description.peer or (known is not None and (known.linked or known.state is PeerState.REFUSED)):
            return
        try:
            found = parse_address(address, 0)
        except ValueError:
            return
        if is_peer_id(peer) and found.port:
            self._apply(PeerFound(source=GOSSIP, peer=peer, addresses=(found.host,), port=found.port))

    def _apply(self, event: Event) -> None:
        try:
            commands = self.table.apply(event, self.clock.monotonic())
        except MeshdError as error:
            self.notice(error.message, error.hint)
            return
        except IllegalTransition:
            log.exception("the table of peers does not allow this event (a bug in meshd); it is dropped")
            return
        for command in commands:
            match command:
                case Dial(peer, addresses):
                    self._dial(peer, addresses, event.source if isinstance(event, PeerFound) else GOSSIP)
                case StopDialling(peer):
                    self._forget(peer)
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
        if state != was:
            log.info("peer %s (%.8s) is %s%s", self.name_of(peer), peer, state, f": {why}" if why else "")
        self.bus.publish("peer", peer=peer, name=self.name_of(peer), state=state, was=was, reason=why)

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
            for command in self.table.expire(self.clock.monotonic()):
                if isinstance(command, StopDialling):
                    self._forget(command.peer)


def _refused_row(address: str, peer: str, why: str) -> dict[str, Any]:
    host, colon, port = address.rpartition(":")
    known = Address(host, int(port)) if colon and port.isdecimal() else Address(address, 0)
    return unlinked_row(known, "link", PeerState.REFUSED, why, peer)
