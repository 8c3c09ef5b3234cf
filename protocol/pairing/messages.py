"""The messages of a pairing, and their frames: `u16 length | msgpack`. SPEC.md, section 13.

They are not messages of links: before the pairing nobody is a member.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from meshd.bounds import printable
from meshd.errors import ProtocolViolation
from meshd.values import parse_name

PREFIX_BYTES = 2
MAX_BYTES = 12 * 1024
"""Largest message. The join code is the largest part; today it has 114 characters."""
_SHARE_BYTES, _PROOF_BYTES = 33, 32
_MAX_NAME = 63
_Share = Annotated[bytes, Meta(min_length=_SHARE_BYTES, max_length=_SHARE_BYTES)]
_Proof = Annotated[bytes, Meta(min_length=_PROOF_BYTES, max_length=_PROOF_BYTES)]


class PairingMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """The base of all messages of a pairing."""


class Join(PairingMessage, frozen=True, kw_only=True, tag="join"):
    """Joiner to inviter, the first message."""

    share: _Share


class Answer(PairingMessage, frozen=True, kw_only=True, tag="answer"):
    """Inviter to joiner: the inviter proves first, so that a false inviter learns nothing from a joiner."""

    share: _Share
    proof: _Proof


class Confirm(PairingMessage, frozen=True, kw_only=True, tag="confirm"):
    """Joiner to inviter."""

    proof: _Proof
    sealed: Annotated[bytes, Meta(max_length=512)]
    """A `Joiner`."""


class Admit(PairingMessage, frozen=True, kw_only=True, tag="admit"):
    """Inviter to joiner."""

    sealed: Annotated[bytes, Meta(max_length=8192)]
    """An `Invitation`."""


class Stored(PairingMessage, frozen=True, kw_only=True, tag="stored"):
    """Joiner to inviter, the last message: the joiner has stored the join code."""

    sealed: Annotated[bytes, Meta(max_length=64)]
    """Nothing."""


AnyMessage = Join | Answer | Confirm | Admit | Stored
_decoder = msgspec.msgpack.Decoder(AnyMessage)


class Joiner(msgspec.Struct, frozen=True, kw_only=True):
    """What a joiner tells of itself."""

    name: Annotated[str, Meta(max_length=_MAX_NAME)]


class Invitation(msgspec.Struct, frozen=True, kw_only=True):
    """What an inviter gives."""

    join_code: Annotated[str, Meta(max_length=4096)]
    """As `meshd key show` prints it. Opaque here."""
    name: Annotated[str, Meta(max_length=_MAX_NAME)]
    """The inviter's name."""
    link_port: Annotated[int, Meta(ge=1, le=65535)]
    """Where the inviter's links listen, at the address at which the joiner reached it."""


def encode(message: AnyMessage) -> bytes:
    """Encode a message as a frame."""
    body = msgspec.msgpack.encode(message)
    assert len(body) <= MAX_BYTES
    return len(body).to_bytes(PREFIX_BYTES, "big") + body


def length_of(prefix: bytes) -> int:
    """Return the length of the message after these two bytes. Raises: ProtocolViolation if it is out of bounds."""
    length = int.from_bytes(prefix, "big")
    if not 0 < length <= MAX_BYTES:
        raise ProtocolViolation(f"a message of {length} bytes, where 1 to {MAX_BYTES} are allowed")
    return length


def decode(body: bytes) -> AnyMessage:
    """Decode a message. Raises: ProtocolViolation."""
    try:
        message: AnyMessage = _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"a message of a pairing is malformed: {printable(str(error), limit=200)}") from error
    return message


def encode_joiner(name: str) -> bytes:
    return msgspec.msgpack.encode(Joiner(name=name))


def decode_joiner(data: bytes) -> str:
    """Return a joiner's name. Raises: ProtocolViolation if it is none that a peer can have."""
    try:
        return parse_name(msgspec.msgpack.decode(data, type=Joiner).name)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolViolation("the joiner has no valid name") from error


def encode_invitation(invitation: Invitation) -> bytes:
    return msgspec.msgpack.encode(invitation)


def decode_invitation(data: bytes) -> Invitation:
    """Decode an invitation. Raises: ProtocolViolation."""
    try:
        invitation = msgspec.msgpack.decode(data, type=Invitation)
        parse_name(invitation.name)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolViolation("the invitation is malformed") from error
    return invitation
