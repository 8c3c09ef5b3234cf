"""A peer's part in a fleet: publishes its presence, believes that of others, publishes telemetry and events, passes on jobs.

A presence is only a hint, like a record of mDNS: it says where to dial, and the link proves who answers. Every peer of a fleet sees
every other one, so both sides dial. If only one can reach the other, its link serves both; if neither can, both say so.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger

import msgspec

from meshd.agents.budget import TokenBucket
from meshd.agents.membership.fleet.believed import MAX_AGE_S, SILENT_S, BelievedPresences, Refused
from meshd.agents.membership.fleet.broker import Broker, BrokerSettings
from meshd.agents.membership.fleet.home_assistant import discovery_payload, discovery_topic
from meshd.agents.membership.fleet.jobs import JobServer
from meshd.agents.membership.fleet.presence import MAX_ADDRESSES, MAX_UNREACHED, Presence, sign_presence
from meshd.agents.membership.fleet.telemetry import Meter, event_line
from meshd.agents.membership.fleet.topics import Topics
from meshd.agents.membership.interfaces import is_unicast
from meshd.agents.membership.sources import DuplicateIdentity, OnSighting, PeerFound, PeerWithdrawn, SourceNotice
from meshd.agents.observe.stream import EventStream
from meshd.clock import Clock
from meshd.protocol.identity import Identity
from meshd.protocol.statement import StatementChecker
from meshd.types import PeerId
from meshd.values import BrokerUrl

log = getLogger(__name__)

SOURCE = "mqtt"
REPEAT_S = 30.0
"""A presence is published again at least so often, well within `MAX_AGE_S`."""
_CHECK_S = 1.0
_URGENT_S, _LOAD_S = 3.0, 10.0
"""Shortest time between two presences, if addresses, unreached peers or the cluster key have changed, and if only the load has."""
_PATIENCE_S = 10.0
"""A peer without a link for so long can't be reached, even if no dial has failed."""
_EVENTS_PER_S, _EVENTS_AT_ONCE = 20.0, 100
"""Events that are published. Further ones are left out."""
_TROUBLE_S = 3.0
"""A connection to the broker that is back sooner causes no notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """The user's choices."""

    url: BrokerUrl
    ca_file: str = ""
    telemetry_s: float = 10.0
    """Interval of telemetry in seconds. 0: neither telemetry nor events."""
    home_assistant: str = ""
    """Home Assistant's discovery prefix. Empty: no discovery messages are published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """What a fleet needs to know of this peer."""

    name: str
    port: int
    protocol: str
    version: str
    addresses: Callable[[], Sequence[str]]
    """IP addresses at which links are accepted."""
    load: Callable[[], int]
    linked: Callable[[], Collection[PeerId]]
    unreached: Callable[[], Mapping[PeerId, str]]
    """Peers that were dialled in vain, and why."""
    belongs: Callable[[PeerId], bool]
    """Whether a peer belongs to the cluster, also with a certificate of another key of it: see `StatementChecker.belongs`."""
    tokens: Callable[[], int]
    """Number of tokens of the answers that this peer has coordinated."""


MakeJobs = Callable[[Broker, Topics], JobServer]


class Fleet:
    """The source of peers that are at the same MQTT broker."""

    def __init__(
        self,
        settings: FleetSettings,
        identity: Callable[[], Identity],
        view: FleetView,
        events: EventStream,
        on_sighting: OnSighting,
        clock: Clock,
        make_jobs: MakeJobs | None = None,
    ) -> None:
        """`identity` returns this peer's present identity: its cluster key changes with a rotation."""
        self._settings = settings
        self._identity = identity
        self._authority = identity().key.issuer.public
        """The authority under which the known presences were believed."""
        self._me = identity().peer
        self._view = view
        self._events = events
        self._on_sighting = on_sighting
        self._clock = clock
        self.topics = Topics(identity().fingerprint)
        self.believed = BelievedPresences(self.topics.cluster, StatementChecker(identity, view.belongs))
        subscriptions = (self.topics.presence("+"), *((self.topics.jobs(self._me),) if make_jobs else ()))
        broker = BrokerSettings(settings.url, settings.ca_file, f"meshd-{self._me[:16]}", subscriptions)
        self.broker = Broker(broker, self, clock)
        self.jobs = make_jobs(self.broker, self.topics) if make_jobs else None
        self._meter = Meter(view.tokens, lambda: len(view.linked()), view.load)
        self._started_ms = self._now_ms()
        self._since = 0
        self._own: deque[int] = deque(maxlen=64)
        """`since` of this peer's latest connections."""
        self._last_at = 0
        self._published: Presence | None = None
        self._published_under = b""
        """The authority of the certificate that was published with it."""
        self._up_at = 0.0
        """When the present connection was made, in monotonic time."""
        self._down_at: float | None = clock.monotonic()
        self._unlinked_since: dict[PeerId, float] = {}
        """Peers of the fleet without a link -> since when, in monotonic time."""
        self._noticed: set[PeerId] = set()
        """Peers of which this peer says that neither can reach the other."""

    async def run(self) -> None:
        """Take part in the fleet. Cancel: publishes that this peer leaves."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.broker.run())
            tasks.create_task(self._watch())
            if self.jobs is not None:
                tasks.create_task(self.jobs.run())

    def about(self) -> dict[str, object]:
        """Describe the connection to the broker, and how many presences were believed and refused."""
        return {
            "broker": str(self._settings.url),
            "connected": self.broker.up,
            "peers": len(self.believed),
            "refused": dict(self.believed.refused),
            "too_long": self.broker.skipped,
            "jobs": len(self.jobs) if self.jobs is not None else 0,
            "jobs_refused": dict(self.jobs.refused) if self.jobs is not None else {},
        }

    def will(self) -> tuple[str, bytes]:
        """Begin a new connection. Returns: its last will, which names the connection by its `since`."""
        self._since = self._next_at()
        self._own.append(self._since)
        self._published = None
        return self.topics.presence(self._me), self._sign(leaves=True, at=self._since)

    async def connected(self) -> None:
        """Publish presence, telemetry and events until the connection ends."""
        await self._publish_presence()
        log.info("at the MQTT broker %s", self._settings.url)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_presence())
            if self._settings.telemetry_s:
                tasks.create_task(self._publish_telemetry())
                tasks.create_task(self._publish_events())

    def farewell(self) -> Sequence[tuple[str, bytes, bool]]:
        """Returns: that this peer leaves, to those who listen now; nothing of it stays at the broker."""
        presence = self.topics.presence(self._me)
        messages = [(presence, self._sign(leaves=True, at=self._next_at()), False), (presence, b"", True)]
        if self._announces_sensors:
            messages.append((discovery_topic(self._settings.home_assistant, self._me), b"", True))
        return messages

    def on_trouble(self, reason: str) -> None:
        """Note why there is no connection; with an empty reason, that there is one."""
        now = self._clock.monotonic()
        if not reason:
            self._up_at, self._down_at = now, None
            self._notice("mqtt", "")
            return
        self._down_at = now if self._down_at is None else self._down_at
        log.debug("no connection to the MQTT broker: %s", reason)
        if now - self._down_at >= _TROUBLE_S or not self._since or len(self._own) == 1:
            self._notice(
                "mqtt",
                f"there is no connection to the MQTT broker {self._settings.url}: {reason}",
                "linked peers work without it; check its address, user, password and certificate (--mqtt, --mqtt-ca)",
            )

    def on_message(self, topic: str, payload: bytes) -> None:
        """Handle a message of the broker."""
        if (peer := self.topics.peer_of_presence(topic)) is not None:
            if payload:
                self._hear(peer, payload)
        elif self.jobs is not None and (job := self.topics.job_of(topic, self._me)) is not None:
            self.jobs.on_message(job, payload, self._since)

    def _hear(self, peer: PeerId, payload: bytes) -> None:
        heard = self.believed.hear(peer, payload, self._clock.wall(), self._clock.monotonic())
        if isinstance(heard, Refused):
            if heard.clock:
                self._notice(
                    "mqtt clock",
                    f"the clock of peer {peer:.8} is more than {MAX_AGE_S / 60:.0f} minutes ahead of this device's, "
                    "so its presence at the MQTT broker is not believed",
                    "set the clocks of both devices, such as by NTP",
                )
        elif peer == self._me:
            self._check_own(heard)
        elif heard.leaves:
            self._on_sighting(PeerWithdrawn(source=SOURCE, peer=peer))
        elif addresses := self._usable(heard.addresses):
            self._on_sighting(
                PeerFound(
                    source=SOURCE,
                    peer=peer,
                    addresses=addresses,
                    port=heard.port,
                    name=heard.name,
                    cluster=heard.cluster,
                    protocol=heard.protocol,
                    version=heard.version,
                    load=heard.load,
                )
            )

    def _check_own(self, presence: Presence) -> None:
        """Report a daemon that uses a copy of this peer's identity: it signs now, for a connection that is not this peer's."""
        if presence.at > self._started_ms and presence.since not in self._own:
            addresses = presence.addresses
            self._on_sighting(DuplicateIdentity(source=SOURCE, peer=self._me, addresses=addresses, port=presence.port))

    def _usable(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """Returns: the addresses that can be dialled from here. Loopback is one only for peers that are on loopback themselves."""
        local = all(_is_loopback(address) for address in self._view.addresses())
        return tuple(address for address in addresses if is_unicast(address) and (local or not _is_loopback(address)))

    async def _publish_presence(self) -> None:
        presence = self._presence(leaves=False, at=self._next_at())
        identity = self._identity()
        await self.broker.publish(self.topics.presence(self._me), sign_presence(identity, presence), retain=True)
        self._published, self._published_under = presence, identity.key.issuer.public

    async def _keep_presence(self) -> None:
        """Publish the presence when it has changed, and at least every `REPEAT_S`, less a part that spreads the peers' load."""
        published = self._clock.monotonic()
        while True:
            await self._clock.sleep(_CHECK_S)
            age_s = self._clock.monotonic() - published
            if age_s >= self._due_s():
                await self._publish_presence()
                published = self._clock.monotonic()

    def _due_s(self) -> float:
        """Returns: after how many seconds the present state is to be published."""
        before = self._published
        if before is None:
            return 0.0
        now = self._presence(leaves=False, at=before.at)
        certified = self._identity().key.issuer.public == self._published_under
        if not certified or (now.addresses, now.unreached) != (before.addresses, before.unreached):
            return _URGENT_S
        return _LOAD_S if now.load != before.load else REPEAT_S * (0.7 + 0.3 * self._clock.random_bytes(1)[0] / 256)

    async def _publish_telemetry(self) -> None:
        """Publish measurements, and before the first ones how Home Assistant can show them."""
        announced: set[str] = set()
        while True:
            measured = await asyncio.to_thread(self._meter.measure, self._clock.monotonic(), self._clock.wall())
            if self._announces_sensors and not announced >= measured.keys():
                announced |= measured.keys()
                view, prefix = self._view, self._settings.home_assistant
                expire_s = max(30.0, 3 * self._settings.telemetry_s)
                payload = discovery_payload(self.topics, self._me, view.name, view.version, announced, expire_s)
                await self.broker.publish(discovery_topic(prefix, self._me), payload, retain=True)
            await self.broker.publish(self.topics.telemetry(self._me), msgspec.json.encode(measured))
            await self._clock.sleep(self._settings.telemetry_s)

    @property
    def _announces_sensors(self) -> bool:
        return bool(self._settings.home_assistant and self._settings.telemetry_s)

    async def _publish_events(self) -> None:
        budget = TokenBucket(_EVENTS_PER_S, _EVENTS_AT_ONCE)
        async for event in self._events.read():
            if (line := event_line(event)) is not None and budget.take(self._clock.monotonic()):
                await self.broker.publish(self.topics.event(self._me, line[0]), line[1])

    async def _watch(self) -> None:
        """Say of which peers nothing but their presence comes through: neither side can dial the other."""
        while True:
            await self._clock.sleep(_CHECK_S)
            self._follow_rotation()
            self._forget_silent()
            self._note_unlinked()
            unreached = self._unreached()
            apart = {peer for peer in unreached if self._cannot_reach_us(peer)}
            for peer in self._noticed - apart:
                self._notice(f"mqtt {peer}", "")
            for peer in apart - self._noticed:
                known = self.believed.get(peer)
                assert known is not None
                self._notice(
                    f"mqtt {peer}",
                    f"{known.name} ({peer:.8}) is in the fleet, but neither it nor this peer can dial the other: {unreached[peer]}",
                    "have one of them accept connections from the other's network, "
                    f"on port {known.port} there or {self._view.port} here",
                )
            self._noticed = apart

    def _follow_rotation(self) -> None:
        """After a rotation, forget the presences of peers that were excluded, which were believed under the old key."""
        authority = self._identity().key.issuer.public
        if authority != self._authority:
            self._authority = authority
            self._withdraw(self.believed.forget(lambda peer: not self._view.belongs(peer)))

    def _forget_silent(self) -> None:
        """Forget peers that are gone without a last will. Without a connection, and soon after, all peers seem silent."""
        since = self._clock.monotonic() - SILENT_S
        if self.broker.up and self._up_at < since:
            self._withdraw(self.believed.forget_silent(since))

    def _withdraw(self, peers: Sequence[PeerId]) -> None:
        for peer in peers:
            self._on_sighting(PeerWithdrawn(source=SOURCE, peer=peer))

    def _note_unlinked(self) -> None:
        linked, now = self._view.linked(), self._clock.monotonic()
        unlinked = [one.peer for one in self.believed.present() if one.peer != self._me and one.peer not in linked]
        self._unlinked_since = {peer: self._unlinked_since.get(peer, now) for peer in unlinked}

    def _unreached(self) -> dict[PeerId, str]:
        """Returns: the peers of the fleet that this peer can't dial, and why. A dial can also end at another device, or nowhere."""
        failed, now = self._view.unreached(), self._clock.monotonic()
        reasons = {}
        for peer, since in self._unlinked_since.items():
            if peer in failed:
                reasons[peer] = failed[peer]
            elif now - since >= _PATIENCE_S:
                reasons[peer] = "none of the addresses that it publishes leads to it"
        return reasons

    def _cannot_reach_us(self, peer: PeerId) -> bool:
        known = self.believed.get(peer)
        return known is not None and not known.leaves and self._me in known.unreached

    def _presence(self, *, leaves: bool, at: int) -> Presence:
        view = self._view
        if leaves:
            return Presence(cluster=self.topics.cluster, peer=self._me, name=view.name, at=at, since=self._since, leaves=True)
        return Presence(
            cluster=self.topics.cluster,
            peer=self._me,
            name=view.name,
            at=at,
            since=self._since,
            addresses=tuple(view.addresses()[:MAX_ADDRESSES]),
            port=view.port,
            protocol=view.protocol,
            version=view.version,
            load=view.load(),
            unreached=tuple(sorted(self._unreached())[:MAX_UNREACHED]),
        )

    def _sign(self, *, leaves: bool, at: int) -> bytes:
        return sign_presence(self._identity(), self._presence(leaves=leaves, at=at))

    def _next_at(self) -> int:
        """Returns: the date of the next presence: the time, and later than any date before, also if the clock was set back."""
        self._last_at = max(self._now_ms(), self._last_at + 1)
        return self._last_at

    def _now_ms(self) -> int:
        return int(self._clock.wall() * 1000)

    def _notice(self, about: str, message: str, hint: str = "") -> None:
        self._on_sighting(SourceNotice(source=SOURCE, message=message, hint=hint, about=about))


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
