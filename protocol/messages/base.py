"""The protocol version, the lanes, the base classes of messages, and the registry of message types."""

from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar, TypeVar

import msgspec

from meshd.bounds import MAX_TEXT, Epoch, Serial, printable
from meshd.types import SessionId

PROTOCOL_VERSION = (4, 0)
"""(major, minor). Peers of different major versions refuse each other. A higher minor version only adds to the protocol."""

FEATURES: frozenset[str] = frozenset({"f32", "events", "mqtt"})
"""Optional features of this build. Two peers use the features that both have."""


class Lane(IntEnum):
    """The two connections of a link. Small messages have their own lane, so that they never wait behind large ones."""

    CONTROL = 0
    BULK = 1


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The base of all messages. `number` is the type number on the wire."""

    number: ClassVar[int] = 0
    default_lane: ClassVar[Lane] = Lane.CONTROL

    @property
    def send_lane(self) -> Lane:
        """The lane that carries this message. It depends on the kind of the message, never on its size: messages of one kind must
        not overtake one another."""
        return self.default_lane


class Request(Message, frozen=True, kw_only=True):
    """A message that expects one reply with the same `request` number. A repeat has no further effect and gets the same answer."""

    lasting: ClassVar[bool] = False
    """The receiver may take minutes to answer."""
    request: Serial


class Reply(Message, frozen=True, kw_only=True):
    """A message that answers the request with the same `request` number."""

    request: Serial


class SessionMessage(Message, frozen=True, kw_only=True):
    """A message of a session's epoch. The receiver drops a message of an epoch older than its own."""

    session: SessionId
    epoch: Epoch


def make_printable(message: msgspec.Struct, *fields: str) -> None:
    """Make new texts fit the bounds of `Text`: an error's message may quote a file, a library or another peer."""
    for field in fields:
        text = getattr(message, field)
        if len(text) > MAX_TEXT or not text.isprintable():
            msgspec.structs.force_setattr(message, field, printable(text, MAX_TEXT))


M = TypeVar("M", bound=Message)

REGISTRY: dict[int, type[Message]] = {}
"""All messages, by type number."""


def message(number: int) -> Callable[[type[M]], type[M]]:
    """Register a message class under its type number. Raises: ValueError if the number is taken."""

    def register(cls: type[M]) -> type[M]:
        if number in REGISTRY:
            raise ValueError(f"message number {number} is taken by {REGISTRY[number].__name__}")
        cls.number = number
        REGISTRY[number] = cls
        return cls

    return register
