"""One link: its two connections with a peer (the lanes), the time when the peer was last heard, and the round-trip time."""

import asyncio
from collections.abc import Callable

from meshd.errors import PeerLost
from meshd.protocol.handshake import ExistingLink, HelloAgreement
from meshd.protocol.messages import Heartbeat, HeartbeatAck, Lane, Message
from meshd.protocol.transport import Buffer, Connection
from meshd.types import PeerId

_RTT_WEIGHT = 0.125
"""Weight of a new sample in the mean round-trip time, as in TCP (RFC 6298)."""


class Link:
    """A link with a peer, from its first HELLO to its end. It is up once both peers know that both lanes are connected."""

    def __init__(
        self, peer: PeerId, number: int, *, dialled: bool, now: float, on_end: Callable[["Link", str, bool], None]
    ) -> None:
        self.peer = peer
        self.number = number
        self.dialled = dialled
        self.born = now
        self.heard = now
        self.up = False
        self.up_since = 0.0
        self.agreement: HelloAgreement | None = None
        self.rtt_min_s: float | None = None
        self.rtt_mean_s: float | None = None
        self.gone = asyncio.Event()
        self.lanes: dict[Lane, Connection] = {}
        self._on_end = on_end
        self._sequence = 0

    @property
    def joined(self) -> bool:
        """Whether both lanes are connected."""
        return len(self.lanes) == len(Lane)

    @property
    def queued_bytes(self) -> int:
        return sum(connection.queued_bytes for connection in self.lanes.values())

    def lived_s(self, now: float) -> float:
        """Returns: seconds since the link came up; 0 if it never did."""
        return now - self.up_since if self.up_since else 0.0

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

    def beat_answered(self, answer: HeartbeatAck, now: float) -> None:
        """Update the round-trip time from the answer to a heartbeat. Implausible answers are ignored."""
        rtt_s = now - answer.sent_ns / 1e9
        if rtt_s < 0 or not 0 < answer.sequence <= self._sequence:
            return
        self.rtt_min_s = rtt_s if self.rtt_min_s is None else min(self.rtt_min_s, rtt_s)
        self.rtt_mean_s = rtt_s if self.rtt_mean_s is None else self.rtt_mean_s + _RTT_WEIGHT * (rtt_s - self.rtt_mean_s)

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
