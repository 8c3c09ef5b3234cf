"""The table of links, at most one with each other peer. Brings links up, sends heartbeats, and ends links that are silent."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from meshd.agents.links.link import Link
from meshd.agents.links.log import LinkLog
from meshd.agents.links.meters.traffic import Traffic
from meshd.agents.links.rpc import Dispatcher
from meshd.clock import Clock
from meshd.errors import MeshdError, ProtocolViolation
from meshd.protocol.framing import Frame
from meshd.protocol.handshake import HelloAgreement, LinkChoice, choose_link
from meshd.protocol.messages import Goodbye, Heartbeat, HeartbeatAck, Hello, Lane, Message, Probe, ProbeAck
from meshd.protocol.transport import Address, Connection
from meshd.types import PeerId

log = logging.getLogger("meshd.links")
LEFT = "it left"
"""Prefix of the reason of a link that ended by GOODBYE. Such an end is not a fault."""
STOPS = "this peer stops"
"""Why a peer ends its own links when its daemon stops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Heartbeat interval and time limits of a link, in seconds."""

    heartbeat_s: float = 0.5
    silence_s: float = 2.0
    """A link ends when nothing has been received on it for this long."""
    handshake_s: float = 5.0
    """Time limit of each step of opening a link: TLS, HELLO, and the second lane."""
    connect_s: float = 1.0
    """Time limit of one TCP connection attempt."""


OnUp = Callable[[PeerId, Hello, Address], None]
OnDown = Callable[[PeerId, str], None]


class LinkTable:
    """Owns every Link. Calls `on_up` before the first message of a link is handled, and `on_down` when the link has ended."""

    def __init__(
        self,
        own: PeerId,
        dispatcher: Dispatcher,
        clock: Clock,
        linklog: LinkLog,
        timing: Timing,
        on_up: OnUp,
        on_down: OnDown,
        *,
        slow_start: bool = True,
    ) -> None:
        """`slow_start`: see `LinkStats.slow_start`."""
        self.own = own
        self.timing = timing
        self._slow_start = slow_start
        self._dispatcher = dispatcher
        self._now = clock.monotonic
        self._linklog = linklog
        self._on_up = on_up
        self._on_down = on_down
        self._links: dict[PeerId, Link] = {}
        self.traffic = Traffic()
        self._checked = clock.monotonic()

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(tuple(self._links.values()))

    def get(self, peer: PeerId) -> Link | None:
        """Returns: the link with a peer, which may not be up yet."""
        return self._links.get(peer)

    def begin_dialled(self, peer: PeerId, number: int) -> Link:
        """Begin a link that this peer dials. The table must have no link with `peer` yet."""
        return self._begin(peer, number, dialled=True)

    def begin_accepted(self, agreement: HelloAgreement) -> Link | None:
        """Begin a link that another peer dialled, and end an existing one. Returns: None if the existing link is kept instead."""
        hello = agreement.hello
        present = self._links.get(hello.peer)
        fresh_s = 2 * self.timing.heartbeat_s
        verdict = choose_link(present.as_existing(self._now()) if present else None, hello, self.own, fresh_s=fresh_s)
        if verdict is LinkChoice.REFUSE:
            return None
        if present is not None:
            known = present.agreement
            restarted = known is not None and known.hello.incarnation != hello.incarnation
            present.end("it has restarted" if restarted else "it has dialled again")
        return self._begin(hello.peer, hello.link, dialled=False)

    def join(self, link: Link, lane: Lane, connection: Connection, agreement: HelloAgreement) -> None:
        """Add a lane to a link. Raises: PeerLost if the lane's connection has closed already."""
        link.agreement = agreement
        connection.accepts = agreement.limits
        connection.attach(partial(self._received, link), lambda _, reason: link.end(reason))
        link.lanes[lane] = connection

    def bring_up(self, link: Link) -> None:
        """Mark a link as up, because both peers have both lanes, and call `on_up`."""
        assert link.agreement is not None
        link.up = True
        link.heard = link.up_since = self._now()
        hello = link.agreement.hello
        remote = link.lanes[Lane.CONTROL].remote
        address = remote if link.dialled else (remote[0], hello.port)
        log.info("linked with %s (%.8s) at %s:%d", hello.name, link.peer, *address)
        _notify(partial(self._on_up, link.peer, hello, address))

    def _begin(self, peer: PeerId, number: int, *, dialled: bool) -> Link:
        link = Link(peer, number, dialled=dialled, now=self._now, traffic=self.traffic, on_end=self._ended)
        link.estimate.slow_start = self._slow_start
        self._links[peer] = link
        return link

    def _ended(self, link: Link, reason: str, on_purpose: bool) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        self.traffic.ended(link.peer, link.bytes_out, link.bytes_in)
        if not link.up:
            return
        link.up = False
        if on_purpose:
            log.info("the link with %.8s has ended: %s", link.peer, reason)
        else:
            self._linklog.warn(f"down {link.peer} {reason}", "the link with %.8s is down: %s", link.peer, reason)
        self._dispatcher.peer_lost(link.peer, reason)
        _notify(partial(self._on_down, link.peer, reason))

    def check(self) -> None:
        """Send each peer a heartbeat; end links that are silent or did not come up in time. Called once per heartbeat interval.

        If this process was stalled, no link ends by silence for one more interval: the sockets may contain unread messages.
        """
        now = self._now()
        stalled = now - self._checked > 2 * self.timing.heartbeat_s
        self._checked = now
        for link in self:
            if stalled:
                link.heard = max(link.heard, now - self.timing.silence_s + self.timing.heartbeat_s)
            self._check(link, now)

    def _check(self, link: Link, now: float) -> None:
        if not link.up:
            if now - link.born > 3 * self.timing.handshake_s:
                link.end("it did not come up in time")
        elif now - link.heard >= self.timing.silence_s:
            link.end(f"silent for {now - link.heard:.1f} s")
        else:
            _try(partial(link.beat, now))

    def _received(self, link: Link, connection: Connection, message: Message, frame: Frame) -> None:
        link.received(message, frame, self._now())
        if not link.up:
            if link.dialled or not link.joined:
                raise ProtocolViolation(f"{type(message).__name__} before the link was up")
            # The dialler sends its first message only when it has both lanes, so now both peers know that both are connected.
            self.bring_up(link)
        if message.number > ProbeAck.number or not self._link_message(link, message):
            self._dispatcher.deliver(link.peer, message, frame.payload)

    def _link_message(self, link: Link, message: Message) -> bool:
        """Handle a message about the link itself. Returns: False if the message is for the dispatcher."""
        match message:
            case Heartbeat():
                _try(partial(link.answer_beat, message))
            case HeartbeatAck():
                link.beat_answered(message, link.heard)
            case Goodbye():
                link.end(f"{LEFT}: {message.reason}", on_purpose=True)
            case Hello():
                raise ProtocolViolation("HELLO on a link that is up")
            case Probe():
                _try(partial(link.send, ProbeAck(request=message.request)))
            case _:
                return False
        return True


def _try(send: Callable[[], None]) -> None:
    """Send a heartbeat or an answer. A failure is only logged, because the next heartbeat or probe makes up for it."""
    try:
        send()
    except MeshdError as error:
        log.debug("not sent: %s", error)


def _notify(listener: Callable[[], None]) -> None:
    """Call `on_up` or `on_down`. An exception is only logged, so that it does not end the link."""
    try:
        listener()
    except Exception:
        log.exception("a listener of links failed (a bug in meshd); the link stays")
