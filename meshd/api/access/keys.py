"""API keys: how one looks, and what is stored of it.

A key is `meshd-PREFIX-SECRET`, with 6 and 32 letters of Crockford's alphabet in lower case. `meshd-PREFIX` names the key in lists,
logs and metrics; it is not secret. The secret has 160 random bits, so its SHA-256 is stored as it is: nobody can try 2**160 keys,
however fast the hash. A slow hash (scrypt, Argon2) protects passwords that people choose, and would cost each request its time.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from meshd.api.access.scopes import Scope

MAX_KEYS = 256
"""Most keys of one peer. They bound the labels of the metrics."""
MAX_RATE = 10_000
"""Most requests per minute that a key's rate can be. So many times are remembered for each key."""
MAX_CONCURRENCY = 10_000
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_FORM = re.compile(rf"(meshd-[{_ALPHABET}]{{6}})-[{_ALPHABET}]{{32}}")
_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"
_Moment = Annotated[int, Meta(ge=0, le=1 << 40)]


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of one key."""

    name: Annotated[str, Meta(pattern=_NAME)]
    prefix: Annotated[str, Meta(pattern=rf"\Ameshd-[{_ALPHABET}]{{6}}\Z")]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    """Of the whole key, in hexadecimal digits."""
    scope: Scope
    created: _Moment
    """Seconds since 1970, as `expires`."""
    expires: _Moment | None = None
    rate: Annotated[int, Meta(ge=1, le=MAX_RATE)] | None = None
    """Most requests in any minute. None: no limit, as for `concurrency`."""
    concurrency: Annotated[int, Meta(ge=1, le=MAX_CONCURRENCY)] | None = None
    """Most requests at once. A stream is one until it ends, and an answer in the background until it is complete."""

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)

    def expired(self, now: float) -> bool:
        """Whether the key is no longer valid at `now`, in seconds since 1970."""
        return self.expires is not None and now >= self.expires


def generate(random_bytes: Callable[[int], bytes]) -> tuple[str, str]:
    """Generate a key. Returns: the whole key, and its prefix."""
    letters = "".join(_ALPHABET[byte & 31] for byte in random_bytes(38))  # 256 is a multiple of 32, so all letters are as likely
    prefix = f"meshd-{letters[:6]}"
    return f"{prefix}-{letters[6:]}", prefix


def digest_of(text: str) -> bytes:
    """Return the hash of a key, also of one that is no valid text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def prefix_of(text: str) -> str | None:
    """Return the prefix of a key; None if the text does not have the form of a key."""
    match = _FORM.fullmatch(text)
    return match[1] if match else None
