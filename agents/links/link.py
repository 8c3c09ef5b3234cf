"""One link: its two connections with a peer (the lanes), the time when the peer was last heard, and the round-trip time."""

import asyncio
import math
from collections.abc import Callable

from meshd.agents.links.estimate import LinkEstimate
from meshd.agents.links.meters.clock_offset import ClockOffset
from meshd.agents.links.meters.traffic import Traffic
from meshd.errors import PeerLost
from meshd.protocol.framing import KIB, Frame
from meshd.protocol.handshake import ExistingLink, HelloAgreement
from meshd.protocol.messages import Heartbeat, HeartbeatAck, Lane, Message, Probe, SessionMessage
from meshd.protocol.transport import Address, Buffer, Connection
from meshd.types import PeerId

_ADDRESSES = 16
_LARGE = 16 * KIB
"""A payload from this size on may delay the heartbeats behind it."""
_TELLING = 64 * KIB
"""The arrival of a payload from this size on tells the bandwidth, if it takes `_TELLING_S` and several round trips."""
_TELLING_S = 0.002


class Link:
    """A link with a peer, from its first HELLO to its end. It is up once both peers know that both lanes are connected."""

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
        self.up_since = 0.0
        self.agreement: HelloAgreement | None = None
        self.estimate = LinkEstimate()
        self.clock = ClockOffset()
        """The other peer's clock."""
        self.used_at = now()
        """Time of the last message of a session."""
        self.gone = asyncio.Event()
        self.lanes: dict[Lane, Connection] = {}
        self.addresses: dict[Address, None] = {}
        """Where the peer was reached or says that it listens, oldest first."""
        self._on_end = on_end
        self._now = now
        self._traffic = traffic
        self._sequence = 0
        self._arrival_bytes_s = 0.0

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
        return ExistingLink(incarnation=incarnation, dialled=self.dialled, up=self.up, silent_s=now - self.heard)

    def send(self, message: Message, payload: Buffer | None = None) -> None:
        """Send a message on its lane. Raises: PeerLost, Overloaded, InvalidRequest."""
        connection = self.lanes.get(message.send_lane)
        if connection is None:
            raise PeerLost(f"the link with {self.peer} is not up")
        connection.send(message, payload)
        if payload is None:
            self._note_use(message, 0)
        else:
            size = memoryview(payload).nbytes
            self._traffic.count_sent(message, size)
            self._note_use(message, size)

    def received(self, message: Message, frame: Frame, now: float) -> None:
        """Record that a message has arrived."""
        self.heard = now
        size = len(frame.payload)
        if size:
            self._traffic.count_received(message, size)
        self._note_use(message, size)
        rtt_s = self.estimate.rtt_s(now) or 0.0
        if size >= _TELLING and not isinstance(message, Probe) and frame.receive_s > max(_TELLING_S, 4 * rtt_s):
            self._arrival_bytes_s = size / frame.receive_s

    def _note_use(self, message: Message, size: int) -> None:
        if size >= _LARGE:
            self.estimate.disturb(self._now())
        if isinstance(message, SessionMessage):
            self.used_at = self._now()

    def when_room(self, lane: Lane, callback: Callable[[], None]) -> None:
        """See `Connection.when_room`. Raises: PeerLost."""
        connection = self.lanes.get(lane)
        if connection is None:
            raise PeerLost(f"the link with {self.peer} is not up")
        connection.when_room(callback)

    def beat(self, now: float) -> None:
        """Send a heartbeat. Raises: as `send`."""
        self._sequence += 1
        self.send(Heartbeat(sequence=self._sequence, sent_ns=int(now * 1e9)))

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

    def end(self, reason: str, farewell: Message | None = None, *, on_purpose: bool = False) -> None:
        """Close both lanes, and send `farewell` on them first if there is one. Later calls do nothing.

        An end without a farewell is logged as a fault, unless it is `on_purpose`.
        """
        if self.gone.is_set():
            return
        self.gone.set()
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
