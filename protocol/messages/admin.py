"""Messages that carry a user's commands to sessions on other peers, and show what happens on them."""

from typing import Annotated, ClassVar

import msgspec

from meshd.bounds import Address, Count, Digest, Millis, Seconds, Text, Timestamp, Word, at_most
from meshd.protocol.messages.base import Lane, Message, Reply, Request, make_printable, message
from meshd.types import PeerId, Plan, SessionId


@message(88)
class EndSession(Request, frozen=True, kw_only=True):
    """Cancel a session that the receiver coordinates. With `forget`, the session's record is deleted too."""

    session: SessionId
    forget: bool = False


@message(89)
class SessionEnded(Reply, frozen=True, kw_only=True):
    known: bool


@message(90)
class FetchStory(Request, frozen=True, kw_only=True):
    """Request the events that the receiver recorded for a session."""

    session: SessionId


@message(91)
class StoryData(Reply, frozen=True, kw_only=True):
    """Payload: JSON list of `{"at": monotonic seconds, "what": str, ...}`, oldest first."""

    default_lane: ClassVar[Lane] = Lane.BULK
    now: Timestamp
    """Reading of the sender's clock when it replied. From it and half the round trip, the requester converts the events' times to
    its own clock."""


@message(92)
class Move(Request, frozen=True, kw_only=True):
    """Ask a session's coordinator to move the stages on peer `source` (None: on all peers) to peer `target`."""

    lasting: ClassVar[bool] = True
    session: SessionId
    target: PeerId
    source: PeerId | None = None


@message(93)
class Moved(Reply, frozen=True, kw_only=True):
    pause_s: Seconds
    """Time between the last token before the change of plan and the first one after it."""
    plan: Plan


@message(94)
class WatchEvents(Message, frozen=True, kw_only=True):
    """Ask the receiver to send its events for `lease_ms`, starting with the rows of its sessions. Renews an earlier request.
    A lease of 0 ends it.

    Only for peers with the feature `events`.
    """

    lease_ms: Millis


@message(95)
class PeerEvents(Message, frozen=True, kw_only=True):
    """Some of the sender's events, in order. Payload: JSON objects, one on each line, as in `GET /mesh/v1/events`."""

    default_lane: ClassVar[Lane] = Lane.BULK
    lost: Count = 0
    """Number of events before these that the sender has left out, because there were too many."""


MAX_ATTEMPTS = 8
"""Most addresses of a peer that a check of reachability dials."""


class DialAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """What a dial of one address showed."""

    address: Address
    why: Text = ""
    """Why the peer does not answer there. Empty: it does."""

    def __post_init__(self) -> None:
        make_printable(self, "why")


@message(110)
class CheckReach(Request, frozen=True, kw_only=True):
    """Ask the receiver to dial the addresses at which it knows the sender, and to listen for the sender's multicast."""

    nonce: Digest
    """The sender multicasts an mDNS question with this name while it waits, the receiver one with its digits in reverse order."""


@message(111)
class ReachChecked(Reply, frozen=True, kw_only=True):
    attempts: Annotated[tuple[DialAttempt, ...], at_most(MAX_ATTEMPTS)] = ()
    multicast: Word = ""
    """`heard`, `silent`, or empty if the sender does not look for peers by multicast."""
    wall: Timestamp = 0.0
    """The sender's clock when it replied, in seconds since the Unix epoch."""


@message(114)
class FetchTrace(Request, frozen=True, kw_only=True):
    """Request when the receiver computed the steps of a session, and what it noted about the session."""

    session: SessionId


@message(115)
class TraceData(Reply, frozen=True, kw_only=True):
    """Payload: `records` records of 48 bytes, then a JSON list as in STORY_DATA."""

    default_lane: ClassVar[Lane] = Lane.BULK
    records: Count
    dropped: Count = 0
    """Number of older records that the sender has not kept."""
