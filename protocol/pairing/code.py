"""Invite codes, such as `7-amber-lion`: a number that finds the invite, and two secret words."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from meshd.errors import ConfigError
from meshd.protocol.pairing.words import WORDS

MOST_NUMBER = 99
"""The number is not secret: mDNS tells it. It only lets a joiner choose among the invites that are open on a LAN."""
SECRET_BITS = 22
"""Two of 2,048 words. With three tries, somebody who knows nothing guesses an invite's code with probability 3 / 2**22."""
_NUMBER = re.compile(r"0{0,3}([1-9][0-9]?)")
_BY_START = {word[:4]: word for word in WORDS}
_START = 4


@dataclass(frozen=True, slots=True)
class InviteCode:
    """A code that works once."""

    number: int
    words: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.number}-{'-'.join(self.words)}"

    def __repr__(self) -> str:
        return f"InviteCode({self.number}-...)"

    @property
    def password(self) -> bytes:
        """What both sides prove to know."""
        return str(self).encode()

    @classmethod
    def generate(cls, random_bytes: Callable[[int], bytes]) -> "InviteCode":
        """Generate a code."""
        first, second = (
            WORDS[int.from_bytes(random_bytes(2), "big") % len(WORDS)] for _ in range(2)
        )  # 2**16 is a multiple of 2,048
        return cls(1 + int.from_bytes(random_bytes(8), "big") % MOST_NUMBER, (first, second))

    @classmethod
    def parse(cls, text: str) -> "InviteCode":
        """Read a code as a person typed it: case doesn't matter, spaces are dashes, and four letters of a word are enough.

        Raises: ConfigError.
        """
        parts = [part for part in re.split(r"[\s\-_.]+", text.strip().lower()) if part]
        number = _NUMBER.fullmatch(parts[0]) if len(parts) == 3 else None
        if number is None:
            raise _mistyped("it is a number and two words, like 7-amber-lion")
        first, second = (_word(part) for part in parts[1:])
        return cls(int(number[1]), (first, second))


def _word(typed: str) -> str:
    word = _BY_START.get(typed[:_START])
    if word is None or not word.startswith(typed):
        import difflib

        near = difflib.get_close_matches(typed, WORDS, 1)
        raise _mistyped(f"{typed[:20]!r} is not a word of codes" + (f", did you mean {near[0]}?" if near else ""))
    return word


def _mistyped(reason: str) -> ConfigError:
    return ConfigError(f"the invite code is mistyped: {reason}", hint="copy it again from `meshd invite` on the other device")
