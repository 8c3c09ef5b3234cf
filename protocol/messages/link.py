"""Messages that open, watch, measure and close a link, and the error that answers a failed request."""

from typing import ClassVar

from meshd.protocol.messages.base import Lane, Message, Reply, Request, message
from meshd.types import PeerId, SessionId


@message(1)
class Hello(Message, frozen=True, kw_only=True):
    """The first message of each connection, from both sides. The dialler chooses the lane and the link number."""

    version: tuple[int, int]
    features: tuple[str, ...]
    software: str
    peer: PeerId
    """The sender's id: the hash of the key in its TLS certificate."""
    name: str
    incarnation: int
    """Random number drawn at start, so that a restarted peer is a new incarnation."""
    link: int
    """Random number that the dialler draws, the same on both connections of a link. The answering side repeats it."""
    lane: int
    max_header: int
    max_payload: int
    port: int
    """TCP port on which the sender listens for links."""


@message(2)
class Error(Reply, frozen=True, kw_only=True):
    """A request failed. With `request` 0: a message that is not a request failed, or the sender closes the connection."""

    request: int = 0
    code: str
    message: str
    hint: str = ""
    session: SessionId | None = None
    number_of: int = 0
    """The unknown type number that this error answers; 0 if the number was known."""


@message(3)
class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent by each side every 0.5 s on the control lane."""

    sequence: int
    sent_ns: int
    """Reading of the sender's monotonic clock. The answer repeats it."""


@message(4)
class HeartbeatAck(Message, frozen=True, kw_only=True):
    sequence: int
    sent_ns: int
    arrival_bytes_s: float = 0.0
    """Rate at which the last large payload since the previous answer arrived, in bytes/s. 0: none arrived."""


@message(5)
class Goodbye(Message, frozen=True, kw_only=True):
    """The sender leaves on purpose, so its silence is not a failure."""

    reason: str


@message(6)
class Probe(Request, frozen=True, kw_only=True):
    """Measure the link. Payload: any bytes. The reply is sent when the payload has arrived."""

    default_lane: ClassVar[Lane] = Lane.BULK


@message(7)
class ProbeAck(Reply, frozen=True, kw_only=True):
    """The whole payload of a PROBE has arrived."""
