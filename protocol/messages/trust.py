"""Messages about the cluster's key: rotations of it, and copies of the owner key."""

from typing import ClassVar

from meshd.protocol.messages.base import Lane, Message, Reply, Request, message


@message(100)
class Rotation(Message, frozen=True, kw_only=True):
    """The newest rotation that the sender knows. Payload: the cluster key (32 bytes) if `secret`, then a chain of rotations.

    Also the first message of a connection under the authority of returning peers.
    """

    default_lane: ClassVar[Lane] = Lane.BULK
    secret: bool = False
    """Whether the payload begins with the cluster key. It is given only to a peer that the chain's newest record lists, or that has
    linked with that key."""


@message(101)
class GiveOwnerKey(Request, frozen=True, kw_only=True):
    """Keep a copy of the owner key: this device shall be able to exclude others. Payload: the key's 32 bytes."""


@message(102)
class OwnerKeyTaken(Reply, frozen=True, kw_only=True):
    """The owner key is stored in the sender's state folder."""
