"""What all messages share: the version, the lanes, the base classes and the registry."""

from collections.abc import Callable
from enum import IntEnum
from typing import ClassVar, TypeVar

import msgspec

from meshd.types import SessionId

PROTOCOL_VERSION = (2, 0)
"""(major, minor): peers of another major version refuse each other; a higher minor only adds."""

FEATURES: frozenset[str] = frozenset({"f32"})
"""Optional features of this build. Peers use those that both have."""


class Lane(IntEnum):
    """A link is two connections, so that a small message never waits behind a large one."""

    CONTROL = 0
    BULK = 1


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """The base of all messages. `number` is the type on the wire."""

    number: ClassVar[int] = 0
    default_lane: ClassVar[Lane] = Lane.CONTROL


class Request(Message, frozen=True, kw_only=True):
    """Expects one reply with the same `request`. A repeat has no further effect and gets the same answer."""

    request: int


class Reply(Message, frozen=True, kw_only=True):
    """Answers the request with this number."""

    request: int


class SessionMessage(Message, frozen=True, kw_only=True):
    """Carries the session's epoch. The receiver drops messages of an older epoch than its own."""

    session: SessionId
    epoch: int


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
