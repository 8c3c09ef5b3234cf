"""Messages of the link itself."""

from typing import ClassVar

from meshd.protocol.messages.base import Lane, Message, Reply, Request, message
from meshd.types import PeerId, SessionId


@message(1)
class Hello(Message, frozen=True, kw_only=True):
    """First frame of each connection, from both sides. Whoever dialled says which lane this is and of which link."""

    version: tuple[int, int]
    features: tuple[str, ...]
    software: str
    peer: PeerId
    """Must be the hash of the key in the TLS certificate."""
    name: str
    incarnation: int
    """Drawn at start: a peer that restarts is a new incarnation."""
    link: int
    """Drawn by the dialler; both connections of a link carry it. The side that answers repeats it."""
    lane: int
    max_header: int
    max_payload: int
    port: int
    """Where the sender listens for links."""


@message(2)
class Error(Reply, frozen=True, kw_only=True):
    """A request (or, with request 0, a message) could not be met."""

    request: int = 0
    code: str
    message: str
    hint: str = ""
    session: SessionId | None = None
    number_of: int = 0
    """The type number that this answers, if it was unknown."""


@message(3)
class Heartbeat(Message, frozen=True, kw_only=True):
    """Each side, every 0.5 s, on the control lane."""

    sequence: int
    sent_ns: int
    """The sender's monotonic clock; the answer repeats it."""


@message(4)
class HeartbeatAck(Message, frozen=True, kw_only=True):
    sequence: int
    sent_ns: int


@message(5)
class Goodbye(Message, frozen=True, kw_only=True):
    """The sender leaves on purpose; its silence is no fault."""

    reason: str


@message(6)
class Probe(Request, frozen=True, kw_only=True):
    """Payload: filler. The reply comes when all of it has arrived; with `echo` it comes back whole."""

    default_lane: ClassVar[Lane] = Lane.BULK
    echo: bool = False


@message(7)
class ProbeAck(Reply, frozen=True, kw_only=True):
    received_bytes: int
    receive_s: float
    """From the first byte of the payload to the last, by the receiver's clock."""
