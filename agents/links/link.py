"""One link: its two connections with a peer (the lanes), the time when the peer was last heard, and the round-trip time.

A link that breaks keeps what is sent on it, until another link takes its place (`restoring/`) or the peer is given up.
"""

import asyncio
import math
from collections.abc import Callable
from functools import partial

from meshd.agents.links.estimate import LinkEstimate
from meshd.agents.links.meters.clock_offset import ClockOffset
from meshd.agents.links.meters.traffic import Traffic
from meshd.agents.links.restoring.history import LinkHistory, SentFrame, is_counted
from meshd.errors import Overloaded, PeerLost
from meshd.protocol.framing import EMPTY, KIB, Frame
from meshd.protocol.handshake import ExistingLink, HelloAgreement
from meshd.protocol.messages import Heartbeat, HeartbeatAck, Lane, Message, Probe, Received, SessionMessage, Steps
from meshd.protocol.transport import Address, Buffer, Connection
from meshd.types import PeerId

_ADDRESSES = 16
_LARGE = 16 * KIB
"""A payload from this size on may delay the heartbeats behind it."""
_TELLING = 64 * KIB
"""The arrival of a payload from this size on tells the bandwidth, if it takes `_TELLING_S` and several round trips."""
_TELLING_S = 0.002


class Link:
    """A link with a peer, from its first HELLO to its end. It is up once both peers know that both lanes are connected.

    After its end it may be `broken`: then another link may take its place, and messages are still accepted for that one.
    """

    def __init__(
        self,
        peer: PeerId,
        number: int,
        *,
        dialled: bool,
        now: Callable[[], float],
        traffic: Traffic,
        on_end: Callable[["Link", str, bool], None],
    ) -> None:
        self.peer = peer
        self.number = number
        self.dialled = dialled
        self.born = self.heard = now()
        self.up = False
        self.broken = False
        """Whether the link has ended and may be restored."""
        self.reason = ""
        """Why the link has ended. Empty: it has not."""
        self.up_since = 0.0
        self.ended_at = 0.0
        self.agreement: HelloAgreement | None = None
        self.estimate = LinkEstimate()
        self.clock = ClockOffset()
        """The other peer's clock."""
        self.used_at = now()
        """Time of the last message of a session."""
        self.gone = asyncio.Event()
        """Set when this link has ended."""
        self.over = asyncio.Event()
        """Set when no link takes the place of this one any more. Links that take the place of one another share it."""
        self.history = LinkHistory(number)
        self.restores: Link | None = None
        """The broken link whose place this one takes when it comes up."""
        self.arrived: tuple[int, int] = (0, 0)
        """How much of that link's messages the other peer has received, by lane."""
        self.lanes: dict[Lane, Connection] = {}
        self.addresses: dict[Address, None] = {}
        """Where the peer was reached or says that it listens, oldest first."""
        self._on_end = on_end
        self._now = now
        self._traffic = traffic
        self._sequence = 0
        self._arrival_bytes_s = 0.0
        self._waiting: dict[Lane, list[Callable[[], None]]] = {lane: [] for lane in Lane}
        """Callbacks of senders that wait for room, while the connection is not to be asked."""

    @property
    def joined(self) -> bool:
        """Whether both lanes are connected."""
        return len(self.lanes) == len(Lane)

    @property
    def queued_bytes(self) -> int:
        return sum(connection.queued_bytes for connection in self.lanes.values())

    @property
    def bytes_in(self) -> int:
        """Bytes received on both lanes, with headers and without encryption."""
        return sum(connection.bytes_in for connection in self.lanes.values())

    @property
    def bytes_out(self) -> int:
        return sum(connection.bytes_out for connection in self.lanes.values())

    def lived_s(self, now: float) -> float:
        """Returns: seconds since the link came up; 0 if it never did."""
        return now - self.up_since if self.up_since else 0.0

    def note_address(self, address: Address) -> None:
        """Remember an address of the peer, at most `_ADDRESSES` of them."""
        if len(self.addresses) < _ADDRESSES:
            self.addresses[address] = None

    def as_existing(self, now: float) -> ExistingLink:
        """Describe this link for `choose_link`, which decides whether a second link with the same peer replaces it."""
        incarnation = self.agreement.hello.incarnation if self.agreement else None
        silent_s = now - self.heard
        return ExistingLink(number=self.number, incarnation=incarnation, dialled=self.dialled, up=self.up, silent_s=silent_s)

    def send(self, message: Message, payload: Buffer | None = None) -> None:
        """Send a message on its lane, or keep it while the link is broken. Raises: PeerLost, Overloaded, InvalidRequest."""
        lane = message.send_lane
        connection = self.lanes.get(lane)
        if connection is None:
            raise PeerLost(f"the link with {self.peer} is not up")
        view = EMPTY if payload is None else memoryview(payload).cast("B")
        if is_counted(message):
            self._send_counted(lane, SentFrame(connection.encode(message, view), view))
        else:
            connection.send(message, view)
        if view:
            self._traffic.count_sent(message, len(view))
        self._note_use(message, len(view))

    def _send_counted(self, lane: Lane, frame: SentFrame) -> None:
        sent = self.history.sent[lane]
        sent.check_room(frame)
        at_once = not (self.broken or sent.unwritten)
        if at_once:
            self.lanes[lane].send_encoded(frame.header, frame.payload)
        sent.keep(frame, written=at_once)

    def take_place(self, broken: "Link") -> None:
        """Go on in the place of a broken link, and send again what the other peer has not received."""
        self.history, self.over, self.up_since = broken.history, broken.over, broken.up_since
        self.estimate, self.clock = broken.estimate, broken.clock
        self._sequence = broken._sequence
        for address in broken.addresses:
            self.note_address(address)
        for lane, waiting in broken._waiting.items():
            self._waiting[lane] += waiting
        broken.broken = False
        self.history.restart_at(self.arrived)
        for lane in Lane:
            self._write(lane)

    def _write(self, lane: Lane) -> None:
        """Give the kept messages to the connection, as far as it has room."""
        sent = self.history.sent[lane]
        while not self.gone.is_set() and (frame := sent.next) is not None:
            try:
                self.lanes[lane].send_encoded(frame.header, frame.payload)
            except Overloaded:
                self.lanes[lane].when_room(partial(self._write, lane))
                return
            sent.wrote()
        self._call_waiting(lane)

    def _call_waiting(self, lane: Lane) -> None:
        sent = self.history.sent[lane]
        if self._waiting[lane] and not self.gone.is_set() and not sent.unwritten and sent.has_room:
            waiting, self._waiting[lane] = self._waiting[lane], []
            for callback in waiting:
                self.lanes[lane].when_room(callback)

    def acknowledged(self, received: tuple[int, int]) -> None:
        """Forget what the other peer has received. Raises: ProtocolViolation if that was never sent."""
        self.history.acknowledge(received)
        for lane in Lane:
            self._call_waiting(lane)

    def give_up(self) -> None:
        """Drop what is kept: no link takes the place of this one any more."""
        self.broken = False
        self.over.set()
        self.history = LinkHistory(self.number)
        for waiting in self._waiting.values():
            for callback in waiting:
                asyncio.get_running_loop().call_soon(callback)
            waiting.clear()

    def received(self, lane: Lane, message: Message, frame: Frame, now: float) -> bool:
        """Record that a message has arrived. Returns: whether it is time to `report`."""
        self.heard = now
        size = len(frame.payload)
        if size:
            self._traffic.count_received(message, size)
        self._note_use(message, size)
        if size >= _TELLING and frame.receive_s > _TELLING_S and not isinstance(message, Probe):
            rtt_s = self.estimate.rtt_s(now) or 0.0
            if frame.receive_s > 4 * rtt_s:
                self._arrival_bytes_s = size / frame.receive_s
        return is_counted(message) and self.history.note_received(lane, size)

    def report(self) -> None:
        """Tell the other peer what has arrived. Raises: as `send`."""
        self.send(Received(received=self.history.report()))

    def _note_use(self, message: Message, size: int) -> None:
        if size >= _LARGE:
            self.estimate.disturb(self._now())
        if isinstance(message, (SessionMessage, Steps)):
            self.used_at = self._now()

    def when_room(self, lane: Lane, callback: Callable[[], None]) -> None:
        """See `Connection.when_room`. Raises: PeerLost."""
        connection = self.lanes.get(lane)
        if connection is None:
            raise PeerLost(f"the link with {self.peer} is not up")
        sent = self.history.sent[lane]
        if self.broken or sent.unwritten or not sent.has_room:
            self._waiting[lane].append(callback)
        else:
            connection.when_room(callback)

    def beat(self, now: float) -> None:
        """Send a heartbeat. Raises: as `send`."""
        self._sequence += 1
        self.send(Heartbeat(sequence=self._sequence, sent_ns=int(now * 1e9), received=self.history.report()))

    def answer_beat(self, beat: Heartbeat) -> None:
        """Answer a heartbeat, and report how the last large message arrived. Raises: as `send`."""
        arrival_bytes_s, self._arrival_bytes_s = self._arrival_bytes_s, 0.0
        clock_ns = int(self._now() * 1e9)
        self.send(HeartbeatAck(sequence=beat.sequence, sent_ns=beat.sent_ns, arrival_bytes_s=arrival_bytes_s, clock_ns=clock_ns))

    def beat_answered(self, answer: HeartbeatAck, now: float) -> None:
        """Update the estimate from the answer to a heartbeat. Implausible answers are ignored."""
        rtt_s = now - answer.sent_ns / 1e9
        if rtt_s < 0 or not 0 < answer.sequence <= self._sequence:
            return
        self.estimate.round_trip(rtt_s, now)
        if answer.clock_ns:
            self.clock.add(answer.sent_ns / 1e9, now, answer.clock_ns / 1e9)
        if 0 < answer.arrival_bytes_s < math.inf:
            self.estimate.bandwidth(answer.arrival_bytes_s, now)

    def end(self, reason: str, farewell: Message | None = None, *, on_purpose: bool = False, breaks: bool = False) -> None:
        """Close both lanes, and send `farewell` on them first if there is one. Later calls do nothing.

        An end without a farewell is logged as a fault, unless it is `on_purpose`. With `breaks` the link may be restored.
        """
        if self.gone.is_set():
            return
        self.gone.set()
        self.reason, self.broken = reason, breaks and self.up and not self.history.is_futile()
        for connection in self.lanes.values():
            if farewell is None:
                connection.abort(reason)
            else:
                connection.close(reason, farewell)  # on both lanes: the peer may see the end of either first
        self._on_end(self, reason, on_purpose or farewell is not None)

    async def closed(self) -> None:
        """Wait until both sockets are closed."""
        for connection in self.lanes.values():
            await connection.closed()
