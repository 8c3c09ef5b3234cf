"""Messages that open, watch, measure and close a link, and the error that answers a failed request."""

from typing import Annotated, ClassVar

from meshd.bounds import MAX_LISTED, Count, Label, PeerName, Port, Rate, Serial, Text, Word, at_most
from meshd.protocol.messages.base import Lane, Message, Reply, Request, make_printable, message
from meshd.types import PeerId, SessionId

Arrived = tuple[Serial, Serial]
"""How many messages have arrived on the control lane and on the bulk lane since the first link of the history."""


@message(1)
class Hello(Message, frozen=True, kw_only=True):
    """The first message of each connection, from both sides. The dialler chooses the lane and the link number."""

    version: tuple[Count, Count]
    features: Annotated[tuple[Word, ...], at_most(MAX_LISTED)]
    software: Label
    peer: PeerId
    """The sender's id: the hash of the key in its TLS certificate."""
    name: PeerName
    incarnation: Serial
    """Random number drawn at start, so that a restarted peer is a new incarnation."""
    link: Serial
    """Random number that the dialler draws, the same on both connections of a link. The answering side repeats it."""
    lane: Count
    max_header: Count
    max_payload: Count
    port: Port
    """TCP port on which the sender listens for links."""
    history: Serial = 0
    """Number of the first of the links that broke and are to be restored by this one. 0: nothing is restored."""
    lost: Serial = 0
    """Number of the latest of these links."""
    received: Arrived = (0, 0)
    """Messages that the sender has received over them."""


@message(2)
class Error(Reply, frozen=True, kw_only=True):
    """A request failed. With `request` 0: a message that is not a request failed, or the sender closes the connection."""

    request: Serial = 0
    code: Word
    message: Text
    hint: Text = ""
    session: SessionId | None = None
    number_of: Serial = 0
    """The unknown type number that this error answers; 0 if the number was known."""

    def __post_init__(self) -> None:
        make_printable(self, "message", "hint")


@message(3)
class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent by each side every 0.5 s on the control lane."""

    sequence: Serial
    sent_ns: Serial
    """Reading of the sender's monotonic clock. The answer repeats it."""
    received: Arrived = (0, 0)


@message(4)
class HeartbeatAck(Message, frozen=True, kw_only=True):
    sequence: Serial
    sent_ns: Serial
    arrival_bytes_s: Rate = 0.0
    """Rate at which the last large payload since the previous answer arrived, in bytes/s. 0: none arrived."""
    clock_ns: Serial = 0
    """Reading of the sender's own monotonic clock. 0: it does not tell."""


@message(5)
class Goodbye(Message, frozen=True, kw_only=True):
    """The sender leaves on purpose, so its silence is not a failure."""

    reason: Text

    def __post_init__(self) -> None:
        make_printable(self, "reason")


@message(6)
class Probe(Request, frozen=True, kw_only=True):
    """Measure the link. Payload: any bytes. The reply is sent when the payload has arrived."""

    default_lane: ClassVar[Lane] = Lane.BULK


@message(7)
class ProbeAck(Reply, frozen=True, kw_only=True):
    """The whole payload of a PROBE has arrived."""


@message(8)
class Received(Message, frozen=True, kw_only=True):
    """Messages have arrived, so that their sender need not keep them any longer."""

    received: Arrived
