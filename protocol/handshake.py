"""The rules of HELLO: what two peers agree on, and which of two links between them survives. Pure functions."""

from collections.abc import Iterable
from enum import Enum

import msgspec

from meshd.errors import PeerLost, PeerRefused, ProtocolViolation
from meshd.protocol.framing import MAX_HEADER_HARD, MAX_PAYLOAD, FrameLimits
from meshd.protocol.messages import FEATURES, PROTOCOL_VERSION, Error, Goodbye, Hello, Lane, Message
from meshd.types import PeerId

_MIN_HEADER = 4096
"""The smallest `max_header` that a HELLO may have. With less, the answer to a message might not fit."""


class HelloAgreement(msgspec.Struct, frozen=True):
    """The result of both HELLOs of a connection."""

    hello: Hello
    """HELLO of the other side."""
    features: frozenset[str]
    """Features that both sides have."""
    limits: FrameLimits
    """Largest header and payload that the other side accepts."""


class LinkChoice(Enum):
    """The decision about a link that a peer offers."""

    ACCEPT = "there is none yet"
    REPLACE = "the new one takes the place of the old"
    REFUSE = "the old one stays"


def check_hello(message: Message, certified: PeerId, *, features: Iterable[str] = FEATURES) -> HelloAgreement:
    """Check the first message of a connection, which must be HELLO from the peer in the certificate.

    Raises: ProtocolViolation if the message breaks the protocol; PeerRefused if its major version differs; PeerLost if it is
    GOODBYE or ERROR.
    """
    if isinstance(message, Goodbye):
        raise PeerLost(message.reason)
    if isinstance(message, Error):
        raise PeerLost(message.message)
    if not isinstance(message, Hello):
        raise ProtocolViolation(f"a connection began with {type(message).__name__}, not HELLO")
    if message.version[0] != PROTOCOL_VERSION[0]:
        theirs, ours = (".".join(map(str, version)) for version in (message.version, PROTOCOL_VERSION))
        raise PeerRefused(
            f"{message.name} speaks protocol {theirs} ({message.software}) and this peer {ours}",
            hint="install the same version of meshd on both",
        )
    if message.peer != certified:
        raise ProtocolViolation("HELLO names another peer than the certificate")
    if message.lane not in (Lane.CONTROL, Lane.BULK):
        raise ProtocolViolation(f"HELLO names lane {message.lane}, which does not exist")
    if not _MIN_HEADER <= message.max_header <= MAX_HEADER_HARD or not 0 <= message.max_payload <= MAX_PAYLOAD:
        raise ProtocolViolation(
            f"HELLO has max_header {message.max_header} and max_payload {message.max_payload}, which are out of range"
        )
    return HelloAgreement(
        message, frozenset(features) & frozenset(message.features), FrameLimits(message.max_header, message.max_payload)
    )


def check_answer(answer: Hello, asked: Hello) -> None:
    """Check the answering side's HELLO against the dialler's. Raises: ProtocolViolation."""
    if (answer.link, answer.lane) != (asked.link, asked.lane):
        raise ProtocolViolation("HELLO was answered for another link or lane")


class ExistingLink(msgspec.Struct, frozen=True, kw_only=True):
    """The link that exists with a peer when that peer offers another one."""

    number: int
    incarnation: int | None
    """The other peer's incarnation. None: no HELLO has arrived yet."""
    dialled: bool
    """Whether this peer dialled the link."""
    up: bool
    silent_s: float
    """Time since the last frame arrived."""


def choose_link(present: ExistingLink | None, offered: Hello, own: PeerId, *, fresh_s: float) -> LinkChoice:
    """Decide whether a link that a peer dials replaces the existing one. Both sides decide alike (SPEC.md, section 4).

    A peer never dials a peer with which it has a link. So if the peer that dialled the existing link dials again, it has lost
    that link; of a link that this peer dialled, HELLO says so (`lost`). Of two links dialled at the same time, the one dialled by
    the peer with the smaller id survives. A link that this peer dialled and that received a frame within `fresh_s` seconds is kept:
    the other peer dialled before that link came up, and withdraws its offer.
    """
    if present is None:
        return LinkChoice.ACCEPT
    restarted = present.incarnation is not None and present.incarnation != offered.incarnation
    if restarted or not present.dialled or offered.lost == present.number:
        return LinkChoice.REPLACE
    if present.up:
        return LinkChoice.REPLACE if present.silent_s > fresh_s else LinkChoice.REFUSE
    return LinkChoice.REPLACE if offered.peer < own else LinkChoice.REFUSE
