"""The table of links, at most one with each other peer. Brings links up, sends heartbeats, and ends links that are silent.

A link whose connections break stays in the table, as broken, until another link with the same process of the peer has taken its
place, or it is given up. Only then has this peer lost the other one.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from meshd.agents.links.link import Link
from meshd.agents.links.log import LinkLog
from meshd.agents.links.meters.traffic import Traffic
from meshd.agents.links.rpc import Dispatcher
from meshd.clock import Clock
from meshd.errors import MeshdError, PeerLost, ProtocolViolation
from meshd.protocol.framing import Frame
from meshd.protocol.handshake import HelloAgreement, LinkChoice, choose_link
from meshd.protocol.messages import Goodbye, Heartbeat, HeartbeatAck, Hello, Lane, Message, Probe, ProbeAck, Received
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
    restore_s: float = 1.0
    """A broken link is given up after this long. Less than `silence_s`: a peer that is gone is not noticed later than a silent one.
    A new link takes eight round trips and two TLS handshakes: below 0.1 s in a LAN, also on slow devices."""


OnUp = Callable[[PeerId, Hello, Address], None]
OnDown = Callable[[PeerId, str], None]


class LinkTable:
    """Owns every Link. Calls `on_up` before the first message of a link is handled, and `on_down` when the peer is lost.

    `on_break(link)` is called when a link has broken. The callee must call `give_up` if the link is not restored.
    """

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
        self.on_break: Callable[[Link], None] = lambda link: None
        self.restored_total = 0
        """How often a link has taken the place of a broken one."""
        self._links: dict[PeerId, Link] = {}
        self._broken: dict[PeerId, Link] = {}
        self.traffic = Traffic()
        self._checked = clock.monotonic()

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(tuple(self._links.values()))

    def get(self, peer: PeerId) -> Link | None:
        """Returns: the link with a peer, which may not be up yet."""
        return self._links.get(peer)

    def known(self, peer: PeerId) -> Link | None:
        """Returns: the link with a peer that is up, or the broken one that may be restored."""
        link = self._links.get(peer)
        return link if link is not None and link.up else self._broken.get(peer)

    def broken(self, peer: PeerId) -> Link | None:
        """Returns: the broken link with a peer, whether another one is about to take its place or not."""
        return self._broken.get(peer)

    def all_known(self) -> list[Link]:
        """Returns: the links that are up, and the broken ones that may be restored."""
        return [link for link in self._links.values() if link.up] + list(self._broken.values())

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
            present.end("it has restarted" if restarted else "it has dialled again", breaks=not restarted)
        return self._begin(hello.peer, hello.link, dialled=False)

    def join(self, link: Link, lane: Lane, connection: Connection, agreement: HelloAgreement) -> None:
        """Add a lane to a link. Raises: PeerLost if the lane's connection has closed already."""
        link.agreement = agreement
        connection.accepts = agreement.limits
        connection.attach(partial(self._received, link, lane), lambda closed, reason: link.end(reason, breaks=not closed.violated))
        link.lanes[lane] = connection
        if lane is Lane.CONTROL:
            self._agree_on_history(link, agreement.hello)

    def may_restore(self, hello: Hello) -> bool:
        """Whether an offered link can take the place of the one that it names. This peer may not have noticed yet that it broke."""
        link = self.known(hello.peer)
        return link is not None and _continues(link, hello)

    def _agree_on_history(self, link: Link, hello: Hello) -> None:
        """Note which broken link a new one restores. If the peer has given that one up, so does this peer.

        Raises: PeerLost if the dialled link should have restored one and can't. A new dial then makes a link without a history.
        """
        broken = self._broken.get(link.peer)
        if broken is not None and _continues(broken, hello):
            link.restores, link.arrived = broken, hello.received
            return
        if broken is not None:
            assert broken.agreement is not None
            restarted = hello.incarnation != broken.agreement.hello.incarnation
            self.give_up(broken, "it has restarted" if restarted else broken.reason)
        if link.dialled and (broken is not None or hello.history):
            raise PeerLost("the broken link can't be restored")

    def bring_up(self, link: Link) -> None:
        """Mark a link as up, because both peers have both lanes, and call `on_up`, or restore what was broken.

        Raises: PeerLost if the broken link whose place it should take has been given up meanwhile.
        """
        assert link.agreement is not None
        old = link.restores
        if old is not self._broken.get(link.peer):
            raise PeerLost("the link that it should restore was given up")
        self._broken.pop(link.peer, None)
        link.up = True
        link.heard = link.up_since = self._now()
        hello = link.agreement.hello
        remote = link.lanes[Lane.CONTROL].remote
        address = remote if link.dialled else (remote[0], hello.port)
        if old is None:
            log.info("linked with %s (%.8s) at %s:%d", hello.name, link.peer, *address)
            _notify(partial(self._on_up, link.peer, hello, address))
        else:
            log.info("the link with %s (%.8s) is back after %.0f ms", hello.name, link.peer, 1e3 * (self._now() - old.ended_at))
            self.restored_total += 1
            link.take_place(old)

    def give_up(self, link: Link, reason: str) -> None:
        """Give up a broken link, if it has not been restored: the peer is lost."""
        if self._broken.get(link.peer) is link:
            del self._broken[link.peer]
            self._lost(link, reason)

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
            link.give_up()
            return
        link.up, link.ended_at = False, self._now()
        if link.broken:
            log.info("the link with %.8s broke: %s", link.peer, reason)
            self._broken[link.peer] = link
            self.on_break(link)
            return
        if on_purpose:
            log.info("the link with %.8s has ended: %s", link.peer, reason)
        self._lost(link, reason, on_purpose=on_purpose)

    def _lost(self, link: Link, reason: str, *, on_purpose: bool = False) -> None:
        if not on_purpose:
            self._linklog.warn(f"down {link.peer} {reason}", "the link with %.8s is down: %s", link.peer, reason)
        link.give_up()
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

    def _received(self, link: Link, lane: Lane, connection: Connection, message: Message, frame: Frame) -> None:
        if not link.up and not self._comes_up(link, message):
            return
        if link.received(lane, message, frame, self._now()):
            _try(link.report)
        if message.number > Received.number or not self._link_message(link, message):
            self._dispatcher.deliver(link.peer, message, frame.payload)

    def _comes_up(self, link: Link, message: Message) -> bool:
        """Bring a link up at its first message after HELLO. Returns: False if it has ended instead."""
        if link.dialled or not link.joined:
            raise ProtocolViolation(f"{type(message).__name__} before the link was up")
        # The dialler sends its first message only when it has both lanes, so now both peers know that both are connected.
        try:
            self.bring_up(link)
        except PeerLost as error:
            link.end(str(error))
        return link.up

    def _link_message(self, link: Link, message: Message) -> bool:
        """Handle a message about the link itself. Returns: False if the message is for the dispatcher."""
        match message:
            case Heartbeat():
                link.acknowledged(message.received)
                _try(partial(link.answer_beat, message))
            case HeartbeatAck():
                link.beat_answered(message, link.heard)
            case Goodbye():
                link.end(f"{LEFT}: {message.reason}", on_purpose=True)
            case Received():
                link.acknowledged(message.received)
            case Hello():
                raise ProtocolViolation("HELLO on a link that is up")
            case Probe():
                _try(partial(link.send, ProbeAck(request=message.request)))
            case _:
                return False
        return True


def _continues(link: Link, hello: Hello) -> bool:
    """Whether a link with this HELLO can take the place of `link`: both sides keep all that the other has not received."""
    assert link.agreement is not None
    named = hello.history == link.history.number and hello.incarnation == link.agreement.hello.incarnation
    return named and link.history.can_restart_at(hello.received)


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
