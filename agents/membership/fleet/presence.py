"""A peer's presence: what it publishes of itself at the broker, signed and dated. `protocol/statement.py` has its form."""

from typing import Annotated

import msgspec
from msgspec import Meta

from meshd.agents.membership.fleet.topics import PRESENCE_BYTES
from meshd.bounds import MAX_ADDRESS, Count, PeerName, Port, Word, at_most
from meshd.errors import PeerRefused
from meshd.protocol.identity import Identity
from meshd.protocol.statement import Statement, StatementChecker, make_statement, read_statement
from meshd.types import PeerId

KIND = "presence"
MAX_ADDRESSES = 8
MAX_UNREACHED = 16
Milliseconds = Annotated[int, Meta(ge=0, le=1 << 53)]
"""Since the Unix epoch, by the clock of the peer that writes it."""
Host = Annotated[str, Meta(max_length=MAX_ADDRESS, pattern=r"\A[0-9A-Za-z.:_-]+\Z")]


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """Who a peer is and where it can be dialled. Only a hint: the link proves who answers."""

    cluster: Annotated[str, Meta(pattern=r"\A[a-z2-7]{16}\Z")]
    peer: PeerId
    name: PeerName
    at: Milliseconds
    """When it was signed."""
    since: Milliseconds
    """When the peer's present connection to the broker was made. Names that connection in its last will and in jobs."""
    leaves: bool = False
    """The peer is gone: it has left, or the broker publishes its last will, which was signed when the connection was made."""
    addresses: Annotated[tuple[Host, ...], at_most(MAX_ADDRESSES)] = ()
    port: Port = 0
    protocol: Annotated[str, Meta(max_length=16, pattern=r"\A[0-9.]*\Z")] = ""
    version: Word = ""
    load: Count = 0
    """Number of sessions that have a stage on the peer."""
    unreached: Annotated[tuple[PeerId, ...], at_most(MAX_UNREACHED)] = ()
    """Peers of the fleet that this peer has dialled in vain."""


_DECODER = msgspec.json.Decoder(Presence)


def sign_presence(identity: Identity, presence: Presence) -> bytes:
    """Returns: the text to publish, at most `PRESENCE_BYTES`."""
    return make_statement(identity, KIND, msgspec.json.encode(presence))


def read_presence(data: bytes) -> tuple[Presence, Statement]:
    """Parse a presence, without a check of signatures. Raises: PeerRefused if it is too long, malformed or of another peer."""
    if len(data) > PRESENCE_BYTES:
        raise PeerRefused(f"it has {len(data)} bytes, more than {PRESENCE_BYTES}")
    statement = read_statement(data)
    try:
        presence = _DECODER.decode(statement.body)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise PeerRefused(f"it is malformed: {error}") from error
    if presence.peer != statement.peer:
        raise PeerRefused("it is of another peer than its certificate")
    return presence, statement


def check_presence(checker: StatementChecker, statement: Statement) -> None:
    """Check certificate and signature. Raises: PeerRefused."""
    checker.check(KIND, statement)
