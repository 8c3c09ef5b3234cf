"""Messages that copy a session's record to other peers, so that the session survives its coordinator."""

from typing import Annotated, ClassVar

from meshd.bounds import MAX_LISTED, Epoch, TokenId, Tokens, Word, at_most
from meshd.protocol.messages.base import Lane, Reply, Request, SessionMessage, message
from meshd.types import SessionId, TokenLogprobs


@message(80)
class Journal(Request, frozen=True, kw_only=True):
    """Store a session's whole record and become a deputy: a peer that can continue the session if its coordinator is lost.

    Payload: the record (msgpack).
    """

    default_lane: ClassVar[Lane] = Lane.BULK
    session: SessionId
    epoch: Epoch


@message(81)
class Journaled(Reply, frozen=True, kw_only=True):
    session: SessionId


@message(82)
class JournalTokens(SessionMessage, frozen=True, kw_only=True):
    """The answer's tokens from `index` on, and the finish reason if the answer has ended."""

    index: Tokens
    tokens: Annotated[tuple[tuple[TokenId, TokenLogprobs | None], ...], at_most(MAX_LISTED)]
    finish: Word = ""


@message(83)
class JournalDrop(SessionMessage, frozen=True, kw_only=True):
    """From the coordinator: the record is not needed any more. From a deputy: it lacks the record or a part of it."""


@message(84)
class FindSession(Request, frozen=True, kw_only=True):
    """Ask whether the receiver coordinates this session or has its record."""

    session: SessionId
    nonce: Word
    """Random hexadecimal digits, drawn for this request."""


@message(85)
class SessionFound(Reply, frozen=True, kw_only=True):
    coordinates: bool
    keeps: bool
    epoch: Epoch = 0
    tokens: Tokens = 0
    proof: Word = ""
    """HMAC-SHA-256, in hex, with the record's key over the nonce and the sender's id. Without it, the sender has no record."""


@message(86)
class FetchSession(Request, frozen=True, kw_only=True):
    """Request a session's record. With `take` the receiver stops coordinating the session and the sender continues it."""

    session: SessionId
    secret: Word
    """The secret of the answer's id, which the session's client sent to the sender."""
    take: bool = False


@message(87)
class SessionData(Reply, frozen=True, kw_only=True):
    """Payload: the record (msgpack)."""

    default_lane: ClassVar[Lane] = Lane.BULK
    session: SessionId
    epoch: Epoch
